"""`moekit inspect`: what a checkpoint holds and what it needs, from its headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moekit.cli.output import console, in_bytes, print_json, table
from moekit.cli.platform import gpus, installed, prepare_jax
from moekit.cli.weights import kept_weights
from moekit.errors import UnavailableError

if TYPE_CHECKING:
    from moekit.models.qwen3next.checkpoint import Checkpoint
    from moekit.models.qwen3next.files import Tensor

MOST_MEMORY = 1e12  # GB
PROMPT = 1024  # tokens of a prompt that are read at once


@click.command(short_help="What a checkpoint holds, and what it needs of each device.")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="Devices to share the model.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once.")
@click.option("--length", type=click.IntRange(1), default=4096, show_default=True, help="Tokens of each.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Of the weights (default: as stored).")
@kept_weights
@click.option("--memory", type=click.FloatRange(0, min_open=True), help="GB of a device (default: of the GPUs here, if any).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(
    directory: Path, tp: int, batch: int, length: int, dtype: str | None, weights: str | None, memory: float | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Read a checkpoint's config and headers: its sizes, what is skipped, bytes of each rank, and what fits.

    No tensor is read and no device is used. Exit code 1 if the checkpoint is broken.
    """
    for needed in ("jax", "safetensors"):
        if not installed(needed):
            raise UnavailableError(f"inspect needs {needed}; install moekit[jax]")
    prepare_jax()
    from moekit.models.qwen3next import Config, ConfigError, Room
    from moekit.models.qwen3next.checkpoint import Checkpoint, weights_dtype
    from moekit.models.qwen3next.config import check_tensor_parallel
    from moekit.models.qwen3next.memory import needed as need_of

    if memory is not None and not memory < MOST_MEMORY:
        raise click.BadParameter(f"{memory} is no number of GB", param_hint="--memory")
    config = Config.from_json(directory)
    try:
        check_tensor_parallel(config, tp)
    except ConfigError as error:
        raise click.BadParameter(str(error), param_hint="--tp") from None
    with Checkpoint(directory, config) as checkpoint:
        kind = weights_dtype(checkpoint, dtype)
        if weights:
            checkpoint.keep_float8(weights != "auto", tp)
        room = Room(batch, length, min(length, PROMPT))
        need = need_of(checkpoint.config, tp, kind, room)
        each = need_of(checkpoint.config, tp, kind, Room(1, length)).cache
        free = memory * 1e9 if memory else min((gpu.gigabytes * 2**30 for gpu in gpus()), default=None)
        report = {
            **_held(checkpoint),
            "tp": tp,
            "weights_dtype": kind,
            "batch": batch,
            "length": length,
            "rank": {
                "weights": need.weights,
                "copied": need.copied,
                "cache": need.cache,
                "temporaries": need.temporaries,
                "total": need.total,
                "one_sequence": each,
            },
            "memory": None if free is None else int(free),
            "fits": None if free is None else need.total <= free,
            "sequences": None if free is None else max(0, int(free - need.weights - need.temporaries) // each),
        }
    if as_json:
        print_json(report)
    else:
        _show(report)


def _held(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the files hold."""
    from math import prod

    from moekit.models.qwen3next.config import GDN

    config, form = checkpoint.config, checkpoint.form
    part = {name: prod(shape) for name, shape in form.shapes.items()}
    experts = sum(size for name, size in part.items() if ".mlp.experts." in name)
    total = sum(part.values())
    fields = config.to_json()
    return {
        "checkpoint": str(checkpoint.directory),
        "model_type": config.model_type,
        "config": {name: value for name, value in fields.items() if name not in ("architectures", "model_type", "layer_types")},
        "layers": {"linear_attention": config.layer_types.count(GDN), "all": config.num_layers},
        "files": len({tensor.file for tensor in checkpoint.tensors.values()}),
        "tensors": len(checkpoint.tensors),
        "experts": "fused" if form.fused else "apart",
        "prefix": form.prefix,
        "dtype": checkpoint.dtype,
        "fp8": _fp8(checkpoint),
        "parameters": total,
        "active": total - experts + experts * config.num_experts_per_tok // config.num_experts,
        "bytes": sum(map(_size, (*(checkpoint.tensors[name] for name in part), *checkpoint.scales.values()))),
        "skipped": {
            start: {"tensors": len(found), "bytes": sum(map(_size, found))}
            for start, found in checkpoint.skipped.items()
            if found
        },
    }


def _fp8(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The weights that are in FP8, and their scales; None where there are none."""
    scales, blocks = checkpoint.scales, checkpoint.config.blocks
    if blocks is None or not scales:
        return None
    return {
        "tensors": len(scales),
        "bytes": sum(_size(checkpoint.tensors[name]) for name in scales),
        "scales": sum(map(_size, scales.values())),
        "block": [blocks.rows, blocks.columns],
    }


def _size(tensor: Tensor) -> int:
    return tensor.stop - tensor.start


def _show(report: dict[str, Any]) -> None:
    out, config, rank = console(), report["config"], report["rank"]
    attention = report["layers"]["all"] - report["layers"]["linear_attention"]
    billions = [f"{report[name] / 1e9:.2f} billion" for name in ("parameters", "active")]
    chosen = f"{config['num_experts_per_tok']} of them for a token"
    made = table("", "")
    made.add_row("model", f"{report['model_type']}, {report['layers']['linear_attention']} delta nets, {attention} attentions")
    made.add_row("parameters", f"{billions[0]}, {billions[1]} of them for a token")
    made.add_row("experts", f"{config['num_experts']}, {chosen}, {report['experts']}")
    made.add_row("files", f"{report['files']}, {report['tensors']} tensors, {in_bytes(report['bytes'])} of {report['dtype']}")
    if fp8 := report["fp8"]:
        blocks = " × ".join(map(str, fp8["block"]))
        held = f"{in_bytes(fp8['bytes'])} beside {in_bytes(fp8['scales'])} of scales for {blocks}"
        made.add_row("FP8", f"{fp8['tensors']} of them, {held}, read to {report['weights_dtype']}")
    for start, found in report["skipped"].items():
        made.add_row("skipped", f"{start}*: {found['tensors']} tensors, {in_bytes(found['bytes'])}")
    out.print(made)
    out.print()
    title = f"each of {report['tp']} ranks, {report['weights_dtype']}, {report['batch']} × {report['length']} tokens"
    need = table("", "", title=title)
    need.add_row("weights", f"{in_bytes(rank['weights'])}, of which {in_bytes(rank['copied'])} on every rank")
    need.add_row("cache", f"{in_bytes(rank['cache'])}, {in_bytes(rank['one_sequence'])} a sequence")
    need.add_row("temporaries", f"about {in_bytes(rank['temporaries'])}")
    need.add_row("in all", in_bytes(rank["total"]))
    if report["memory"] is not None:
        fits = "[green]fits[/green]" if report["fits"] else "[red]does not fit[/red]"
        need.add_row("", f"{fits} in {in_bytes(report['memory'])}, where {report['sequences']} sequences would")
    out.print(need)
