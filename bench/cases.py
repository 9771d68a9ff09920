"""What the benches measure: each fusion at the model's sizes, its operands as a model has them, and what a call must move."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Operands = dict[str, torch.Tensor]
EPS = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU is for tests of the benches alone


@dataclass(frozen=True)
class Case:
    """A fusion at given static sizes. `make(t, dtype)` draws one set of operands, strided where the model's are.

    `moved(t, itemsize)` are the bytes that must be read and written at the least, `flops(t)` the multiply-adds twice. `part`:
    it is no fusion but the gate or the whole of a MoE block, several fusions one after the other (bench/layer.py).
    """

    fusion: str
    sizes: str
    make: Callable[[int, torch.dtype], Operands]
    moved: Callable[[int, int], int]
    flops: Callable[[int], int] = lambda t: 0
    params: Mapping[str, object] = field(default_factory=dict)
    part: str = ""

    @property
    def name(self) -> str:
        """What its rows are called."""
        return f"{self.fusion} {self.sizes}"

    def rates(self, t: int, itemsize: int, us: float | None) -> dict[str, float]:
        """TB/s and TFLOP/s of a call that takes so long; nothing of one that was not timed."""
        if us is None:
            return {}
        return {"TB/s": round(self.moved(t, itemsize) / us / 1e6, 4), "TFLOP/s": round(self.flops(t) / us / 1e6, 2)}


def rows(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random normal numbers on the device."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).to(dtype)


def weight(out: int, into: int, dtype: torch.dtype) -> torch.Tensor:
    """A random weight [out, into], scaled so that products stay near 1."""
    return rows(out, into, dtype=torch.float32).mul_(into**-0.5).to(dtype)


def empty(t: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An output buffer on t's device."""
    return torch.empty(*shape, dtype=dtype or t.dtype, device=t.device)


