"""What the README shows works: its Python blocks run, its commands exist."""

import re
from pathlib import Path

import pytest

from moekit.cli.app import cli
from moekit.fusions import FUSIONS

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.search(r"moekit\.\w+", block)[0])
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_commands_exist():
    shown = set(re.findall(r"^moekit (\w+)", README, re.MULTILINE))
    assert {"decode", "list", "show", "doctor"} <= shown <= set(cli.commands)


def test_every_fusion_is_named():
    assert all(f"`{name}`" in README for name in FUSIONS)


def test_the_two_commands_come_first():
    assert README.index("make demo") < README.index("make test") < README.index("## ")
