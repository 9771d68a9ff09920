"""Emitted text as a module that tracebacks and debuggers show the lines of."""

from __future__ import annotations

import linecache
from hashlib import sha256
from typing import Any


def load(kind: str, name: str, source: str, digest: str = "") -> dict[str, Any]:
    """What a text defines, by name; its file is called `<moekit triton NAME DIGEST HASH>`."""
    short = sha256(source.encode()).hexdigest()[:8]
    filename = f"<moekit {' '.join(filter(None, (kind, name, digest, short)))}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    names: dict[str, Any] = {"__name__": f"moekit_generated_{name}"}
    exec(compile(source, filename, "exec"), names)
    return names
