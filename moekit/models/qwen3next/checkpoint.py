"""Hugging Face safetensors checkpoints, read slice by slice: a device's share and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open

from moekit.models.qwen3next.config import Config
from moekit.models.qwen3next.files import DTYPES, CheckpointError, Tensor, read_tensors, said, shown
from moekit.models.qwen3next.numerics import finite
from moekit.models.qwen3next.sharding import AXIS, FLOAT32, Parameter, Slab, Weight, checkpoint_shapes, parameters

HEAD = "lm_head.weight"
MANY = 100_000
IGNORED = ("mtp.",)  # the multi-token-prediction layer
MAY_BE_F32 = ("A_log", "dt_bias", "norm.weight", "mlp.gate.weight", "shared_expert_gate.weight")


class Checkpoint:
    """The checked headers of a checkpoint's files, and slices of their tensors.

    The constructor reads headers only and raises CheckpointError on a file that is no safetensors, and on a missing,
    extra, mis-shaped, mistyped or truncated tensor. config: as given, but not tied where the files hold a head of
    their own. dtype: the files' name of it. A context manager: leaving it closes the files.
    """

    def __init__(self, directory: str | Path, config: Config):
        self.directory = Path(directory)
        self.tensors = read_tensors(self.directory)
        if HEAD in self.tensors:
            config = replace(config, tie_word_embeddings=False)
        self.config = config
        self.dtype = _check(self.directory, self.tensors, config)
        self._stack, self._files = ExitStack(), {}
        with ExitStack() as stack:
            for file, name in {(tensor.file, tensor.name): None for tensor in self.tensors.values()}:
                self._files[file] = stack.enter_context(_opened(file, name))
            self._stack = stack.pop_all()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self._files.clear()

    def read(self, slab: Slab) -> np.ndarray:
        """One slab, in the file's dtype; only its own rows and columns are touched."""
        tensor = self.tensors[slab.key]
        try:
            part = self._files[tensor.file].get_slice(slab.key)
            if not tensor.shape:
                return part[:]
            rows = slice(*slab.rows) if slab.rows else slice(None)
            return part[rows] if slab.columns is None else part[rows, slice(*slab.columns)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{tensor.file.name}: tensor {slab.key} cannot be read: {error}") from None


def load_parameters(
    directory: str | Path,
    config: Config,
    mesh: Mesh,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The parameter tree of a checkpoint as global arrays over `mesh`, each device having read its share.

    dtype: that of the weights (A_log and dt_bias stay float32); None takes what config.json names, and the files'
    where it names none. progress(done, total) is called after each array. All files are checked before the first
    array is placed.
    """
    with Checkpoint(directory, config) as checkpoint:
        tree = parameters(checkpoint.config, mesh.shape[AXIS])
        leaves, structure = jax.tree.flatten(tree)
        dtype = dtype or config.dtype
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


def _opened(file: Path, name: str) -> Any:
    """The library's reader of a file; opening it, the library checks the header once more."""
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shown(name)} is no valid safetensors file: {said(error)}") from None


def _check(directory: Path, tensors: Mapping[str, Tensor], config: Config) -> str:
    """Compare the headers with what the config promises; return the checkpoint's dtype."""
    experts = 3 * config.num_layers * config.num_experts
    if experts > len(tensors) + MANY:  # too many to make a name for each and say which is missing
        sizes = f"num_hidden_layers = {config.num_layers} and num_experts = {config.num_experts}"
        raise CheckpointError(f"{shown(directory)} holds {len(tensors)} tensors where {sizes} need {experts} for experts alone")
    wanted = checkpoint_shapes(config)
    for key, shape in wanted.items():
        if key not in tensors:
            raise CheckpointError(f"{shown(directory)}: tensor {key} of shape {list(shape)} is missing from every file")
        if tensors[key].shape != shape:
            got = f"shape {list(tensors[key].shape)} where {list(shape)} is needed"
            raise CheckpointError(f"{shown(tensors[key].name)}: tensor {key} has {got}")
    for key, tensor in tensors.items():
        if key not in wanted and not key.startswith(IGNORED):
            got = f"tensor {shown(key)} is not part of the model that config.json describes"
            raise CheckpointError(f"{shown(tensor.name)}: {got}")
    dtype = tensors["model.embed_tokens.weight"].dtype
    for key in wanted:
        allowed = {dtype, "F32"} if key.endswith(MAY_BE_F32) else {dtype}
        if not (tensors[key].dtype in allowed and tensors[key].dtype in DTYPES):
            needed = " or ".join(sorted(allowed & set(DTYPES))) or "F32, F16 or BF16"
            got = f"dtype {shown(tensors[key].dtype)} where {needed} is needed"
            raise CheckpointError(f"{shown(tensors[key].name)}: tensor {key} has {got}")
    return dtype
