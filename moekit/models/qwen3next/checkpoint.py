"""Hugging Face safetensors checkpoints, read slice by slice: a device's share and nothing else.

Files are mapped, so that a block costs the pages it lies in. One share of one array is on the host at a time, and the one
before it on its way to a device; threads fill it, weight by weight and expert by expert.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open

from moekit.models.qwen3next.config import Config
from moekit.models.qwen3next.files import DTYPES, FP8, WHOLE, CheckpointError, Tensor, read_tensors, said, shown
from moekit.models.qwen3next.forms import FUSED, Form, Piece
from moekit.models.qwen3next.fp8 import LARGEST, SCALE, Float8, dequantised, scales_of
from moekit.models.qwen3next.layer import SCALE as SCALE_OF
from moekit.models.qwen3next.memory import NO_ROOM, Room, check_fits
from moekit.models.qwen3next.numerics import finite
from moekit.models.qwen3next.sharding import (
    AXIS,
    FLOAT32,
    MIXERS,
    REPLICATED,
    ROUTED,
    SHARED,
    Parameter,
    Slab,
    Weight,
    layer_weights,
    parameters,
)

HEAD = "lm_head.weight"
LEAST = 16  # columns that share a scale: as many as the matrix unit takes at a time
MANY = 100_000
MAY_BE_F32 = ("A_log", "dt_bias", "norm.weight", "mlp.gate.weight", "shared_expert_gate.weight")
THREADS = 16  # at most: more than fill the memory's bandwidth


class Checkpoint:
    """The checked headers of a checkpoint's files, and slices of their tensors.

    The constructor reads headers only and raises CheckpointError on a file that is no safetensors, and on a missing,
    extra, mis-shaped, mistyped or truncated tensor. config: as given, but not tied where the files hold a head of
    their own. dtype: the files' name of it, of what is not FP8. scales: the tensor of scales of each weight in FP8. skipped:
    the tensors that are no part of the text model, by how their names begin. A context manager: leaving it forgets the files.
    """

    def __init__(self, directory: str | Path, config: Config):
        self.directory = Path(directory)
        self.tensors = read_tensors(self.directory)
        if HEAD in self.tensors:
            config = replace(config, tie_word_embeddings=False)
        self.config, self.form = config, Form.of(config, self.tensors)
        self.dtype, self.scales = _check(self.directory, self.tensors, self.form)
        self.skipped = {
            start: [tensor for name, tensor in self.tensors.items() if name.startswith(start)] for start in self.form.skipped
        }
        files = {tensor.file: tensor.name for tensor in self.tensors.values()}
        self._maps = {file: _mapped(file, name) for file, name in files.items()}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self._maps.clear()

    def read(self, slab: Slab, codes: bool = False) -> np.ndarray:
        """One slab, rows first, in the file's dtype: mapped where it is one piece of a tensor, else joined; of FP8 float32, or

        the codes as they are. Its scales, if those are meant.
        """
        one = partial(self._piece, codes=codes) if slab.scales is None else partial(self._scales, block=slab.scales)
        pieces = [one(piece) for piece in self.form.pieces(slab)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def quantised(self, slab: Slab) -> bool:
        """Whether all of a slab is FP8 in the files."""
        return all(piece.key in self.scales for piece in self.form.pieces(slab))

    def keep_float8(self, required: bool, tp: int = 1) -> None:
        """Let a model over `tp` ranks have what is FP8 in all layers as it is.

        CheckpointError where that is required and the routed experts are not, or not in blocks that kernels take.
        """
        found, why = kept_float8(self, tp)
        if required and found is None:
            raise CheckpointError(f"{shown(self.directory)}: {why}")
        self.config = replace(self.config, float8=found)

    def kept(self, slab: Slab) -> bool:
        """Whether a tensor is in float32 though the checkpoint is not."""
        return self.tensors[self.form.pieces(slab)[0].key].dtype == "F32" != self.dtype

    def whole(self, tensor: Tensor, expert: int | None = None) -> np.ndarray:
        """A tensor as it stands in its file, mapped, or one expert's part of it."""
        array = np.ndarray(tensor.shape, DTYPES[tensor.dtype], self._maps[tensor.file], tensor.start)
        return array if expert is None else array[expert]

    def content(self, tensor: Tensor) -> np.ndarray:
        """The bytes of a tensor of any dtype, mapped."""
        return np.ndarray(tensor.stop - tensor.start, np.uint8, self._maps[tensor.file], tensor.start)

    def _piece(self, piece: Piece, codes: bool) -> np.ndarray:
        part = self.whole(self.tensors[piece.key], piece.expert)
        if piece.rows:
            part = part[slice(*piece.rows)]
        part = part[:, slice(*piece.columns)] if piece.columns else part
        if codes or piece.key not in self.scales:
            return part
        blocks, scales = self.config.blocks, self.whole(self.scales[piece.key], piece.expert)
        assert blocks is not None  # or no scales would have been found
        return dequantised(part, scales, blocks, ((piece.rows or (0,))[0], (piece.columns or (0,))[0]))

    def _scales(self, piece: Piece, block: tuple[int, int]) -> np.ndarray:
        """Float32 scales of a piece, one for so many rows and columns, of which the files' blocks have whole multiples."""
        blocks, scales = self.config.blocks, self.whole(self.scales[piece.key], piece.expert)
        shape, at = self.tensors[piece.key].shape[-2:], []
        assert blocks is not None  # or no scales would have been found
        for span, n, of, own in zip((piece.rows, piece.columns), shape, (blocks.rows, blocks.columns), block, strict=True):
            start, stop = span or (0, n)
            assert start % own == 0, (piece, block)
            at.append(np.arange(start, stop, own) // of)
        return scales[np.ix_(*at)].astype(np.float32)


def load_parameters(
    checkpoint: Checkpoint,
    mesh: Mesh,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    room: Room = NO_ROOM,
) -> dict[str, Any]:
    """The parameter tree of a checkpoint's config as global arrays over `mesh`, each device having read its share.

    dtype: that of the weights (A_log and dt_bias stay float32, and what a narrow checkpoint keeps in float32 does where
    the model has it so); None takes what config.json names, and the files' where it names none. progress(done, total),
    in bytes of this process's devices, is called after each share. Before the first array is placed it is checked that
    weights and a cache as `room` says it fit (FitError).
    """
    kind, config = np.dtype(weights_dtype(checkpoint, dtype)), checkpoint.config
    check_fits(config, mesh, kind, room)
    leaves, structure = jax.tree.flatten(parameters(config, mesh.shape[AXIS]))
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        reader = _Reader(checkpoint, mesh, kind, pool)
        total, done, arrays = sum(map(reader.size, leaves)), 0, []
        for parameter in leaves:
            shares = []
            for share in reader.shares(parameter):
                shares.append(share)
                done += share.nbytes
                if progress is not None:
                    progress(done, total)
            sharding = NamedSharding(mesh, parameter.spec)
            arrays.append(jax.make_array_from_single_device_arrays(parameter.shape, sharding, shares))
    return jax.tree.unflatten(structure, arrays)


def kept_float8(checkpoint: Checkpoint, tp: int = 1) -> tuple[Float8 | None, str]:
    """What a model over `tp` ranks can keep as the files have it: the routed experts, or None, and then why not.

    They must be FP8 in every layer, and so must be what is kept beside them: the shared experts, and the projections of a kind
    of layer. Where ranks cut the files' blocks, LEAST columns or more must share a scale.
    """
    config, blocks = checkpoint.config, checkpoint.config.blocks
    name, others = DTYPES[FP8].name, (SHARED, *map(MIXERS.__getitem__, sorted(set(config.layer_types))))

    def parts(names: tuple[str, ...], every: Config, ranks: int) -> Iterator[Weight]:
        layers = (layer_weights(every, ranks, i) for i in range(config.num_layers))
        return (layer[name] for layer in layers for name in names if name in layer)

    def plain(names: tuple[str, ...]) -> str | None:
        """A tensor among what these weights are made of that is not FP8."""
        for weight in parts(names, replace(config, ep=1), 1):
            slabs = weight.slabs(0)
            for slab in chain.from_iterable(slabs) if weight.stacked else slabs:
                for piece in checkpoint.form.pieces(slab):
                    if piece.key not in checkpoint.scales:
                        return piece.key
        return None

    if blocks is None or (key := plain(ROUTED)):
        key, made = (plain(ROUTED), ", or quantise the checkpoint") if blocks is None else (key, "")
        kind = shown(checkpoint.tensors[key or HEAD].dtype)
        return None, f"tensor {key} is {kind}, so the routed experts cannot be kept in {name}; leave weights out{made}"

    def narrow(names: tuple[str, ...]) -> int | None:
        """So many elements of what is contracted that share a scale of one of these weights, if they are too few."""
        scaled = tuple(n + SCALE_OF for n in names)
        every = replace(config, float8=Float8(blocks.rows, blocks.columns, frozenset(names) | {*ROUTED}))
        return next((w.block[1] for w in parts(scaled, every, tp) if w.block and w.block[1] < LEAST), None)

    if few := narrow(ROUTED):
        where = f"over {tp} ranks in {config.ep} groups" if tp > config.ep else f"of blocks of {blocks.rows} × {blocks.columns}"
        advice = "choose fewer ranks or a larger ep, or leave" if tp > config.ep else "leave"
        found = f"{where} {few} columns of a routed expert share a scale, and {LEAST} are needed"
        return None, f"{found} for {name}; {advice} weights out"
    kept = [ROUTED, *(names for names in others if plain(names) is None and narrow(names) is None)]
    return Float8(blocks.rows, blocks.columns, frozenset(chain.from_iterable(kept))), ""


def weights_dtype(checkpoint: Checkpoint, dtype: str | None) -> str:
    """The dtype that weights get: the one asked for, else what config.json names, else the files'."""
    return dtype or checkpoint.config.dtype or DTYPES[checkpoint.dtype].name


@dataclass(frozen=True)
class _Reader:
    """Reads this process's shares of parameters, in `dtype` where those are narrow."""

    checkpoint: Checkpoint
    mesh: Mesh
    dtype: np.dtype
    pool: ThreadPoolExecutor

    def ranks(self) -> list[tuple[Any, int]]:
        """This process's devices of the mesh, and the rank of each."""
        axis = self.mesh.axis_names.index(AXIS)
        return [(d, at[axis]) for at, d in np.ndenumerate(self.mesh.devices) if d.process_index == jax.process_index()]

    def size(self, parameter: Parameter) -> int:
        """The bytes that all shares of a parameter take on these devices."""
        kind = parameter.dtype(self.dtype)
        return len(self.ranks()) * prod(parameter.local_shape(self.mesh.shape[AXIS])) * kind.itemsize

    def shares(self, parameter: Parameter) -> Iterator[jax.Array]:
        """A parameter's part of each device, in order; what every rank has is read once."""
        before, held = None, None
        for device, rank in self.ranks():
            if held is None or parameter.spec != REPLICATED:
                held = self._share(parameter, rank)
            share = jax.device_put(held, device)
            if before is not None:
                before.block_until_ready()  # two shares are on the host at most
            yield share
            before = share

    def _share(self, parameter: Parameter, rank: int) -> np.ndarray:
        """What one rank holds: its share of every weight where that stands, zeros elsewhere."""
        local = parameter.local_shape(self.mesh.shape[AXIS])
        held = _aligned(local, parameter.dtype(self.dtype))
        flat, jobs, end = held.reshape(-1), [], 0
        for weight, start in sorted(parameter.weights, key=lambda held: held[1]):
            flat[end:start] = 0
            end = start + prod(weight.shape)
            place = flat[start:end].reshape(weight.shape)
            groups = weight.slabs(rank) if weight.stacked else [weight.slabs(rank)]
            jobs += [(own, weight, slabs) for own, slabs in zip(place if weight.stacked else [place], groups, strict=True)]
        flat[end:] = 0
        for _ in self.pool.map(lambda job: self._fill(*job), jobs):
            pass  # the first problem is raised
        return held

    def _fill(self, place: np.ndarray, weight: Weight, slabs: Sequence[Slab]) -> None:
        """One rank's share of a weight, or of one expert's: its slabs joined by rows, rounded once."""
        float8 = place.dtype == DTYPES[FP8]
        wide = weight.name in FLOAT32 or float8 or weight.block is not None
        wide = wide or (place.dtype == np.float32 and all(map(self.checkpoint.kept, slabs)))
        matrix = place.reshape(len(place), -1)
        matrix, at = matrix.T if weight.transposed else matrix, 0
        with np.errstate(over="ignore"):
            for slab in slabs:
                block = self.checkpoint.read(slab, codes=float8)
                rows = matrix[at : at + len(block)]
                at += len(block)
                block = block.reshape(rows.shape) if block.ndim != 2 else block
                _copy(rows, block, rows.dtype if wide else self.dtype, weight.transposed)
            if not finite(place):
                self._refuse(slabs, place.dtype if wide else self.dtype)
            if float8 and any(map(self._leaves, slabs)):
                self._refuse(slabs, self.dtype)

    def _leaves(self, slab: Slab) -> bool:
        """Whether codes times their scales leave the range of the weights' dtype, in which some products have them."""
        most = float(ml_dtypes.finfo(self.dtype).max)
        for piece in self.checkpoint.form.pieces(slab):
            scales = self.checkpoint.whole(self.checkpoint.scales[piece.key], piece.expert)
            if float(np.abs(scales).max(initial=0)) * float(LARGEST) > most:  # which is rare, and then looked at closely
                return not finite(self.checkpoint.read(slab).astype(self.dtype))
        return False

    def _refuse(self, slabs: Sequence[Slab], dtype: np.dtype) -> None:
        """Say which tensor a value came from that is not finite."""
        blocks = [(slab, self.checkpoint.read(slab, codes=dtype == DTYPES[FP8])) for slab in slabs]
        slab, block = next((s, b) for s, b in blocks if not finite(b.astype(dtype)))
        why = f"leaves the range of {dtype}; choose a wider dtype" if finite(block) else "holds NaN or an infinity"
        key = self.checkpoint.form.pieces(slab)[0].key
        raise CheckpointError(f"{self.checkpoint.directory}: tensor {key} {why}")


def _copy(to: np.ndarray, block: np.ndarray, dtype: np.dtype, transposed: bool) -> None:
    """Put a block in its place by way of `dtype`. Equal dtypes are copied as integers, which numpy does without its lock."""
    if not to.dtype == block.dtype == dtype:
        to[...] = block.astype(dtype)
        return
    bits, words = np.dtype(f"u{to.itemsize}"), 8 // to.itemsize
    to, block = to.view(bits), block.view(bits)
    if transposed and block.shape[1] % words == 0 and block.strides[1] == to.itemsize:
        # eight bytes at a time, then apart: element by element numpy takes twice as long
        turned = np.ascontiguousarray(block.view(np.uint64).T).view(bits).reshape(-1, len(block), words)
        to.T.reshape(-1, words, len(block))[...] = turned.transpose(0, 2, 1)
    else:
        to[...] = block


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array, unwritten, that begins where a CPU device takes it as it is."""
    room = np.empty(prod(shape) * dtype.itemsize + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : len(room) - 64 + start].view(dtype).reshape(shape)


def _mapped(file: Path, name: str) -> mmap.mmap:
    """A file's bytes, once the library has checked its header too."""
    try:
        with safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shown(name)} is no valid safetensors file: {said(error)}") from None


