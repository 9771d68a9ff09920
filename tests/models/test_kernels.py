"""Which kernels a decode step calls, that each of them matters, and what the combine writes before an all-reduce."""

from collections import Counter
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moekit.jax import shared_expert_combine, view
from moekit.models.qwen3next import cache_shapes, greedy_step, most_likely, prefill
from moekit.models.qwen3next.config import GDN
from moekit.models.qwen3next.kernels import FUSIONS, named

CASE = "four-layers"
TPS = [1, 2, 4, 8]


def calls(jaxpr, found=None):
    """Every pallas_call that a jaxpr makes, by name: the kernels for a GPU, beside which interpreted ones stand hidden."""
    found = Counter() if found is None else found
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found[equation.params["name"]] += not equation.params["interpret"]
            continue
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(value, "eqns"):
                calls(getattr(value, "jaxpr", value), found)
    return found


def traced(model, kernels):
    """The kernels of prompts of 16 tokens and of a step, of two sequences."""
    lengths = jax.ShapeDtypeStruct((2,), np.int32)
    tokens = jax.ShapeDtypeStruct((2, 16), np.int32)
    fill = prefill.trace(model, tokens, lengths, cache_length=64, kernels=kernels)
    _, memory = fill.out_info
    step = greedy_step.trace(model, lengths, memory, kernels=kernels)
    return calls(fill.jaxpr.jaxpr), calls(step.jaxpr.jaxpr)


def by_fusion(found):
    """How often each fusion is called, from the calls of its launches, all of which are called as often."""
    counts = {}
    for name, n in found.items():
        fusion = max((f for f in FUSIONS if name.startswith(f)), key=len)
        assert counts.setdefault(fusion, n) == n, name
    return counts


@pytest.mark.parametrize(("case", "tp"), [*((CASE, tp) for tp in TPS), ("eight-kv-heads", 8), ("odd-experts", 2)])
def test_kernel_calls_by_fusion(zoo, case, tp):
    """Of one sequence and of two, whose pairs are too many to gather an expert for each."""
    model, kinds = zoo.model(case, tp=tp), zoo.config(case).layer_types
    layers, deltas = len(kinds), kinds.count(GDN)
    every = {"add_rms_norm": 2 * layers + 1, "gated_rms_norm": deltas}
    filled, steps = dict.fromkeys(("gate_projections", "topk_softmax"), layers), {"gate_topk": layers}
    filled |= dict.fromkeys(("delta_rule_chunks", "unit_lower_inverse"), deltas)
    steps |= dict.fromkeys(("causal_conv1d_step", "delta_rule_step"), deltas)
    steps |= dict.fromkeys(("qkv_norm_rope", "gated_attention_decode"), layers - deltas)
    gathered = dict.fromkeys(("expert_gate_up", "expert_down_shared"), layers)
    grouped = dict.fromkeys(("experts", "down_combine"), layers)
    fill, step = map(by_fusion, traced(model, "pallas"))
    assert fill == every | filled | grouped
    assert step == every | steps | grouped
    one = cache_shapes(model.config, model.mesh, 1, 64, np.float32)
    step = greedy_step.trace(model, one.lengths, one, kernels="pallas")
    del steps["causal_conv1d_step"], steps["gate_topk"]
    alone = {"conv_projections": deltas, "add_rms_norm": layers + 1, "row_product": layers - deltas + 1}
    alone |= dict.fromkeys(("add_norm_gate_projections", "topk_softmax"), layers)
    assert by_fusion(calls(step.jaxpr.jaxpr)) == every | steps | gathered | alone
    scaled = {name for name in FUSIONS if name.startswith(("scaled_", "quantised"))}  # of float8: tests/models/test_float8.py
    known = (scaled, every, filled, steps, gathered, grouped, alone, ["causal_conv1d_step", "gate_topk"])
    assert set().union(*known) == set(FUSIONS)


def test_xla_calls_no_kernel(zoo):
    fill, step = traced(zoo.model(CASE, tp=2), "xla")
    assert not fill
    assert not step


