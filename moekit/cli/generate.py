"""`moekit generate`: text in, text out, with a checkpoint's own tokenizer, chat template and settings."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moekit.cli.output import notes, print_json
from moekit.cli.platform import installed, prepare_jax
from moekit.cli.processes import process_count, several_processes
from moekit.cli.progress import loading
from moekit.cli.weights import float8_activations, kept_weights
from moekit.errors import ArgumentError, NonFiniteError, ShapeError, UnavailableError

if TYPE_CHECKING:
    from moekit.models.qwen3next import Config, Engine, Sampling
    from moekit.models.qwen3next.text import Text

NEW_TOKENS, SLOTS, PIECE, SEEDS = 256, 16, 256, 2**32
Emit = Callable[[str], None]


@click.command(short_help="Text in, text out: completions and chat.")
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Its folder (default: the tiny one that moekit ships).",
)
@click.option("--prompt", "prompts", multiple=True, help="A text to continue; may be repeated.")
@click.option("--prompts-file", type=click.File(encoding="utf-8"), help="Prompts, one a line; - is stdin.")
@click.option("--chat", is_flag=True, help="Prompts are a user's messages; without any, converse over stdin.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=NEW_TOKENS, show_default=True, help="For each prompt.")
@click.option("--temperature", type=click.FloatRange(0), help="0 takes the likeliest (default: the checkpoint's).")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Draw among the likeliest that reach this.")
@click.option("--top-k", type=click.IntRange(0), help="Draw among so many; 0: all.")
@click.option(
    "--seed", type=click.IntRange(0, SEEDS - 1), default=0, show_default=True, help="Of the first prompt; then up by 1."
)
@click.option("--stream", is_flag=True, help="Print the text as it comes; of several prompts, one after the other.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--tp", type=click.IntRange(1), help="Devices to share the model (default: as many as it allows).")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Of the weights (default: as stored).")
@kept_weights
@float8_activations
@click.option("--kernels", type=click.Choice(["pallas", "triton", "xla"]), help="Default: pallas on a GPU, xla elsewhere.")
@click.option("--slots", type=click.IntRange(1), default=SLOTS, show_default=True, help="Sequences at once, at most.")
@click.option(
    "--length", type=click.IntRange(2), default=4096, show_default=True, help="Tokens of a conversation over stdin, at most."
)
@several_processes
def generate(
    checkpoint: Path | None,
    prompts: tuple[str, ...],
    prompts_file: Any,
    chat: bool,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int,
    stream: bool,
    as_json: bool,
    tp: int | None,
    dtype: str | None,
    weights: str | None,
    activations: str | None,
    kernels: str | None,
    slots: int,
    length: int,
) -> None:
    """Continue texts, or answer messages, with a checkpoint of Qwen3-Next or Qwen3.5 MoE.

    The shipped one answers `--chat --prompt "sort moekit"`; it can copy, flip and sort words and add two numbers.
    The checkpoint's tokenizer.json, chat template and generation_config.json are used; a sequence stops at any of its end
    tokens. Prompts share the model and are decoded together; a prompt's tokens follow from its own seed, whatever the others.
    """
    given = [*prompts, *_lines(prompts_file)]
    converse = chat and not given and prompts_file is None
    if not given and not converse:
        raise click.UsageError("there is nothing to continue: give --prompt, --prompts-file or --chat")
    if as_json and (stream or converse):
        raise click.UsageError("--json prints all at the end; leave --stream out, and give --chat prompts")
    if converse and max_new_tokens >= length:
        raise click.UsageError(f"--max-new-tokens {max_new_tokens} leaves no room for a message in --length {length}")
    for needed, extra in (("jax", "jax"), ("safetensors", "jax"), ("tokenizers", "text"), ("jinja2", "text")):
        if not installed(needed):
            raise UnavailableError(f"generate needs {needed}; install moekit[{extra}]")
    on_gpu = prepare_jax()
    if converse and process_count() > 1:
        raise click.UsageError("a conversation is with one process; give several --chat with --prompt")
    from moekit.cli import run
    from moekit.jax.doors import best
    from moekit.models.qwen3next import SHIPPED, Config
    from moekit.models.qwen3next.text import Text, sampling_of

    run.check_kernels(kernels)
    checkpoint = checkpoint or SHIPPED
    config, text = Config.from_json(checkpoint), Text(checkpoint)
    given_sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampling = replace(sampling_of(checkpoint), **{k: v for k, v in given_sampling.items() if v is not None}, seed=seed)
    encode = (lambda prompt: text.encode_chat([{"role": "user", "content": prompt}])) if chat else text.encode
    ids = [encode(prompt) for prompt in given]
    _check(config, ids or [encode("x")])  # of a conversation, that there is a template and what it adds
    slots = min(slots, max(1, len(given)))
    need = length if converse else run.rounded(max(map(len, ids)) + max_new_tokens)
    which = kernels or (best() if on_gpu else "xla")
    if activations and which == "xla":
        what = f"--activations is {activations}, to which kernels xla round nothing"
        raise ArgumentError(f"{what}; add --kernels pallas, or leave it out")
    session = _loaded(checkpoint, config, text, tp, (dtype, weights, activations), which, slots, need, max_new_tokens, sampling)
    if converse:
        _converse(session)
        return
    start = time.perf_counter()
    answers = _answers(session, ids, _printed if stream else None)
    seconds = time.perf_counter() - start
    if as_json:
        _print_report(session, given, ids, answers, seconds)
    elif not stream:
        for answer in answers:
            click.echo(answer.text)


@dataclass(frozen=True)
class _Session:
    """An engine on a loaded checkpoint, how it is asked, and what adds up over ranks in its steps."""

    checkpoint: Path
    text: Text
    engine: Engine
    ends: tuple[int, ...]
    new: int
    sampling: Sampling
    all_reduce: str

    def add(self, ids: Sequence[int], number: int = 0) -> int:
        """Queue a prompt; the seed counts up from prompt to prompt."""
        sampling = replace(self.sampling, seed=(self.sampling.seed + number) % SEEDS)
        return self.engine.add(ids, max_new_tokens=self.new, eos=self.ends, sampling=sampling)


@dataclass
class _Answer:
    """What came of a prompt. end: why it ended."""

    tokens: list[int]
    text: str = ""
    end: str = ""


def _lines(prompts_file: Any) -> list[str]:
    try:
        return [line.rstrip("\r\n") for line in prompts_file or ()]
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{prompts_file.name} is no UTF-8: {error}", param_hint="--prompts-file") from None


def _check(config: Config, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse, before anything is loaded, prompts that the model cannot read."""
    from moekit.models.qwen3next.checks import token_ids

    for i, prompt in enumerate(prompts):
        if not token_ids(f"prompt {i}", prompt, config.vocab_size):
            raise ShapeError(f"prompt {i} is empty; it needs at least one token")


