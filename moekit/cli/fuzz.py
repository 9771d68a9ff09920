"""`moekit fuzz`: a campaign of random cases against the reference."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import click

from moekit.cli import fuzz_report
from moekit.cli.interrupt import held
from moekit.cli.output import OutputFile, console, notes, print_json
from moekit.errors import FileError, UnavailableError
from moekit.files import check_writable

FAILED = 1
SHRUNK = 5  # failures that are made small: the first of each fusion and implementation
FEW, MANY = 15, 150  # tries to make one small: of those that end their process, of the others
SHORTEST = 2.0  # seconds below which it is not tried
FOR_SHRINKING = 300.0  # seconds for all of them, where no time is given
GROUPS = 8  # sets of sizes and values in a batch
LEAST = {"triton": 200}  # cases that every cell must have


@click.command(short_help="Run random cases of every fusion against its reference.")
@click.argument("fusions", nargs=-1, metavar="[FUSION]...")
@click.option("--impl", "implementations", multiple=True, metavar="NAME",
              help="interpret, numpy, eager, xla, pallas, pallas-triton, triton-jax, mosaic, triton, triton-interpreter, "
                   "a peer, or module:callable.")  # fmt: skip
@click.option("--time", "seconds", type=click.FloatRange(min=0, min_open=True),
              help="End after this many seconds, making failures small included.")  # fmt: skip
@click.option("--examples", multiple=True, metavar="N | NAME=N",
              help="Cases that count, of all implementations together, or of one. Repeatable.  "
                   "[default: 2000, unless --time is given]")  # fmt: skip
@click.option("--least", type=click.IntRange(min=0),
              help="Cases that each cell of the coverage must have, if there is time.  "
                   "[default: 200 for triton, else 0]")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--workers", type=click.IntRange(min=1),
              help="Worker processes.  [default: as many as there are cores, at most 12]")  # fmt: skip
@click.option(
    "--combos",
    type=click.IntRange(min=1),
    default=80,
    show_default=True,
    help="Distinct static calls per fusion: what compiles.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=8, show_default=True,
    help="Layouts per set of sizes (values per shape in JAX: ×8).",
)  # fmt: skip
@click.option("--mutant", "mutants", multiple=True, metavar="NAME",
              help="Plant a fault of `moekit mutants --list` in the workers' copy of the package; "
                   "the verifier is off.")  # fmt: skip
@click.option("--patch", "patches", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Plant a unified diff likewise.")  # fmt: skip
@click.option(
    "--replay", type=click.Path(exists=True, path_type=Path), help="Run the cases of a JSON file (or directory) only."
)
@click.option("--save", type=click.Path(path_type=Path), default=Path("tests/regressions"), show_default=True,
              help="Where failures are appended, if the directory exists.")  # fmt: skip
@click.option("--record", type=OutputFile(),
              help="Keep the worst error ratios in this JSON file (the repository's: moekit/testing/worst.json).")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--json-file", type=OutputFile(), help="Write the summary as JSON, cells included.")
@click.pass_obj
def fuzz(pressed_before: list[int] | None, /, fusions: tuple[str, ...], implementations: tuple[str, ...], seconds: float | None,
         examples: tuple[str, ...], least: int | None, seed: int, workers: int | None, combos: int, batch: int,
         mutants: tuple[str, ...], patches: tuple[Path, ...], replay: Path | None, save: Path, record: Path | None,
         as_json: bool, json_file: Path | None) -> None:  # fmt: skip
    """Run random cases of FUSIONs (all of moekit's; also `probes`, `random:SEED` or module:attribute) against the reference.

    Sizes, dtypes, strides, offsets, aliasing, values and schedules follow from the seed. Exit codes: 0 clean, 1 failures,
    2 asked wrongly, 3 an implementation or fusion that is not available here.
    """
    begin = time.monotonic()
    with contextlib.ExitStack() as open_:
        with held() as pressed:
            from moekit.testing import campaign

            chosen = list(dict.fromkeys(implementations)) or ["interpret", "numpy", "eager"]
            names = _checked(fusions, chosen)
            shared, own = _budgets(examples, chosen, seconds)
            plan = campaign.Plan(
                names, chosen, seed, shared, seconds, workers or min(12, os.cpu_count() or 1), combos, GROUPS, batch, own,
                {i: LEAST.get(i, 0) if least is None else least for i in chosen},
                frozenset(i for i in chosen if campaign.accelerated(i)), bool(mutants or patches))  # fmt: skip
            _check_kept(None if plan.disarmed else save, record)
            open_.enter_context(_package(mutants, patches))
        if pressed_before or pressed:
            result = campaign.Campaign(plan).result
            result.stopped = "interrupted"
        elif replay:
            _replay(replay, implementations, as_json)
            return
        else:
            result = fuzz_report.watched(plan, json_file)
        rest = FOR_SHRINKING if seconds is None else seconds - (time.monotonic() - begin)
        rows = _shrunk(result, None if plan.disarmed else save, rest, plan.disarmed)
    result.seconds = time.monotonic() - begin
    summary = fuzz_report.summarise(plan, result, rows)
    if json_file:
        fuzz_report.write(json_file, summary, result)
    if record:
        campaign.record_worst(record, result.coverage, plan)
    if as_json:
        print_json(summary)
    else:
        fuzz_report.show(summary, rows)
    raise SystemExit(FAILED if result.failures else 0)


def _checked(fusions: tuple[str, ...], chosen: list[str]) -> list[str]:
    """The fusions that are meant, where each of them and of the implementations can be had here."""
    from moekit.testing.case import find_fusion

    names = _fusions(fusions)
    for name in names:
        find_fusion(name)
    for name in chosen:
        _check(name, _unavailable(name))
    return names


def _unavailable(name: str) -> str | None:
    """Why a campaign cannot run an implementation here, None if it can."""
    from moekit.testing.executors import unavailable

    if name == "triton-jax" and os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is set, and XLA takes what Triton compiles; unset it"
    return unavailable(name)


def _check_kept(save: Path | None, record: Path | None) -> None:
    """Refuse, before the campaign, what its failures and ratios could not be added to after it."""
    from moekit.testing.campaign import worst_seen
    from moekit.testing.failures import load

    try:
        if save is not None and save.is_dir():
            check_writable(save / "probe")
            load(save)
        if record is not None:
            worst_seen(record)
    except (ValueError, FileError) as error:
        raise click.UsageError(str(error)) from None


def _budgets(given: tuple[str, ...], chosen: list[str], seconds: float | None) -> tuple[int | None, dict[str, int]]:
    """The cases that implementations share, and those that have their own: `N` and `NAME=N`."""
    shared, own = None, {}
    for text in given:
        name, _, number = text.rpartition("=")
        if not number.isdecimal() or int(number) < 1:
            raise click.UsageError(f"--examples is {text!r}; it must be a positive number, or IMPLEMENTATION=NUMBER")
        if name and name not in chosen:
            raise click.UsageError(f"--examples names {name!r}, which is none of --impl: {', '.join(chosen)}")
        if name:
            own[name] = int(number)
        else:
            shared = int(number)
    if shared is None and seconds is None and len(own) < len(chosen):
        shared = 2000
    return shared, own


def _package(mutants: tuple[str, ...], patches: tuple[Path, ...]) -> contextlib.AbstractContextManager:
    """The package that the workers import: a copy with faults in it where some are to be planted."""
    from moekit.testing.mutants.score import workers_have
    from moekit.testing.mutants.table import TABLE

    if unknown := set(mutants) - {m.name for m in TABLE}:
        raise click.UsageError(f"there is no mutant {sorted(unknown)[0]!r}; see `moekit mutants --list`")
    planted = [m for m in TABLE if m.name in mutants]
    return workers_have(*planted, *patches) if mutants or patches else contextlib.nullcontext()


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
    elif name not in EXECUTORS:
        raise click.UsageError(f"there is no implementation {name!r}; choose of {', '.join((*EXECUTORS, *PEERS))}")


def _shrunk(result: Any, save: Path | None, seconds: float, disarmed: bool) -> list[dict]:
    """The failures: the first of each fusion and implementation made small, in `seconds` for all, and appended to `save`."""
    from moekit.testing.case import FuzzCase
    from moekit.testing.failures import Failure, append

    rows, seen, until = [], set(), time.monotonic() + seconds
    for failure in result.failures:
        if (key := (failure.case.fusion, failure.implementation)) in seen:
            continue
        seen.add(key)
        made = fuzz_report.row(failure)
        rest = until - time.monotonic()
        if len(seen) > SHRUNK or rest < SHORTEST or result.stopped:
            result.left.append(f"a failure of {key[0]} ({key[1]}) was not made small")
        else:
            notes().print(f"making a failure of {key[0]} ({key[1]}) small …")
            try:
                made |= _small(failure, rest / max(1, SHRUNK - len(seen)), disarmed)
            except KeyboardInterrupt:
                result.stopped = "interrupted"
        if save is not None and save.is_dir():
            append(save, Failure(FuzzCase.from_json(made["case"]), failure.implementation, tuple(made["problems"])))
        rows.append(made)
    return rows


def _small(failure: Any, seconds: float, disarmed: bool) -> dict:
    """What changes in a failure's row when it is made small."""
    from moekit.testing.failures import fails, pasteable, problems, shrink
    from moekit.testing.peers import may_ask
    from moekit.testing.processes import Process

    process, name = Process(disarmed), failure.implementation
    still = lambda case: may_ask(name, case) and fails(process, case, name, failure.problems)  # noqa: E731
    try:
        case = shrink(failure.case, still, FEW if failure.fatal else MANY, seconds)
        said = problems(process, case, name, max(SHORTEST, seconds / 4)) or list(failure.problems)
    finally:
        process.end()
    return {"case": case.to_json(), "problems": said, "test": pasteable(case, name)}


def _replay(path: Path, implementations: tuple[str, ...], as_json: bool) -> None:
    """Run recorded cases, in a process that may die of them."""
    from moekit.testing.failures import load, problems
    from moekit.testing.processes import Process

    try:
        recorded = load(path)
    except (ValueError, FileError) as error:
        raise click.UsageError(str(error)) from None
    rows, skipped, process = [], 0, Process()
    for regression in recorded:
        for name in implementations or (regression.implementation,):
            if why := _unavailable(name):
                skipped += 1
                notes().print(f"skipped {regression.case.fusion}: {name}: {why}")
                continue
            found = problems(process, regression.case, name)
            rows.append({"fusion": regression.case.fusion, "implementation": name, "problems": found})
    process.end()
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
