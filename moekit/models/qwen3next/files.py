"""Reading of files that somebody else wrote: JSON, an index, safetensors headers. Nothing in them is believed unchecked.

All files are checked before anything is opened for its tensors: names before they are looked up, kinds and sizes
before bytes are read, and every byte of every shard belongs to one tensor.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from reprlib import Repr
from typing import Any, NoReturn, TypeGuard

import ml_dtypes
import numpy as np

from moekit.errors import MoekitError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
LONGEST = 100_000_000  # bytes of JSON: what the safetensors library allows a header
MOST_DIMENSIONS = 32
FP8 = "F8_E4M3"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    FP8: np.dtype(ml_dtypes.float8_e4m3fn),
}
WHOLE = ("F32", "F16", "BF16")  # which need no scales beside them
AGAIN = "download or save it again"

_short = Repr(maxstring=80, maxother=80, maxlong=40)
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


class CheckpointError(MoekitError, ValueError):
    """A checkpoint that does not hold what its config promises."""


@dataclass(frozen=True)
class Tensor:
    """What a file's header says of one tensor. name: the file's, in the folder. start, stop: its bytes there."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def brief(value: object) -> str:
    """A value in a sentence: one line, and cut short where it is long."""
    try:
        return _short.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__} too long to print"


def shown(name: object) -> str:
    """A tensor's or file's name in a sentence: as it is, unless it is long or holds what cannot be printed."""
    text = str(name)
    return text if text.isprintable() and len(text) <= 200 else brief(text)


def said(problem: BaseException) -> str:
    """What the system or a library says of an error, on one line, as much of it as a sentence holds."""
    text = " ".join(str(getattr(problem, "strerror", None) or problem).split())
    return (text if text.isprintable() else ascii(text))[:400]


def read_json(path: Path, error: type[MoekitError]) -> dict[str, Any]:
    """The JSON object in a regular file of UTF-8; raises `error`, which names the path, for anything else.

    Numbers may be NaN or infinite, as Python's json writes them.
    """
    where = shown(path)
    size = regular_size(path, where, error)
    if size > LONGEST:
        raise error(f"{where} has {size} bytes where at most {LONGEST} of JSON are read; {AGAIN}")
    try:
        with path.open("rb") as stream:
            data = stream.read(size)  # not to the end: a file of /proc may have none
    except OSError as problem:
        raise error(f"{where} cannot be read: {said(problem)}; make it readable") from None
    return _object(data, where, error)


def regular_size(path: Path, where: str, error: type[MoekitError]) -> int:
    """The bytes of a regular file, symbolic links followed; raises `error` where there is none, without opening it."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise error(f"{where} does not exist; {AGAIN}") from None
    except (OSError, ValueError) as problem:
        raise error(f"{where} cannot be read: {said(problem)}; {AGAIN}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise error(f"{where} is {kind} where a regular file is needed; {AGAIN}")
    return status.st_size


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint in a folder, read from the files that transformers reads; raises CheckpointError.

    `model.safetensors` goes before an index. Of the files that an index names, sorted, a later one's tensor goes
    before an earlier one's; it is refused where the index names the earlier.
    """
    if os.path.lexists(directory / ADAPTER):
        what = f"{ADAPTER}, and adapters are not applied; merge the adapter into the weights, or remove it"
        raise CheckpointError(f"{shown(directory)} holds {what}")
    listed = _weight_map(directory)
    tensors: dict[str, Tensor] = {}
    earlier: dict[str, str] = {}
    for name in sorted(set(listed.values())) or [SINGLE]:
        header = read_header(directory / name, name)
        earlier |= {key: tensors[key].name for key in header.keys() & tensors.keys()}
        tensors |= header
    for key, name in earlier.items():
        last = tensors[key].name
        if listed.get(key) != last:
            says = f"{INDEX} names {shown(listed.get(key, 'neither'))}"
            raise CheckpointError(
                f"{shown(last)}: tensor {shown(key)} is also in {shown(name)}, and {says}; remove it from the wrong file"
            )
    return tensors


def _weight_map(directory: Path) -> dict[str, str]:
    """The index's map from tensors to files, their names checked; empty where there is one file without an index."""
    if os.path.isfile(directory / SINGLE):
        return {}
    if not os.path.isfile(directory / INDEX):
        for name in (SINGLE, INDEX):
            if os.path.lexists(directory / name):  # a FIFO, a link to nowhere, …
                regular_size(directory / name, name, CheckpointError)
        raise CheckpointError(f"{shown(directory)} holds neither {SINGLE} nor {INDEX}; give a folder that holds one")
    raw = read_json(directory / INDEX, CheckpointError)
    listed = raw.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        got = f"weight_map is {brief(listed)} where a JSON object from tensors to files is needed"
        raise CheckpointError(f"{INDEX} cannot be read as a safetensors index: {got}; {AGAIN}")
    return {key: _inside(key, name) for key, name in listed.items()}


