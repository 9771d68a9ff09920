"""`moekit quantize`: an FP8 checkpoint of one in bfloat16 or float32."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import click

from moekit.cli.output import console, in_bytes, print_json
from moekit.cli.platform import installed, prepare_jax
from moekit.cli.progress import loading
from moekit.errors import UnavailableError


@click.command(short_help="Write a checkpoint's matrices in FP8, with block scales.")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def quantize(directory: Path, out: Path, as_json: bool) -> None:
    """Write the checkpoint in DIRECTORY, of bfloat16 or float32, to a new folder OUT with FP8 weights.

    Matrices of projections and experts become float8_e4m3fn with a float32 scale for each 128 × 128 block; all else is copied,
    as are those with a side above 128 that is no multiple of it, which is said. No device is used. Exit code 1 if the
    checkpoint is broken, is no such one, or holds NaN or an infinity.
    """
    for needed in ("jax", "safetensors"):
        if not installed(needed):
            raise UnavailableError(f"quantize needs {needed}; install moekit[jax]")
    prepare_jax()
    from moekit.models.qwen3next.quantize import BLOCK
    from moekit.models.qwen3next.quantize import quantize as written

    with loading("quantising") as progress:
        made = written(directory, out, progress)
    if as_json:
        print_json({"checkpoint": str(directory), **asdict(made), "directory": str(made.directory)})
        return
    what = f"{made.quantised} matrices in FP8, {in_bytes(made.before)} became {in_bytes(made.after)}"
    files = "1 file" if made.files == 1 else f"{made.files} files"
    console().print(f"wrote {made.directory}: {what} in {files}", soft_wrap=True)
    if made.uneven:
        kinds = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", module) for module in made.uneven)
        stays = f"{len(made.uneven)} modules stay as they are, of which a side above {BLOCK} is no multiple of it"
        console().print(f"{stays}: {', '.join(kinds)}", soft_wrap=True)
