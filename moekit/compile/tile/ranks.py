"""All ranks of a mesh played by one process: the meaning of packets, with any interleaving of ranks and programs.

A rank's calls follow each other; all programs of a call are under way at once; ranks wait for packets alone. What must never
happen is an error: a packet that nobody has received is overwritten, one of another call is taken, nobody can go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from moekit.compile import tile as t
from moekit.compile.tile.interpret import poison, programs

SLOTS = 2


class Mailboxes:
    """The mailboxes of all ranks: a packet for each receiver, sender, slot and element of `shape`, with the number of the call
    that sent it, 0 before the first and from there on where it has been received."""

    def __init__(self, ranks: int, shape: tuple[int, ...], slots: int = SLOTS):
        self.shape, self.slots = shape, slots
        every = (ranks, ranks, slots, *shape)
        self.data, self.epoch = np.zeros(every, np.int32), np.zeros(every, np.int32)
        self.call, self.unread = np.zeros(every, np.int64), np.zeros(every, bool)

    def slot(self, epoch: np.ndarray) -> np.ndarray:
        """Which slot an epoch's packets are in."""
        return epoch.astype(np.int64) % self.slots


@dataclass
class Mail:
    """One rank's way to the mailboxes: where it sends, and its own. `call`: how many times it has been called, this one too."""

    boxes: Mailboxes
    rank: int
    call: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, and packets of a row."""
        return self.boxes.shape

    @property
    def ways(self) -> list[int]:
        """What leads to each rank, and from each: its number, of this one, too."""
        ranks = list(range(len(self.boxes.data)))
        return [*ranks, *ranks, 0, 0]

    def send(self, peer: int, at: tuple[np.ndarray, ...], epoch: np.ndarray, value: np.ndarray) -> None:
        """Packets to `peer`, which are there at once; IndexError where one is still to be received."""
        place = (peer, self.rank, self.boxes.slot(epoch), *at)
        if self.boxes.unread[place].any():
            raise IndexError(f"call {self.call} of rank {self.rank} overwrites a packet that rank {peer} has not received")
        for part, x in ((self.boxes.data, value), (self.boxes.epoch, epoch), (self.boxes.call, self.call)):
            part[place] = x
        self.boxes.unread[place] = True

    def arrived(self, sender: int, at: tuple[np.ndarray, ...], epoch: np.ndarray) -> bool:
        """Whether the packets of an epoch are all there."""
        return bool((self.boxes.epoch[self.rank, sender, self.boxes.slot(epoch), *at] == epoch).all())

    def receive(self, sender: int, at: tuple[np.ndarray, ...], epoch: np.ndarray) -> np.ndarray:
        """The data of packets that are there; IndexError for those of another call, taken twice or too early."""
        place = (self.rank, sender, self.boxes.slot(epoch), *at)
        if not self.arrived(sender, at, epoch):
            raise IndexError(f"call {self.call} of rank {self.rank} takes a packet of rank {sender} that is not there yet")
        if (wrong := self.boxes.call[place] != self.call).any() or not self.boxes.unread[place].all():
            of = int(self.boxes.call[place][wrong][0]) if wrong.any() else self.call
            raise IndexError(f"call {self.call} of rank {self.rank} takes a packet that rank {sender} sent for call {of}")
        self.boxes.unread[place] = False
        return self.boxes.data[place]


@dataclass
class _Rank:
    """A rank on its way through its calls: the programs of the launch it is in that have still to go on."""

    launches: Iterator[list[Any]]
    running: list[Any] = field(default_factory=list)
    done: bool = False

    def waiting(self) -> list[Any]:
        """The programs under way, of the next launch if there is none of this one."""
        while not self.running and not self.done:
            following = next(self.launches, None)
            self.done = following is None
            self.running = [run for run in following or () if run.go_on()]
        return self.running


class _Run:
    """A program that has stopped before a packet."""

    def __init__(self, program: Any):
        self.program, self.steps, self.before = program, program.steps(), None

    def go_on(self) -> bool:
        """Run up to the next packet; False where the program has ended."""
        self.before = next(self.steps, None)
        return self.before is not None

    def ready(self) -> bool:
        """Whether what stops the program is there."""
        return not isinstance(self.before, t.Receive) or self.program.arrived(self.before)


Memories = Sequence[Mapping[str, Any]]


def play(calls: Sequence[Any], memories: Sequence[Memories], sizes: Sequence[Mapping[str, int]], order: Random) -> None:
    """Every rank's calls, one after the other: `calls[c]` is a plan, `memories[r][c]` and `sizes[c]` are rank r's for it.

    Of what can go on, `order` draws what does, packet by packet. Raises IndexError for what must not happen.
    """
    ranks = [_Rank(_launches(calls, mine, sizes)) for mine in memories]
    while under_way := [(rank, run) for rank in ranks for run in rank.waiting()]:
        ready = [each for each in under_way if each[1].ready()]
        if not ready:
            raise IndexError(f"{len(under_way)} programs wait for packets that nobody sends")
        rank, run = order.choice(ready)
        if not run.go_on():
            rank.running.remove(run)


def _launches(calls: Sequence[Any], memories: Memories, sizes: Sequence[Mapping[str, int]]) -> Iterator[list[_Run]]:
    """The programs of each launch of one rank; none is begun before all of the one before have ended."""
    for plan, mine, size in zip(calls, memories, sizes, strict=True):
        memory = dict(mine) | {s.name: poison(s.shape(size), s.dtype) for s in plan.scratch}
        for mail in (x for x in memory.values() if isinstance(x, Mail)):
            mail.call += 1
        for kernel in plan.programs:
            yield [_Run(program) for program in programs(kernel, memory, size)]
