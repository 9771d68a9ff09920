"""`moekit tune`: search schedules on the GPU at hand and write its table."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moekit.errors import UnavailableError
from moekit.fusions import FUSIONS
from moekit.lang.dtypes import FLOATS


@click.command(short_help="Search schedules on the GPU at hand; write its table.")
@click.argument("fusions", nargs=-1, type=click.Choice(list(FUSIONS)), metavar="[FUSION]...")
@click.option("--dtype", "dtypes", type=click.Choice(FLOATS), multiple=True, default=("bfloat16",), show_default=True,
              help="Tune for this dtype. Repeatable.")  # fmt: skip
@click.option("--time", "seconds", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True,
              help="Seconds for one fusion, size and dtype.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The table to write (default: the package's own).")
@click.option("--json", "as_json", is_flag=True, help="Print what was tried as JSON.")
def tune(fusions: tuple[str, ...], dtypes: tuple[str, ...], seconds: float, output: Path | None, as_json: bool) -> None:
    """Search legal schedules of FUSIONS (default: all) and write the GPU's table.

    Every candidate is compared with the reference before it is timed; times are geometric means over 1 to 4096 tokens, of
    CUDA graphs on rotated inputs. No schedule changes a result with the number of tokens.
    """
    try:
        import torch
    except ImportError:
        raise UnavailableError("moekit tune: torch is not installed; install moekit[torch]") from None
    if not torch.cuda.is_available():
        raise UnavailableError("moekit tune: there is no CUDA device here; run it on the GPU to tune for")
    from moekit.tune import run
    from moekit.tune.table import device_key

    path = output or Path(run.__file__).parent / "tables" / f"{device_key(torch.cuda.get_device_name())}.json"
    jobs = [(n, s, d) for n in fusions or FUSIONS for s in run.SIZES[n] for d in dtypes]
    found, tried, console = {}, [], Console(stderr=True, emoji=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[best]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        for name, sizes, dtype in jobs:
            label = f"{name} {' '.join(f'{a}={s}' for a, s in sizes.items())} {dtype}"
            task = bar.add_task(label, total=seconds, best="")

            def progress(trial, spent, task=task, ratios=[]) -> None:  # noqa: B006  one list per job
                ratios.append(trial.ratio)
                bar.update(task, completed=min(spent, seconds), best=f"{len(ratios)} tried, best {min(ratios):.2f}")

            key, winner, trials = run.tune(name, sizes, dtype, seconds, progress)
            bar.update(task, completed=seconds, best=f"{len(trials)} tried, best {winner.ratio:.2f}")
            found[key] = winner
            tried.append({"key": key, "best": str(winner.schedule), "ratio": winner.ratio, "trials": [_row(t) for t in trials]})
            run.write(path, found)
    _report(tried, path, as_json)


def _row(trial) -> dict:
    return {"schedule": str(trial.schedule), "ratio": trial.ratio if trial.problem is None else None, "problem": trial.problem}


def _report(tried: list[dict], path: Path, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"table": str(path), "tuned": tried}))
        return
    shown = Table("fusion and sizes", "tried", "time / heuristic", "schedule", title=f"written to {path}")
    for row in tried:
        shown.add_row(row["key"], str(len(row["trials"])), f"{row['ratio']:.3f}", row["best"])
    Console(width=200, emoji=False, highlight=False).print(shown)
