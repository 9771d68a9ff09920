"""`moekit decode`: greedy decoding with a Qwen3-Next checkpoint, sharded, with both kinds of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from moekit.cli.output import console, notes, print_json, table
from moekit.cli.platform import installed, prepare_jax
from moekit.cli.processes import several_processes
from moekit.cli.progress import bar, loading
from moekit.cli.weights import kept_weights
from moekit.errors import UnavailableError

if TYPE_CHECKING:
    from moekit.cli.agreement import Closeness, Difference
    from moekit.models.qwen3next import Config, Generation
    from moekit.models.qwen3next.questions import Question

BATCH, PROMPT_LENGTH, NEW_TOKENS = 2, 8, 16
DEMO = 7  # the seed of questions of long words
KINDS = ("pallas", "triton", "xla")


def parse_ids(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[list[int]]:
    """Token ids from "1,2,3"; spaces will do too."""
    prompts = []
    for text in values:
        try:
            prompts.append([int(word) for word in text.replace(",", " ").split()])
        except ValueError:
            raise click.BadParameter(f"{text!r} is not a list of token ids such as 1,2,3") from None
        if not prompts[-1]:
            raise click.BadParameter("a prompt needs at least one token id")
    return prompts


@click.command(short_help="Decode with Qwen3-Next, sharded, and compare its kernels.")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A Hugging Face Qwen3-Next checkpoint (default: the tiny one that moekit ships).",
)
@click.option("--prompt-ids", multiple=True, callback=parse_ids, help='A prompt, "1,2,3"; may be repeated.')
@click.option("--batch", type=click.IntRange(1), help=f"How many random prompts (default {BATCH}).")
@click.option("--prompt-len", type=click.IntRange(1), help=f"Tokens of each (default {PROMPT_LENGTH}).")
@click.option("--new-tokens", type=click.IntRange(1), default=NEW_TOKENS, show_default=True, help="Tokens to decode.")
@click.option("--tp", type=click.IntRange(1), help="Devices to share the model (default: as many as it allows).")
@click.option("--ep", type=click.IntRange(1), default=1, show_default=True, help="Groups of devices to deal the experts to.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the weights (default: as stored; of the shipped model, float32).",
)
@kept_weights
@click.option(
    "--kernels",
    type=click.Choice(KINDS),
    help="Whose tokens and fusions to show; xla's are timed, too (default: pallas, or triton where jax has no Pallas-Triton).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@several_processes
def decode(
    checkpoint: Path | None,
    prompt_ids: list[list[int]],
    batch: int | None,
    prompt_len: int | None,
    new_tokens: int,
    tp: int | None,
    ep: int,
    dtype: str | None,
    weights: str | None,
    kernels: str | None,
    as_json: bool,
) -> None:
    """Decode greedily with a Qwen3-Next checkpoint, tensor parallel.

    Runs twice, with moekit's kernels and with XLA's, and compares them: exit code 1 if they disagree. In float32 the tokens
    must be equal; in a narrower dtype the logits of the same tokens must lie as near to a float32 run's. A sequence ends at the
    checkpoint's end tokens. Without a checkpoint and prompts, the shipped model is asked four questions.
    Without a GPU, 8 virtual CPU devices share the model and the kernels run in interpret mode.
    """
    if prompt_ids and (batch or prompt_len):
        raise click.UsageError(
            "--prompt-ids says the prompts; --batch and --prompt-len make random ones: give one or the other"
        )
    for needed in ("jax", "safetensors"):
        if not installed(needed):
            raise UnavailableError(f"decode needs {needed}; install moekit[jax]")
    prepare_jax()
    from moekit.cli import agreement, run
    from moekit.jax import doors
    from moekit.models.qwen3next import SHIPPED, Config, channel_of, load
    from moekit.models.qwen3next.questions import TASKS, held_out

    fused = kernels if kernels in doors.DOORS else doors.best()
    run.check_kernels(kernels)
    kernels = kernels or fused
    directory, dtype = (checkpoint, dtype) if checkpoint else (SHIPPED, dtype or "float32")
    config = replace(Config.from_json(directory), ep=ep)
    tp = checked_tp(config, tp)
    questions = [] if checkpoint or prompt_ids or batch or prompt_len else held_out(len(TASKS), DEMO)
    asked = prompt_ids or [question.tokens for question in questions]
    prompts = asked or run.random_prompts(config, batch or BATCH, prompt_len or PROMPT_LENGTH)
    _check_prompts(config, prompts)
    ends = _ends(directory, config)

    with loading(f"loading {directory.name}") as advance:
        room = run.room(prompts, new_tokens)
        model = load(directory, run.mesh_of(tp), dtype, weights=weights, ep=ep, room=room, progress=advance)
    runs: dict[str, Generation] = {}
    for which in dict.fromkeys((kernels, fused, "xla")):
        with bar(f"decoding with {which}") as advance:
            runs[which] = run.run(model, prompts, new_tokens, ends, which, lambda p, advance=advance: advance(p.step, p.total))
    found = agreement.difference(runs[fused], runs["xla"])
    close = None
    if str(model.dtype) != "float32":
        with bar("comparing logits") as advance:
            channel, _ = channel_of(model.mesh, len(prompts), config.hidden_size, fused)
            close = agreement.closeness(model, prompts, runs[kernels].tokens, fused, advance, channel)
    agree = found is None if close is None else close.within
    report = {
        **_setting(directory, checkpoint is None, config, model),
        "kernels": kernels,
        "fused": fused,
        "questions": _answered(questions, runs[kernels]),
        "prompts": [list(p) for p in prompts],
        "tokens": [list(t) for t in runs[kernels].tokens],
        "timing": {which: _timing(generation) for which, generation in runs.items()},
        "served": run.served(model, len(prompts), kernels),
        "all_reduce": channel_of(model.mesh, len(prompts), config.hidden_size, kernels)[1],
        "ends": list(ends),
        "agreement": {"agree": agree, **_agreement(found, fused), **_logits(close, fused)},
    }
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not agree:
        raise click.exceptions.Exit(1)


def checked_tp(config: Config, tp: int | None) -> int:
    """The ranks asked for, if this machine and this model allow them; where None, the most they allow."""
    from moekit.cli import run
    from moekit.models.qwen3next import ConfigError
    from moekit.models.qwen3next.config import check_tensor_parallel

    devices = run.devices()
    tp = run.largest_tp(config, len(devices)) if tp is None else tp
    if tp > len(devices):
        raise click.BadParameter(f"{tp} is more than the {len(devices)} {devices[0].platform} devices here", param_hint="--tp")
    idle = {device.process_index for device in devices} - {device.process_index for device in devices[:tp]}
    if idle:
        wrong = f"{tp} leaves process {min(idle)} without a device; start fewer processes or give each fewer devices"
        raise click.BadParameter(wrong, param_hint="--tp")
    try:
        check_tensor_parallel(config, tp)
    except ConfigError as error:
        raise click.BadParameter(str(error), param_hint="--tp") from None
    return tp


def _check_prompts(config: Config, prompts: list[list[int]]) -> None:
    for prompt in prompts:
        for token in prompt:
            if not 0 <= token < config.vocab_size:
                raise click.BadParameter(
                    f"{token} is no token id; the model has {config.vocab_size}, from 0",
                    param_hint="--prompt-ids",
                )


def _ends(directory: Path, config: Config) -> tuple[int, ...]:
    """The checkpoint's end tokens; those that its vocabulary lacks end nothing, which is said."""
    from moekit.models.qwen3next import end_tokens

    named = end_tokens(directory, config)
    for token in named:
        if token >= config.vocab_size:
            said = f"the end token {token} is outside the vocabulary of {config.vocab_size} and ends nothing"
            notes().print(said, soft_wrap=True)
    return tuple(token for token in named if token < config.vocab_size)


