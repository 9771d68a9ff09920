"""Sizes for the axes of every fusion by the axes' names, so that a new fusion needs a row only for an axis that none had."""

from collections.abc import Mapping

from moekit.fusions import FUSIONS
from moekit.lang.fusion import Fusion


def sizes_of(fusion: Fusion, sizes: Mapping[str, int]) -> dict[str, int]:
    """Those of `sizes` that are of the fusion's plain axes: all but what follows from others at a call."""
    own = {axis for spec in fusion.tensors.values() for d in spec.dims for _, axis in d.terms} - {*fusion.axes}
    optional = {f"{d.text}?" for spec in fusion.tensors.values() for d in spec.dims if d.optional}
    return {a: n for a, n in sizes.items() if a in own | optional}


def every(sizes: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """`sizes_of` each fusion that ships, by name."""
    return {name: sizes_of(fusion, sizes) for name, fusion in FUSIONS.items()}
