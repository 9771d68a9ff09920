"""Two result files side by side: the ratio of every row that both have.

    python bench/compare.py BEFORE.json AFTER.json [--side moekit] [--tolerance 0.03] [--all]

Exit code 1 if a row of the sides named became slower, or stopped working, beyond noise: by more than the tolerance and by more
than the spreads (interquartile ranges) of both measurements together. 2 if the files have no row in common. Without `--all`
only what moved beyond noise is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.common import load

KEYS = ("framework", "case", "op", "tp", "T", "prompts", "dtype", "side", "way")  # what a row is of; the rest was measured


@dataclass(frozen=True)
class Change:
    """One row in both files: its name, the times in µs (None: it did not run), and how far apart chance may bring them."""

    name: str
    side: str
    before: float | None
    after: float | None
    noise: float

    @property
    def ratio(self) -> float | None:
        """After over before."""
        return self.after / self.before if self.before and self.after else None

    @property
    def verdict(self) -> str:
        """slower, faster, broken, mended or same."""
        if self.before is None or self.after is None:
            return "same" if self.before is self.after else "broken" if self.after is None else "mended"
        if abs(self.after - self.before) <= self.noise:
            return "same"
        return "slower" if self.after > self.before else "faster"


def key(row: Mapping) -> tuple:
    """What a row is of."""
    return tuple((k, row[k]) for k in KEYS if k in row)


def compare(before: Sequence[Mapping], after: Sequence[Mapping], tolerance: float) -> list[Change]:
    """The rows that both have, in the order of the first."""
    new = {key(r): r for r in after}
    found = []
    for old in before:
        if (row := new.get(key(old))) is None:
            continue
        noise = max(tolerance * old.get("us", 0.0), old.get("spread", 0.0) + row.get("spread", 0.0))
        name = " ".join(str(v) for k, v in key(old) if k not in ("side", "way"))
        found.append(Change(name, str(old.get("side", old.get("way", ""))), old.get("us"), row.get("us"), noise))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two files; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--side", default="moekit", help="rows whose side begins so decide the exit code")
    parser.add_argument("--tolerance", type=float, default=0.03, help="a share of the time that is never called a change")
    parser.add_argument("--all", action="store_true", help="print every row")
    args = parser.parse_args(argv)
    files = load(args.before), load(args.after)
    if files[0]["device"] != files[1]["device"]:
        print(f"measured on different devices: {files[0]['device']} and {files[1]['device']}", file=sys.stderr)
    changes = compare(files[0]["rows"], files[1]["rows"], args.tolerance)
    if not changes:
        print("the files have no row in common", file=sys.stderr)
        return 2
    for c in changes:
        if args.all or c.verdict != "same":
            times = " → ".join("–" if t is None else f"{t:.2f}" for t in (c.before, c.after))
            ratio = "" if c.ratio is None else f"  {c.ratio:.2f}"
            print(f"{c.verdict:7s} {c.name}, {c.side}: {times} µs{ratio}")
    bad = [c for c in changes if c.side.startswith(args.side) and c.verdict in ("slower", "broken")]
    print(f"{len(changes)} rows in both: {len(bad)} regressions of {args.side}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
