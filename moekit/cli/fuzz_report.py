"""What `moekit fuzz` shows: a live line, failures as they come, and at the end a table, tests to paste and what was left."""

import json
import time
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.text import Text

from moekit.cli.output import console, notes, table
from moekit.files import write_text

SHOWN = 10  # failures printed in full as they come: the first of each fusion and implementation


def watched(plan: Any, json_file: Path | None) -> Any:
    """Run the campaign under a live line on stderr (a line every half minute where stderr is no terminal).

    Failures are printed as they come, and what is known so far is written to `json_file` every twenty seconds.
    """
    from moekit.testing import campaign

    out, last, keep = notes(), [time.monotonic()], _Keeper(plan, json_file)
    if not out.is_terminal:

        def report(result: Any) -> None:
            keep(result)
            if time.monotonic() - last[0] > 30:
                last[0] = time.monotonic()
                out.print(_line(result))

        return campaign.run(plan, report)
    with Live(console=out, refresh_per_second=4, transient=True) as live:

        def refresh(result: Any) -> None:
            keep(result)
            live.update(_line(result))

        return campaign.run(plan, refresh)


def _line(result: Any) -> Text:
    cells = sum(len(c.cells) for c in result.coverage.values())
    rate = result.ran / max(0.001, result.seconds)
    return Text(f"{result.ran:,} cases, {rate:,.0f}/s, {cells:,} cells, {len(result.failures)} failures, "
                f"{result.seconds:.0f} s")  # fmt: skip


class _Keeper:
    """Prints failures as they come, and writes what is known to a file now and then."""

    def __init__(self, plan: Any, json_file: Path | None):
        self.plan, self.json_file = plan, json_file
        self.written, self.taken, self.shown = time.monotonic(), 0, set()

    def __call__(self, result: Any) -> None:
        """After every task."""
        from moekit.testing.failures import pasteable

        out = notes()
        for failure in result.failures[self.taken :]:
            key = (failure.case.fusion, failure.implementation)
            if key not in self.shown and len(self.shown) < SHOWN:
                self.shown.add(key)
                out.print(f"{failure.case.fusion}, {failure.implementation}:", *failure.problems[:3], sep="\n  ", markup=False)
                out.print(pasteable(failure.case, failure.implementation), markup=False, soft_wrap=True)
        self.taken = len(result.failures)
        if self.json_file and time.monotonic() - self.written > 20:
            self.written = time.monotonic()
            write(self.json_file, summarise(self.plan, result, [row(f) for f in result.failures]), result)


def row(failure: Any) -> dict:
    """A failure as JSON has it before it is made small."""
    from moekit.testing.failures import pasteable

    case = failure.case.to_json()
    return {"fusion": failure.case.fusion, "implementation": failure.implementation, "problems": list(failure.problems),
            "case": case, "found": case, "test": pasteable(failure.case, failure.implementation)}  # fmt: skip


def write(path: Path, summary: dict, result: Any) -> None:
    """The summary with every cell."""
    cells = {i: [[*c, n] for c, n in sorted(v.cells.items())] for i, v in result.coverage.items()}
    write_text(path, json.dumps({**summary, "by_cell": cells}, indent=1))


def summarise(plan: Any, result: Any, rows: list[dict]) -> dict:
    """What the campaign says of itself, as JSON has it."""
    return {
        "seed": plan.seed,
        "seconds": round(result.seconds, 1),
        "workers": plan.workers,
        "ran": result.ran,
        "counted": result.counted,
        "rate": round(result.ran / max(0.001, result.seconds), 1),
        "stopped": result.stopped,
        "failed": len(result.failures),
        "first_failure": result.first_failure,
        "left": result.left,
        "implementations": {name: _implementation(plan, name, c) for name, c in result.coverage.items()},
        "failures": rows,
    }


def _implementation(plan: Any, name: str, c: Any) -> dict:
    least = plan.least.get(name, 0)
    return {"ran": c.ran, "counted": c.counted, "cells": len(c.cells), "least": min(c.cells.values(), default=0),
            "wanted": least, "below": len(c.below(least)), "edge_cells": len(set(c.edge_cells) - set(c.cells)),
            "compiled": len(c.compiled), "fusions": c.table(least)}  # fmt: skip


def show(summary: dict, rows: list[dict]) -> None:
    """The summary for people."""
    out = console()
    for name, c in summary["implementations"].items():
        shown = table("fusion", "cases", "cells", "least", "below", "edges", "compiled", "dtypes", "layouts", "tails", "worst",
                      title=f"{name}: {c['counted']:,} cases counted of {c['ran']:,}; {c['below']} of {c['cells']} cells have "
                            f"fewer than {c['wanted']}, {c['edge_cells']} more are met by edges only")  # fmt: skip
        for r in c["fusions"]:
            numbers = (
                r["cells"],
                r["least"],
                r["below"],
                r["edges"],
                r["compiled"],
                r["dtypes"],
                r["layouts"],
                len(r["tails"]),
            )
            shown.add_row(r["fusion"], f"{r['cases']:,}", *map(str, numbers), f"{r['worst']:.3f}")
        out.print(shown)
    for r in rows:
        out.print(f"[bold red]{r['fusion']}, {r['implementation']}[/]", *r["problems"][:3], sep="\n  ", markup=True)
        out.print(r["test"] + "\n", markup=False, soft_wrap=True)
    for text in summary["left"]:
        out.print(f"left: {text}", markup=False)
    how = f"{summary['rate']:,.0f}/s, {summary['workers']} workers, seed {summary['seed']}"
    end = f", {summary['stopped']}" if summary["stopped"] else ""
    first = f", the first after {summary['first_failure']:,} cases" if summary["failed"] else ""
    out.print(f"{summary['counted']:,} cases in {summary['seconds']:.0f} s ({how}): {summary['failed']} failures{first}{end}")
