"""`moekit list`: the fusions there are."""

import click

from moekit.cli.output import console, print_json, table


@click.command("list", short_help="List the fusions.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_fusions(as_json: bool) -> None:
    """List the fusions: name, parameters, tensors and what each computes."""
    from moekit.fusions import FUSIONS

    rows = [describe(fusion) for fusion in FUSIONS.values()]
    if as_json:
        print_json(rows)
        return
    out = console()
    for row in rows:
        out.print(f"[bold]{row['name']}[/bold]", row["signature"], soft_wrap=True, markup=True)
        out.print(f"  {row['doc']}", soft_wrap=True, markup=False)
        tensors = table("", "", "", "")
        for name, t in row["tensors"].items():
            tensors.add_row("  " + name, t["role"], f"[{t['shape']}]".replace("[", r"\["), ", ".join(t["dtypes"]))
        out.print(tensors)


def describe(fusion) -> dict:
    """What the command says of a fusion, as JSON would have it."""
    tensors = {
        name: {"role": spec.role, "shape": ", ".join(spec.shape.split()), "dtypes": list(spec.dtypes)}
        for name, spec in fusion.tensors.items()
    }
    return {
        "name": fusion.name,
        "signature": str(fusion.signature),
        "tensors": tensors,
        "doc": fusion.doc.split("\n")[0],
    }
