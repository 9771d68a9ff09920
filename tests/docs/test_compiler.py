"""docs/compiler.md is true: what it shows of a fusion after some passes is what the passes make.

After a change that is meant, write it anew with `MOEKIT_WRITE_GOLDEN=1 pytest tests/docs/test_compiler.py`.
"""

import os
import re
from pathlib import Path

from moekit.backends import triton
from moekit.compile.passes import PASSES, watching
from moekit.compile.plan import plan
from moekit.compile.tile.layouts import contiguous
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example

PAGE = Path(__file__).parents[2] / "docs" / "compiler.md"
SHOWN = re.compile(r"(<!-- (?:after )?(\w+) -->\n```text\n)(.*?)(```\n<!-- end -->)", re.S)


def made() -> dict[str, str]:
    """The program after every pass, and its text in Triton."""
    fusion, found = FUSIONS["add_rms_norm"], {}
    binding = example(fusion, {"T": 4, "H": 40}, "bfloat16", {})
    graph = fusion.trace(binding)
    with watching(lambda name, program: found.update({name: f"{program}\n"})):
        (program,) = plan(graph, None, contiguous(graph, dict(binding.sizes))).programs
    return found | {"triton": triton.emit(program)}


def test_the_page_shows_what_is_made():
    """Word by word."""
    found, text = made(), PAGE.read_text()
    if os.environ.get("MOEKIT_WRITE_GOLDEN"):
        text = SHOWN.sub(lambda m: m[1] + found[m[2]] + m[4], text)
        PAGE.write_text(text)
    shown = {name: body for _, name, body, _ in SHOWN.findall(text)}
    assert set(shown) == {"nest", "masks", "tidy", "triton"}
    assert shown == {name: found[name] for name in shown}


def test_the_page_has_every_pass():
    """In order, a row each."""
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.M)
    assert rows == ["nest", *PASSES]


def test_what_the_page_says_nothing_becomes_of_is_as_it_was():
    """Passes that find nothing to do."""
    found = made()
    assert found["nest"] == found["decompose"] == found["prefetch"]
    assert found["motion"] == found["flatten"] == found["legalise"]
