"""Hugging Face safetensors checkpoints, read slice by slice: a device's share and nothing else."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open

from moekit.errors import MoekitError
from moekit.models.qwen3next.config import Config
from moekit.models.qwen3next.numerics import finite
from moekit.models.qwen3next.sharding import AXIS, FLOAT32, Parameter, Slab, Weight, checkpoint_shapes, parameters

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
IGNORED = ("mtp.",)  # the multi-token-prediction layer
MAY_BE_F32 = ("A_log", "dt_bias", "norm.weight", "mlp.gate.weight", "shared_expert_gate.weight")


class CheckpointError(MoekitError, ValueError):
    """A checkpoint that does not hold what its config promises."""


@dataclass(frozen=True)
class Tensor:
    """What a file's header says of one tensor; `end` counts bytes from the start of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    end: int


class Checkpoint:
    """The checked headers of a checkpoint's files, and slices of their tensors.

    The constructor reads headers only and raises CheckpointError on a missing, extra, mis-shaped, mistyped or
    truncated tensor. A context manager: leaving it closes the files.
    """

    def __init__(self, directory: str | Path, config: Config):
        self.directory = Path(directory)
        self.tensors = _headers(self.directory)
        self.dtype = _check(self.directory, self.tensors, config)
        self._stack, self._files = ExitStack(), {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._files.clear()

    def read(self, slab: Slab) -> np.ndarray:
        """One slab, in the file's dtype; only its own rows and columns are touched."""
        tensor = self.tensors[slab.key]
        try:
            part = self._open(tensor.file).get_slice(slab.key)
            if not tensor.shape:
                return part[:]
            rows = slice(*slab.rows) if slab.rows else slice(None)
            return part[rows] if slab.columns is None else part[rows, slice(*slab.columns)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{tensor.file.name}: tensor {slab.key} cannot be read: {error}") from None

    def _open(self, file: Path) -> Any:
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(file, framework="numpy"))
        return self._files[file]


def load_parameters(
    directory: str | Path,
    config: Config,
    mesh: Mesh,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The parameter tree of a checkpoint as global arrays over `mesh`, each device having read its share.

    dtype: that of the weights (A_log and dt_bias stay float32); None keeps the checkpoint's. progress(done,
    total) is called after each array.
    """
    tree = parameters(config, mesh.shape[AXIS])
    leaves, structure = jax.tree.flatten(tree)
    with Checkpoint(directory, config) as checkpoint:
        wanted = DTYPES[checkpoint.dtype] if dtype is None else np.dtype(dtype)
        arrays = []
        for done, parameter in enumerate(leaves, start=1):
            arrays.append(_array(checkpoint, parameter, mesh, wanted))
            if progress is not None:
                progress(done, len(leaves))
    return jax.tree.unflatten(structure, arrays)


def _array(checkpoint: Checkpoint, parameter: Parameter, mesh: Mesh, dtype: np.dtype) -> jax.Array:
    local = parameter.local_shape(mesh.shape[AXIS])

    def share(index: tuple[slice, ...] | None) -> np.ndarray:
        """What one rank holds: its share of every weight where that stands, zeros elsewhere."""
        rank = 0 if index is None else (index[0].start or 0) // local[0]
        held = np.zeros(local, dtype if parameter.narrow else np.float32)
        for weight, start in parameter.weights:
            place = held.reshape(-1)[start : start + prod(weight.shape)].reshape(weight.shape)
            _fill(place, checkpoint, weight, rank, np.dtype(np.float32) if weight.name in FLOAT32 else dtype)
        return held

    return jax.make_array_from_callback(parameter.shape, NamedSharding(mesh, parameter.spec), share)


def _fill(place: np.ndarray, checkpoint: Checkpoint, weight: Weight, rank: int, dtype: np.dtype) -> None:
    """One rank's share of a weight, rounded to `dtype`: its slabs joined by rows, or one such block per expert."""
    groups = weight.slabs(rank) if weight.stacked else [weight.slabs(rank)]
    for own, slabs in zip(place if weight.stacked else [place], groups, strict=True):
        block = _joined(checkpoint, slabs, dtype)
        own[...] = (block.T if weight.transposed else block).reshape(own.shape)


def _joined(checkpoint: Checkpoint, slabs: Sequence[Slab], dtype: np.dtype) -> np.ndarray:
    blocks = [checkpoint.read(slab) for slab in slabs]
    block = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    with np.errstate(over="ignore"):
        block = block.astype(dtype, copy=False)
        if not finite(block):
            wrong, part = next((s, b) for s, b in zip(slabs, blocks, strict=True) if not finite(b.astype(dtype)))
            why = f"leaves the range of {dtype}; choose a wider dtype" if finite(part) else "holds NaN or an infinity"
            raise CheckpointError(f"{checkpoint.directory}: tensor {wrong.key} {why}")
    return block


def _headers(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, with truncated files refused."""
    index = directory / INDEX
    if index.is_file():
        listed = _weight_map(index)
        files = [directory / name for name in sorted(set(listed.values()))]
    elif (directory / SINGLE).is_file():
        listed, files = {}, [directory / SINGLE]
    else:
        raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        for key, tensor in _header(file).items():
            if key in tensors:
                raise CheckpointError(f"{file.name}: tensor {key} is also in {tensors[key].file.name}")
            tensors[key] = tensor
    for key, name in listed.items():
        if key not in tensors or tensors[key].file.name != name:
            raise CheckpointError(f"{name}: tensor {key} is missing, though {INDEX} lists it there")
    return tensors


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index.name} cannot be read as a safetensors index: {error!r}") from None
    return listed


def _header(file: Path) -> dict[str, Tensor]:
    """The header of one safetensors file: eight bytes of length, JSON, then the data."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise CheckpointError(f"{file.name} is truncated: its header needs {8 + length} bytes, it has {size}")
            raw = json.loads(stream.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{file.name} does not exist in {file.parent}") from None
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{file.name} has no readable safetensors header: {error}") from None
    raw.pop("__metadata__", None)
    tensors = {
        key: Tensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][1])
        for key, entry in raw.items()
    }
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].end):
        if tensor.end > size:
            got = f"the file ends at byte {size} where {tensor.end} are needed"
            raise CheckpointError(f"{file.name}: tensor {key} is truncated: {got}")
    return tensors