OUTPUTS = [
    ("add_rms_norm", 0),
    ("add_rms_norm", 1),
    ("row_product", 0),
    *(("add_norm_gate_projections", part) for part in range(5)),
    ("gate_topk", 0),
    ("gate_topk", 1),
    ("gate_topk", 2),
    ("down_combine", 0),
    ("expert_gate_up", 0),
    ("expert_down_shared", 0),
    ("experts", 0),
    ("qkv_norm_rope", 0),
    ("qkv_norm_rope", 1),
    ("qkv_norm_rope", 2),
    ("gated_attention_decode", 0),
    ("gated_rms_norm", 0),
    ("conv_projections", 0),
    ("conv_projections", 1),
    ("conv_projections", 2),
    ("causal_conv1d_step", 0),
    ("causal_conv1d_step", 1),
    ("delta_rule_step", 0),
    ("delta_rule_step", 1),
]


def signed(signs):
    """The kernels with each of OUTPUTS multiplied by its sign."""
    kernels = named("pallas")

    def times_sign(name, original):
        own = [(signs[i], part) for i, (fusion, part) in enumerate(OUTPUTS) if fusion == name]

        def changed(*args, **kwargs):
            out = original(*args, **kwargs)
            if not isinstance(out, tuple):
                return out * own[0][0]
            out = list(out)
            for sign, part in own:
                out[part] = out[part] * sign
            return tuple(out)

        return changed

    return replace(kernels, **{name: times_sign(name, getattr(kernels, name)) for name in {n for n, _ in OUTPUTS}})


# Of one sequence; of more other kernels.
ALONE = ("expert_gate_up", "expert_down_shared", "conv_projections", "row_product", "add_norm_gate_projections")


@pytest.fixture(scope="module")
def short(zoo):
    """From tp, a number of sequences and signs to the greedy tokens of a model of one delta-net and one attention layer."""
    tokens = np.random.default_rng(2).integers(0, 256, (2, 16)).astype(np.int32)
    lengths = np.array([16, 5], np.int32)

    @jax.jit
    def step(model, tokens, cache, signs):
        return greedy_step(model, tokens, cache, kernels=signed(signs))

    @cache
    def started(tp, batch):
        model = zoo.model("two-layers", tp=tp)
        return model, prefill(model, tokens[:batch], lengths[:batch], cache_length=64, kernels="xla")

    def continued(tp, batch, signs):
        model, (logits, memory) = started(tp, batch)
        current, made = most_likely(model, logits), []
        for _ in range(8):
            current, memory = step(model, current, memory, signs)
            made.append(np.asarray(current))
        return np.stack(made)

    return continued


@pytest.mark.parametrize(("tp", "batch"), [(1, 1), (1, 2), (8, 2)])
def test_negating_any_kernels_output_changes_the_tokens(short, tp, batch):
    plain = short(tp, batch, np.ones(len(OUTPUTS), np.float32))
    for i, output in enumerate(OUTPUTS):
        if (output[0] in ALONE) != (batch == 1):  # of one sequence what two have been asked, too
            continue
        signs = np.where(np.arange(len(OUTPUTS)) == i, -1, 1).astype(np.float32)
        assert not np.array_equal(plain, short(tp, batch, signs)), output


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
@pytest.mark.parametrize("tp", [2, 8])
def test_the_combine_writes_a_strided_view_of_a_buffer_that_is_then_all_reduced(mesh, tp, implementation):
    """Every second row of the middle columns of a larger buffer; the rest of it is summed as it was."""
    rng = np.random.default_rng(tp)
    tokens, hidden, room = 5, 24, 40
    routed, shared = rng.standard_normal((2, tp, tokens, hidden)).astype(np.float32)
    gate = rng.standard_normal((tokens, 1)).astype(np.float32)
    buffers = rng.standard_normal((tp, 2 * tokens, room)).astype(np.float32)

    def local(routed, shared, gate, buffer):
        out = view(buffer[0])[1::2, 8 : 8 + hidden]
        written = shared_expert_combine(routed[0], shared[0], gate, out=out, implementation=implementation)
        return jax.lax.psum(written, "tp")

    places = (P("tp"), P("tp"), P(), P("tp"))
    run = jax.jit(jax.shard_map(local, mesh=mesh(tp), in_specs=places, out_specs=P(), check_vma=False))
    expected = buffers.astype(np.float64).sum(0)
    both = routed.astype(np.float64) + shared / (1 + np.exp(-gate.astype(np.float64)))
    expected[1::2, 8 : 8 + hidden] = both.sum(0)
    assert np.abs(run(routed, shared, gate, buffers) - expected).max() < 1e-5
