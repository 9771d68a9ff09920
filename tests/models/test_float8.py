"""Weights that stay as an FP8 checkpoint has them: every rank's codes and scales, and logits of both kinds of kernels."""

from dataclasses import replace
from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest

from moekit.errors import ArgumentError
from moekit.models.qwen3next import (
    CheckpointError,
    abstract_model,
    cache_shapes,
    decode_step,
    greedy_step,
    load,
    prefill,
    quantize,
    write_random_checkpoint,
)
from moekit.models.qwen3next.kernels import named
from moekit.models.qwen3next.memory import needed
from moekit.models.qwen3next.projected import widened as widened_rows
from moekit.models.qwen3next.sharding import MIXERS, ROUTED, SHARED
from tests.models.conftest import CASES
from tests.models.micro import load_tensors
from tests.models.test_fp8 import METHOD, RAGGED, made, widened, written
from tests.models.test_kernels import by_fusion, calls

KEPT = "float8_e4m3fn"
# blocks of 128 end within matrices; at tp 8 a rank's share of an expert would be 24 columns, with a scale for 8 of them
CONFIG = replace(CASES["two-layers"], vocab_size=64, hidden_size=160, num_experts=8, moe_intermediate_size=192)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of which all that can be FP8 is, with scales of every kind but huge ones."""
    rng = np.random.default_rng(6)
    short, _ = made(CONFIG, False, rng)
    plain = write_random_checkpoint(tmp_path_factory.mktemp("plain"), CONFIG, seed=3)
    from safetensors.numpy import load_file

    values = load_file(plain / "model.safetensors")
    tensors = {}
    for key, tensor in short.items():
        if tensor.dtype == ml_dtypes.float8_e4m3fn:  # about as large as the weight was
            codes = (rng.standard_normal(tensor.shape) * 32).astype(np.float32)
            tensors[key] = np.clip(codes, -448, 448).astype(tensor.dtype)
        elif key.endswith("_scale_inv"):
            size = np.abs(values[key.removesuffix("_scale_inv")]).std() / 32
            scales = rng.uniform(-2, 2, tensor.shape) * size
            scales.reshape(-1)[:: max(7, scales.size // 2)] = -0.0
            tensors[key] = scales.astype(np.float32)
        else:
            tensors[key] = values[key].astype(tensor.dtype)
    return written(tmp_path_factory.mktemp("fp8") / "model", tensors, CONFIG, quantization_config=METHOD)


def wide(layer, name):
    """Every rank's matrices times their scales, in float32."""
    block = layer.layout[name + "_scale"].block
    return widened(np.asarray(layer[name]), np.asarray(layer[name + "_scale"]), *block)


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (4, 2), (8, 8)])
def test_every_rank_has_the_codes_and_scales_of_what_it_holds(folder, mesh, tp, ep):
    """Bits are those of the same checkpoint dequantised as it is read."""
    loaded = (load(folder, mesh(tp), "float32", weights=w, ep=ep).params["layers"] for w in (KEPT, None))
    ours, plain = (jax.tree.map(np.asarray, layers) for layers in loaded)  # slices of sharded arrays are collectives

    def cut(layers, rank):
        return jax.tree.map(lambda a: a[rank * (len(a) // tp) : (rank + 1) * (len(a) // tp)], layers)

    for rank in range(tp):
        layer, same = cut(ours, rank)[1], cut(plain, rank)[1]
        assert {str(layer[name].dtype) for name in ROUTED} == {KEPT}
        np.testing.assert_array_equal(wide(layer, "experts_gate_up"), np.asarray(same["experts_gate_up"]))
        np.testing.assert_array_equal(wide(layer, "experts_down").swapaxes(1, 2), np.asarray(same["experts_down"]))
        if tp < 8:  # 8 columns a rank, which are too few to share a scale
            gates, back = (np.asarray(widened_rows(layer, name, dtype="float32")) for name in SHARED)
            np.testing.assert_array_equal(gates, np.asarray(same["gate_up"]))
            np.testing.assert_array_equal(back.T, np.asarray(same["shared_down"]))
        assert ("gate_up_scale" in layer.layout) == (tp < 8)
        for kind, (*joined, out) in MIXERS.items():
            at = CONFIG.layer_types.index(kind)
            layer, same = cut(ours, rank)[at], cut(plain, rank)[at]
            for names in (joined, [out]):
                got = np.asarray(widened_rows(layer, *names, dtype="float32"))
                np.testing.assert_array_equal(got, np.concatenate([np.asarray(same[name]) for name in names]))


TOKENS, LENGTHS = np.random.default_rng(0).integers(0, 64, (2, 9)).astype(np.int32), np.array([9, 4], np.int32)


def logits(model, kernels, batch):
    """After a prompt, and after one more token of each sequence."""
    reading = kernels if batch == 1 else "xla"  # of two sequences, too, interpreted kernels would take minutes
    first, cache = prefill(model, TOKENS[:batch], LENGTHS[:batch], cache_length=32, kernels=reading)
    second, _ = decode_step(model, np.array([3, 4], np.int32)[:batch], cache, kernels=kernels)
    return np.stack([first, second])


@pytest.fixture(scope="module")
def expected(folder, mesh):
    """Of the dequantised model, in float32."""
    return logits(load(folder, mesh(1), "float32"), "xla", 2)


@pytest.mark.parametrize("kernels", ["pallas", "xla"])
@pytest.mark.parametrize(("tp", "ep", "batch"), [(1, 1, 1), (1, 1, 2), (2, 1, 1), (4, 2, 2), (8, 8, 1)])
def test_logits_are_those_of_dequantised_weights(folder, mesh, expected, kernels, tp, ep, batch):
    got = logits(load(folder, mesh(tp), "float32", weights=KEPT, ep=ep), kernels, batch)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(got, expected[:, :batch], atol=1e-4)


def test_sorted_pairs_of_many_experts(tmp_path, mesh):
    """More tokens than all experts run over: pairs are sorted, and matrices widened turn by turn."""
    config = replace(CONFIG, num_experts=24, num_experts_per_tok=2, hidden_size=256, moe_intermediate_size=256)
    quantize(write_random_checkpoint(tmp_path / "plain", config, seed=4), tmp_path / "fp8")
    tokens = np.random.default_rng(1).integers(0, 64, (1, 150)).astype(np.int32)
    models = (load(tmp_path / "fp8", mesh(1), "float32", weights=w) for w in (KEPT, None))
    got, wanted = (prefill(m, tokens, np.array([150], np.int32), cache_length=256, kernels="xla")[0] for m in models)
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_many_tokens_by_arrays(folder, mesh):
    """All experts, whose matrices are widened together."""
    tokens = np.random.default_rng(1).integers(0, 64, (1, 150)).astype(np.int32)
    models = (load(folder, mesh(1), "float32", weights=w) for w in (KEPT, None))
    got, wanted = (prefill(m, tokens, np.array([150], np.int32), cache_length=256, kernels="xla")[0] for m in models)
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def stepped(model, batch):
    """The kernels of a step, by fusion."""
    shapes = cache_shapes(model.config, model.mesh, batch, 64, np.float32)
    step = greedy_step.trace(model, shapes.lengths, shapes, kernels="pallas")
    return by_fusion(calls(step.jaxpr.jaxpr))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Experts enough for a token's to be few."""
    config = replace(CONFIG, num_experts=24, num_experts_per_tok=3, hidden_size=128, moe_intermediate_size=128)
    plain = write_random_checkpoint(tmp_path_factory.mktemp("many") / "plain", config, seed=4)
    quantize(plain, plain.parent / "short")
    return plain.parent / "short"


def test_steps_call_the_kernels_that_take_scales(folder, many, mesh):
    found = stepped(load(folder, mesh(2), weights=KEPT), 2)
    every = ("scaled_gate_topk", "scaled_experts", "scaled_product", "scaled_down_combine", "scaled_conv_projections")
    assert [found[name] for name in every] == [2, 2, 3, 2, 1]
    assert {"experts", "gate_topk", "down_combine", "causal_conv1d_step"}.isdisjoint(found)
    found = stepped(load(folder, mesh(2), weights=KEPT), 17)  # more than a block of the matrix unit's has
    assert [found.get(name) for name in ("scaled_product", "scaled_conv_projections", "causal_conv1d_step")] == [4, None, 1]
    found = stepped(load(many, mesh(1), weights=KEPT), 1)  # 2 layers: q, k and v, and what goes back
    pairs = ("scaled_add_norm_gate_projections", "topk_softmax", "scaled_expert_gate_up", "scaled_expert_down_shared")
    assert [found[name] for name in (*pairs, "scaled_conv_projections", "scaled_product")] == [2, 2, 2, 2, 1, 3]
    assert {"scaled_expert_down", "scaled_down_combine", "causal_conv1d_step"}.isdisjoint(found)


@pytest.mark.parametrize(("batch", "by_lanes"), [(1, {True}), (2, {False})])
def test_one_row_is_multiplied_by_lanes(folder, mesh, batch, by_lanes):
    """And more than one by the matrix unit, which then reads the weight once for all."""
    model, real, asked = load(folder, mesh(1), weights=KEPT), named("pallas"), []

    def noted(name):
        def call(*given, lanes, **how):
            asked.append((name, lanes))
            return getattr(real, name)(*given, lanes=lanes, **how)

        return call

    names = "scaled_product", "scaled_conv_projections"
    shapes = cache_shapes(model.config, model.mesh, batch, 64, np.float32)
    greedy_step.trace(model, shapes.lengths, shapes, kernels=replace(real, **{n: noted(n) for n in names}))
    assert {*asked} == {(n, lanes) for n in names for lanes in by_lanes}


@pytest.mark.parametrize("tp", [1, 4])
def test_a_step_of_one_sequence_with_few_experts_each(many, mesh, tp):
    """As the dequantised weights give it, by the kernels that a step of one sequence has."""
    found = []
    for weights, kernels in ((KEPT, "pallas"), (None, "xla")):
        model = load(many, mesh(tp), "float32", weights=weights)
        _, cache = prefill(model, TOKENS[:1, :3], np.array([3], np.int32), cache_length=16, kernels="xla")
        found.append(decode_step(model, np.array([3], np.int32), cache, kernels=kernels)[0])
    np.testing.assert_allclose(*found, atol=1e-4)


def test_shared_experts_that_are_not_float8_stay_beside_those_that_are(many, mesh):
    """The kernels of both kinds of weights, each with its own."""
    model = load(many, mesh(1), weights=KEPT)
    config = replace(model.config, float8=replace(model.config.float8, names=model.config.float8.names - {*SHARED}))
    found = stepped(abstract_model(config, model.mesh, "float32"), 1)
    assert [found[name] for name in ("add_norm_gate_projections", "scaled_expert_down", "down_combine")] == [2, 2, 2]


def test_memory_is_that_of_the_codes(folder, mesh):
    """What is needed is what the arrays take."""
    model = load(folder, mesh(2), "bfloat16", weights=KEPT)
    size = sum(a.nbytes for a in jax.tree.leaves(model.params)) // 2
    copied = sum(model.params[name].nbytes for name in ("embed_tokens", "norm")) // 2
    assert needed(model.config, 2, "bfloat16").weights == size + copied


def test_what_is_said_of_weights(folder, tmp_path, mesh):
    with pytest.raises(ArgumentError, match="load: weights is 'int8'; it must be one of None, 'auto', 'float8_e4m3fn'"):
        load(folder, mesh(1), weights="int8")
    plain = write_random_checkpoint(tmp_path, replace(RAGGED, num_experts=2))
    assert load(plain, mesh(1), weights="auto").config.float8 is None
    with pytest.raises(
        CheckpointError, match=r"tensor \S+experts.0.gate_proj.weight is \S+, so the .*, or quantise the checkpoint"
    ):
        load(plain, mesh(1), weights=KEPT)


def changed(folder, to, change):
    """A copy of a checkpoint with other tensors."""
    tensors = load_tensors(folder)
    change(tensors)
    return written(to / "model", tensors, CONFIG, quantization_config=METHOD)


EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


def test_experts_that_are_float8_in_part_are_not_kept(folder, tmp_path, mesh):
    """And what is said does not ask for what `moekit quantize` refuses."""

    def change(tensors):
        tensors[EXPERT] = tensors[EXPERT].astype(np.float32)
        del tensors[EXPERT + "_scale_inv"]

    with pytest.raises(CheckpointError, match=rf"tensor {EXPERT} is F32, so the routed experts cannot .*; leave weights out$"):
        load(changed(folder, tmp_path, change), mesh(1), weights=KEPT)


def test_too_few_columns_with_one_scale_are_refused(folder, mesh, monkeypatch):
    """Before anything is placed; `auto` dequantises them."""
    monkeypatch.setattr(jax, "device_put", None)
    with pytest.raises(
        CheckpointError, match="over 8 ranks in 1 groups 8 columns of a routed expert share a scale, and 16 are"
    ):
        load(folder, mesh(8), weights=KEPT)
    monkeypatch.undo()
    assert load(folder, mesh(8), weights="auto").config.float8 is None


def test_codes_times_scales_that_leave_the_range_are_refused(folder, tmp_path, mesh):
    """Kernels multiply before they scale, but arrays, and prompts, widen first."""

    def change(tensors):
        tensors[EXPERT + "_scale_inv"][0, 0] = 3e3

    spoilt = changed(folder, tmp_path, change)
    with pytest.raises(CheckpointError, match=f"tensor {EXPERT} leaves the range of float16; choose a wider dtype"):
        load(spoilt, mesh(1), "float16", weights=KEPT)
    assert load(spoilt, mesh(1), "bfloat16", weights=KEPT).config.float8 is not None


def test_a_checkpoint_that_was_quantised(tmp_path, mesh):
    """`moekit quantize` makes what can be kept."""
    plain = write_random_checkpoint(tmp_path / "plain", replace(CONFIG, hidden_size=128, moe_intermediate_size=128))
    quantize(plain, tmp_path / "short")
    model = load(tmp_path / "short", mesh(1), weights="auto")
    assert model.config.float8.names == {*ROUTED, *SHARED, *(name for names in MIXERS.values() for name in names)}


def test_activations_in_float8(folder, mesh):
    """Of many tokens they are in the product, some percent off; a step's few rows are in the model's dtype, as without."""
    tokens = np.random.default_rng(8).integers(0, CONFIG.vocab_size, (1, 64)).astype(np.int32)
    plain, short = (load(folder, mesh(2), "float32", weights=KEPT, activations=a) for a in (None, KEPT))
    assert short.config.activations == KEPT
    many = partial(prefill, tokens=tokens, lengths=np.array([64], np.int32), cache_length=80, kernels="pallas")
    (wanted, _), (got, cache) = (many(m) for m in (plain, short))
    error = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    assert 1e-4 < error < 0.2
    traced = prefill.trace(short, tokens, np.array([64], np.int32), cache_length=80, kernels="pallas")
    found = by_fusion(calls(traced.jaxpr.jaxpr))
    assert (found["quantised"], found["quantised_experts"]) == (2, 2)
    assert "scaled_experts" not in found
    assert "quantised" not in stepped(short, 2)
    copies = (jax.tree.map(lambda a: a + 0, cache) for _ in "ab")  # a step takes its own away
    pairs = zip((plain, short), copies, strict=True)
    np.testing.assert_array_equal(*(decode_step(m, np.array([3], np.int32), c, kernels="pallas")[0] for m, c in pairs))


def test_what_is_said_of_activations(folder, mesh):
    with pytest.raises(ArgumentError, match="load: activations is 'int8'; it must be one of None, 'float8_e4m3fn'"):
        load(folder, mesh(1), weights=KEPT, activations="int8")
    with pytest.raises(ArgumentError, match="load: activations is 'float8_e4m3fn', which experts in float8 alone are"):
        load(folder, mesh(1), activations=KEPT)
