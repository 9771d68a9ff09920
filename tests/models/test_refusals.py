"""What the model's functions refuse before anything is compiled; what only a device knows becomes NaN, never a number."""

import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from moekit.errors import ArgumentError, DtypeError, NonFiniteError, ShapeError
from moekit.models.qwen3next import (
    CheckpointError,
    ConfigError,
    Model,
    decode_step,
    end_tokens,
    generate,
    greedy_step,
    load,
    most_likely,
    prefill,
    write_random_checkpoint,
)
from moekit.models.qwen3next.numerics import finite

CASE, ROOM = "two-layers", 18
PROMPTS = [[5, 250, 17]]
TOKENS = np.random.default_rng(3).integers(0, 256, (3, 16)).astype(np.int32)
LENGTHS = np.array([16, 9, 12], np.int32)


def unread(*_, **__):
    raise AssertionError("something was compiled or placed")


def with_token(token):
    tokens = TOKENS.astype(np.int64)
    tokens[1, 3] = token
    return tokens


def filled(zoo, tokens=TOKENS, lengths=LENGTHS, room=ROOM, **options):
    return prefill(zoo.model(CASE), tokens, lengths, cache_length=room, kernels="xla", **options)


@pytest.fixture
def uncompiled(monkeypatch):
    """Fails the test where jax compiles or traces."""
    for function in (prefill, decode_step, greedy_step):
        monkeypatch.setattr(function, "function", unread)


