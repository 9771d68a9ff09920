"""What the probes' references calculate in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moekit.lang import Fusion, fusion
from moekit.lang.dtypes import is_float


def probe(reference: Callable, **how) -> Callable[[Callable], Fusion]:
    """`fusion`, for a reference to which every float comes in float64."""

    def exact(**given) -> dict[str, np.ndarray]:
        floats = {n: x.astype(np.float64) for n, x in given.items() if isinstance(x, np.ndarray) and is_float(x.dtype.name)}
        return reference(**{**given, **floats})

    return fusion(exact, **how)
