"""`moekit export`: a fusion as one standalone Python file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moekit.cli.output import OutputFile, notes, print_source
from moekit.cli.show import all_parameters, parse_parameters, parse_sizes, refuse_empty_axes
from moekit.files import write_text
from moekit.fusions import FUSIONS


@click.command(short_help="Write a fusion as one standalone Python file.")
@click.argument("fusion", type=click.Choice(list(FUSIONS)), metavar="FUSION")
@click.option("--backend", type=click.Choice(["triton"]), default="triton", show_default=True, help="Whose kernels.")
@click.option("--sizes", callback=parse_sizes, help="Sizes of axes, H=4096 (default: Qwen3-Next's); H?=1 for a dimension of 1.")
@click.option("--dtype", default="bfloat16", show_default=True, help="Of every tensor that may have it.")
@click.option("--params", callback=parse_parameters, help="Parameters of the fusion, k=10,renormalize=false.")
@click.option("--schedule", help='As `moekit show --as schedule` prints it: "tile:T:1 loop:H:1024 warps:4 stages:1".')
@click.option("-o", "--output", type=OutputFile(), help="The file (default: stdout).")
def export(
    fusion: str, backend: str, sizes: dict[str, int], dtype: str, params: dict[str, Any], schedule: str | None,
    output: Path | None,
) -> None:  # fmt: skip
    """Write FUSION as one standalone Python file: kernels, launcher and self-test.

    The file imports torch and triton alone. Weight-side sizes, dtypes and parameters are fixed in it; the number of tokens and
    all strides are not: a GEMM has the kernels of every class of rows. Run it to test it.
    """
    from moekit.compile.schedule import Schedule
    from moekit.export import export as written

    refuse_empty_axes(FUSIONS[fusion], sizes)
    given = Schedule.parse(schedule) if schedule else None
    text = written(FUSIONS[fusion], dtype, sizes, all_parameters(FUSIONS[fusion], params), given)
    if output is None:
        print_source(text, "python")
        return
    write_text(output, text)
    notes().print(f"wrote {output}; test it with: python {output}", soft_wrap=True)
