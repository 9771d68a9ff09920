"""`moekit tune`: search schedules on the GPU at hand and write its table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from moekit.cli.output import OutputFile, console, notes, print_json, table
from moekit.cli.show import parse_sizes
from moekit.errors import FileError, UnavailableError
from moekit.files import check_writable, read_json, write_text
from moekit.fusions import FUSIONS
from moekit.lang.dtypes import FLOATS

if TYPE_CHECKING:
    from moekit.tune.run import Tuned


@click.command(short_help="Search schedules on the GPU at hand; write its table.")
@click.argument("fusions", nargs=-1, type=click.Choice(list(FUSIONS)), metavar="[FUSION]...")
@click.option("--dtype", "dtypes", type=click.Choice(FLOATS), multiple=True, default=("bfloat16",), show_default=True,
              help="Tune for this dtype. Repeatable.")  # fmt: skip
@click.option("--sizes", callback=parse_sizes, help="Those of the model's sizes that have these: I=64,E=512.")
@click.option("--time", "seconds", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True,
              help="Seconds of search for one fusion, size and dtype.")  # fmt: skip
@click.option("--again", is_flag=True, help="Search nothing: time the table's entries anew and drop those that do not win.")
@click.option("-o", "--output", type=OutputFile(), help="The table to write (default: the package's own).")
@click.option("--json", "as_json", is_flag=True, help="Print times and what was tried as JSON.")
@click.option("--json-file", type=OutputFile(),
              help="Write the times to a file, which keeps those it has of other fusions and sizes.")  # fmt: skip
def tune(
    fusions: tuple[str, ...], dtypes: tuple[str, ...], sizes: dict[str, int], seconds: float, again: bool,
    output: Path | None, as_json: bool, json_file: Path | None,
) -> None:  # fmt: skip
    """Search legal schedules of FUSIONS (default: all) for every bucket of rows, and write the GPU's table.

    Every candidate is compared with the reference before it is timed, in CUDA graphs on rotated inputs. Schedules for different
    numbers of rows add up in the same order, so that no result changes with the number of rows.
    """
    run, where = _ready(), output
    if where is None:
        where = run.table_path()
    chosen = fusions or tuple(FUSIONS)
    if untimed := ", ".join(n for n in chosen if n not in run.SIZES):
        notes().print(f"passed over, as moekit tune has no operands to time them on: {untimed}", soft_wrap=True)
    jobs = [(n, s, d) for n in chosen for s in run.SIZES.get(n, ()) if sizes.items() <= s.items() for d in dtypes]
    if not any(n in run.SIZES for n in chosen):
        raise click.UsageError(f"there is nothing to tune; name one of {', '.join(run.SIZES)}")
    if not jobs:
        raise click.UsageError(f"none of the model's sizes has {', '.join(f'{a}={n}' for a, n in sizes.items())}")
    _check_kept(where, json_file)
    found, report = [], {}
    for name, static, dtype, tuned in _again(run, jobs, where) if again else _search(run, jobs, seconds):
        found.append({"fusion": name, "sizes": static, "dtype": dtype, "tuned": tuned})
        run.write(where, [row["tuned"] for row in found])
        report = run.made() | {"table": str(where), "rows": [_row(**row, seconds=0 if again else seconds) for row in found]}
        if json_file:  # after each graph: a search that is stopped keeps what it found
            _keep(json_file, report)
    if as_json:
        print_json(report)
    else:
        _print(report)


def _check_kept(where: Path, json_file: Path | None) -> None:
    """Refuse, before the search, what cannot be written or whose rows could not be kept after it."""
    try:
        check_writable(where)
        for path in (where, json_file):
            if path is not None and path.is_file() and not isinstance(read_json(path), dict):
                raise FileError(f"{path} is not what `moekit tune` writes")
    except FileError as error:
        raise click.UsageError(str(error)) from None


def _ready() -> Any:
    """The module that tunes, where it can."""
    try:
        import torch
    except ImportError:
        raise UnavailableError("moekit tune: torch is not installed; install moekit[torch]") from None
    if not torch.cuda.is_available():
        raise UnavailableError("moekit tune: there is no CUDA device here; run it on the GPU to tune for")
    from moekit.tune import run

    return run


def _again(run, jobs, where: Path) -> Iterator[tuple[str, dict, str, Tuned]]:
    entries = read_json(where)["entries"] if where.is_file() else {}
    for name, sizes, dtype in jobs:
        yield name, sizes, dtype, run.again(name, sizes, dtype, entries)


def _search(run, jobs, seconds: float) -> Iterator[tuple[str, dict, str, Tuned]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[best]}"), TimeRemainingColumn())
    with Progress(*columns, console=notes()) as bar, run.Checkers() as checkers:
        for name, sizes, dtype in jobs:
            task = bar.add_task(f"{name} {_said(sizes)} {dtype}", total=seconds, best="")

            def tell(trial, spent, task=task, ratios=[]) -> None:  # noqa: B006  one list per job
                ratios.append(trial.ratio)
                bar.update(task, completed=min(spent, seconds), best=f"{len(ratios)} tried, best {min(ratios):.2f}")

            tuned = run.tune(name, sizes, dtype, seconds, checkers, tell)
            bar.update(task, completed=seconds, best=f"{len(tuned.trials)} tried")
            yield name, sizes, dtype, tuned


def _said(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{a}={s}" for a, s in sizes.items())


def _keep(path: Path, report: dict) -> None:
    """The report without what was tried, beside the rows of other graphs that the same device and versions gave."""
    before = read_json(path) if path.is_file() else {}
    same = all(before.get(n) == report[n] for n in ("device", "versions"))
    rows = {row["key"]: row for row in (before["rows"] if same else [])}
    rows |= {row["key"]: {n: x for n, x in row.items() if n != "trials"} for row in report["rows"]}
    lines = ",\n".join("  " + json.dumps(row) for row in rows.values())
    head = json.dumps({n: x for n, x in report.items() if n not in ("rows", "table")}, indent=1)
    write_text(path, head[:-2] + ',\n "rows": [\n' + lines + "\n ]\n}\n")


def _row(fusion: str, sizes: Mapping[str, int], dtype: str, tuned: Tuned, seconds: float) -> dict:
    """One graph as JSON."""
    trials = [
        {
            "rows from": t.bucket,
            "schedule": str(t.schedule),
            "ratio": None if t.problem else round(t.ratio, 4),
            "problem": t.problem,
        }
        for t in tuned.trials
    ]
    times = [
        {"rows": t.rows, "bucket": t.bucket, "us": {n: round(us, 3) for n, us in t.us.items()}, "schedules": dict(t.schedules)}
        for t in tuned.times
    ]
    entry = tuned.entry.to_json()["schedules"] if tuned.entry else {}
    return {"fusion": fusion, "sizes": dict(sizes), "dtype": dtype, "key": tuned.key, "entry": entry, "problem": tuned.problem,
            "seconds": seconds, "times": times, "trials": trials}  # fmt: skip


def _print(report: dict) -> None:
    """For each graph a line per number of rows, then what goes into the table."""
    out = console()
    for row in report["rows"]:
        title = f"{row['fusion']} {_said(row['sizes'])} {row['dtype']}"
        shown = table("rows", "heuristic µs", "tuned µs", "heuristic / tuned", "and for these rows alone", title=title)
        for t in row["times"]:
            us = t["us"]
            ratios = (f"{us['heuristic'] / us[side]:.2f}" for side in ("tuned", "free"))
            shown.add_row(str(t["rows"]), f"{us['heuristic']:.2f}", f"{us['tuned']:.2f}", *ratios)
        out.print(shown)
        entries = [f"from {least} rows on: {text}" for least, text in row["entry"].items()]
        for line in [*entries, *([f"no entry: {row['problem']}"] if row["problem"] else [])]:
            click.echo(line)
        click.echo()
    click.echo(f"written to {report['table']}")
