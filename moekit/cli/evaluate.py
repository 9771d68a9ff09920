"""`moekit evaluate`: a checkpoint's answers with fused and unfused kernels, beside transformers', and layer errors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moekit.cli.output import console, notes, print_json, table
from moekit.cli.platform import installed, prepare_jax
from moekit.cli.progress import bar, loading
from moekit.cli.weights import float8_activations, kept_weights
from moekit.errors import ArgumentError, UnavailableError

if TYPE_CHECKING:
    from moekit.cli.answers import Row

QUESTIONS, BATCH, NEW_TOKENS = 300, 4, 16
FUSED = ("pallas", "triton")
WHO = (*FUSED, "xla", "transformers")
ALLOWED = 300  # of so many questions one answer may be right with one kind of kernels alone


@click.command(short_help="Exact answers of fused and unfused kernels, and layer errors.")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Its folder, with a tokenizer and a chat template (default: the tiny one that moekit ships).",
)
@click.option("--questions", type=click.IntRange(1), default=QUESTIONS, show_default=True, help="How many, each task in turn.")
@click.option("--batch", type=click.IntRange(1), default=BATCH, show_default=True, help="Questions at once.")
@click.option("--new-tokens", type=click.IntRange(1), default=NEW_TOKENS, show_default=True, help="Of an answer, at most.")
@click.option("--kernels", type=click.Choice(WHO), multiple=True,
              help="Who answers; may be repeated (default: the first fused kind, xla, transformers).")  # fmt: skip
@click.option("--dtype", "dtypes", type=click.Choice(["float32", "float16", "bfloat16"]), multiple=True,
              help="Of the weights; may be repeated (default: float32 and bfloat16).")  # fmt: skip
@kept_weights
@float8_activations
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="Devices to share the model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    checkpoint: Path | None,
    questions: int,
    batch: int,
    new_tokens: int,
    kernels: tuple[str, ...],
    dtypes: tuple[str, ...],
    weights: str | None,
    activations: str | None,
    tp: int,
    as_json: bool,
) -> None:
    """Ask a checkpoint questions that have one answer, with each kind of kernels and in each dtype.

    Counts exact answers and those that differ from the unfused kernels', and compares each layer with a float64 reference.
    Exit code 1 if fused and unfused kernels do not have equally many answers right, but for one of 300.
    """
    for needed, extra in (("jax", "jax"), ("safetensors", "jax"), ("tokenizers", "text"), ("jinja2", "text")):
        if not installed(needed):
            raise UnavailableError(f"evaluate needs {needed}; install moekit[{extra}]")
    there = installed("transformers") and installed("torch")
    if "transformers" in kernels and not there:
        raise UnavailableError("--kernels transformers needs transformers and torch; install moekit[dev]")
    prepare_jax()
    from moekit.cli import answers, run
    from moekit.cli.decode import checked_tp
    from moekit.jax.doors import best
    from moekit.models.qwen3next import SHIPPED, Config, channel_of, load
    from moekit.models.qwen3next.questions import held_out
    from moekit.models.qwen3next.text import Text

    run.check_kernels(*kernels)
    directory = checkpoint or SHIPPED
    config, text, asked = Config.from_json(directory), Text(directory), held_out(questions)
    prompts = [text.encode_chat([{"role": "user", "content": question.text}]) for question in asked]
    tp, batch = checked_tp(config, tp), min(batch, questions)
    default = (best(), "xla", *(["transformers"] if there else []))
    who = [name for name in WHO if name in (kernels or default)]
    if activations and not {*who} - {"xla", "transformers"}:
        what = f"--activations is {activations}, to which kernels {' and '.join(who)} round nothing"
        raise ArgumentError(f"{what}; add --kernels pallas, or leave it out")
    rows: list[Row] = []
    for dtype in dtypes or ("float32", "bfloat16"):
        with loading(f"loading {directory.name}") as advance:
            room = run.room(prompts[:batch], new_tokens)
            told = {"weights": weights, "activations": activations}
            model = load(directory, run.mesh_of(tp), dtype, **told, room=room, progress=advance)
        for name in who:
            with bar(f"{name} in {dtype}") as advance:
                if name == "transformers":
                    made = answers.by_transformers(directory, dtype, prompts, new_tokens, text.ends(config), advance)
                    error = None
                else:
                    made = answers.by(model, name, prompts, batch, new_tokens, text.ends(config), advance)
                    error = answers.layer_error(model, name, prompts[:batch])
            rows.append(answers.Row(name, dtype, [text.decode(tokens).strip() for tokens in made], error))
    report = {
        "checkpoint": str(directory),
        "platform": run.devices()[0].platform,
        "tp": tp,
        "questions": len(asked),
        "batch": batch,
        "all_reduce": channel_of(run.mesh_of(tp), batch, config.hidden_size, next((n for n in who if n in FUSED), "xla"))[1],
        "rows": [answers.scored(row, asked, rows) for row in rows],
    }
    report["agree"] = _agree(report["rows"], questions)
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not report["agree"]:
        raise click.exceptions.Exit(1)


def _agree(rows: list[dict[str, Any]], questions: int) -> bool:
    """Whether fused and unfused kernels have equally many answers right in each dtype, but for one of ALLOWED."""
    right = {(row["kernels"], row["dtype"]): row["right"] for row in rows}
    pairs = [(count, right.get(("xla", dtype))) for (name, dtype), count in right.items() if name in FUSED]
    return all(other is None or abs(count - other) <= max(1, questions // ALLOWED) for count, other in pairs)


def _show(report: dict[str, Any]) -> None:
    out, total = console(), report["questions"]
    out.print(f"{report['checkpoint']}: {total} questions, {report['batch']} at once", soft_wrap=True, markup=False)
    tasks = list(report["rows"][0]["tasks"])
    made = table("kernels", "dtype", "right", *tasks, "unlike xla's", "worst layer's error", title="")
    for row in report["rows"]:
        differ = "–" if row["differ"] is None else str(row["differ"])
        error = "–" if row["layer_error"] is None else f"{row['layer_error']['error']:.1e} ({row['layer_error']['layer']})"
        shares = [f"{right}/{asked}" for right, asked in row["tasks"].values()]
        made.add_row(row["kernels"], row["dtype"], f"{row['right']}/{total}", *shares, differ, error)
    out.print(made)
    if not report["agree"]:
        notes().print("moekit's kernels and xla do not have equally many answers right")
