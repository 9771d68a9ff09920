"""The one runner: a question's command line, its cases one after the other, progress, and the result file.

A bench declares a `Question` and calls `ask`. What all of them share is here: options, processes of their own, what is told
while they run, what does not run, and the file.
"""

import argparse
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from bench.child import Child, said
from bench.common import environment, write
from moekit.cli.platform import gpu_count

Case = tuple[dict, tuple]  # the head of its rows, which says what they are of, and what it is measured with


@dataclass(frozen=True)
class Option:
    """An option of a command line. What it takes is told by its default: nothing, text, a number, or several of a kind.

    Several are written with commas or spaces between them; names may have spaces in them, and then need commas.
    """

    name: str
    default: Any
    help: str = ""
    choices: tuple[str, ...] | None = None

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Add it to a command line."""
        if isinstance(self.default, bool):
            parser.add_argument(f"--{self.name}", action="store_true", help=self.help)
            return
        several = isinstance(self.default, tuple)
        kind = {"type": str, "nargs": "+"} if several else {"type": type(self.default)}
        parser.add_argument(f"--{self.name}", default=self.default, choices=self.choices, help=self.help, **kind)

    def read(self, given: Any) -> Any:
        """What was given as a value of the default's kind. Raises ValueError where a number is none."""
        if not isinstance(given, list):
            return given
        kind = type(self.default[0])
        parts = re.split(r"\s*,\s*" if kind is str else r"[,\s]+", " ".join(given))
        return tuple(kind(part) for part in parts)


DTYPE = Option("dtype", "bfloat16", "of operands", ("bfloat16", "float16", "float32"))
ROUNDS = Option("rounds", 15, "how often all sides are timed in turn")
SHARED = (
    Option("seconds", 1e9, "begin no measurement after so long"),
    Option("smoke", False, "a small case that needs no GPU, to see that the bench works: its times mean nothing"),
)


@dataclass(frozen=True)
class Question:
    """What a bench asks.

    `cases(args)` yields a head and arguments per case, and `measure(*arguments)` its rows, one per side, without the head.
    `smoke` are the options of a small case. `patience`: seconds that a process of its own has for a case; 0: this process
    measures. `fresh`: no two cases have the same process. `workers`: so many at a time. `begin(args)` is added to the head of
    the result; `end(result)` may add to it, too, and returns what is printed last. `plot(result, path)` draws beside the file.
    `columns` are what is told of a row; empty: all numbers and text.
    """

    doc: str | None
    cases: Callable[[argparse.Namespace], Iterable[Case]]
    measure: Callable[..., Iterable[dict]]
    smoke: str
    options: tuple[Option, ...] = ()
    gpu: bool = True
    patience: float = 0
    fresh: bool = False
    workers: int = 1
    begin: Callable[[argparse.Namespace], dict] = lambda args: {}
    end: Callable[[dict], str] = lambda result: ""
    plot: Callable[[dict, Path], None] | None = None
    columns: tuple[str, ...] = ()

    def arguments(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """A command line as values; with `--smoke` those of the small case."""
        parser = argparse.ArgumentParser(description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        options = (*self.options, *SHARED, Option("workers", self.workers, "processes at a time, where there are some"))
        for option in options:
            option.add(parser)
        parser.add_argument("--json", "--out", help="write the rows, and what they were measured on, to this file")
        args = parser.parse_args(argv)
        if args.smoke:
            args = parser.parse_args(self.smoke.split(), argparse.Namespace(smoke=True, json=args.json))
        for option in options:
            name = option.name.replace("-", "_")
            try:
                setattr(args, name, option.read(getattr(args, name)))
            except ValueError as error:
                parser.error(f"--{option.name}: {error}; it takes numbers with commas between them")
        return args


def ask(question: Question, argv: Sequence[str] | None = None) -> dict:
    """Measure all cases as long as there is time, tell of each, and write the file after each; the result.

    Raises SystemExit where there is no GPU and the question needs one.
    """
    args = question.arguments(argv)
    if question.gpu and not args.smoke and not gpu_count():
        raise SystemExit("this bench needs an NVIDIA GPU, and there is none; --smoke runs a small case without one")
    start = time.monotonic()
    result = environment() | question.begin(args) | {"rows": [], "left out": []}
    for head, rows in answers(question, list(question.cases(args)), args, start):
        if rows is None:
            result["left out"].append(head)
            continue
        result["rows"] += [head | row for row in rows]
        print(*head.values(), f"[{time.monotonic() - start:.0f} s]", told(rows, question.columns), flush=True)
        if args.json:
            write(args.json, result)
    if last := question.end(result):
        print(last)
    if args.json:
        write(args.json, result)
        if question.plot:
            question.plot(result, Path(args.json).with_suffix(".svg"))
    return result


def answers(
    question: Question, cases: Sequence[Case], args: argparse.Namespace, start: float
) -> Iterator[tuple[dict, list[dict] | None]]:
    """The head and the rows of each case, in order; None for one that there was no time for."""
    apart = question.patience and not args.smoke
    children = [Child(question.measure, question.patience) for _ in range(args.workers if apart else 0)]
    idle: SimpleQueue[Child] = SimpleQueue()
    for child in children:
        idle.put(child)

    def answer(case: Case) -> list[dict] | None:
        if time.monotonic() - start > args.seconds:
            return None
        if not apart:
            return list(question.measure(*case[1]))
        child = idle.get()
        rows = child.rows(*case[1])
        if question.fresh:
            child.close()
        idle.put(child)
        return rows

    heads = [head for head, _ in cases]
    if not apart:
        yield from zip(heads, map(answer, cases), strict=True)
        return
    with ThreadPoolExecutor(args.workers) as pool:
        yield from zip(heads, pool.map(answer, cases), strict=True)
    for child in children:
        child.close()


def told(rows: Sequence[dict], columns: Sequence[str]) -> str:
    """The rows of a case in one line, the fastest first."""
    return " | ".join(_told(row, columns) for row in sorted(rows, key=lambda row: row.get("us", float("inf"))))


def _told(row: dict, columns: Sequence[str]) -> str:
    name = str(row.get("side", row.get("way", "")))
    if "problem" in row:
        return f"{name}: {row['problem'][:90]}"
    shown = columns or [k for k, v in row.items() if k not in ("side", "way") and isinstance(v, (int, float, str))]
    values = [(k, row[k]) for k in shown if k in row]
    return " ".join([name, *(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values)])


def beside(
    sides: Iterable[str],
    prepare: Callable[[str], tuple[dict, Any]],
    timed: Callable[[Mapping[str, Any]], Mapping[str, dict]],
) -> list[dict]:
    """One row per side. `prepare(side)` gives what to say of it and what to time, `timed` the times of all that can run.

    A side that raises has a row that says why, and the others go on.
    """
    rows: dict[str, dict] = {}
    ready: dict[str, Any] = {}
    for side in sides:
        rows[side] = {"side": side}
        try:
            found, ready[side] = prepare(side)
            rows[side] |= found
        except Exception as error:
            rows[side]["problem"] = said(error)
    for side, timing in timed(ready).items():
        rows[side] |= timing
    return list(rows.values())
