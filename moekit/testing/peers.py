"""Others' kernels under the same cases: a table of adapters, each with the peer's own documented rounding and limits.

An adapter takes a case and its tensors (torch views of exactly the case's strides, outputs poisoned) and writes the outputs.
`--impl module:callable` needs no adapter: `callable(*operands, **params)` returns the outputs, and its operands must
stay as they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moekit.cli import platform
from moekit.errors import UnavailableError
from moekit.lang.dtypes import FLOATS, is_float, itemsize
from moekit.testing import others, standards
from moekit.testing.case import FuzzCase, attribute_of
from moekit.testing.executors import Executor, Torch, launches
from moekit.testing.layouts import KINDS
from moekit.testing.oracle import Standard

HALVES = ("bfloat16", "float16")
DENSE = ("dense",)
ROWS = ("dense", "padded 16")  # rows of stride 1 that begin on 16 bytes
FINITE = ("normal", "integers", "tiny", "huge", "ties", "equal", "zeros", "mixed")

Adapter = Callable[[FuzzCase, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Peer:
    """A peer's kernel for one fusion. `call(case, tensors)` writes the outputs; `supports`, `kinds` (of layouts) and `dtypes`

    say what its documentation allows; `standard` what it is held to where it documents other roundings or promises less; `load`
    raises UnavailableError where it is not installed.
    """

    fusion: str
    call: Adapter
    supports: Callable[[FuzzCase], bool]
    load: Callable[[], object]
    standard: Standard = standards.DECLARED
    kinds: tuple[str, ...] = DENSE
    dtypes: tuple[str, ...] = HALVES


def _uniform(case: FuzzCase) -> bool:
    """Whether all operands have one dtype."""
    return len(set(case.dtypes.values())) == 1


def _some(case: FuzzCase) -> bool:
    """Whether there is a row: no peer says what it does with none."""
    return case.extents.get("T", 1) > 0


def vectors(case: FuzzCase) -> bool:
    """Whether every tensor has elements one after the other along its last dimension, and rows that begin where a vector may:

    16 bytes wide, or as many elements as divide the row. That is how wide the kernels of FlashInfer's family load.
    """
    for name in case.memory():
        layout, shape, size = case.layout(name), case.shape(name), itemsize(case.dtype(name))
        *rows, last = layout.strides(shape) or (1,)
        vector = math.gcd(16 // size, shape[-1])
        if layout.zero or last != 1 or any(s % vector for s in (*rows, layout.offset(shape))):
            return False
    return True


def _in_place_norm(kernel: Callable) -> Adapter:
    """An in-place fused add-RMSNorm: its first two arguments become the output and the residual."""

    def call(case: FuzzCase, tensors: Mapping[str, Any]) -> None:
        out, residual = tensors[case.targets["out"]], tensors[case.targets["residual"]]
        if case.targets["out"] != "x":
            out.copy_(tensors["x"])
        if case.targets["residual"] != "residual":
            residual.copy_(tensors["residual"])
        kernel(out, residual, tensors["weight"], case.params["eps"], case.params["offset"])

    return call


def _returning(kernel: Callable) -> Adapter:
    """A function of operands and parameters that returns the outputs in their order."""

    def call(case: FuzzCase, tensors: Mapping[str, Any]) -> None:
        got = kernel(*(tensors[n] for n in case.shapes), **case.params)
        for result, target in zip(got if isinstance(got, tuple) else (got,), case.targets.values(), strict=True):
            tensors[target].copy_(result)

    return call


def _writing(kernel: Callable) -> Adapter:
    """A function of one operand and the output."""

    def call(case: FuzzCase, tensors: Mapping[str, Any]) -> None:
        kernel(tensors[next(iter(case.shapes))], tensors[case.targets["out"]])

    return call


def _quack(x, residual, weight, *, eps, offset):
    return others.quack_add_rms_norm(x, residual, weight.float() + offset, eps, 0.0)


def _topk(kernel: Callable, extra: bool = False) -> Adapter:
    def call(case: FuzzCase, tensors: Mapping[str, Any]) -> None:
        outs = [tensors[case.targets[n]] for n in ("weights", "ids")]
        more = [outs[1].clone()] if extra else []
        kernel(tensors["logits"], *outs, *more, case.params["renormalize"])

    return call


def _delta(q, k, v, a, b, A_log, dt_bias, state, *, eps):
    return others.fla_delta_rule_step(q, k, v, a, b, A_log, dt_bias, state)


def _norm_supported(case: FuzzCase) -> bool:
    return case.params["offset"] in (0.0, 1.0) and _uniform(case) and vectors(case) and _some(case)


def _silu_supported(case: FuzzCase) -> bool:
    """ "The pointers must be multiple of 16 bytes": of both halves, and of the output's rows."""
    return _uniform(case) and case.sizes["I"] % 8 == 0 and _some(case)


def _topk_supported(case: FuzzCase) -> bool:
    return case.recipe in FINITE and _some(case) and not case.params["nan_to_zero"]


def _delta_supported(case: FuzzCase) -> bool:
    """Not where exp(A_log) makes much of what fla's softplus loses: models have A_log up to log(16), here it is up to 8."""
    return case.params["eps"] == 1e-6 and _some(case) and float(case.values()["A_log"].max(initial=0.0)) <= 8


