"""What pages point at is there, and their text has one width."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WIDEST = 128
MADE = re.compile(r"<!-- \w+ \S+ -->\n.*?<!-- end -->\n", re.DOTALL)  # by bench/report.py
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def anchors(page: Path) -> set[str]:
    """What a link to a heading of a page says behind the #."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


@pages
def test_names_and_files_exist(page):
    """`moekit.x.y` can be imported or is there; files are, but for results that a command in the page would write."""
    text = page.read_text()
    for name in set(re.findall(r"(?<![\w/.])moekit(?:\.\w+)+", text)):
        assert resolved(name.split(".")) is not None, name
    for path in set(re.findall(r"(?<![\w./-])(?:moekit|tests|bench|docs|examples|requirements)/[\w./-]*\w", text)):
        assert (ROOT / path).exists() or re.search(rf"--json(-file)? {re.escape(path)}", text), path


def resolved(parts: list[str]) -> object:
    """The module, or what stands in one, that a dotted name says; None if there is no such thing."""
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            found = getattr(found, part, None)
        return found
    return None


@pages
def test_no_line_of_running_text_is_too_long(page):
    """Tables, code and what is made from results are as long as they are."""
    lines = CODE.sub("", MADE.sub("", page.read_text())).splitlines()
    assert not [line for line in lines if len(line) > WIDEST and not line.startswith(("|", "    "))]
