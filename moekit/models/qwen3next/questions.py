"""What the shipped model is asked: copying, flipping (reversing) and sorting of letters, and sums.

A question is text, `flip hello` or `add 17 25`, and has one answer. Every tenth question, chosen by its checksum, is held
out: a training never draws it, and an evaluation draws no others.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moekit.errors import ArgumentError

TASKS = ("copy", "flip", "sort", "add")
LONGEST = 8  # letters
LARGEST = 99  # of the numbers that are added
LETTERS = "abcdefghijklmnopqrstuvwxyz"
END, USER, ANSWER = 256, 257, 258  # the shipped model's tokens after the 256 bytes
MOST = 2000  # questions of an evaluation: there are a thousand sums that no training draws, and a quarter are of those
_HELD_OUT = 10  # one question of so many


@dataclass(frozen=True)
class Question:
    """A question of one of TASKS, and its answer."""

    task: str
    text: str
    answer: str

    @property
    def tokens(self) -> list[int]:
        """The question as the shipped model's chat template writes it, in its tokens."""
        return [USER, *self.text.encode(), ANSWER]

    @property
    def held_out(self) -> bool:
        """Whether no training draws it."""
        return zlib.crc32(self.text.encode()) % _HELD_OUT == 0


def ask(task: str, words: str) -> Question:
    """The question of a task about letters, or about two numbers with a space between."""
    if task == "add":
        answer = str(sum(map(int, words.split())))
    else:
        answer = {"copy": words, "flip": words[::-1], "sort": "".join(sorted(words))}[task]
    return Question(task, f"{task} {words}", answer)


def draw(rng: np.random.Generator, task: str, longest: int = LONGEST, held_out: bool = False) -> Question:
    """A random question, held out or not. longest: letters at most, of which there are one or more.

    Every number is as likely where it is held out; a training meets those of one digit as often as all others.
    """
    while True:
        if task == "add":
            most = len(str(LARGEST))
            sizes = (most, most) if held_out else rng.integers(1, most + 1, 2)
            words = " ".join(str(rng.integers(0, 10**size)) for size in sizes)
        else:
            words = "".join(rng.choice(list(LETTERS), rng.integers(1, longest + 1)))
        if (question := ask(task, words)).held_out == held_out:
            return question


def held_out(count: int, seed: int = 0) -> list[Question]:
    """`count` different questions that no training has drawn, of all tasks in turn; the same ones for a seed.

    Raises ArgumentError for more than MOST.
    """
    if count > MOST:
        raise ArgumentError(f"held_out: {count} questions of at most {MOST}; ask fewer")
    rng = np.random.default_rng(seed)
    found: dict[Question, None] = {}
    while len(found) < count:
        found[draw(rng, TASKS[len(found) % len(TASKS)], held_out=True)] = None
    return list(found)


def said(tokens: Sequence[int]) -> str:
    """The text of the shipped model's tokens, up to its end token."""
    stop = list(tokens).index(END) if END in tokens else len(tokens)
    return bytes(token for token in tokens[:stop] if token < END).decode(errors="replace")
