"""Room on a device for tensors of gigabytes, which many processes want and few can have at once.

A place is a locked file: the operating system gives it back when a process dies, however it dies.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

FAR_BYTES = 2**33 + 2**28  # what a far tensor of float32 and its neighbours need
SHARE = 0.75  # of a device's memory; the rest is for contexts, caches and what lies near
VARIABLE = "MOEKIT_FUZZ_ROOM"  # a folder, and how many places it has


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
def place(patience: float = 60.0) -> Iterator[None]:
    """Hold one of the places, waiting for it; after `patience` seconds go on without (an allocation may then fail)."""
    folder, _, places = os.environ.get(VARIABLE, ":0").rpartition(":")
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(open(Path(folder) / f"place-{i}", "w")) for i in range(int(places))]
        until = time.monotonic() + patience
        while files and not any(map(_locked, files)) and time.monotonic() < until:
            time.sleep(0.05)
        yield


def _locked(file) -> bool:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
