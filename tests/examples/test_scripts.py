"""Every script in examples/ that is JAX and no server runs to its end, in this process, on two virtual CPU devices."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from moekit.models.qwen3next import TINY, write_random_checkpoint
from moekit.models.qwen3next.config import ATTENTION, GDN

SCRIPTS = sorted((Path(__file__).parents[2] / "examples").glob("*_jax.py"))
WORDS = {
    "views": "(8, 128) activations and (8, 8) ids",
    "shard_map": "2 ranks, each with 32 columns",
    "model": "tokens seen by each row [16, 12]",
    "engine": "sequence 10: 0 tokens, cancelled",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of half the layers that the scripts' own has."""
    config = replace(TINY, layer_types=(GDN, ATTENTION))
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", config)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs(script, checkpoint, capsys, monkeypatch):
    known = jax.devices("cpu")[:2]
    monkeypatch.setattr(jax, "devices", lambda *_: known)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(sys, "argv", [str(script), str(checkpoint)])
    with jax.default_device(known[0]):
        runpy.run_path(str(script), run_name="__main__")
    assert WORDS[script.stem.removesuffix("_jax")] in capsys.readouterr().out