def _compiled(case: FuzzCase, tensors: Mapping[str, Any]) -> None:
    kernel = _compiled_eager(case.declaration, tuple(case.params.items()))
    _returning(lambda *operands, **params: kernel(*operands))(case, tensors)


@functools.lru_cache(maxsize=64)
def _compiled_eager(fusion, params: tuple) -> Callable:
    import torch

    from moekit.torch.autograd import evaluated

    config = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = 10_000  # past it, dynamo would run eagerly and say nothing

    def eager(*tensors):
        bound, values = evaluated(fusion, dict(params), tensors)
        return tuple(values[n] for n in bound.names)

    return torch.compile(eager, dynamic=True)


def _package(name: str) -> Callable[[], object]:
    return functools.partial(others.module, name)


PEERS: dict[str, Peer] = {
    "flashinfer-add-norm": Peer("add_rms_norm", _in_place_norm(others.flashinfer_add_rms_norm), _norm_supported,
                                _package("flashinfer.norm"), standards.UNROUNDED_NORM, ROWS),
    "flashinfer-cuda-add-norm": Peer("add_rms_norm", _in_place_norm(others.flashinfer_cuda_add_rms_norm), _norm_supported,
                                     others.flashinfer_cuda, standards.UNROUNDED_NORM, ROWS),
    "flashinfer-silu": Peer("silu_and_mul", _writing(others.flashinfer_silu_and_mul), _silu_supported,
                            _package("flashinfer.activation")),
    "sgl-add-norm": Peer("add_rms_norm", _in_place_norm(others.sgl_add_rms_norm), _norm_supported, others.sgl,
                         standards.UNROUNDED_NORM),
    "sgl-silu": Peer("silu_and_mul", _writing(others.sgl_silu_and_mul), _silu_supported, others.sgl),
    "sgl-topk": Peer("topk_softmax", _topk(others.sgl_topk_softmax), _topk_supported, others.sgl,
                     standards.ANY_TIES, dtypes=FLOATS),
    "vllm-topk": Peer("topk_softmax", _topk(others.vllm_topk_softmax, True), _topk_supported, others.vllm_moe,
                      standards.ANY_TIES, dtypes=FLOATS),
    "liger-add-norm": Peer("add_rms_norm", _returning(others.liger_add_rms_norm), lambda c: _uniform(c) and _some(c),
                           _package("liger_kernel.ops.fused_add_rms_norm"), kinds=(*ROWS, "padded", "shifted"), dtypes=FLOATS),
    "liger-silu": Peer("silu_and_mul", _returning(others.liger_silu_and_mul), _some,
                       _package("liger_kernel.ops.swiglu"), standards.ROUNDED_SILU, (*ROWS, "padded", "shifted"), FLOATS),
    "quack-add-norm": Peer("add_rms_norm", _returning(_quack), lambda c: _norm_supported(c) and c.sizes["H"] % 8 == 0,
                           _package("quack.rmsnorm"), standards.UNROUNDED_NORM),
    "fla-gated-norm": Peer("gated_rms_norm", _returning(others.fla_gated_rms_norm), _some,
                           _package("fla.modules.norm.fused_norm_gate"), standards.UNROUNDED_GATED_NORM, dtypes=FLOATS),
    "fla-delta": Peer("delta_rule_step", _returning(_delta), _delta_supported,
                      _package("fla.ops.gated_delta_rule.fused_recurrent"), standards.FLA_DELTA, dtypes=FLOATS),
    "compiled-eager": Peer("", _compiled, _some, _package("torch"), kinds=KINDS, dtypes=FLOATS),
}  # fmt: skip


class PeerExecutor(Torch):
    """A peer's kernel on tensors in guarded memory, on the GPU if there is one."""

    def __init__(self, name: str, peer: Peer):
        super().__init__(name, "peer", "cuda" if platform.gpu_count() else "cpu")
        self.peer, self.standard = peer, peer.standard

    def supports(self, case: FuzzCase) -> bool:
        """Whether the case is one the peer's documentation allows."""
        return case.fusion == (self.peer.fusion or case.fusion) and self.peer.supports(case)

    def call(self, case: FuzzCase, tensors: Mapping[str, Any]) -> None:
        """Run the adapter."""
        if any(tensors[t].numel() for t in case.targets.values()):
            self.peer.call(case, tensors)
            launches[self.name] += 1


def may_ask(name: str, case: FuzzCase) -> bool:
    """Whether a campaign would ask implementation `name` for a case: a peer's refusal of any other is no finding."""
    if (peer := PEERS.get(name)) is None:
        return True
    fits = all(case.layout(n).kind in peer.kinds for n in case.memory())
    return fits and all(d in peer.dtypes for d in case.dtypes.values() if is_float(d)) and peer.supports(case)


@functools.lru_cache(maxsize=64)
def peer_executor(name: str) -> Executor:
    """The executor of a peer by name, or of `module:callable`; raises UnavailableError where it is not installed."""
    if name not in PEERS:
        function = attribute_of(name)
        return PeerExecutor(name, Peer("", _returning(function), lambda case: True, lambda: None, kinds=KINDS, dtypes=FLOATS))
    try:
        PEERS[name].load()
    except UnavailableError as error:
        raise UnavailableError(f"{name}: {error}") from None
    return PeerExecutor(name, PEERS[name])
