"""What is said of versions holds: of the locks, of the project's requirements, and on the page."""

import re
import tomllib
from pathlib import Path

import pytest

from moekit.compat import DIFFERENCES, TESTED, release, untested

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")


def locked(name: str) -> dict[str, str]:
    """Package → version in a lock."""
    return dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "requirements" / name).read_text(encoding="utf-8"), re.M))


def required() -> dict[str, str]:
    """Package → what every extra of the project wants of it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = ["python" + project["requires-python"], *(x for extra in project["optional-dependencies"].values() for x in extra)]
    found = (re.fullmatch(r"([\w-]+)(?:\[\w+\])?([><=].*)", line) for line in lines)
    return dict(one.groups() for one in found if one)


def test_the_locks_are_the_ends_of_what_is_tested():
    oldest, newest = locked("test.lock"), locked("test-newest.lock")
    assert set(oldest) == set(newest)
    for package, (first, last) in TESTED.items():
        if package == "python":
            continue
        assert release(newest[package]) == release(last), package
        assert release(oldest[package]) == release(first) or package == "transformers"  # `make against` takes its oldest
    assert not untested(oldest)
    assert not untested(newest)


def test_the_requirements_allow_what_is_tested_and_of_jax_no_more():
    wanted = required()
    for package in ("python", "torch", "triton", "jax", "transformers"):
        assert wanted[package].split(",")[0] == f">={TESTED[package][0]}"
    major, minor = release(TESTED["jax"][1])
    assert wanted["jax"] == f">={TESTED['jax'][0]},<{major}.{minor + 1}"


@pytest.mark.parametrize("row", DIFFERENCES, ids=lambda row: f"{row.package} {row.since} {row.where}")
def test_a_difference_is_minded_where_it_says_and_is_still_wanted(row):
    """A row whose last version is older than what is tested can go, and with it what it says of the code."""
    assert (ROOT / row.where).exists()
    oldest, newest = map(release, TESTED[row.package])
    assert release(row.since) <= newest
    assert row.until is None or oldest <= release(row.until) < newest
    assert row.unwanted == "open" or oldest < release(row.unwanted) <= newest


def test_the_page_shows_both_tables():
    """As they are in moekit/compat.py, in its order."""
    rows = [tuple(cell.strip() for cell in line.strip("|\n").split("|")) for line in PAGE.splitlines() if line.startswith("| ")]
    tested = [(p, *ends) for p, ends in TESTED.items()]
    differ = [(d.package, d.since, d.until or "", d.unwanted, d.what, f"`{d.where}`") for d in DIFFERENCES]
    assert [row for row in rows if row[0] in TESTED] == tested + differ


def test_the_release_of_a_version():
    given = ["3.12.1", "2.14.1+cu130", "0.13.0.dev20", "4", "2.15rc1"]
    assert [release(v) for v in given] == [(3, 12), (2, 14), (0, 13), (4, 0), (2, 15)]