def _loaded(
    checkpoint: Path,
    config: Config,
    text: Text,
    tp: int | None,
    of: tuple[str | None, str | None, str | None],
    kernels: str,
    slots: int,
    length: int,
    new: int,
    sampling: Sampling,
) -> _Session:
    from moekit.cli import run
    from moekit.cli.decode import checked_tp
    from moekit.models.qwen3next import Engine, Room, channel_of, load

    run.keep_programs()
    with loading(f"loading {checkpoint.name}") as advance:
        mesh = run.mesh_of(checked_tp(config, tp))
        dtype, weights, activations = of
        room = Room(slots + 1, length, piece=PIECE)
        model = load(checkpoint, mesh, dtype, weights=weights, activations=activations, room=room, progress=advance)
    channel, how = channel_of(model.mesh, slots, config.hidden_size, kernels)
    engine = Engine(model, slots=slots, length=length, piece=PIECE, kernels=kernels, waiting=2**31, channel=channel)
    return _Session(checkpoint, text, engine, text.ends(config), new, sampling, how)


def _answers(session: _Session, prompts: Sequence[Sequence[int]], emit: Emit | None) -> list[_Answer]:
    """Each prompt's answer. emit is called with the text as it comes, prompt after prompt, and a new line after each."""
    from moekit.models.qwen3next.text import Stream

    numbers = [session.add(ids, i) for i, ids in enumerate(prompts)]
    answers = {number: _Answer([]) for number in numbers}
    streams = {number: Stream(session.text) for number in numbers}
    waiting = dict.fromkeys(numbers, "")  # text that is not printed yet, in order
    while session.engine.busy:
        for event in session.engine.step():
            answer, piece = answers[event.sequence], ""
            if event.token >= 0:
                answer.tokens.append(event.token)
                piece = streams[event.sequence].add(event.token)
            if event.end:
                piece += streams[event.sequence].end()
                answer.end = event.end
            answer.text += piece
            waiting[event.sequence] += piece
        while emit and waiting:
            first = next(iter(waiting))
            emit(waiting[first])
            waiting[first] = ""
            if not answers[first].end:
                break
            emit("\n")
            del waiting[first]
    for number, answer in answers.items():
        if answer.end == "failed":
            raise NonFiniteError(
                f"generate: the logits of prompt {numbers.index(number)} hold NaN or an infinity after {len(answer.tokens)} "
                "new tokens; its activations leave the range of the model's dtype, or a kernel is at fault"
            )
    return [answers[number] for number in numbers]


def _converse(session: _Session) -> None:
    """A conversation: a line of stdin is a turn; an empty one, or its end, is the end."""
    messages: list[dict[str, str]] = []
    for line in _turns():
        messages.append({"role": "user", "content": line})
        ids, most = session.text.encode_chat(messages), session.engine.length - session.new
        if len(ids) > most:
            raise ArgumentError(f"the conversation comes to {len(ids)} tokens where --length leaves room for {most}; give more")
        (answer,) = _answers(session, [ids], _printed)
        messages.append({"role": "assistant", "content": answer.text})


def _turns() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            notes().print("> ", end="")
        try:
            line = sys.stdin.readline().strip()
        except UnicodeDecodeError as error:
            raise click.UsageError(f"what stdin holds is no text of its encoding: {error}") from None
        if not line:
            return
        yield line


def _printed(piece: str) -> None:
    click.echo(piece, nl=False)
    sys.stdout.flush()


def _print_report(
    session: _Session, prompts: Sequence[str], ids: Sequence[Sequence[int]], answers: Sequence[_Answer], seconds: float
) -> None:
    model, sampling = session.engine.model, session.sampling
    total = sum(len(answer.tokens) for answer in answers)
    print_json(
        {
            "checkpoint": str(session.checkpoint),
            "tp": model.tp,
            "dtype": str(model.dtype),
            "kernels": session.engine.kernels.name,
            "all_reduce": session.all_reduce,
            "sampling": {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "seed")},
            "ends": list(session.ends),
            "seconds": seconds,
            "tokens_per_second": total / seconds,
            "answers": [
                {"prompt": p, "prompt_tokens": len(i), "text": a.text, "tokens": a.tokens, "end": a.end}
                for p, i, a in zip(prompts, ids, answers, strict=True)
            ],
        }
    )
