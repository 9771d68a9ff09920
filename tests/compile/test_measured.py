"""The figures that earned the rules: each names what it earned, and how to measure it again."""

import importlib
import json
import re
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).parents[2]
RULES = json.loads((resources.files("moekit.compile.rules") / "measured.json").read_text(encoding="utf-8"))["rules"]


def test_every_figure_belongs_to_a_rule_that_is_there():
    """A constant that goes takes its figures along."""
    for name, row in RULES.items():
        for constant in row["constants"]:
            module, _, attribute = constant.partition(".")
            assert hasattr(importlib.import_module(f"moekit.compile.rules.{module}"), attribute), (name, constant)
        assert row["figures"], name
        script, fusions = re.fullmatch(r"python (bench/\w+\.py) --fusions (\S+) --tokens [\d,]+", row["again"]).groups()
        assert (ROOT / script).is_file()
        assert all((ROOT / "moekit/fusions" / f"{fusion}.py").is_file() for fusion in fusions.split(","))


def test_no_figure_of_a_gpu_stands_in_the_code():
    """Times, and the name of the one GPU, are data; what a target has is its row."""
    for path in [*(ROOT / "moekit/compile/rules").glob("*.py"), *(ROOT / "moekit/compile/schedule").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert path.name == "targets.py" or not re.search(r"H200|\d\s?(µs|us)\b|Measured on", text), path.name
