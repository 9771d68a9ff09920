"""Targets: what schedules have to know of a GPU, a row each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A GPU. Sizes in bytes, but `matrix`: elements of each axis from which on its matrix unit takes a product."""

    name: str
    sms: int
    shared_memory: int
    l2: int
    line: int = 128
    lanes: int = 32
    matrix: int = 16
    largest_tile: int = 2**17  # elements of a block that the compilers take
    warps: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    most_stages: int = 8


TARGETS = {
    t.name: t
    for t in (
        Target("h200", sms=132, shared_memory=227 * 2**10, l2=60 * 2**20),
        Target("b200", sms=148, shared_memory=227 * 2**10, l2=126 * 2**20),
        Target("mi300x", sms=304, shared_memory=64 * 2**10, l2=4 * 2**20, lanes=64),
    )
}
MEASURED = TARGETS["h200"]  # where the rules' figures come from (rules/measured.json)
