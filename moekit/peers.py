"""Whether GPUs reach each other's memory, as the CUDA driver says: asked without torch or jax."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import permutations


def driver() -> ctypes.CDLL | None:
    """The CUDA driver, initialised; None where there is none that works."""
    try:
        found = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return found if found.cuInit(0) == 0 else None


def unreachable(ordinals: Sequence[int], cuda: ctypes.CDLL | None = None) -> str | None:
    """Why some of these devices cannot reach another's memory, in a sentence; None if all can."""
    cuda = cuda or driver()
    if cuda is None:
        return "there is no NVIDIA driver here"
    if len(ordinals) < 2:
        return f"{len(ordinals)} GPU here; packets go between two or more"
    for one, other in permutations(ordinals, 2):
        can, devices = ctypes.c_int(0), (ctypes.c_int(0), ctypes.c_int(0))
        for device, ordinal in zip(devices, (one, other), strict=True):
            if cuda.cuDeviceGet(ctypes.byref(device), ordinal) != 0:
                return f"the driver knows no GPU {ordinal}"
        if cuda.cuDeviceCanAccessPeer(ctypes.byref(can), *devices) != 0 or not can.value:
            return f"GPU {one} cannot reach the memory of GPU {other}"
    return None
