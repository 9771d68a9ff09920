"""Two result files side by side: the ratio of every row that both have.

    python bench/compare.py BEFORE.json AFTER.json [--side moekit] [--tolerance 0.03] [--all]

Exit code 1 if a row of the sides named became slower, or stopped working, beyond noise: by more than the tolerance and by more
than the spreads (interquartile ranges) of both measurements together. 2 if the files have no row in common. Without `--all`
only what moved beyond noise is printed.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

sys.path.insert(0, __file__.rpartition("/bench/")[0])

from bench.common import load

KEYS = ("framework", "case", "op", "tp", "T", "prompts", "slots", "batch", "dtype", "side", "way")  # what a row is of


def key(row: Mapping) -> tuple:
    """What a row is of; the rest was measured."""
    return tuple((k, row[k]) for k in KEYS if k in row)


def verdict(before: Mapping, after: Mapping, tolerance: float) -> str:
    """slower, faster, broken, mended or same."""
    old, new = before.get("us"), after.get("us")
    if old is None or new is None:
        return "same" if old is new else "broken" if new is None else "mended"
    if abs(new - old) <= max(tolerance * old, before.get("spread", 0.0) + after.get("spread", 0.0)):
        return "same"
    return "slower" if new > old else "faster"


def shown(before: Mapping, after: Mapping) -> str:
    """What a row is of, its two times and their ratio."""
    side = str(before.get("side", before.get("way", "")))
    name = " ".join(str(v) for k, v in key(before) if k not in ("side", "way"))
    times = [row.get("us") for row in (before, after)]
    ratio = f"  {times[1] / times[0]:.2f}" if all(times) else ""
    return f"{name}, {side}: {' → '.join('–' if t is None else f'{t:.2f}' for t in times)} µs{ratio}"


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--side", default="moekit", help="rows whose side begins so decide the exit code")
    parser.add_argument("--tolerance", type=float, default=0.03, help="a share of the time that is never called a change")
    parser.add_argument("--all", action="store_true", help="print every row")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Compare two files; the exit code."""
    args = options().parse_args(argv)
    before, after = load(args.before), load(args.after)
    if before["device"] != after["device"]:
        print(f"measured on different devices: {before['device']} and {after['device']}", file=sys.stderr)
    new = {key(row): row for row in after["rows"]}
    pairs = [(row, new[key(row)]) for row in before["rows"] if key(row) in new]
    if not pairs:
        print("the files have no row in common", file=sys.stderr)
        return 2
    bad = 0
    for old, row in pairs:
        found = verdict(old, row, args.tolerance)
        if args.all or found != "same":
            print(f"{found:7s} {shown(old, row)}")
        ours = str(old.get("side", old.get("way", ""))).startswith(args.side)
        bad += ours and found in ("slower", "broken")
    print(f"{len(pairs)} rows in both: {bad} regressions of {args.side}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
