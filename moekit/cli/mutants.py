"""`moekit mutants`: plant faults in the compiler and see whether the numerical properties find them."""

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moekit.cli.output import OutputFile, console, notes, print_json, table
from moekit.errors import FileError
from moekit.files import read_json, write_text

if TYPE_CHECKING:
    from moekit.testing.mutants import Mutant, Outcome

FAILED = 1
WANTED = 0.98


@click.command(short_help="Plant faults in the compiler; see which are found.")
@click.argument("names", nargs=-1, metavar="[MUTANT]...")
@click.option("--patch", "patches", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A unified diff as a mutant. Repeatable.")  # fmt: skip
@click.option("--historical", is_flag=True, help="The bugs that happened to others only.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=90.0, show_default=True,
              help="Of the processor, for one stage of one mutant.")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), help="Mutants at a time.  [default: half as many as there are cores]")
@click.option("--list", "only_list", is_flag=True, help="List the mutants and end.")
@click.option("--markdown", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Print what --json-file wrote as a Markdown table and end.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--json-file", type=OutputFile(), help="Write the outcomes as JSON, as they come.")
def mutants(names: tuple[str, ...], patches: tuple[Path, ...], historical: bool, seconds: float, workers: int | None,
            only_list: bool, markdown: Path | None, as_json: bool, json_file: Path | None) -> None:  # fmt: skip
    """Run numerical properties against each mutant of the lowering and the emitters, in a copy of the package.

    The verifier and golden files are switched off. Where no mutants are named the package as it is goes first, which must
    survive. Changes that are proven to change no result are listed, not counted. Exit codes: 0 at least 98 % killed, 1 fewer,
    or the package as it is fails, 2 asked wrongly.
    """
    from moekit.testing.mutants.score import markdown as as_markdown
    from moekit.testing.mutants.score import score_all

    if markdown:
        try:
            shown = as_markdown(read_json(markdown)["outcomes"])
        except (FileError, KeyError, TypeError) as error:
            raise click.UsageError(f"{markdown} is not what --json-file writes: {error}") from None
        click.echo(shown)
        return
    chosen = _chosen(names, historical, bool(patches))
    if only_list:
        for m in chosen:
            console().print(f"{m.name}  [dim]{m.file}[/dim]  {m.about}", soft_wrap=True)
        _show_equivalent()
        return
    every = [*([] if names or patches else [None]), *patches, *chosen]
    ended: list[Outcome] = []

    def tell(o: "Outcome") -> None:
        ended.append(o)
        how = f"{o.stage}, " * o.killed + f"cases: {o.cases}, {o.seconds:.0f} s"
        notes().print(f"{len(ended)}/{len(every)} {o.name}: {'killed' if o.killed else 'SURVIVED'} ({how})", markup=False)
        if json_file:
            write_text(json_file, json.dumps(_summary(ended), indent=1))

    at_once = workers or max(1, (os.cpu_count() or 2) // 2)
    found = score_all(every, seconds, tell, at_once)
    summary = _summary(found)
    if json_file:
        write_text(json_file, json.dumps(summary, indent=1))
    if as_json:
        print_json(summary)
    else:
        _show(found)
    sound = summary["unchanged"] is None or not summary["unchanged"]["killed"]
    raise SystemExit(0 if sound and summary["killed"] >= WANTED * summary["mutants"] else FAILED)


def _chosen(names: tuple[str, ...], historical: bool, patches: bool) -> "list[Mutant]":
    """The mutants of the table that are meant: all of them, unless some or patches are named."""
    from moekit.testing.mutants.table import HISTORICAL, TABLE

    if unknown := set(names) - {m.name for m in TABLE}:
        raise click.UsageError(f"there is no mutant {sorted(unknown)[0]!r}; see `moekit mutants --list`")
    if patches and not names and not historical:
        return []
    return [m for m in (HISTORICAL if historical else TABLE) if not names or m.name in names]


def _parted(found: "list[Outcome]") -> "tuple[Outcome | None, list[Outcome]]":
    """What became of the package as it is, and of the mutants."""
    from moekit.testing.mutants.score import UNCHANGED

    return next((o for o in found if o.name == UNCHANGED), None), [o for o in found if o.name != UNCHANGED]


def _summary(found: "list[Outcome]") -> dict:
    unchanged, planted = _parted(found)
    killed = sum(o.killed for o in planted)
    return {
        "mutants": len(planted),
        "killed": killed,
        "rate": killed / max(1, len(planted)),
        "unchanged": None if unchanged is None else dataclasses.asdict(unchanged),
        "outcomes": [dataclasses.asdict(o) for o in planted],
    }


def _show(found: "list[Outcome]") -> None:
    unchanged, planted = _parted(found)
    killed = sum(o.killed for o in planted)
    shown = table("mutant", "file", "killed by", "cases", "seconds", "what it does")
    for o in planted:
        by = o.stage if o.killed else "[bold red]survived[/]"
        shown.add_row(o.name, o.file, by, str(o.cases), f"{o.seconds:.0f}", o.about)
    console().print(shown)
    if unchanged is not None:
        fails = f"FAILS ({unchanged.by}), so that the kills mean nothing"
        fine = f"passes all {unchanged.cases} cases"
        console().print(f"the package as it is {fails if unchanged.killed else fine}", markup=False)
    console().print(f"{killed} of {len(planted)} killed ({100 * killed / max(1, len(planted)):.1f} %)")
    if unchanged is not None:
        _show_equivalent()


def _show_equivalent() -> None:
    """Changes of the sources that change no result, and why."""
    from moekit.testing.mutants.table import EQUIVALENT

    for m in EQUIVALENT:
        console().print(f"not counted: {m.name} ({m.about}): {m.proof}", markup=False, soft_wrap=True)
