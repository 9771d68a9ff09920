"""Others' kernels under the same cases: a table of adapters, each with the peer's own documented rounding and limits.

An adapter takes a case and its tensors (torch views of exactly the case's strides, outputs poisoned) and writes the outputs.
`--impl module:callable` needs no adapter: `callable(*operands, **params)` returns the outputs, and its operands must
stay as they are.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moekit.errors import UnavailableError
from moekit.lang.dtypes import round_to
from moekit.testing.case import FuzzCase
from moekit.testing.executors import Executor, Torch, launches


@dataclass(frozen=True)
class Peer:
    """A peer's kernel for one fusion. `call(case, tensors)` writes the outputs; `supports` says what its documentation allows;
    `reference` replaces the fusion's where it documents other roundings."""

    package: str
    fusion: str
    call: Callable[[FuzzCase, Mapping[str, Any]], None]
    supports: Callable[[FuzzCase], bool]
    reference: Callable | None = None


def _uniform(case: FuzzCase, *dtypes: str) -> bool:
    return len(set(case.dtypes.values())) == 1 and next(iter(case.dtypes.values())) in dtypes


def _unit_rows(case: FuzzCase) -> bool:
    """Whether every tensor has stride 1 along its last dimension and no stride 0."""
    return all(
        not case.layout(n).zero and (not case.shape(n) or case.layout(n).strides(case.shape(n))[-1] == 1) for n in case.memory()
    )


def _dense(case: FuzzCase) -> bool:
    return all(case.layout(n).kind in ("dense", "shifted") for n in case.memory())


def _wide(case: FuzzCase, axis: str, multiple: int) -> bool:
    return case.sizes.get(axis, 0) % multiple == 0 and case.sizes.get("T", 1) > 0


def _unrounded_norm(x, residual, weight, *, eps, offset):
    """Add-RMSNorm as FlashInfer and SGLang document it: the variance and the output are of the unrounded sum."""
    total = x.astype(np.float64) + residual.astype(np.float64)
    scale = 1 / np.sqrt(np.mean(total * total, axis=-1, keepdims=True) + eps)
    return {"out": total * scale * (offset + weight.astype(np.float64)), "residual": round_to(total, residual.dtype)}


def _fused_add_norm(module: str, offset_one: str, offset_zero: str) -> Callable[[FuzzCase, Mapping[str, Any]], None]:
    """An in-place fused add-RMSNorm: its first two arguments become the output and the residual."""

    def call(case: FuzzCase, tensors: Mapping[str, Any]) -> None:
        package = importlib.import_module(module)
        kernel = getattr(package, offset_one if case.params["offset"] == 1.0 else offset_zero)
        out, residual = tensors[case.targets["out"]], tensors[case.targets["residual"]]
        if case.targets["out"] != "x":
            out.copy_(tensors["x"])
        if case.targets["residual"] != "residual":
            residual.copy_(tensors["residual"])
        kernel(out, residual, tensors["weight"], case.params["eps"])

    return call


def _norm_supported(case: FuzzCase) -> bool:
    known = case.params["offset"] in (0.0, 1.0)
    return known and _uniform(case, "float16", "bfloat16") and _dense(case) and _wide(case, "H", 8)


def _silu(module: str) -> Callable[[FuzzCase, Mapping[str, Any]], None]:
    def call(case: FuzzCase, tensors: Mapping[str, Any]) -> None:
        importlib.import_module(module).silu_and_mul(tensors["gate_up"], tensors[case.targets["out"]])

    return call


def _silu_supported(case: FuzzCase) -> bool:
    return _uniform(case, "float16", "bfloat16") and _dense(case) and _wide(case, "I", 16)


def _sgl_topk(case: FuzzCase, tensors: Mapping[str, Any]) -> None:
    kernel = importlib.import_module("sgl_kernel").topk_softmax
    kernel(tensors["weights"], tensors["ids"], tensors["logits"], case.params["renormalize"])


def _topk_supported(case: FuzzCase) -> bool:
    finite = case.recipe not in ("special", "lowest", "huge")
    return _dense(case) and finite and _wide(case, "E", 1) and not case.params["nan_to_zero"]


