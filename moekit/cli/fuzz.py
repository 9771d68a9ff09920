"""`moekit fuzz`: a campaign of random cases against the reference."""

import json
import os
import time
from pathlib import Path
from typing import Any

import click
from rich.live import Live
from rich.text import Text

from moekit.cli.output import console, notes, print_json, table
from moekit.errors import UnavailableError

FAILED = 1
SHOWN = 10  # failures printed in full as they come
SHRUNK = 5  # failures that are made small: the first of each fusion and implementation


@click.command(short_help="Run random cases of every fusion against its reference.")
@click.argument("fusions", nargs=-1, metavar="[FUSION]...")
@click.option("--impl", "implementations", multiple=True, metavar="NAME",
              help="interpret, numpy, eager, xla, pallas, triton, triton-interpreter, a peer, module:callable.")  # fmt: skip
@click.option("--time", "seconds", type=float, help="Stop after this many seconds.")
@click.option("--examples", type=int, help="Stop after this many cases that count.  [default: 2000, unless --time is given]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--workers", type=int, help="Worker processes.  [default: as many as there are cores, at most 12]")
@click.option("--combos", type=int, default=80, show_default=True, help="Distinct static calls per fusion: what compiles.")
@click.option(
    "--batch", type=int, default=8, show_default=True, help="Layouts per set of values (values per shape in JAX: ×8)."
)
@click.option(
    "--replay", type=click.Path(exists=True, path_type=Path), help="Run the cases of a JSON file (or directory) only."
)
@click.option("--save", type=click.Path(path_type=Path), default=Path("tests/regressions"), show_default=True,
              help="Where failures are appended, if the directory exists.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--json-file", type=click.Path(path_type=Path), help="Write the summary as JSON, cells included.")
def fuzz(fusions: tuple[str, ...], implementations: tuple[str, ...], seconds: float | None, examples: int | None, seed: int,
         workers: int | None, combos: int, batch: int, replay: Path | None, save: Path, as_json: bool,
         json_file: Path | None) -> None:  # fmt: skip
    """Run random cases of FUSIONs (all of moekit's; also `probes`, `random:SEED` or module:attribute) against the reference.

    Sizes, dtypes, strides, offsets, aliasing, values and schedules follow from the seed. Exit codes: 0 clean, 1 failures,
    2 asked wrongly, 3 an implementation or fusion that is not available here.
    """
    from moekit.testing import campaign
    from moekit.testing.case import find_fusion
    from moekit.testing.executors import unavailable

    names = _fusions(fusions)
    for name in names:
        find_fusion(name)
    chosen = implementations or ("interpret", "numpy", "eager")
    for name in chosen:
        _check(name, unavailable(name))
    if replay:
        _replay(replay, implementations, as_json)
        return
    if seconds is None and examples is None:
        examples = 2000
    plan = campaign.Plan(names, chosen, seed, examples, seconds, workers or min(12, os.cpu_count() or 1), combos, 8, batch)
    result = _watched(plan, json_file)
    rows = _shrunk(result, save)
    summary = summarise(plan, result, rows)
    if json_file:
        _write(json_file, summary, result)
    if as_json:
        print_json(summary)
    else:
        _print(summary, rows)
    raise SystemExit(FAILED if result.failures else 0)


def _fusions(given: tuple[str, ...]) -> list[str]:
    from moekit.fusions import FUSIONS
    from moekit.testing.probes import PROBES

    found: list[str] = []
    for name in given or ("all",):
        if name == "random":
            found += [f"random:{n}" for n in range(100)]
        else:
            found += {"all": list(FUSIONS), "probes": list(PROBES)}.get(name, [name])
    return list(dict.fromkeys(found))


def _check(name: str, why: str | None) -> None:
    from moekit.testing.executors import EXECUTORS
    from moekit.testing.peers import PEERS, peer_executor

    if why:
        raise UnavailableError(f"{name}: {why}")
    if name in PEERS or ":" in name:
        peer_executor(name)
    elif name not in (*EXECUTORS, "pallas", "xla"):
        raise click.UsageError(
            f"there is no implementation {name!r}; choose of {', '.join((*EXECUTORS, 'pallas', 'xla', *PEERS))}"
        )


def _write(path: Path, summary: dict, result: Any) -> None:
    cells = {i: [[*c, n] for c, n in sorted(v.cells.items())] for i, v in result.coverage.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**summary, "by_cell": cells}, indent=1))


