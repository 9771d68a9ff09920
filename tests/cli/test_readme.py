"""What the README shows works: its Python blocks run, its commands exist."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from moekit.cli.app import cli
from moekit.fusions import FUSIONS

ROOT = Path(__file__).parents[2]
README, COMMANDS = (ROOT / "README.md").read_text(), (ROOT / "docs" / "cli.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.search(r"moekit\.\w+", block)[0])
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_the_block_of_commands_is_the_command():
    (block,) = re.findall(r"## The command\n\n```\n(.*?)```", README, re.DOTALL)
    shown = re.findall(r"^moekit (\w+)", block, re.MULTILINE)
    listed = re.findall(r"^  (\w+)  ", CliRunner().invoke(cli, ["--help"]).output.split("Commands:")[1], re.MULTILINE)
    assert sorted(shown) == listed == sorted(cli.commands)
    assert all("  # " in line for line in block.splitlines())


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_option_is_documented_and_there_is_no_other(name):
    command = cli.commands[name]
    (section,) = re.findall(rf"^## moekit {name}\n(.*?)(?=^## |\Z)", COMMANDS, re.DOTALL | re.MULTILINE)
    options = {o for p in command.params if p.param_type_name == "option" for o in p.opts if o.startswith("--")}
    synopsis = section.split("```")[1] if "```" in section else section
    long = {o.replace("--output", "-o") for o in options}
    assert not {o for o in long if not re.search(rf"(?<![\w-]){o}(?![\w-])", synopsis)}
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]*", section)) - options


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_help_is_whole(name):
    """No line of `moekit --help` is cut off."""
    assert "..." not in cli.commands[name].get_short_help_str(60)


def test_every_fusion_is_named():
    assert all(f"`{name}`" in README for name in FUSIONS)


def test_the_two_commands_come_first():
    assert README.index("make demo") < README.index("make test") < README.index("## ")
