"""Schedules: directives, the facts about a graph that they rest on, what is legal, cuts into launches, and targets."""

from moekit.compile.schedule.directives import (
    Abreast,
    Dependent,
    Launch,
    Loop,
    Pair,
    Parts,
    Prefetch,
    Schedule,
    Section,
    Split,
    Stage,
    Stages,
    Tile,
    Warps,
    Whole,
    pow2,
)

__all__ = [
    "Abreast",
    "Dependent",
    "Launch",
    "Loop",
    "Pair",
    "Parts",
    "Prefetch",
    "Schedule",
    "Section",
    "Split",
    "Stage",
    "Stages",
    "Tile",
    "Warps",
    "Whole",
    "pow2",
]