def _check(directory: Path, tensors: Mapping[str, Tensor], form: Form) -> tuple[str, dict[str, Tensor]]:
    """Compare the headers with what the config promises; return the checkpoint's dtype, and the scales of FP8 weights."""
    config = form.config
    experts = 3 * config.num_layers * config.num_experts
    if form.fused:
        key = next(key for key in tensors if key.endswith(FUSED) and not key.startswith(form.skipped))
        _check_shape(tensors[key], key, (config.num_experts, 2 * config.moe_intermediate_size, config.hidden_size))
    elif experts > len(tensors) + MANY:  # too many to make a name for each and say which is missing
        sizes = f"num_hidden_layers = {config.num_layers} and num_experts = {config.num_experts}"
        raise CheckpointError(f"{shown(directory)} holds {len(tensors)} tensors where {sizes} need {experts} for experts alone")
    wanted = form.shapes
    for key, shape in wanted.items():
        if key not in tensors:
            raise CheckpointError(f"{shown(directory)}: tensor {key} of shape {list(shape)} is missing from every file")
        _check_shape(tensors[key], key, shape)
    scales = scales_of(tensors, wanted, config.blocks)
    known = wanted.keys() | {key + SCALE for key in scales}
    for key, tensor in tensors.items():
        if key not in known and not key.startswith(form.skipped):
            got = f"tensor {shown(key)} is not part of the model that config.json describes"
            raise CheckpointError(f"{shown(tensor.name)}: {got}")
    dtype = tensors[f"{form.prefix}embed_tokens.weight"].dtype
    for key in wanted:
        allowed = {dtype, "F32"} if key.endswith(MAY_BE_F32) else {dtype}
        if key not in scales and not (tensors[key].dtype in allowed and tensors[key].dtype in WHOLE):
            needed = " or ".join(sorted(allowed & set(WHOLE))) or "F32, F16 or BF16"
            got = f"dtype {shown(tensors[key].dtype)} where {needed} is needed"
            raise CheckpointError(f"{shown(tensors[key].name)}: tensor {key} has {got}")
    return dtype, scales


def _check_shape(tensor: Tensor, key: str, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        got = f"shape {list(tensor.shape)} where {list(shape)} is needed"
        raise CheckpointError(f"{shown(tensor.name)}: tensor {shown(key)} has {got}")
