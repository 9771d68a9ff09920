"""Targets: what has to be known of a GPU, and of the compiler that makes its code, a row each."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Target:
    """A GPU as a compiler serves it. `shared_memory` and `line` in bytes; `matrix`: elements of each axis from which on its

    matrix unit takes a product; `largest_tile`: elements of a block that the compiler takes; `faults`: those of the compiler
    that passes/legalise.py works around, by the names they have there; `told`: whether it wants to be told which thread holds
    what (passes/fragments.py); `early_byte`: what an element of one byte counts as among what is loaded early, where others
    count as 2 (passes/motion.py).
    """

    sms: int
    shared_memory: int
    line: int
    lanes: int
    matrix: int
    largest_tile: int
    warps: tuple[int, ...]
    most_stages: int
    faults: tuple[str, ...]
    told: bool = False
    early_byte: int = 2


_H200 = {"sms": 132, "shared_memory": 227 * 2**10, "line": 128, "lanes": 32, "matrix": 16, "largest_tile": 2**17,
         "warps": (1, 2, 4, 8, 16, 32), "most_stages": 8}  # fmt: skip
TARGETS = {
    "triton": Target(
        **_H200, faults=("narrowing", "negation", "float8", "negative zero", "rounded product", "zeros of float8"), early_byte=1
    ),
    "pallas": Target(**_H200, faults=("narrowing", "negation", "float8", "zeros of float8")),
    "mosaic": replace(Target(**_H200, faults=("narrowing", "negation")), warps=(4,), told=True),
}
MEASURED = TARGETS["triton"]  # where the rules' figures come from (rules/measured.json)