def _liger_silu(case: FuzzCase, tensors: Mapping[str, Any]) -> None:
    function = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    half = case.sizes["I"]
    tensors[case.targets["out"]].copy_(function.apply(tensors["gate_up"][:, :half], tensors["gate_up"][:, half:]))


def _compiled(case: FuzzCase, tensors: Mapping[str, Any]) -> None:
    results = _compiled_eager(case.declaration, tuple(case.params.items()))(*(tensors[n] for n in case.shapes))
    for result, target in zip(results, case.targets.values(), strict=True):
        tensors[target].copy_(result)


@functools.lru_cache(maxsize=64)
def _compiled_eager(fusion, params: tuple) -> Callable:
    import torch

    from moekit.torch.autograd import evaluated

    def eager(*tensors):
        bound, values = evaluated(fusion, dict(params), tensors)
        return tuple(values[n] for n in bound.names)

    return torch.compile(eager, dynamic=True)


PEERS: dict[str, Peer] = {
    "flashinfer-add-norm": Peer("flashinfer", "add_rms_norm", _fused_add_norm(
        "flashinfer.norm", "gemma_fused_add_rmsnorm", "fused_add_rmsnorm"), _norm_supported, _unrounded_norm),
    "flashinfer-silu": Peer("flashinfer", "silu_and_mul", _silu("flashinfer.activation"), _silu_supported),
    "sgl-add-norm": Peer("sgl_kernel", "add_rms_norm", _fused_add_norm(
        "sgl_kernel", "gemma_fused_add_rmsnorm", "fused_add_rmsnorm"), _norm_supported, _unrounded_norm),
    "sgl-silu": Peer("sgl_kernel", "silu_and_mul", _silu("sgl_kernel"), _silu_supported),
    "sgl-topk": Peer("sgl_kernel", "topk_softmax", _sgl_topk, _topk_supported),
    "liger-silu": Peer("liger_kernel", "silu_and_mul", _liger_silu, lambda c: _wide(c, "I", 1) and _unit_rows(c)),
    "compiled-eager": Peer("torch", "", _compiled, lambda c: _wide(c, "T", 1) or "T" not in c.sizes),
}  # fmt: skip


class PeerExecutor(Torch):
    """A peer's kernel on tensors in guarded memory, on the GPU if there is one."""

    def __init__(self, name: str, peer: Peer):
        from moekit.cli.platform import gpu_count

        super().__init__(name, "peer", "cuda" if gpu_count() else "cpu")
        self.peer, self.reference, self.compiled = peer, peer.reference, False

    def supports(self, case: FuzzCase) -> bool:
        """Whether the case is one the peer's documentation allows."""
        return case.fusion == (self.peer.fusion or case.fusion) and self.peer.supports(case)

    def call(self, case: FuzzCase, tensors: Mapping[str, Any]) -> None:
        """Run the adapter."""
        if any(tensors[t].numel() for t in case.targets.values()):
            self.peer.call(case, tensors)
            launches[self.name] += 1


def _plain(function: Callable) -> Callable[[FuzzCase, Mapping[str, Any]], None]:
    def call(case: FuzzCase, tensors: Mapping[str, Any]) -> None:
        got = function(*(tensors[n] for n in case.shapes), **case.params)
        for result, target in zip(got if isinstance(got, tuple) else (got,), case.targets.values(), strict=True):
            tensors[target].copy_(result)

    return call


@functools.lru_cache(maxsize=64)
def peer_executor(name: str) -> Executor:
    """The executor of a peer by name, or of `module:callable`; raises UnavailableError where it is not installed."""
    if name in PEERS:
        peer = PEERS[name]
        if importlib.util.find_spec(peer.package) is None:
            raise UnavailableError(f"{name}: {peer.package} is not installed")
        return PeerExecutor(name, peer)
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UnavailableError(f"{name}: {error}") from None
    return PeerExecutor(name, Peer(module, "", _plain(function), lambda case: True))
