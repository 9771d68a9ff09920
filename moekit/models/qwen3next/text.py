"""A checkpoint's words: its tokenizer, its chat template, how its tokens are drawn, and text that comes token by token."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from moekit.errors import ArgumentError, MissingExtraError
from moekit.models.qwen3next.config import Config, ConfigError
from moekit.models.qwen3next.files import brief, read_json, said, shown
from moekit.models.qwen3next.generate import end_tokens
from moekit.models.qwen3next.sampling import GREEDY, Sampling

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
GENERATION = "generation_config.json"
UNFINISHED = "\ufffd"  # what stands for bytes that are no character yet

try:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from tokenizers import Tokenizer
except ModuleNotFoundError as error:
    raise MissingExtraError(f"text needs {error.name}; install moekit[text]") from None


class Text:
    """The tokenizer of a checkpoint's folder, and its chat template if it has one.

    Raises ConfigError where `tokenizer.json` is missing or a file cannot be read.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        path = self.directory / TOKENIZER
        if not path.is_file():
            raise ConfigError(f"{shown(path)} does not exist; save the checkpoint's tokenizer beside its weights")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as problem:  # the library raises plain Exceptions
            raise ConfigError(f"{shown(path)} is no tokenizer: {said(problem)}") from None
        self.tokenizer.no_truncation()  # what a file says of these is for batches of a training: transformers takes neither
        self.tokenizer.no_padding()
        settings = self.directory / SETTINGS
        self.settings = read_json(settings, ConfigError) if settings.is_file() else {}

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. Raises ArgumentError where it is no Unicode, ConfigError where the tokenizer fails."""
        return self._encode(text)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The token ids of a conversation, up to where the model's turn begins."""
        return self._encode(self.chat(messages), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation as the checkpoint's template writes it, up to where the model's turn begins.

        messages: each with `role` and `content`. The template is a stranger's program: it runs in Jinja's sandbox. Raises
        ConfigError where there is none or it fails.
        """
        where = shown(self.directory)
        source = self._template()
        if source is None:
            raise ConfigError(f"{where} has no chat template; give plain prompts")
        try:
            made = _sandbox().from_string(source)
            return made.render(messages=messages, add_generation_prompt=True, **self._special())
        except Exception as problem:  # whatever a stranger's program comes to
            raise ConfigError(f"{where}: the chat template fails: {said(problem) or type(problem).__name__}") from None

    def ends(self, config: Config) -> tuple[int, ...]:
        """The token ids that end a sequence: those that the configs name, else the tokenizer's own end token."""
        named = end_tokens(self.directory, config)
        if not named and (own := self._special().get("eos_token")) is not None:
            named = tuple(token for token in [self.tokenizer.token_to_id(own)] if token is not None)
        return tuple(token for token in named if 0 <= token < config.vocab_size)

    def _encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            raise ArgumentError(f"the text {brief(text)} is no Unicode: {problem.reason} at {problem.start}") from None
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as problem:  # plain Exceptions, and panics, which are none
            if isinstance(problem, (KeyboardInterrupt, SystemExit)):
                raise
            path = shown(self.directory / TOKENIZER)
            raise ConfigError(f"{path} cannot encode {brief(text)}: {said(problem)}") from None

    def _special(self) -> dict[str, str]:
        """The special tokens that the settings name, as text."""
        found = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = self.settings.get(name)
            value = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(value, str):
                found[name] = value
        return found

    def _template(self) -> str | None:
        """The chat template: a file of its own goes before the settings, as in transformers; of several, the default."""
        path = self.directory / TEMPLATE
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except (OSError, ValueError) as problem:
                raise ConfigError(f"{shown(path)} cannot be read: {said(problem)}") from None
        named = self.settings.get("chat_template")
        if isinstance(named, list):
            templates = [each.get("template") for each in named if isinstance(each, Mapping) and each.get("name") == "default"]
            named = templates[-1] if templates else None
        return named if isinstance(named, str) else None


class Stream:
    """Text that comes token by token, in whole characters: bytes that are no character yet wait for the next token.

    stops: strings that end it. `stopped` says that one has come: neither it nor what follows is given out, and what may be
    the beginning of one waits as well. Raises ArgumentError for an empty one.
    """

    def __init__(self, text: Text, stops: Sequence[str] = ()):
        if not all(stops):
            raise ArgumentError("a stop string is empty; it needs at least one character")
        self.text, self.stops, self.stopped = text, tuple(stops), False
        self.ids: list[int] = []
        self.shown, self.seen = 0, 0  # ids before `shown` are context; those before `seen` have become text
        self.held = ""  # text that may be the beginning of a stop

    def add(self, token: int) -> str:
        """The characters that a token completes; empty where it completes none."""
        self.ids.append(token)
        whole = self.text.decode(self.ids[self.shown :])
        return "" if whole.endswith(UNFINISHED) else self._give(whole)

    def end(self) -> str:
        """What is left, though it may be no whole character."""
        last = self._give(self.text.decode(self.ids[self.shown :]))
        held, self.held = self.held, ""
        return last + held

    def _give(self, whole: str) -> str:
        before = self.text.decode(self.ids[self.shown : self.seen])
        self.shown, self.seen = self.seen, len(self.ids)
        return self._before_a_stop(whole[len(before) :])

    def _before_a_stop(self, piece: str) -> str:
        """What of the text so far can be given out."""
        if self.stopped:
            return ""
        known, self.held = self.held + piece, ""
        found = [known.index(stop) for stop in self.stops if stop in known]
        if found:
            self.stopped = True
            return known[: min(found)]
        begun = max((_overlap(known, stop) for stop in self.stops), default=0)
        self.held = known[len(known) - begun :]
        return known[: len(known) - begun]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the first of a stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def sampling_of(directory: str | Path) -> Sampling:
    """How `generation_config.json` has tokens drawn: greedily without `do_sample`; what it does not name is left out.

    Raises ConfigError where it cannot be read or holds no such numbers.
    """
    path = Path(directory) / GENERATION
    if not path.is_file():
        return GREEDY
    raw = read_json(path, ConfigError)
    if raw.get("do_sample") is not True:
        return GREEDY
    found = Sampling(temperature=1.0)
    for name, kinds in (("temperature", (int, float)), ("top_k", (int,)), ("top_p", (int, float))):
        value = raw.get(name)
        if value is None:
            continue
        try:
            if type(value) not in kinds:
                raise ValueError
            found = replace(found, **{name: value})
        except ValueError:
            raise ConfigError(f"{shown(path)}: {name} is {brief(value)}, which no sampling can have; correct it") from None
    return found


class _Generation(Extension):
    """`{% generation %}` marks what an assistant said, for the masks of a training; here it is what stands inside."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


def _sandbox() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it: blocks take their line with them, loops can be left, and two helpers more."""
    extensions = [_Generation, "jinja2.ext.loopcontrols"]
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    made.globals.update(raise_exception=_raise, strftime_now=lambda form: datetime.now().strftime(form))
    made.filters["tojson"] = _tojson
    return made


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    """JSON as it is, where Jinja's own filter would spell it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)