@pytest.mark.parametrize(
    ("tokens", "lengths", "room", "error", "words"),
    [
        (TOKENS, [16, 0, 12], 18, ArgumentError, r"lengths\[1\] is 0; between 1 and 16"),
        (TOKENS, [16, 9, -2], 18, ArgumentError, r"lengths\[2\] is -2"),
        (TOKENS, [17, 9, 12], 18, ArgumentError, r"lengths\[0\] is 17"),
        (TOKENS, [16, 9], 18, ShapeError, r"lengths has shape \(2,\) and tokens 3 rows"),
        (TOKENS, [16.0, 9.0, 12.0], 18, DtypeError, "lengths is float"),
        (TOKENS[0], [16], 18, ShapeError, r"tokens has shape \(16,\) where \[B, S\] is needed"),
        (TOKENS[:, :0], [0, 0, 0], 18, ShapeError, "at least one row of at least one token"),
        (TOKENS.tolist(), [16, 9, 12], 18, DtypeError, "tokens is a list; an integer array"),
        (with_token(256), [16, 9, 12], 18, ArgumentError, r"tokens\[1, 3\] is 256, outside the vocabulary of 256"),
        (with_token(2**32 + 5), [16, 9, 12], 18, ArgumentError, "4294967301"),
        (TOKENS, [16, 9, 12], 15, ArgumentError, "cache_length = 15 is less than the 16 tokens"),
        (TOKENS, [16, 9, 12], 18.0, DtypeError, "cache_length is 18.0"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(zoo, uncompiled, tokens, lengths, room, error, words):
    with pytest.raises(error, match=words):
        filled(zoo, tokens, np.array(lengths), room)
    if not isinstance(tokens, list):  # a device's arrays are as good as the host's
        with jax.enable_x64(True), pytest.raises(error, match=words):
            filled(zoo, jnp.asarray(tokens), jnp.asarray(lengths), room)


def test_padding_may_be_anything(zoo):
    padding = np.arange(16) >= LENGTHS[:, None]
    expected, _ = filled(zoo)
    for fill in (-1, 256, 2**31 - 1):
        logits, _ = filled(zoo, np.where(padding, fill, TOKENS).astype(np.int32))
        assert np.array_equal(logits, expected)


def test_what_a_traced_prefill_cannot_refuse_is_nan_in_its_row_and_in_every_step_after(zoo):
    """A traced call sees no values: rows of wrong lengths or tokens are NaN, the others bit for bit as without them."""
    model = zoo.model(CASE)
    fill = jax.jit(lambda t, n: prefill(model, t, n, cache_length=ROOM, kernels="pallas"))
    tokens, lengths = np.tile(TOKENS, (2, 1)), np.tile(LENGTHS, 2)
    good, cache = fill(tokens, lengths)
    spoiled, wrong = tokens.copy(), np.array([16, 0, -2, 17, 9, 12], np.int32)
    spoiled[4, 5] = 256
    logits, poisoned = fill(spoiled, wrong)
    right = np.isin(np.arange(6), [0, 5])
    for _ in range(2):
        assert np.array_equal(np.asarray(logits)[right], np.asarray(good)[right])
        assert np.isnan(np.asarray(logits)[~right]).all()
        assert np.array_equal(poisoned.lengths[~right], [-1] * 4)
        assert np.array_equal(most_likely(model, logits) == -1, ~right)
        now = jnp.arange(6, dtype=jnp.int32)
        logits, poisoned = decode_step(model, now, poisoned, kernels="pallas")
        good, cache = decode_step(model, now, cache, kernels="pallas")


def test_a_full_cache_gives_nan_and_never_a_number_and_leaves_the_other_rows(zoo):
    """Rows of 16, 9 and 12 tokens in a cache of 18: the third step of the first row has no room."""
    model, ids = zoo.model(CASE), np.random.default_rng(5).integers(0, 256, (5, 3)).astype(np.int32)
    _, small = filled_at(model, ROOM)
    _, large = filled_at(model, 32)
    for step, now in enumerate(ids):
        before = jax.tree.map(jnp.copy, small)
        logits, small = decode_step(model, jnp.asarray(now), small, kernels="xla")
        token, _ = greedy_step(model, jnp.asarray(now), before, kernels="xla")
        expected, large = decode_step(model, jnp.asarray(now), large, kernels="xla")
        lost = np.array([step >= 2, False, False])
        assert np.isnan(np.asarray(logits)[lost]).all()
        assert np.allclose(np.asarray(logits)[~lost], np.asarray(expected)[~lost], atol=1e-5)
        assert np.array_equal(np.asarray(token) == -1, lost)
        assert np.array_equal(np.asarray(small.lengths) == -1, lost)


def filled_at(model, room):
    return prefill(model, TOKENS, LENGTHS, cache_length=room, kernels="xla")


def test_a_step_refuses_a_hosts_wrong_tokens_and_spoils_the_row_of_a_devices(zoo):
    model = zoo.model(CASE)
    _, cache = filled(zoo)
    for tokens, error, words in (
        (np.array([1, 256, 2], np.int32), ArgumentError, r"tokens\[1\] is 256, outside the vocabulary of 256"),
        (np.array([1, 2, -1]), ArgumentError, r"tokens\[2\] is -1"),
        (np.array([1, 2]), ShapeError, r"shape \(2,\) and the cache 3 rows"),
        (jnp.array([[1, 2, 3]]), ShapeError, r"shape \(1, 3\) where \[B\] is needed"),
        (jnp.array([1.0, 2, 3]), DtypeError, "tokens is float32"),
        ([1, 2, 3], DtypeError, "tokens is a list"),
    ):
        for step in (decode_step, greedy_step):
            with pytest.raises(error, match=words):
                step(model, tokens, cache, kernels="xla")
    with pytest.raises(ArgumentError, match="cache is a DeltaState"):
        decode_step(model, jnp.array([1, 2, 3]), cache.deltas[0], kernels="xla")
    expected, _ = decode_step(model, jnp.array([1, 2, 3]), jax.tree.map(jnp.copy, cache), kernels="xla")
    logits, after = decode_step(model, jnp.array([1, 256, 3]), cache, kernels="xla")
    assert np.isnan(logits[1]).all()
    assert np.array_equal(np.asarray(logits)[::2], np.asarray(expected)[::2])
    again, _ = decode_step(model, jnp.array([1, 2, 3]), after, kernels="xla")
    assert np.array_equal(np.isnan(again).all(axis=1), [False, True, False])


def test_a_step_never_looks_at_what_a_device_holds(zoo, monkeypatch):
    """To read a device's array is to wait for it: a step of tokens from the device must not."""
    model = zoo.model(CASE)
    _, cache = filled(zoo)
    tokens = jnp.array([1, 2, 3], jnp.int32)
    greedy_step(model, tokens, jax.tree.map(jnp.copy, cache), kernels="xla")
    with jax.transfer_guard_device_to_host("disallow_explicit"):
        monkeypatch.setattr(type(tokens), "_value", property(unread))
        greedy_step(model, tokens, cache, kernels="xla")


@pytest.mark.parametrize("dtype", ["int8", "float64", "fp8", jnp.int8, 3])
def test_a_dtype_that_weights_cannot_have_is_refused_before_a_file_is_opened(mesh, tmp_path, dtype):
    with pytest.raises(DtypeError, match="it must be one of float32, float16, bfloat16"):
        load(tmp_path / "nothing", mesh(1), dtype)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate.weight", "model.layers.0.mlp.experts.3.up_proj.weight"])
def test_a_checkpoint_of_nan_is_refused_by_the_tensors_name(zoo, mesh, tmp_path, name, value):
    directory = write_random_checkpoint(tmp_path / "nan", zoo.config(CASE))
    tensors = load_file(directory / "model.safetensors")
    tensors[name].reshape(-1)[-1] = value
    save_file(tensors, directory / "model.safetensors")
    for dtype in (None, "bfloat16"):
        with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN or an infinity"):
            load(directory, mesh(2), dtype)


def test_weights_that_overflow_in_the_dtype_asked_for_are_refused(zoo, mesh, tmp_path):
    directory = write_random_checkpoint(tmp_path / "large", zoo.config(CASE))
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = 70_000.0
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight leaves the range of float16; choose a wider dtype"):
        load(directory, mesh(1), "float16")
    assert load(directory, mesh(1), "bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_finite_is_numpys_isfinite(dtype):
    rng = np.random.default_rng(0)
    width = np.dtype(f"u{np.dtype(dtype).itemsize}")
    bits = rng.integers(0, 2 ** (8 * width.itemsize), (300, 40), np.uint64)
    rows = bits.astype(width).view(dtype)
    assert [finite(row) for row in rows] == np.isfinite(rows).all(axis=1).tolist()
    assert finite(np.zeros((0, 3), dtype))
    large = np.zeros(300_000, dtype)
    large[-1] = np.nan
    assert not finite(large)


def test_non_finite_logits_end_a_generation_by_name(zoo):
    """Weights that no file brought: the first prompt's tokens meet NaN, and an ended sequence's logits are nobody's concern."""
    model = zoo.model(CASE)
    table = model.params["embed_tokens"].at[7].set(jnp.inf)
    broken = Model({**model.params, "embed_tokens": table}, model.config, model.mesh)
    with pytest.raises(NonFiniteError, match="logits of sequence 0 hold NaN or an infinity at new token 0"):
        generate(broken, [[3, 7]], max_new_tokens=8, kernels="xla")
    free = generate(model, PROMPTS, max_new_tokens=8, kernels="xla").tokens[0]
    later = model.params["embed_tokens"].at[free[2]].set(jnp.nan)
    broken = Model({**model.params, "embed_tokens": later}, model.config, model.mesh)
    with pytest.raises(NonFiniteError, match="at new token 3"):
        generate(broken, PROMPTS, max_new_tokens=8, kernels="xla")
    assert generate(broken, PROMPTS, max_new_tokens=8, eos=free[2], kernels="xla").tokens == (free[:3],)


@pytest.mark.parametrize("tp", [1, 4])
def test_the_most_likely_token_of_logits_that_are_not_finite(zoo, tp):
    logits = np.random.default_rng(1).standard_normal((6, 256)).astype(np.float32)
    expected = logits.argmax(-1)
    for row, (at, value) in enumerate([(0, np.nan), (255, np.inf), (70, -np.inf), (130, np.nan)], start=1):
        logits[row, at] = value
        expected[row] = -1
    assert np.array_equal(most_likely(zoo.model(CASE, tp=tp), logits), expected)


KINDS = [int, np.int64, np.array, jnp.array, torch.tensor, lambda e: [e], lambda e: {e, 255}, lambda e: np.array([255, e]),
         lambda e: jnp.array([e]), lambda e: torch.tensor([255, e]), lambda e: [torch.tensor(e)]]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_end_token_of_any_kind_ends_a_sequence(zoo, kind):
    free = generate(zoo.model(CASE), PROMPTS, max_new_tokens=8, kernels="xla").tokens[0]
    stop = free[2]
    assert len(free) == 8
    assert not {stop, 255} & set(free[:2])
    assert generate(zoo.model(CASE), PROMPTS, max_new_tokens=8, eos=kind(stop), kernels="xla").tokens[0] == free[:3]


ROWS = (np.array, jnp.array, torch.tensor, lambda p: [np.array(r) for r in p], lambda p: [map(np.int64, r) for r in p])


@pytest.mark.parametrize("kind", ROWS)
def test_prompts_of_any_kind(zoo, kind):
    plain = [[5, 250, 17], [1, 2, 3]]
    expected = generate(zoo.model(CASE), plain, max_new_tokens=2, kernels="xla").tokens
    assert generate(zoo.model(CASE), kind(plain), max_new_tokens=np.int64(2), kernels="xla").tokens == expected


@pytest.mark.parametrize(
    ("prompts", "options", "error", "words"),
    [
        ([[1.5]], {}, DtypeError, "a token id of prompt 0 is 1.5, a float; an integer is needed"),
        ([[1, True]], {}, DtypeError, "a token id of prompt 0 is True, a bool"),
        ([["1"]], {}, DtypeError, "is '1', a str"),
        (np.ones((2, 2)), {}, DtypeError, "a token id of prompt 0 is 1.0, a float"),
        (torch.ones(2, 2, dtype=torch.bool), {}, DtypeError, "is True, a bool"),
        (np.ones((1, 2, 3), int), {}, ShapeError, "prompt 0 is nested"),
        ([[[1, 2]]], {}, ShapeError, r"prompt 0 is nested: it holds \[1, 2\] where one token id is needed"),
        ([1, 2, 3], {}, ShapeError, r"prompts\[0\] is 1 where a list of token ids is needed; put a single prompt in a list"),
        (np.array([1, 2]), {}, ShapeError, "put a single prompt in a list"),
        ("hello", {}, DtypeError, "a tokenizer makes them of text"),
        (["hello"], {}, DtypeError, "prompt 0 is 'hello'; token ids are needed: a tokenizer"),
        (None, {}, DtypeError, "prompts is None"),
        (np.array([[2**40]]), {}, ArgumentError, "prompt 0 holds token 1099511627776, outside the vocabulary of 256"),
        ([[1]], {"eos": "</s>"}, DtypeError, "eos is '</s>'; token ids are needed"),
        ([[1]], {"eos": ["</s>"]}, DtypeError, "a token id of eos is '</s>'"),
        ([[1]], {"eos": 2.0}, DtypeError, "a token id of eos is 2.0, a float"),
        ([[1]], {"eos": True}, DtypeError, "a token id of eos is True"),
        ([[1]], {"eos": 256}, ArgumentError, "eos holds token 256, outside the vocabulary of 256"),
        ([[1]], {"eos": [[1]]}, ShapeError, "eos is nested"),
        ([[1]], {"max_new_tokens": 1.5}, DtypeError, "max_new_tokens is 1.5, a float"),
        ([[1]], {"max_new_tokens": True}, DtypeError, "max_new_tokens is True, a bool"),
        ([[1]], {"max_new_tokens": "3"}, DtypeError, "max_new_tokens is '3', a str"),
    ],
)
def test_what_is_no_token_is_refused_in_one_sentence(zoo, uncompiled, prompts, options, error, words):
    with pytest.raises(error, match=words):
        generate(zoo.model(CASE), prompts, **{"max_new_tokens": 2, "kernels": "xla"} | options)


@pytest.mark.parametrize(("text", "ends"), [
    (None, (7,)), ("{}", (7,)), ('{"eos_token_id": null}', (7,)), ('{"eos_token_id": 3}', (3,)),
    ('{"eos_token_id": [3, 4]}', (3, 4)),
])  # fmt: skip
def test_end_tokens_are_the_generation_configs_else_the_configs(zoo, tmp_path, text, ends):
    if text is not None:
        (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
    assert end_tokens(tmp_path, replace(zoo.config(CASE), eos_token_ids=(7,))) == ends


@pytest.mark.parametrize("text", ["{", "[]", *(f'{{"eos_token_id": {v}}}' for v in ('"x"', "[true]", "-1", "1.5"))])
def test_a_generation_config_that_cannot_be_read(zoo, tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        end_tokens(tmp_path, zoo.config(CASE))


@pytest.mark.timeout(20)
def test_a_generation_config_that_is_no_file_is_not_opened(zoo, tmp_path):
    """A FIFO's reader would wait for ever."""
    os.mkfifo(tmp_path / "generation_config.json")
    with pytest.raises(ConfigError, match=r"generation_config\.json is a FIFO where a regular file is needed"):
        end_tokens(tmp_path, zoo.config(CASE))


def test_a_cache_of_another_model_is_refused(zoo):
    """A stack of fewer delta nets has the same tree; its count says that it is another model's."""
    other = prefill(zoo.model("two-layers"), np.ones((2, 16), np.int32), np.array([16, 5]), cache_length=64)[1]
    for step in (decode_step, greedy_step):
        with pytest.raises(ArgumentError, match="cache is of 1 delta nets and 1 attentions, the model has 3 and 1"):
            step(zoo.model("four-layers"), np.array([1, 2]), other)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32"])
def test_lengths_of_any_integer_dtype_are_counted_in_int32(zoo, dtype):
    lengths = np.array([16, 5, 2], dtype)
    _, cache = prefill(zoo.model(CASE), np.ones((3, 16), np.int32), lengths, cache_length=64, kernels="xla")
    assert cache.lengths.dtype == np.int32
    np.testing.assert_array_equal(cache.lengths, lengths)