def _answered(questions: Sequence[Question], run: Generation) -> list[dict[str, Any]]:
    """What the shipped model was asked, what it should have said and what it said."""
    from moekit.models.qwen3next.questions import said

    given = zip(questions, run.tokens if questions else (), strict=True)
    return [{"question": q.text, "answer": q.answer, "said": said(tokens)} for q, tokens in given]


def _setting(directory: Path, shipped: bool, config: Config, model: Any) -> dict[str, Any]:
    import jax

    from moekit.cli import run

    device = run.devices()[0]
    return {
        "checkpoint": str(directory),
        "shipped": shipped,
        "layers": config.num_layers,
        "dtype": str(model.dtype),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": len(run.devices()),
        "tp": model.tp,
        "ep": config.ep,
        "versions": {"jax": jax.__version__},
    }


def _timing(generation: Generation) -> dict[str, float | int]:
    return {
        "prefill_seconds": generation.prefill_seconds,
        "first_step_seconds": generation.first_step_seconds,
        "steady_steps": generation.steady_steps,
        "steady_seconds": generation.steady_seconds,
        "steady_tokens_per_second": generation.steady_tokens_per_second,
    }


def _agreement(found: Difference | None, fused: str) -> dict[str, Any]:
    if found is None:
        return {"equal": True}
    mine, xla = found.tokens
    return {
        "equal": False,
        "sequence": found.sequence,
        "position": found.position,
        fused: mine,
        "xla": xla,
    }


