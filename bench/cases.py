"""What the benches measure: each fusion at the model's sizes, its operands as a model has them, and what a call must move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Operands = dict[str, torch.Tensor]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU is for tests of the benches alone


@dataclass(frozen=True)
class Case:
    """A fusion at given static sizes. `make(t, dtype)` draws one set of operands, strided where the model's are;

    `moved(t, itemsize)` are the bytes that must be read and written at the least, `flops(t)` the multiply-adds twice.
    """

    name: str
    fusion: str
    make: Callable[[int, torch.dtype], Operands]
    moved: Callable[[int, int], int]
    flops: Callable[[int], int] = lambda t: 0
    params: Mapping[str, object] = field(default_factory=dict)
    widths: tuple[int, int, int] = (0, 0, 0)  # of gate_up, router and shared gate in a packed weight
    k: int = 0  # how many experts the router chooses after the fusion, where the case goes on to that


def rows(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random normal numbers on the device."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).to(dtype)


def weight(out: int, into: int, dtype: torch.dtype) -> torch.Tensor:
    """A random weight [out, into], scaled so that products stay near 1."""
    return rows(out, into, dtype=torch.float32).mul_(into**-0.5).to(dtype)


def padded(total: int) -> int:
    """The width of a packed gate weight: the next multiple of 8."""
    return -(-total // 8) * 8


def norm_case(h: int) -> Case:
    """add_rms_norm, in place."""
    return Case(
        f"add_rms_norm {h}",
        "add_rms_norm",
        lambda t, d: {"x": rows(t, h, dtype=d), "residual": rows(t, h, dtype=d), "weight": rows(h, dtype=d)},
        lambda t, size: (4 * t * h + h) * size,
    )


def combine_case(h: int) -> Case:
    """shared_expert_combine, in place; the gate is a column of a fused product."""
    return Case(
        f"shared_expert_combine {h}",
        "shared_expert_combine",
        lambda t, d: {"hidden": rows(t, h, dtype=d), "shared": rows(t, h, dtype=d), "gate": rows(t, 648, dtype=d)[:, 640:641]},
        lambda t, size: (3 * t * h + t) * size,
    )


def silu_case(i: int) -> Case:
    """silu_and_mul on the first columns of a fused product."""
    return Case(
        f"silu_and_mul {i}",
        "silu_and_mul",
        lambda t, d: {"gate_up": rows(t, padded(2 * i + 513), dtype=d)[:, : 2 * i]},
        lambda t, size: 3 * t * i * size,
    )


def topk_case(experts: int, k: int) -> Case:
    """topk_softmax on the middle columns of a fused product."""
    return Case(
        f"topk_softmax {experts}/{k}",
        "topk_softmax",
        lambda t, d: {"logits": rows(t, padded(128 + experts + 1), dtype=d)[:, 128 : 128 + experts]},
        lambda t, size: t * experts * size + t * k * 8,
        params={"k": k},
    )


def gemm_case(p: int, widths: tuple[int, int, int]) -> Case:
    """gate_gemm: one product with the packed, padded weight."""
    return Case(
        f"gate_gemm {p}",
        "gate_gemm",
        lambda t, d: {"x": rows(t, 2048, dtype=d), "packed": weight(p, 2048, d)},
        lambda t, size: (t * 2048 + p * 2048 + t * p) * size,
        lambda t: 2 * t * 2048 * p,
        widths=widths,
    )


def gates(p: int, widths: tuple[int, int, int], dtype: torch.dtype) -> Operands:
    """The three weights of a gate as a packed, padded one has them: views of its rows."""
    gate_up, router, shared_gate = weight(p, 2048, dtype)[: sum(widths)].split(list(widths))
    return {"gate_up": gate_up, "router": router, "shared_gate": shared_gate}


def projections_case(p: int, widths: tuple[int, int, int]) -> Case:
    """gate_projections: the same product with its epilogue, on the three parts of the packed weight."""
    i, total = widths[0] // 2, sum(widths)
    return Case(
        f"gate_projections {p}",
        "gate_projections",
        lambda t, d: {"x": rows(t, 2048, dtype=d)} | gates(p, widths, d),
        lambda t, size: (t * 2048 + total * 2048 + t * (i + widths[1])) * size + t * widths[2] * 4,
        lambda t: 2 * t * 2048 * total,
    )


def block_case(p: int, widths: tuple[int, int, int]) -> Case:
    """No fusion but several in a row: norm → gates → activation → router, all that comes before the experts."""
    i, total, k = widths[0] // 2, sum(widths), 10

    def make(t: int, d: torch.dtype) -> Operands:
        x, residual = (rows(t, 2048, dtype=d) for _ in range(2))
        return {"x": x, "residual": residual, "weight": rows(2048, dtype=d)} | gates(p, widths, d)

    return Case(
        f"gate_block {p}",
        "gate_block",
        make,
        lambda t, size: (4 * t * 2048 + 2048 + total * 2048 + t * (i + widths[1])) * size + t * (widths[2] * 4 + k * 8),
        lambda t: 2 * t * 2048 * total,
        k=k,
    )


def down_case(i: int, h: int) -> Case:
    """down_combine, in place: the shared expert's down-projection, added to what the routed experts gave."""
    return Case(
        f"down_combine {i}",
        "down_combine",
        lambda t, d: {
            "hidden": rows(t, h, dtype=d),
            "activated": rows(t, i, dtype=d),
            "down": weight(h, i, d),
            "share": rows(t, 1, dtype=torch.float32).sigmoid_(),
        },
        lambda t, size: (2 * t * h + t * i + h * i) * size + t * 4,
        lambda t: 2 * t * i * h,
    )