def _watched(plan: Any, json_file: Path | None) -> Any:
    """Run the campaign under a live line on stderr (a line every half minute where stderr is no terminal).

    Failures are printed as they come, and what is known so far is written to `json_file` every twenty seconds.
    """
    from moekit.testing import campaign
    from moekit.testing.regressions import pasteable

    out, last, written, shown = notes(), [time.monotonic()], [time.monotonic()], [0]

    def keep(result: Any) -> None:
        for failure in result.failures[shown[0] : shown[0] + SHOWN]:
            out.print(f"{failure.case.fusion}, {failure.implementation}:", *failure.problems[:3], sep="\n  ", markup=False)
            if shown[0] < SHOWN:
                out.print(pasteable(failure.case, failure.implementation), markup=False, soft_wrap=True)
        shown[0] = len(result.failures)
        if json_file and time.monotonic() - written[0] > 20:
            written[0] = time.monotonic()
            rows = [{"fusion": f.case.fusion, "implementation": f.implementation, "problems": list(f.problems),
                     "case": f.case.to_json()} for f in result.failures]  # fmt: skip
            _write(json_file, summarise(plan, result, rows), result)

    def line(result) -> Text:
        cells = sum(len(c.cells) for c in result.coverage.values())
        rate = result.ran / max(0.001, result.seconds)
        return Text(f"{result.ran:,} cases, {rate:,.0f}/s, {cells:,} cells, {len(result.failures)} failures, "
                    f"{result.seconds:.0f} s")  # fmt: skip

    if not out.is_terminal:

        def report(result) -> None:
            keep(result)
            if time.monotonic() - last[0] > 30:
                last[0] = time.monotonic()
                out.print(line(result))

        return campaign.run(plan, report)
    with Live(console=out, refresh_per_second=4, transient=True) as live:
        return campaign.run(plan, lambda result: (keep(result), live.update(line(result))))


def _shrunk(result, save: Path) -> list[dict]:
    """The failures, one of each fusion and implementation made small and appended to the regressions."""
    from moekit.testing.campaign import isolated
    from moekit.testing.regressions import Regression, append, pasteable
    from moekit.testing.shrink import shrink

    rows, seen = [], set()
    for failure in result.failures:
        if (key := (failure.case.fusion, failure.implementation)) in seen or len(seen) >= SHRUNK:
            continue
        seen.add(key)
        died = "process died" in failure.problems[0] or "did not end" in failure.problems[0]
        notes().print(f"making a failure of {failure.case.fusion} ({failure.implementation}) small …")
        case = shrink(failure.case, _fails(failure.implementation, died), 15 if died else 150)
        problems = isolated(case, failure.implementation) or list(failure.problems)
        if save.is_dir():
            append(save, Regression(case, failure.implementation, tuple(problems)))
        rows.append({"fusion": case.fusion, "implementation": failure.implementation, "problems": problems,
                     "case": case.to_json(), "found": failure.case.to_json(),
                     "test": pasteable(case, failure.implementation)})  # fmt: skip
    return rows


def _fails(implementation: str, died: bool):
    from moekit.testing.campaign import Prober, isolated

    if died:
        return lambda case: bool(isolated(case, implementation))
    return Prober(implementation)


def summarise(plan, result, rows: list[dict]) -> dict:
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
        "implementations": {
            name: {"ran": c.ran, "counted": c.counted, "cells": len(c.cells), "least": min(c.cells.values(), default=0),
                   "compiled": len(c.compiled), "fusions": c.table()}
            for name, c in result.coverage.items()
        },
        "failures": rows,
    }  # fmt: skip


def _print(summary: dict, rows: list[dict]) -> None:
    out = console()
    for name, c in summary["implementations"].items():
        shown = table("fusion", "cases", "cells", "least", "compiled", "dtypes", "layouts", "tails", "worst",
                      title=f"{name}: {c['counted']:,} cases counted of {c['ran']:,}")  # fmt: skip
        for r in c["fusions"]:
            numbers = (r["cells"], r["least"], r["compiled"], r["dtypes"], r["layouts"], len(r["tails"]))
            shown.add_row(r["fusion"], f"{r['cases']:,}", *map(str, numbers), f"{r['worst']:.3f}")
        out.print(shown)
    for row in rows:
        out.print(f"[bold red]{row['fusion']}, {row['implementation']}[/]", *row["problems"][:3], sep="\n  ", markup=True)
        out.print(row["test"] + "\n", markup=False, soft_wrap=True)
    how = f"{summary['rate']:,.0f}/s, {summary['workers']} workers, seed {summary['seed']}"
    end = f", {summary['stopped']}" if summary["stopped"] else ""
    out.print(f"{summary['counted']:,} cases in {summary['seconds']:.0f} s ({how}): {summary['failed']} failures{end}")


def _replay(path: Path, implementations: tuple[str, ...], as_json: bool) -> None:
    """Run recorded cases, each in a process of its own."""
    from moekit.testing.campaign import isolated
    from moekit.testing.executors import unavailable
    from moekit.testing.regressions import load

    try:
        recorded = load(path)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    rows, skipped = [], 0
    for regression in recorded:
        for name in implementations or (regression.implementation,):
            if why := unavailable(name):
                skipped += 1
                notes().print(f"skipped {regression.case.fusion}: {name}: {why}")
                continue
            problems = isolated(regression.case, name)
            rows.append({"fusion": regression.case.fusion, "implementation": name, "problems": problems})
    if recorded and skipped and not rows:
        raise UnavailableError(f"{path}: none of its cases can be run here")
    failed = [r for r in rows if r["problems"]]
    if as_json:
        print_json({"ran": len(rows), "skipped": skipped, "failed": len(failed), "cases": rows})
    else:
        for r in failed:
            console().print(f"{r['fusion']}, {r['implementation']}:", *r["problems"], sep="\n  ", markup=False)
        console().print(f"{len(rows)} cases replayed: {len(failed)} failures")
    raise SystemExit(FAILED if failed else 0)
