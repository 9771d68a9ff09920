"""Memory of gigabytes, for tensors whose offsets pass 2³¹: kept by a process, and on a device had by a few at a time.

A place on a device is a locked file: the operating system gives it back when a process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

FAR_BYTES = 2**33 + 2**28  # what a far tensor of float32 and its neighbours need
SHARE = 0.75  # of a device's memory; the rest is for contexts, caches and what lies near
VARIABLE = "MOEKIT_FUZZ_ROOM"  # a folder, and how many places it has
_kept: dict[str, Any] = {}


def scattered(device: str, size: int, index: np.ndarray, image: np.ndarray) -> Any:
    """Memory of at least `size` bytes, kept for the next call, with the image's bytes at their places.

    It is numpy's on a CPU, where pages that nobody touches cost nothing, and torch's on a GPU.
    """
    size = -(-size // 2**28) * 2**28
    if len(_kept.get(device, ())) < size:
        release()
        _kept[device] = np.zeros(size, np.uint8) if device == "cpu" else _empty(device, size)
    memory = _kept[device]
    if device == "cpu":
        memory[index] = image
    else:
        import torch

        memory[torch.from_numpy(index).to(device)] = torch.from_numpy(image).to(device)
    return memory


def _empty(device: str, size: int) -> Any:
    import torch

    return torch.empty(size, dtype=torch.uint8, device=device)


def gathered(device: str, index: np.ndarray) -> np.ndarray:
    """The bytes at their places in the memory that `scattered` gave."""
    memory = _kept[device]
    if device == "cpu":
        return memory[index]
    import torch

    return memory[torch.from_numpy(index).to(device)].cpu().numpy()


def release() -> None:
    """Give far memory back, of whose pages more and more have been touched, and what torch caches on a device."""
    _kept.clear()
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()


@contextlib.contextmanager
def room() -> Iterator[None]:
    """Meanwhile processes that are started know how many far arenas the first GPU has room for at once."""
    from moekit.cli.platform import gpus

    found = gpus()
    places = int(found[0].gigabytes * 2**30 * SHARE // FAR_BYTES) if found else 0
    with tempfile.TemporaryDirectory(prefix="moekit-fuzz-") as folder:
        os.environ[VARIABLE] = f"{folder}:{max(1, places)}"
        try:
            yield
        finally:
            os.environ.pop(VARIABLE, None)


@contextlib.contextmanager
def held(device: str, patience: float = 60.0) -> Iterator[None]:
    """Far memory of a device: on a GPU one of the places, waited for; after `patience` seconds without (it may then be short).

    All of it is given back afterwards.
    """
    folder, _, places = os.environ.get(VARIABLE, ":0").rpartition(":")
    count = 0 if device == "cpu" else int(places)
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(open(Path(folder) / f"place-{i}", "wb")) for i in range(count)]
        until = time.monotonic() + patience
        while files and not any(map(_locked, files)) and time.monotonic() < until:
            time.sleep(0.05)
        try:
            yield
        finally:
            release()


def _locked(file) -> bool:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