def _inside(key: str, name: object) -> str:
    """A file's name from an index, in its plain form: in the folder or below it, whatever it says."""
    if isinstance(name, str) and name.isprintable() and name.endswith(".safetensors"):
        path = PurePosixPath(name)
        if not path.is_absolute() and ".." not in path.parts:
            return str(path)
    got = f"weight_map names {brief(name)} for tensor {shown(key)} where a .safetensors file inside the folder is needed"
    raise CheckpointError(f"{INDEX}: {got}; {AGAIN}")


def read_header(file: Path, name: str) -> dict[str, Tensor]:
    """The header of one safetensors file: eight bytes of length, JSON, then the data; raises CheckpointError."""
    where = shown(name)
    try:
        size = regular_size(file, where, CheckpointError)
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                needs = f"its header needs {8 + length} bytes, it has {size}" if size >= 8 else f"it has {size} bytes"
                raise CheckpointError(f"{where} is truncated: {needs}; {AGAIN}")
            if length > LONGEST:
                raise CheckpointError(f"{where} has a header of {length} bytes where at most {LONGEST} are read; {AGAIN}")
            data = stream.read(length)
    except OSError as problem:
        raise CheckpointError(f"{where} cannot be read: {said(problem)}; make it readable") from None
    raw = _object(data, f"{where} has no readable safetensors header: it", CheckpointError)
    raw.pop("__metadata__", None)
    entries = {key: _entry(where, key, entry) for key, entry in raw.items()}
    _check_cover(where, entries, 8 + length, size)
    first = 8 + length
    return {
        key: Tensor(file, name, dtype, shape, first + start, first + stop)
        for key, (dtype, shape, (start, stop)) in entries.items()
    }


def _entry(where: str, key: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """The dtype, shape and data_offsets of one tensor, each of its type."""

    def refuse(field: str, needed: str) -> NoReturn:
        got = brief(entry[field]) if isinstance(entry, dict) and field in entry else "missing"
        raise CheckpointError(f"{where}: tensor {shown(key)} has {field} {got} where {needed} is needed; {AGAIN}")

    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: tensor {shown(key)} is {brief(entry)} where a JSON object is needed; {AGAIN}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        refuse("dtype", "a name such as F32 or BF16")
    if not _are_sizes(shape) or len(shape) > MOST_DIMENSIONS:
        refuse("shape", "a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse("data_offsets", "a list of two numbers of bytes, begin and end,")
    held = offsets[1] - offsets[0]
    if dtype in DTYPES and held != (needed := math.prod(shape) * DTYPES[dtype].itemsize):
        got = f"{held} bytes where {needed} are needed for its shape {brief(shape)} of {dtype}"
        raise CheckpointError(f"{where}: tensor {shown(key)} has {got}; {AGAIN}")
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _check_cover(where: str, entries: Mapping[str, tuple[Any, Any, tuple[int, int]]], start: int, size: int) -> None:
    """Refuse tensors that do not cover the data, which begins at byte `start` of `size`, one after the other."""
    end = start
    for key, (_, _, (begin, stop)) in sorted(entries.items(), key=lambda item: item[1][2]):
        if start + begin != end:
            how = "overlaps the tensor before it" if start + begin < end else "leaves a gap before it"
            got = f"{how}: it begins at byte {start + begin} where {end} is needed"
            raise CheckpointError(f"{where}: tensor {shown(key)} {got}; {AGAIN}")
        end = start + stop
        if end > size:
            got = f"is truncated: the file ends at byte {size} where {end} are needed"
            raise CheckpointError(f"{where}: tensor {shown(key)} {got}; {AGAIN}")
    if end != size:
        raise CheckpointError(f"{where} has {size - end} bytes after its last tensor where none are needed; {AGAIN}")


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _object(data: bytes, where: str, error: type[MoekitError]) -> dict[str, Any]:
    try:
        raw = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise error(f"{where} cannot be read as JSON: it is nested too deeply; {AGAIN}") from None
    except ValueError as problem:
        raise error(f"{where} cannot be read as JSON: {said(problem)}; {AGAIN}") from None
    if not isinstance(raw, dict):
        raise error(f"{where} holds {type(raw).__name__} where a JSON object is needed; {AGAIN}")
    return raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members; two of one name are refused, as readers differ in which they take."""
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {brief(twice)} is there twice")
    return members
