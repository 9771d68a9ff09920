"""Saving: a head beside a tied config, and what is refused before anything is written."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moekit.errors import DtypeError, NonFiniteError
from moekit.models.qwen3next import load, save
from tests.models.micro import SINGLE, micro

HEAD, EMBED, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
BF16 = ml_dtypes.bfloat16


def test_a_head_of_its_own_is_saved_beside_the_embedding(tmp_path, mesh):
    """Though config.json ties them: the files go before it, in what is saved as in what is loaded."""
    given = load_file(micro(tmp_path / "given", tie_word_embeddings=True) / SINGLE)
    saved = save(load(tmp_path / "given", mesh(1)), tmp_path / "saved")
    made = load_file(saved / SINGLE)
    assert not np.array_equal(given[HEAD], given[EMBED])
    assert made.keys() == given.keys()
    for name in (HEAD, EMBED):
        assert np.array_equal(made[name], given[name]), name
    assert not load(saved, mesh(1)).config.tie_word_embeddings


@pytest.mark.parametrize("dtype", ["int8", "float64", "nope"])
def test_a_dtype_that_no_checkpoint_has_is_refused(tmp_path, mesh, dtype):
    model = load(micro(tmp_path / "given"), mesh(1))
    with pytest.raises(DtypeError, match=f"save: dtype is '{dtype}'; it must be one of float32, float16, bfloat16"):
        save(model, tmp_path / "saved", dtype)
    assert not (tmp_path / "saved").exists()


def test_values_that_leave_the_range_of_a_dtype_are_refused(tmp_path, mesh):
    given = micro(tmp_path / "given")
    tensors = load_file(given / SINGLE)
    tensors[NORM][1] = 1e6
    save_file(tensors, given / SINGLE)
    model = load(given, mesh(1))
    with pytest.raises(NonFiniteError, match=f"save: {NORM} holds values that are NaN or infinite in float16"):
        save(model, tmp_path / "saved", "float16")
    assert not (tmp_path / "saved").exists()
    assert load_file(save(model, tmp_path / "saved", "bfloat16") / SINGLE)[NORM][1] > 9e5


def test_what_a_narrow_model_holds_in_float32_stays_exact(tmp_path, mesh):
    """As checkpoints have A_log; a dtype that is given is that of all values."""
    given = micro(tmp_path / "given", dtype="bfloat16")
    tensors = {name: value.astype(BF16) for name, value in load_file(given / SINGLE).items()}
    exact = {name: value.astype(np.float32) + np.float32(1e-4) for name, value in tensors.items() if name.endswith("A_log")}
    save_file({**tensors, **exact}, given / SINGLE)
    model = load(given, mesh(1))
    ((name, value),) = exact.items()
    assert np.array_equal(load_file(save(model, tmp_path / "saved") / SINGLE)[name], value)
    rounded = load_file(save(model, tmp_path / "rounded", "bfloat16") / SINGLE)[name]
    assert rounded.dtype == np.float32
    assert np.array_equal(rounded, value.astype(BF16).astype(np.float32))
    assert not np.array_equal(rounded, value)
