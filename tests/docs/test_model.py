"""docs/model.md: its Python runs, in order, and its commands work as printed."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from click.testing import CliRunner

from moekit.cli import run
from moekit.cli.app import cli
from moekit.models.qwen3next import TINY, write_random_checkpoint
from moekit.models.qwen3next.config import ATTENTION, GDN
from tests.models.words import write_words

PAGE = Path(__file__).parents[2] / "docs" / "model.md"
SMALL = replace(TINY, layer_types=(GDN, ATTENTION), num_experts=4, num_experts_per_tok=2, vocab_size=258)


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


@pytest.fixture
def beside_a_checkpoint(tmp_path, monkeypatch):
    """Work in a folder that holds one."""
    write_words(write_random_checkpoint(tmp_path / "checkpoint", SMALL))
    monkeypatch.chdir(tmp_path)
    known = jax.devices("cpu")
    monkeypatch.setattr(jax, "devices", lambda *kind: known)
    monkeypatch.setattr(run, "keep_programs", lambda: None)
    with jax.default_device(known[0]):
        yield


@pytest.mark.usefixtures("beside_a_checkpoint")
def test_the_python_of_the_page_runs(capsys):
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, names)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4
    assert said[0].count(",") == 6  # two rows of four tokens
    assert said[0].endswith(" cancelled")
    assert said[1] == "naïve"
    assert said[2] == "['tikeom', '42']"
    assert all(int(number) > 0 for number in said[3].split())


@pytest.mark.usefixtures("beside_a_checkpoint")
def test_its_commands_work_as_printed():
    (block,) = blocks("")
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "moekit"
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert result.stdout
