"""Every command of bench/ that is printed somewhere is one: its options are there, and it measures something."""

import json
import re
import shlex
from pathlib import Path

import pytest

from bench import compare, report
from bench.common import load
from tests.bench.questions import NAMES, ROOT, question

COMMAND = re.compile(r"python (bench/\w+\.py)((?:[^\n`\"#]|\"[^\n\"]*\"|\\\n)*)")
OTHERS = {"compare": compare.options, "report": report.options}


def printed() -> list[tuple[str, str]]:
    """Where a command stands, and the command."""
    found = []
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "bench").glob("*.py")]
    for path in (*pages, ROOT / "moekit/compile/rules/measured.json"):
        found += [(path.name, match.group(0)) for match in COMMAND.finditer(path.read_text(encoding="utf-8"))]
    for path in report.RESULTS.glob("*.json"):
        head = load(path)
        found.append((path.name, head.get("environment", head)["command"]))
    return sorted({(where, command.strip()) for where, command in found if command.startswith("python bench/")})


def parsed(command: str) -> tuple[str, list[str]]:
    """The bench and its arguments, as a shell has them; what a usage line leaves open is left out."""
    command = re.sub(r"\[|\]|,…|\\\s*$|\\\n", " ", command).replace("NAME", "silu").replace("PREFIX", "x").replace(" N ", " 1 ")
    words = shlex.split(command, comments=True)
    return Path(words[1]).stem, words[2:]


def test_there_are_commands():
    """In all the places that this looks at."""
    where = {where for where, _ in printed()}
    assert {"performance.md", "torch.md", "numerics.md", "measured.json", "fusions_h200.json", "fusions.py"} <= where


@pytest.mark.parametrize(("where", "command"), printed())
def test_a_printed_command_is_understood(where, command):
    """It parses, and there are cases for it."""
    name, argv = parsed(command)
    if not (ROOT / "bench" / f"{name}.py").exists():
        assert "no longer kept" in load(report.RESULTS / where if where.endswith(".json") else noted(command)).get("note", "")
        return
    if name in OTHERS:
        OTHERS[name]().parse_args(argv)
        return
    asked = question(name)
    assert list(asked.cases(asked.arguments(argv)))


def noted(command: str) -> Path:
    """The result file that a command which is no longer kept was to write."""
    return report.RESULTS / re.search(r"--json (\S+)", command).group(1)


def test_every_question_is_in_the_documents():
    """Or in the figures that earned a rule: a bench that nobody can find is not run."""
    places = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "moekit/compile/rules/measured.json"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in places)
    assert [name for name in NAMES if f"bench/{name}.py" not in text] == []


def test_the_rules_figures_can_be_measured_again():
    """The commands beside them have cases, of all the fusions that they name, where a bench is told those."""
    rules = json.loads((ROOT / "moekit/compile/rules/measured.json").read_text(encoding="utf-8"))["rules"]
    for row in rules.values():
        name, argv = parsed(row["again"])
        asked = question(name)
        args = asked.arguments(argv)
        cases = {head.get("case") or head["fusion"] for head, _ in asked.cases(args)}
        assert cases
        assert all(any(case.startswith(fusion) for case in cases) for fusion in getattr(args, "fusions", ())), row["again"]