def padded(total: int) -> int:
    """The width of a packed gate weight: the next multiple of 8."""
    return -(-total // 8) * 8


def norm_case(h: int) -> Case:
    """add_rms_norm, in place."""
    return Case(
        "add_rms_norm",
        f"{h}",
        lambda t, d: {"x": rows(t, h, dtype=d), "residual": rows(t, h, dtype=d), "weight": rows(h, dtype=d)},
        lambda t, size: (4 * t * h + h) * size,
    )


def combine_case(h: int) -> Case:
    """shared_expert_combine, in place; the gate is a column of a fused product."""
    return Case(
        "shared_expert_combine",
        f"{h}",
        lambda t, d: {"hidden": rows(t, h, dtype=d), "shared": rows(t, h, dtype=d), "gate": rows(t, 648, dtype=d)[:, 640:641]},
        lambda t, size: (3 * t * h + t) * size,
    )


def silu_case(i: int) -> Case:
    """silu_and_mul on the first columns of a fused product."""
    return Case(
        "silu_and_mul",
        f"{i}",
        lambda t, d: {"gate_up": rows(t, padded(2 * i + 513), dtype=d)[:, : 2 * i]},
        lambda t, size: 3 * t * i * size,
    )


def topk_case(experts: int, k: int) -> Case:
    """topk_softmax on the middle columns of a fused product."""
    return Case(
        "topk_softmax",
        f"{experts}/{k}",
        lambda t, d: {"logits": rows(t, padded(128 + experts + 1), dtype=d)[:, 128 : 128 + experts]},
        lambda t, size: t * experts * size + t * k * 8,
        params={"k": k},
    )


def gemm_case(i: int) -> Case:
    """gate_gemm: one product with the packed, padded weight of gate_up, router and shared gate."""
    p = padded(2 * i + 513)
    return Case(
        "gate_gemm",
        f"{p}",
        lambda t, d: {"x": rows(t, 2048, dtype=d), "packed": weight(p, 2048, d)},
        lambda t, size: (t * 2048 + p * 2048 + t * p) * size,
        lambda t: 2 * t * 2048 * p,
    )


def gates(i: int, experts: int, hidden: int, dtype: torch.dtype) -> Operands:
    """The three weights of a gate as a packed, padded one has them: views of its rows."""
    widths = [2 * i, experts, 1]
    parts = weight(padded(sum(widths)), hidden, dtype)[: sum(widths)].split(widths)
    return dict(zip(("gate_up", "router", "shared_gate"), parts, strict=True))


def projections_case(i: int) -> Case:
    """gate_projections: the same product with its epilogue, on the three parts of the packed weight."""
    total = 2 * i + 513
    return Case(
        "gate_projections",
        f"{padded(total)}",
        lambda t, d: {"x": rows(t, 2048, dtype=d)} | gates(i, 512, 2048, d),
        lambda t, size: (t * 2048 + total * 2048 + t * (i + 512)) * size + t * 4,
        lambda t: 2 * t * 2048 * total,
    )


def block_case(part: str, i: int, hidden: int = 2048, experts: int = 512, k: int = 10) -> Case:
    """A rank's MoE block without its routed experts. `gate`: norm → gates → activation → router, all that comes before them.

    `moe`: the shared expert's down-projection and the combine as well; the normalised rows stand in for what the routed experts
    add up to.
    """
    total, down = 2 * i + experts + 1, i * hidden if part == "moe" else 0

    def make(t: int, d: torch.dtype) -> Operands:
        found = {"x": rows(t, hidden, dtype=d), "residual": rows(t, hidden, dtype=d), "weight": rows(hidden, dtype=d)}
        return found | gates(i, experts, hidden, d) | ({"down": weight(hidden, i, d)} if down else {})

    return Case(
        f"{part}_block",
        f"{padded(total)}",
        make,
        lambda t, size: (4 * t * hidden + hidden + total * hidden + down + t * (i + experts)) * size + t * (4 + k * 8),
        lambda t: 2 * t * (hidden * total + down),
        {"k": k},
        part,
    )


def down_case(i: int, h: int) -> Case:
    """down_combine, in place: the shared expert's down-projection, added to what the routed experts gave."""
    return Case(
        "down_combine",
        f"{i}",
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
        "gated_rms_norm",
        f"{v}x128",
        lambda t, d: {"x": rows(t, v, 128, dtype=d), "z": rows(t, v, 128, dtype=d), "weight": rows(128, dtype=d)},
        lambda t, size: 3 * t * v * 128 * size,
    )


def delta_case(k: int, v: int) -> Case:
    """delta_rule_step, in place, with heads of 128 x 128."""
    f32 = torch.float32
    return Case(
        "delta_rule_step",
        f"{k}/{v}",
        lambda t, d: {
            "q": rows(t, k, 128, dtype=d), "k": rows(t, k, 128, dtype=d), "v": rows(t, v, 128, dtype=d),
            "a": rows(t, v, dtype=d), "b": rows(t, v, dtype=d), "A_log": rows(v, dtype=f32), "dt_bias": rows(v, dtype=f32),
            "state": rows(t, v, 128, 128, dtype=f32),
        },
        lambda t, size: 8 * t * v * 128 * 128,
    )  # fmt: skip


def expert_case(fusion: str, i: int, h: int = 2048, experts: int = 512, k: int = 10) -> Case:
    """One of the two products of the routed experts, with experts drawn evenly and independently for each token."""
    up = fusion == "expert_gate_up"

    def make(t: int, d: torch.dtype) -> Operands:
        ids = torch.rand(t, experts, device=DEVICE).argsort(-1)[:, :k].int()
        if up:
            return {"x": rows(t, h, dtype=d), "gate_up": weight(experts * 2 * i, h, d).view(experts, 2 * i, h), "ids": ids}
        down, shares = weight(experts * i, h, d).view(experts, i, h), rows(t, k, dtype=torch.float32).softmax(-1)
        return {"activated": rows(t, k, i, dtype=d), "down": down, "ids": ids, "weights": shares}

    def moved(t: int, size: int) -> int:
        read = experts * (1 - (1 - k / experts) ** t) * i * h * (2 if up else 1)
        return int((read + t * (h + k * i)) * size + t * k * (4 if up else 8))

    return Case(fusion, f"{i}", make, moved, lambda t: 2 * t * k * i * h * (2 if up else 1))


def shared_down_case(i: int, j: int, h: int = 2048, experts: int = 512, k: int = 10) -> Case:
    """expert_down_shared: a routed expert's width i, the shared one's j."""
    routed = expert_case("expert_down", i, h, experts, k)

    def make(t: int, d: torch.dtype) -> Operands:
        shared = {"shared": rows(t, j, dtype=d), "shared_down": weight(h, j, d), "share": rows(t, 1, dtype=torch.float32)}
        return routed.make(t, d) | shared

    def moved(t: int, size: int) -> int:
        return routed.moved(t, size) + (t + h) * j * size + 4 * t

    return Case("expert_down_shared", f"{i}+{j}", make, moved, lambda t: routed.flops(t) + 2 * t * j * h)


def conv_projections_case(channels: int, others: int, depth: int = 2048, taps: int = 4) -> Case:
    """conv_projections of a rank's channels; the windows lie as the model's do, a channel's inputs a row apart."""

    def make(t: int, d: torch.dtype) -> Operands:
        window = rows(t, taps - 1, channels, dtype=d).transpose(1, 2)
        both = weight(channels + others, depth, d)
        given = {"x": rows(t, depth, dtype=d), "mixing": both[:channels], "others": both[channels:], "state": window}
        return given | {"weight": weight(channels, taps, torch.float32)}

    def moved(t: int, size: int) -> int:
        return (depth * (channels + others + t) + t * (2 * taps * channels + others)) * size + 4 * taps * channels

    return Case("conv_projections", f"{channels}+{others}", make, moved, lambda t: 2 * t * depth * (channels + others))


SHARES = (64, 512)  # of the shared expert's width: one of 8 tensor-parallel ranks', and all of it

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *(norm_case(h) for h in (2048, 4096)),
        *(silu_case(i) for i in (64, 512, 1024)),
        *(topk_case(e, k) for e, k in ((512, 10), (256, 8))),
        *(combine_case(h) for h in (2048, 4096)),
        *(gemm_case(i) for i in SHARES),
        *(projections_case(i) for i in SHARES),
        *(block_case("gate", i) for i in SHARES),
        *(block_case("moe", i) for i in SHARES),
        *(down_case(i, 2048) for i in SHARES),
        *(expert_case(name, 64) for name in ("expert_gate_up", "expert_down")),
        shared_down_case(256, 256),
        conv_projections_case(4096, 2176),
        gated_norm_case(4),
        gated_norm_case(32),
        delta_case(2, 4),
        delta_case(16, 32),
    )
}