def _check(directory: Path, tensors: Mapping[str, Tensor], config: Config) -> str:
    """Compare the headers with what the config promises; return the checkpoint's dtype."""
    wanted = checkpoint_shapes(config)
    for key, shape in wanted.items():
        if key not in tensors:
            raise CheckpointError(f"{directory}: tensor {key} of shape {list(shape)} is missing from every file")
        if tensors[key].shape != shape:
            got = f"shape {list(tensors[key].shape)} where {list(shape)} is needed"
            raise CheckpointError(f"{tensors[key].file.name}: tensor {key} has {got}")
    for key in tensors:
        if key not in wanted and not key.startswith(IGNORED) and not _is_tied_head(key, config):
            where = tensors[key].file.name
            raise CheckpointError(f"{where}: tensor {key} is not part of the model that config.json describes")
    dtype = tensors["model.embed_tokens.weight"].dtype
    for key in wanted:
        allowed = {dtype, "F32"} if key.endswith(MAY_BE_F32) else {dtype}
        if not (tensors[key].dtype in allowed and tensors[key].dtype in DTYPES):
            needed = " or ".join(sorted(allowed & set(DTYPES))) or "F32, F16 or BF16"
            got = f"dtype {tensors[key].dtype} where {needed} is needed"
            raise CheckpointError(f"{tensors[key].file.name}: tensor {key} has {got}")
    return dtype


def _is_tied_head(key: str, config: Config) -> bool:
    return config.tie_word_embeddings and key == "lm_head.weight"
