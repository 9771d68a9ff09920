"""Files that the package writes, whole or not at all and in UTF-8 whatever the locale says, and JSON files that it reads."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from moekit.errors import FileError


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8 and put it in the place of the one before when it is whole; a pipe or terminal is written to.

    Raises FileError where it cannot be written; a file that was there is then as it was.
    """
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """`write_text` of what is no text, or is in an encoding of its own."""
    try:
        if _is_special(path):
            with open(path, "wb") as stream:
                stream.write(content)
            return
        target = _checked(path)
        scratch = beside(target)
        try:
            with open(scratch, "wb") as stream:
                stream.write(content)
            if target.exists():
                scratch.chmod(stat.S_IMODE(target.stat().st_mode))
            os.replace(scratch, target)
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink()
    except OSError as error:
        raise _said(path, error, "written") from None


def make_folder(path: str | Path) -> None:
    """Make a folder, and those around it; raises FileError where that cannot be done."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _said(path, error, "made") from None


def check_writable(path: str | Path) -> None:
    """Raise FileError now where `write_text` would later: before hours of work, say. Nothing is left behind."""
    try:
        if _is_special(path):
            return
        scratch = beside(_checked(path))
        scratch.touch()
        scratch.unlink()
    except OSError as error:
        raise _said(path, error, "written") from None


def read_json(path: str | Path) -> Any:
    """What a JSON file holds; raises FileError where it cannot be read or holds none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _said(path, error, "read") from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} cannot be read as JSON: {error}") from None


def _is_special(path: str | Path) -> bool:
    """Whether a path names something that is written to and not replaced, such as a pipe."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _checked(path: str | Path) -> Path:
    """Where a path leads through links; raises OSError for a directory and for a file that may not be written."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise OSError("it is a directory")
    if not target.parent.is_dir():
        raise OSError(f"there is no directory {target.parent}")
    if target.exists() and not os.access(target, os.W_OK):
        raise OSError("it may not be written")
    return target


def beside(target: Path) -> Path:
    """A name beside a file or folder, for what is put in its place when it is whole."""
    return target.with_name(f".moekit-{os.getpid()}-{secrets.token_hex(4)}")


def _said(path: str | Path, error: OSError, done: str) -> FileError:
    return FileError(f"{path} cannot be {done}: {error.strerror or error}")
