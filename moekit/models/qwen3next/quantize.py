"""An FP8 checkpoint of one in bfloat16 or float32, tensor by tensor: as Qwen's own and transformers' FP8 have it."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import batched
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from moekit.errors import ArgumentError, FileError
from moekit.files import beside, write_bytes, write_text
from moekit.models.qwen3next.checkpoint import HEAD, THREADS, Checkpoint
from moekit.models.qwen3next.config import Config, ConfigError
from moekit.models.qwen3next.files import AGAIN, FP8, INDEX, SINGLE, CheckpointError, Tensor, read_json, said, shown
from moekit.models.qwen3next.forms import FUSED
from moekit.models.qwen3next.fp8 import MATRIX, SCALE, Blocks, quantised
from moekit.models.qwen3next.numerics import finite

BLOCK = 128
BLOCKS = Blocks(BLOCK, BLOCK)
SHARD = 4 * 10**9  # bytes of a file
SOURCES = ("BF16", "F32")
STAYS = re.compile(r".*\.in_proj_(ba|b|a)\.weight")  # a few rows for each head, and servers have them so
BESIDE = (".json", ".jinja", ".txt", ".md", ".model")  # what is copied: tokenizer, template, generation_config, …


@dataclass(frozen=True)
class Quantised:
    """What was written. before, after: bytes of all tensors.

    kept: the modules that stay. uneven: those of them that do because of a side above BLOCK that is no multiple of it.
    """

    directory: Path
    files: int
    tensors: int
    quantised: int
    before: int
    after: int
    kept: tuple[str, ...]
    uneven: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """A tensor to write: what a header says of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class _Job:
    """Tensors that are made together, and how."""

    entries: tuple[_Entry, ...]
    make: Callable[[], Sequence[np.ndarray]]

    @property
    def size(self) -> int:
        """Bytes to write."""
        return sum(entry.size for entry in self.entries)


@dataclass
class _Plan:
    """All that is to be written, in the order of the source; experts that are fused there are taken apart."""

    checkpoint: Checkpoint
    jobs: list[_Job] = field(default_factory=list)
    kept: set[str] = field(default_factory=lambda: {HEAD.removesuffix(".weight")})  # a tied head, too
    uneven: set[str] = field(default_factory=set)

    def add(self, key: str, tensor: Tensor) -> None:
        """One tensor of the source: made FP8, or copied as it is."""
        skipped = key.startswith(self.checkpoint.form.skipped)
        wanted = not skipped and MATRIX.fullmatch(key) and not STAYS.fullmatch(key)
        if wanted and len(tensor.shape) == 3 and _tileable(self._expert_shape(key, tensor)):
            self._fused(key, tensor)
        elif wanted and len(tensor.shape) == 2 and _tileable(tensor.shape):
            self._matrix(key, partial(self.checkpoint.whole, tensor), tensor.shape)
        else:
            entry = _Entry(key, tensor.dtype, tensor.shape, tensor.stop - tensor.start)
            self.jobs.append(_Job((entry,), lambda: [self.checkpoint.content(tensor)]))
            module = key.removesuffix(".weight") if key.endswith(".weight") else key.rpartition(".")[0]
            self.kept |= {module} if len(tensor.shape) > 1 else set()
            self.uneven |= {module} if wanted else set()

    def _expert_shape(self, key: str, tensor: Tensor) -> tuple[int, ...]:
        _, rows, columns = tensor.shape
        return (rows // 2, columns) if key.endswith(FUSED) else (rows, columns)

    def _fused(self, key: str, tensor: Tensor) -> None:
        """The matrices of every expert, gate's rows before up's."""
        shape, base = self._expert_shape(key, tensor), key.rpartition(".")[0]
        names = ("gate_proj", "up_proj") if key.endswith(FUSED) else ("down_proj",)
        for expert in range(tensor.shape[0]):
            for nth, name in enumerate(names):
                rows = slice(nth * shape[0], (nth + 1) * shape[0])
                read = partial(lambda e, rows: self.checkpoint.whole(tensor, e)[rows], expert, rows)
                self._matrix(f"{base}.{expert}.{name}.weight", read, shape)

    def _matrix(self, name: str, read: Callable[[], np.ndarray], shape: tuple[int, ...]) -> None:
        grid = BLOCKS.grid(shape)
        entries = _Entry(name, FP8, shape, prod(shape)), _Entry(name + SCALE, "F32", grid, 4 * prod(grid))
        self.jobs.append(_Job(entries, partial(self._quantised, name, read)))

    def _quantised(self, name: str, read: Callable[[], np.ndarray]) -> Sequence[np.ndarray]:
        matrix = read()
        if not finite(matrix):
            raise CheckpointError(f"{shown(self.checkpoint.directory)}: tensor {name} holds NaN or an infinity")
        return quantised(matrix, BLOCKS)


def quantize(
    source: str | Path, out: str | Path, progress: Callable[[int, int], None] | None = None, shard: int = SHARD
) -> Quantised:
    """Write the checkpoint in `source` to a new folder `out` with its projections' and experts' matrices in FP8.

    Codes are float8_e4m3fn, saturated and rounded to nearest even, with float32 scales `…weight_scale_inv` of the largest
    magnitude / 448 in each 128 × 128 block. Embeddings, head, norms, convolutions, routers, the shared expert's gate,
    `in_proj_ba` (b, a), what is no part of the text model, and matrices with a side above 128 that 128 does not divide (of
    which readers differ in where blocks begin) stay as they are, and `modules_to_not_convert` names those with two
    dimensions. progress(done, total) is called with bytes written; shard: the most bytes of a file, unless one tensor has more.

    Raises, with nothing left behind, ArgumentError where `out` exists, ConfigError or CheckpointError for what is no
    checkpoint in bfloat16 or float32, holds what is not finite or cannot be read, and FileError where files cannot be written.
    """
    source, out = Path(source), Path(out)
    if os.path.lexists(out):
        raise ArgumentError(f"quantize: {shown(out)} exists; give a folder that does not")
    config = Config.from_json(source)
    if config.blocks is not None:
        raise ConfigError(f"quantize: {shown(source)} is quantised; give a checkpoint in bfloat16 or float32")
    with Checkpoint(source, config) as checkpoint:
        if checkpoint.dtype not in SOURCES:
            raise CheckpointError(f"quantize: {shown(source)} is of {checkpoint.dtype}; {' or '.join(SOURCES)} is needed")
        plan = _Plan(checkpoint)
        for key, tensor in checkpoint.tensors.items():
            plan.add(key, tensor)
        copied, scratch = _copied(source), beside(out)
        try:
            scratch.mkdir()
            report = _written(plan, source, copied, scratch, shard, progress or (lambda done, total: None))
            os.rename(scratch, out)
        except OSError as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"quantize: {shown(out)} cannot be written: {said(error)}") from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return Quantised(out, *report)


