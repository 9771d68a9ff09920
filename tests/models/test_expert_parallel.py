"""Experts dealt to groups of ranks: the same logits however tp and ep share them, by kernels and by arrays; several engines."""

from collections import defaultdict
from dataclasses import replace

import jax
import numpy as np
import pytest

from moekit.models.qwen3next import TINY, ConfigError, Engine, decode_step, load, prefill, write_random_checkpoint
from moekit.models.qwen3next.config import ATTENTION
from moekit.models.qwen3next.save import tensors_of
from tests.models.test_kernels import traced

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
SMALL = replace(TINY, layer_types=(ATTENTION,), vocab_size=64, **EXPERTS)  # the layer that compiles soonest
WAYS = [(tp, ep) for tp in (1, 2, 4, 8) for ep in (1, 2, 4, 8) if tp % ep == 0 and 12 % (tp // ep) == 0]
TOKENS, LENGTHS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]], np.int32), np.array([5, 3], np.int32)
STEPS = np.array([[7, 8], [60, 61]], np.int32)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", SMALL)


def logits(model, kernels):
    """Of two prompts, 15 pairs and so all experts at once, and of two steps, six pairs that gather theirs."""
    found, cache = prefill(model, TOKENS, LENGTHS, cache_length=64, kernels=kernels)
    made = [found]
    for tokens in STEPS:
        found, cache = decode_step(model, tokens, cache, kernels=kernels)
        made.append(found)
    return np.stack([np.asarray(each) for each in made])


@pytest.fixture(scope="module")
def wanted(small, mesh):
    return logits(load(small, mesh(1)), "xla")


@pytest.mark.parametrize(("tp", "ep"), WAYS[1:])
def test_logits_are_the_same_however_experts_are_shared(small, mesh, wanted, tp, ep):
    found = logits(load(small, mesh(tp), ep=ep), "xla")
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_kernels_skip_experts_of_other_groups(small, mesh, wanted):
    found = logits(load(small, mesh(4), ep=2), "pallas")
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_the_gate_stays_one_kernel(small, mesh):
    """The router is whole on every rank, and the shared expert cut over all of them, whatever the groups."""
    assert traced(load(small, mesh(4), ep=4), "pallas") == traced(load(small, mesh(4)), "pallas")


def test_a_rank_holds_whole_experts_of_its_group_alone(small, mesh):
    model = load(small, mesh(4), ep=4)
    shares = [np.asarray(shard.data) for shard in model.params["layers"].down[0].addressable_shards]
    assert [share.shape for share in shares] == [(2, 12, 64)] * 4
    whole = tensors_of(model)
    for rank, share in enumerate(shares):
        for own, expert in zip(share, (2 * rank, 2 * rank + 1), strict=True):
            assert np.array_equal(own.T, whole[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"])


@pytest.mark.parametrize(
    ("tp", "ep", "words"),
    [
        (4, 3, "ep = 3 does not divide tp = 4 and num_experts = 8"),
        (8, 1, "tp = 8 does not divide moe_intermediate_size = 12"),
        (4, 0, "ep = 0 does not divide"),
    ],
)
def test_what_does_not_divide_is_refused(small, mesh, tp, ep, words):
    with pytest.raises(ConfigError, match=words):
        load(small, mesh(tp), ep=ep)


def test_engines_on_devices_of_their_own(small):
    """Data parallel: each has a model of its own and is stepped in turn, and a sequence gets the same tokens from any."""
    devices = jax.devices("cpu")
    models = [load(small, jax.sharding.Mesh(devices[i : i + 2], ("tp",)), ep=2) for i in (0, 2)]
    engines = [Engine(model, slots=1, length=32, piece=16, kernels="xla") for model in models]
    found = [defaultdict(list) for _ in engines]
    numbers = [[engine.add(prompt, max_new_tokens=2) for prompt in ([3, 1, 4], [1, 5])] for engine in engines]
    while any(engine.busy for engine in engines):
        for engine, tokens in zip(engines, found, strict=True):
            for event in engine.step():
                tokens[event.sequence].append(event.token)
    first, second = ([tokens[number] for number in own] for tokens, own in zip(found, numbers, strict=True))
    assert first == second
    assert [len(tokens) for tokens in first] == [2, 2]
