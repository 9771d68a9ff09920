"""A model's weights as a checkpoint's tensors, and as a folder that `load` and transformers read."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from moekit.errors import NonFiniteError
from moekit.files import write_text
from moekit.models.qwen3next.checkpoint import MAY_BE_F32
from moekit.models.qwen3next.checks import weight_dtype
from moekit.models.qwen3next.config import QWEN3_NEXT, ConfigError
from moekit.models.qwen3next.files import SINGLE
from moekit.models.qwen3next.model import Model
from moekit.models.qwen3next.numerics import finite
from moekit.models.qwen3next.sharding import FLOAT32, Weight, checkpoint_shapes, parameters


def tensors_of(model: Model) -> dict[str, np.ndarray]:
    """Every tensor of the model by its name in a Qwen3-Next checkpoint, in the dtypes that the model has, on the host.

    What `load` joins and turns is taken apart again, and float8 weights are float32, times their scales. All of the model must
    be on devices of this process.
    """
    shapes, found, scales = checkpoint_shapes(model.config), {}, {}
    described = jax.tree.leaves(parameters(model.config, model.tp))
    for parameter, array in zip(described, jax.tree.leaves(model.params), strict=True):
        whole = np.asarray(array)
        shares = whole.reshape(model.tp, -1) if parameter.shape != parameter.local_shape(model.tp) else whole.reshape(1, -1)
        for rank, share in enumerate(shares):
            for weight, start in parameter.weights:
                place = share[start : start + prod(weight.shape)].reshape(weight.shape)
                _take_apart(place, weight, rank, shapes, scales if weight.block else found)
    return found | {key: found[key].astype(np.float32) * scale for key, scale in scales.items()}


def _take_apart(
    place: np.ndarray, weight: Weight, rank: int, shapes: dict[str, tuple[int, ...]], found: dict[str, np.ndarray]
) -> None:
    """Put one rank's share of a weight into the tensors that it was made of."""
    groups = weight.slabs(rank) if weight.stacked else [weight.slabs(rank)]
    for own, slabs in zip(place if weight.stacked else [place], groups, strict=True):
        matrix = own.reshape(len(own), -1)
        matrix, at = matrix.T if weight.transposed else matrix, 0
        for slab in slabs:
            tensor = found.setdefault(slab.key, np.empty(shapes[slab.key], own.dtype))
            rows, columns = slice(*(slab.rows or (None,))), slice(*(slab.columns or (None,)))
            block = tensor[rows, columns] if slab.columns else tensor[rows]
            count = len(block)
            if slab.scales:
                rows, columns = slab.scales
                wide = np.repeat(np.repeat(matrix[at : at + -(-count // rows)], rows, 0), columns, 1)
                block[...] = wide[:count, : block.shape[1]]
                at += -(-count // rows)
                continue
            block[...] = matrix[at : at + count].reshape(block.shape)
            at += count


def save(model: Model, directory: str | Path, dtype: str | None = None) -> Path:
    """Write `config.json` and `model.safetensors` of a Qwen3-Next under `directory`, and return it.

    dtype: of the weights, the model's where None; what the model then holds in float32 and a checkpoint may, stays exact.
    A_log and dt_bias are float32 in any case, of values that a given `dtype` holds. Raises, before anything is written,
    ConfigError for a model of another family, whose checkpoints have other names, DtypeError for a dtype that no checkpoint
    has, and NonFiniteError where a value is NaN or leaves its range.
    """
    if model.config.model_type != QWEN3_NEXT:
        raise ConfigError(f"save: the model is a {model.config.model_type}; only {QWEN3_NEXT} is written")
    asked = weight_dtype("save", dtype)
    directory, kind = Path(directory), np.dtype(asked or model.dtype)
    tensors = {name: _stored(name, value, kind, exact=asked is None) for name, value in tensors_of(model).items()}
    for name, tensor in tensors.items():
        if not finite(tensor):
            raise NonFiniteError(f"save: {name} holds values that are NaN or infinite in {kind.name}; choose a wider dtype")
    directory.mkdir(parents=True, exist_ok=True)
    description = replace(model.config, dtype=kind.name).to_json()
    write_text(directory / "config.json", json.dumps(description, indent=2) + "\n")
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
    return directory


def _stored(name: str, value: np.ndarray, kind: np.dtype, exact: bool) -> np.ndarray:
    """A tensor as a checkpoint of a dtype has it. exact: in float32 where it may be and holds what `kind` cannot."""
    with np.errstate(over="ignore"):
        rounded = value.astype(kind)
    if exact and name.endswith(MAY_BE_F32) and not np.array_equal(rounded, value):
        return value
    return rounded.astype(np.float32) if name.endswith(FLOAT32) else rounded