def _copied(source: Path) -> dict[str, bytes]:
    """The files beside the tensors that are copied, read before anything is written."""
    found = {}
    try:
        there = sorted(source.iterdir())
    except OSError as error:
        raise CheckpointError(f"{shown(source)} cannot be listed: {said(error)}; make it readable") from None
    for path in there:
        if path.suffix not in BESIDE or path.name in (INDEX, "config.json"):
            continue
        try:
            if stat.S_ISREG(path.stat().st_mode):
                found[path.name] = path.read_bytes()
        except FileNotFoundError:  # a link to nothing
            raise CheckpointError(f"{shown(path)} does not exist; {AGAIN}") from None
        except OSError as error:
            raise CheckpointError(f"{shown(path)} cannot be read: {said(error)}; make it readable") from None
    return found


def _written(
    plan: _Plan, source: Path, copied: dict[str, bytes], to: Path, shard: int, progress: Callable[[int, int], None]
) -> tuple[Any, ...]:
    """Write all files to a folder that is there; what Quantised has but for the folder."""
    shards, total, done = list(_shards(plan.jobs, shard)), sum(job.size for job in plan.jobs), 0
    count, weight_map = len(shards), {}
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        for nth, jobs in enumerate(shards):
            name = SINGLE if count == 1 else f"model-{nth + 1:05d}-of-{count:05d}.safetensors"
            weight_map |= {entry.name: name for job in jobs for entry in job.entries}
            for size in _write_file(to / name, jobs, pool):
                done += size
                progress(done, total)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_text(to / INDEX, json.dumps(index, indent=2) + "\n")
    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    raw = read_json(source / "config.json", ConfigError)
    raw["quantization_config"] = {**method, "modules_to_not_convert": sorted(plan.kept)}
    write_text(to / "config.json", json.dumps(raw, indent=2) + "\n")
    for name, content in copied.items():
        write_bytes(to / name, content)
    made = sum(len(job.entries) == 2 for job in plan.jobs)
    before = sum(tensor.stop - tensor.start for tensor in plan.checkpoint.tensors.values())
    return count, len(weight_map), made, before, total, tuple(sorted(plan.kept)), tuple(sorted(plan.uneven))


def _shards(jobs: Sequence[_Job], most: int) -> Iterator[list[_Job]]:
    """Jobs in order, as many to a file as it has room for."""
    held: list[_Job] = []
    room = most
    for job in jobs:
        if held and job.size > room:
            yield held
            held, room = [], most
        held.append(job)
        room -= job.size
    yield held


def _write_file(path: Path, jobs: Sequence[_Job], pool: ThreadPoolExecutor) -> Iterator[int]:
    """Write one safetensors file, few tensors in memory at a time; yields the bytes of each job.

    Wide elements stand before narrow ones, so that all are aligned, as the safetensors library has them.
    """
    entries = sorted((e for job in jobs for e in job.entries), key=lambda e: -(e.size // max(1, prod(e.shape))))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for entry in entries:
        starts[entry.name], end = end, end + entry.size
        place = [starts[entry.name], end]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
        for some in batched(jobs, THREADS):
            for job, arrays in zip(some, pool.map(lambda job: job.make(), some), strict=True):
                for entry, array in zip(job.entries, arrays, strict=True):
                    stream.seek(8 + len(text) + starts[entry.name])
                    stream.write(np.ascontiguousarray(array).view(np.uint8).data)
                yield job.size


def _tileable(shape: Sequence[int]) -> bool:
    """Whether readers agree on the blocks: those who divide sides by the number of scales, and those who count by 128."""
    return all(size <= BLOCK or size % BLOCK == 0 for size in shape)
