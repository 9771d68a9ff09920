"""`moekit mutants`: plant faults in the compiler and see whether the numerical properties find them."""

import dataclasses
from pathlib import Path

import click

from moekit.cli.output import console, notes, print_json, table

FAILED = 1
WANTED = 0.98


@click.command(short_help="Plant faults in the compiler; see which are found.")
@click.argument("names", nargs=-1, metavar="[MUTANT]...")
@click.option("--patch", "patches", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="A unified diff as a mutant. Repeatable.")  # fmt: skip
@click.option("--historical", is_flag=True, help="The bugs that happened to others only.")
@click.option("--seconds", type=float, default=90.0, show_default=True, help="For one stage of one mutant.")
@click.option("--list", "only_list", is_flag=True, help="List the mutants and end.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def mutants(names: tuple[str, ...], patches: tuple[Path, ...], historical: bool, seconds: float, only_list: bool,
            as_json: bool) -> None:  # fmt: skip
    """Run numerical properties against each mutant of the lowering and the emitters, in a copy of the package.

    The verifier and golden files are switched off. Exit codes: 0 at least 98 % killed, 1 fewer, 2 asked wrongly.
    """
    from moekit.testing.mutants.score import score_all, try_patch
    from moekit.testing.mutants.table import HISTORICAL, TABLE

    chosen = [m for m in (HISTORICAL if historical else TABLE) if not names or m.name in names]
    if unknown := set(names) - {m.name for m in TABLE}:
        raise click.UsageError(f"there is no mutant {sorted(unknown)[0]!r}; see `moekit mutants --list`")
    if only_list:
        for m in chosen:
            console().print(f"{m.name}  [dim]{m.file}[/dim]  {m.about}", soft_wrap=True)
        return
    if patches and not names and not historical:
        chosen = []

    def tell(o) -> None:
        word = f"killed ({o.stage}, {o.cases} cases, {o.seconds:.0f} s)" if o.killed else "SURVIVED"
        notes().print(f"{o.name}: {word}", markup=False)

    found = [try_patch(p, seconds) for p in patches]
    for outcome in found:
        tell(outcome)
    found += score_all(chosen, seconds, tell)
    killed = sum(o.killed for o in found)
    if as_json:
        print_json({"mutants": len(found), "killed": killed, "rate": killed / max(1, len(found)),
                    "outcomes": [dataclasses.asdict(o) for o in found]})  # fmt: skip
    else:
        shown = table("mutant", "file", "killed by", "cases", "seconds", "what it does")
        for o in found:
            shown.add_row(
                o.name, o.file, o.stage if o.killed else "[bold red]survived[/]", str(o.cases), f"{o.seconds:.0f}", o.about
            )
        console().print(shown)
        console().print(f"{killed} of {len(found)} killed ({100 * killed / max(1, len(found)):.1f} %)")
    raise SystemExit(0 if killed >= WANTED * len(found) else FAILED)