def gated_norm_case(v: int) -> Case:
    """gated_rms_norm over heads of 128."""
    return Case(
        f"gated_rms_norm {v}x128",
        "gated_rms_norm",
        lambda t, d: {"x": rows(t, v, 128, dtype=d), "z": rows(t, v, 128, dtype=d), "weight": rows(128, dtype=d)},
        lambda t, size: 3 * t * v * 128 * size,
    )


def delta_case(k: int, v: int) -> Case:
    """delta_rule_step, in place, with heads of 128 x 128."""

    def make(t: int, d: torch.dtype) -> Operands:
        f32 = torch.float32
        return {
            "q": rows(t, k, 128, dtype=d), "k": rows(t, k, 128, dtype=d), "v": rows(t, v, 128, dtype=d),
            "a": rows(t, v, dtype=d), "b": rows(t, v, dtype=d), "A_log": rows(v, dtype=f32), "dt_bias": rows(v, dtype=f32),
            "state": rows(t, v, 128, 128, dtype=f32),
        }  # fmt: skip

    return Case(f"delta_rule_step {k}/{v}", "delta_rule_step", make, lambda t, size: 8 * t * v * 128 * 128)


def experts_case(i: int, h: int, experts: int, k: int) -> Case:
    """expert_down: each row's pairs, by the down projections of the experts that were chosen for it."""

    def make(t: int, d: torch.dtype) -> Operands:
        ids = torch.rand(t, experts, device=DEVICE).topk(k).indices.int()
        down = rows(experts, i, h, dtype=d)
        return {"activated": rows(t, k, i, dtype=d), "down": down, "ids": ids, "weights": rows(t, k, dtype=d).sigmoid_()}

    def moved(t: int, size: int) -> int:
        chosen = round(experts * (1 - (1 - k / experts) ** t))  # as many experts as are expected to be chosen
        return (chosen * i * h + t * (k * i + k + h)) * size + t * k * 4

    return Case(f"expert_down {i}", "expert_down", make, moved, lambda t: 2 * t * k * i * h)


GATES = ((648, (128, 512, 1)), (1544, (1024, 512, 1)))  # one of 8 tensor-parallel ranks, and all in one

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *(norm_case(h) for h in (2048, 4096)),
        *(silu_case(i) for i in (64, 512, 1024)),
        *(topk_case(e, k) for e, k in ((512, 10), (256, 8))),
        *(combine_case(h) for h in (2048, 4096)),
        *(gemm_case(p, w) for p, w in GATES),
        *(projections_case(p, w) for p, w in GATES),
        *(block_case(p, w) for p, w in GATES),
        *(down_case(i, 2048) for i in (64, 512)),
        *(experts_case(i, 2048, 512, 10) for i in (64, 512)),
        gated_norm_case(4),
        gated_norm_case(32),
        delta_case(2, 4),
        delta_case(16, 32),
    )
}