def _logits(close: Closeness | None, fused: str) -> dict[str, Any]:
    if close is None:
        return {}
    sides = {fused: close.fused, "xla": close.xla, "bound": close.bounds}
    return {"logits": {side: {"all": e[0], "worst": e[1]} for side, e in sides.items()} | {"rows": close.rows}}


def _show(report: dict[str, Any]) -> None:
    out = console()
    kind = "the tiny model that moekit ships:" if report["shipped"] else "checkpoint"
    out.print(f"{kind} {report['checkpoint']}", soft_wrap=True, markup=False)
    virtual = ", virtual: kernels are interpreted and times mean little" if report["platform"] == "cpu" else ""
    shared = f"tp {report['tp']}" if report["ep"] == 1 else f"tp {report['tp']}, ep {report['ep']},"
    here = f"{shared} of {report['devices']} {report['device']} devices{virtual}"
    out.print(f"{report['layers']} layers, {report['dtype']}, {here}", soft_wrap=True, markup=False)
    out.print()
    if report["questions"]:
        out.print(_question_table(report["questions"]))
    else:
        for prompt, tokens in zip(report["prompts"], report["tokens"], strict=True):
            out.print(f"[dim]{_ids(prompt)} →[/dim] [bold]{_ids(tokens)}[/bold]", soft_wrap=True)
    out.print()
    out.print(_timing_table(report["timing"]))
    out.print(_served_table(report["served"], report["kernels"]))
    out.print(f"sums over ranks: {report['all_reduce']}", soft_wrap=True, markup=False)
    _show_agreement(report["agreement"], report["fused"], report["tokens"], report["dtype"])


def _question_table(questions: list[dict[str, str]]) -> Any:
    made = table("question", "answer", "")
    for asked in questions:
        right = "[green]right[/green]" if asked["said"] == asked["answer"] else f"[red]wrong: {asked['answer']}[/red]"
        made.add_row(asked["question"], f"[bold]{escape(asked['said'])}[/bold]", right)
    return made


def _ids(ids: list[int]) -> str:
    shown = " ".join(map(str, ids[:32]))
    return f"{shown} … ({len(ids)})" if len(ids) > 32 else shown


def _timing_table(timing: dict[str, dict[str, float]]) -> Any:
    made = table("kernels", "first prefill", "first step", "a step then", "tokens/s then")
    for which, t in timing.items():
        first = f"{t['first_step_seconds']:.2f} s" if t["first_step_seconds"] else "–"
        each = f"{1e3 * t['steady_seconds'] / t['steady_steps']:.2f} ms" if t["steady_steps"] else "–"
        rate = f"{t['steady_tokens_per_second']:.1f}" if t["steady_steps"] else "–"
        made.add_row(which, f"{t['prefill_seconds']:.2f} s", first, each, rate)
    return made


def _served_table(served: dict[str, dict[str, Any]], kernels: str) -> Any:
    made = table("fusion", "served by", "kernels in a step", title=f"\n--kernels {kernels}")
    for name, how in served.items():
        made.add_row(name, how["implementation"], str(how["kernels"]) if how["kernels"] else "–")
    return made


def _show_agreement(agreement: dict[str, Any], fused: str, tokens: list[list[int]], dtype: str) -> None:
    out = console()
    out.print()
    if fused == "xla":
        out.print("xla alone, compared with nothing: no kernels are to be had here (see `moekit doctor`)", soft_wrap=True)
        return
    verdict = f"[green]{fused} and xla agree[/green]" if agreement["agree"] else f"[red]{fused} and xla disagree[/red]"
    if agreement["equal"]:
        said = f"all {sum(map(len, tokens))} new tokens are equal"
    else:
        mine, xla = ("none" if agreement[k] is None else agreement[k] for k in (fused, "xla"))
        at = f"new token {agreement['position']} of sequence {agreement['sequence']}"
        said = f"{at} is {mine} with {fused} and {xla} with xla"
    if "logits" not in agreement:
        out.print(f"{verdict}: {said}", soft_wrap=True)
        return
    found = agreement["logits"]
    sides = [tuple(found[side][rows] for side in (fused, "xla", "bound")) for rows in ("all", "worst")]
    said_of = (f"{{:.2g}} with {fused} and {{:.2g}} with xla ({{:.2g}} allowed)", "in the worst row {:.2g} and {:.2g} ({:.2g})")
    near = "; ".join(text.format(*side) for text, side in zip(said_of, sides, strict=True))
    out.print(f"{verdict}: fed the same tokens, their logits are off from a float32 run's by {near}", soft_wrap=True)
    why = "" if agreement["equal"] or not agreement["agree"] else f": in {dtype} two near-equal logits fall either way"
    out.print(f"{said}{why}", soft_wrap=True)
