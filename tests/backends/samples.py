"""Calls at the model's real sizes that the backend tests compile and print, and Graphs and Plans made from them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from moekit.compile import tile as t
from moekit.compile.plan import Plan, plan
from moekit.compile.schedule import Schedule
from tests.declarations import DECLARATIONS


@dataclass(frozen=True)
class Sample:
    """A fusion at given shapes; `f32` names the operands that are float32 whatever the dtype is, `f8` those in float8."""

    fusion: str
    shapes: dict
    params: dict = field(default_factory=dict)
    f32: tuple[str, ...] = ()
    f8: tuple[str, ...] = ()
    schedule: str = ""
    dtype: str = "bfloat16"

    def dtypes(self) -> dict:
        """The dtype of every operand."""
        own = dict.fromkeys(("ids", "lengths", "positions"), "int32") | dict.fromkeys(self.f32, "float32")
        own |= dict.fromkeys(self.f8, "float8_e4m3fn")
        return {n: own.get(n, self.dtype) for n in self.shapes}

    def bound(self):
        """The declaration, its binding and the traced graph."""
        fusion = DECLARATIONS[self.fusion]
        binding = fusion.bind(self.shapes, self.dtypes(), fusion.bind_params(self.params))
        return fusion, binding, fusion.trace(binding)

    def plan(self, layouts) -> Plan:
        """The plan, with layouts from `strided` or `viewed`."""
        _, binding, graph = self.bound()
        schedule = Schedule.parse(self.schedule) if self.schedule else None
        sizes = dict(binding.sizes) if layouts is viewed else None
        return plan(graph, schedule, layouts(graph, dict(binding.sizes)), sizes)

    def strided(self) -> Plan:
        """The plan for Triton, rows 16-byte aligned."""
        return self.plan(strided)

    def viewed(self) -> Plan:
        """The plan for Pallas on whole arrays."""
        return self.plan(viewed)


def _shape(graph, tensor, sizes) -> tuple[int, ...]:
    known = sizes | {a: s for a, s in graph.axes.items() if s is not None}
    return tuple(1 if i in tensor.ones else known[d.text] for i, d in enumerate(tensor.dims))


def strided(graph, sizes) -> dict:
    """Contiguous rows, every outer stride a multiple of 16 bytes; that of a single element is not told (launch.layout)."""
    single = {a for a, n in graph.axes.items() if n == 1}
    outer = {n: ["unit" if a in single else "aligned" for a in x.axes[:-1]] for n, x in graph.tensors.items()}
    return {n: t.Strided((*outer[n], "unit")) for n in graph.tensors}


def viewed(graph, sizes) -> dict:
    """Whole arrays of their own."""
    found = {}
    for n, x in graph.tensors.items():
        shape = _shape(graph, x, sizes)
        found[n] = t.Viewed(n, shape, tuple(range(len(shape))), (0,) * len(shape), (1,) * len(shape))
    return found


_DELTA = {"q": (4, 2, 128), "k": (4, 2, 128), "v": (4, 4, 128), "a": (4, 4), "b": (4, 4), "A_log": (4,), "dt_bias": (4,),
          "state": (4, 4, 128, 128)}  # fmt: skip
_CHUNKS = {"q": (1, 2, 64, 8, 128), "k": (1, 2, 64, 8, 128), "solved": (1, 2, 16, 128, 64), "attend": (1, 2, 16, 128, 64),
           "v": (1, 2, 64, 16, 128), "since": (1, 2, 64, 16), "left": (1, 2, 64, 16), "asked": (1, 2, 64, 16),
           "fade": (1, 2, 16), "state": (1, 16, 128, 128)}  # fmt: skip
_EXPERTS = {"x": (4, 2048), "ids": (4, 10), "weights": (4, 10), "gate_up": (512, 1024, 2048), "down": (512, 512, 2048)}
_SCALED = {"gate_up_scale": (512, 8, 16), "down": (512, 2048, 512), "down_scale": (512, 16, 4)}
_SCALED_GATES = {"x": (4, 2048), "gate_up": (256, 2048), "scale": (2, 16), "router": (512, 2048), "shared_gate": (1, 2048)}
_ROW_GATES = {n: shape for n, shape in _SCALED_GATES.items() if n != "x"}
_CONVOLVED = {
    "x": (4, 2048),
    "mixing": (1024, 2048),
    "mixing_scale": (8, 16),
    "others": (512, 2048),
    "others_scale": (4, 16),
    "gates": (64, 2048),
    "state": (4, 1024, 3),
    "weight": (1024, 4),
}
_GATES = {"gate_up": (128, 2048), "router": (512, 2048), "shared_gate": (1, 2048)}

SAMPLES = {
    "gate_gemm": Sample("gate_gemm", {"x": (4, 2048), "packed": (648, 2048)}),
    "silu_and_mul": Sample("silu_and_mul", {"gate_up": (4, 128)}),
    "topk_softmax": Sample("topk_softmax", {"logits": (4, 512)}, {"k": 10}),
    "shared_expert_combine": Sample("shared_expert_combine", {"hidden": (4, 2048), "shared": (4, 2048), "gate": (4, 1)}),
    "shared_expert_combine_wide": Sample(
        "shared_expert_combine", {"hidden": (4, 2048), "shared": (4, 2048), "gate": (4, 2048)}
    ),
    "add_rms_norm": Sample("add_rms_norm", {"x": (4, 2048), "residual": (4, 2048), "weight": (2048,)}),
    "add_rms_norm_16384": Sample("add_rms_norm", {"x": (4, 16384), "residual": (4, 16384), "weight": (16384,)}),
    "add_rms_norm_looped": Sample(
        "add_rms_norm",
        {"x": (4, 5000), "residual": (4, 5000), "weight": (5000,)},
        {"offset": 0.0},
        schedule="tile:T:1 loop:H:1024 warps:4 stages:2 dependent",
    ),
    "gate_gemm_split": Sample(
        "gate_gemm",
        {"x": (4, 2048), "packed": (648, 2048)},
        schedule="tile:D.part:1 tile:T:16 loop:D:256 tile:P:32 prefetch:packed warps:4 stages:2 dependent split:D:4 then "
        "loop:D.part:1 tile:T:1 tile:P:256 warps:4 stages:1 dependent",
    ),
    "gated_rms_norm": Sample("gated_rms_norm", {"x": (4, 4, 128), "z": (4, 4, 128), "weight": (128,)}),
    "delta_rule_step": Sample("delta_rule_step", _DELTA, f32=("A_log", "dt_bias", "state")),
    "unit_lower_inverse": Sample("unit_lower_inverse", {"system": (8192, 16, 16)}, f32=("system",)),
    "delta_rule_chunks": Sample("delta_rule_chunks", _CHUNKS, f32=("since", "left", "asked", "fade", "state")),
    "gate_projections": Sample("gate_projections", {"x": (4, 2048), **_GATES}),
    "gate_topk": Sample("gate_topk", {"x": (4, 2048), **_GATES}, {"k": 10}),
    "gate_projections_parts": Sample(
        "gate_projections",
        {"x": (4, 2048), **_GATES},
        schedule="activated(tile:T:16 loop:D:64 tile:I:32 parts:D:2) logits(tile:T:16 loop:D:64 tile:E:32 parts:D:2) "
        "share(tile:T:16 loop:D:64 tile:G:16 parts:D:2 prefetch:shared_gate) warps:4 stages:3 dependent abreast:T",
    ),
    "row_product": Sample("row_product", {"x": (1, 2048), "weight": (1024, 2048)}),
    "add_norm_gate_projections": Sample(
        "add_norm_gate_projections", {"x": (1, 2048), "residual": (1, 2048), "norm": (2048,), **_GATES}, f32=("norm",)
    ),
    "scaled_add_norm_gate_projections": Sample(
        "scaled_add_norm_gate_projections",
        {"x": (1, 2048), "residual": (1, 2048), "norm": (2048,), **_ROW_GATES},
        f32=("norm", "scale"),
        f8=("gate_up",),
    ),
    "gate_block": Sample("gate_block", {"x": (4, 2048), "residual": (4, 2048), "weight": (2048,), **_GATES}),
    "down_combine": Sample(
        "down_combine", {"hidden": (4, 2048), "activated": (4, 64), "down": (2048, 64), "share": (4, 1)}, f32=("share",)
    ),
    "expert_gate_up": Sample("expert_gate_up", {"x": (4, 2048), "gate_up": (512, 128, 2048), "ids": (4, 10)}),
    "attention_decode": Sample(
        "attention_decode",
        {"q": (4, 2, 8, 256), "k_cache": (4, 2, 4096, 256), "v_cache": (4, 2, 4096, 256), "lengths": (4,)},
    ),
    "experts": Sample("experts", _EXPERTS, f32=("weights",)),
    "experts_sorted": Sample("experts", _EXPERTS, {"block": 16}, f32=("weights",)),
    "moe_align": Sample("moe_align", {"ids": (4, 10)}, {"experts": 512, "block": 16}),
    "expert_down": Sample(
        "expert_down",
        {"activated": (4, 10, 64), "down": (512, 64, 2048), "ids": (4, 10), "weights": (4, 10)},
        f32=("weights",),
    ),
    "expert_down_shared": Sample(
        "expert_down_shared",
        {
            "activated": (4, 10, 64),
            "down": (512, 64, 2048),
            "ids": (4, 10),
            "weights": (4, 10),
            "shared": (4, 64),
            "shared_down": (2048, 64),
            "share": (4, 1),
        },
        f32=("weights", "share"),
    ),
    "gated_attention_decode": Sample(
        "gated_attention_decode",
        {"q": (4, 1, 8, 256), "k_cache": (4, 1, 4096, 256), "v_cache": (4, 1, 4096, 256), "lengths": (4,), "gate": (4, 8, 256)},
    ),
    "conv_projections": Sample(
        "conv_projections",
        {"x": (1, 2048), "mixing": (4096, 2048), "others": (2176, 2048), "state": (1, 4096, 3), "weight": (4096, 4)},
        f32=("weight",),
    ),
    "qkv_norm_rope": Sample(
        "qkv_norm_rope",
        {
            "q": (4, 8, 256),
            "k": (4, 1, 256),
            "v": (4, 1, 256),
            "q_weight": (256,),
            "k_weight": (256,),
            "positions": (4,),
            "frequencies": (32,),
            "k_cache": (4, 1, 4096, 256),
            "v_cache": (4, 1, 4096, 256),
        },
        f32=("q_weight", "k_weight", "frequencies"),
    ),
    "causal_conv1d_step": Sample(
        "causal_conv1d_step", {"x": (4, 8192), "state": (4, 8192, 3), "weight": (8192, 4)}, f32=("weight",)
    ),
    "qk_norm_rope": Sample(
        "qk_norm_rope",
        {"q": (4, 16, 256), "k": (4, 2, 256), "q_weight": (256,), "k_weight": (256,), "positions": (4,), "frequencies": (32,)},
        f32=("frequencies",),
    ),
    "scaled_product": Sample(
        "scaled_product", {"x": (4, 2048), "weight": (512, 2048), "scale": (4, 16)}, f32=("scale",), f8=("weight",)
    ),
    "scaled_product_lanes": Sample(
        "scaled_product", {"x": (4, 2048), "weight": (512, 2048), "scale": (4, 16)}, {"lanes": True}, ("scale",), ("weight",)
    ),
    "scaled_conv_projections": Sample(
        "scaled_conv_projections", _CONVOLVED, f32=("mixing_scale", "others_scale", "weight"), f8=("mixing", "others")
    ),
    "scaled_conv_projections_lanes": Sample(
        "scaled_conv_projections", _CONVOLVED, {"lanes": True}, ("mixing_scale", "others_scale", "weight"), ("mixing", "others")
    ),
    "scaled_gate_projections": Sample("scaled_gate_projections", _SCALED_GATES, f32=("scale",), f8=("gate_up",)),
    "scaled_gate_topk": Sample("scaled_gate_topk", _SCALED_GATES, {"k": 10}, f32=("scale",), f8=("gate_up",)),
    "scaled_down_combine": Sample(
        "scaled_down_combine",
        {"hidden": (4, 2048), "activated": (4, 512), "down": (2048, 512), "scale": (16, 4), "share": (4, 1)},
        f32=("scale", "share"),
        f8=("down",),
    ),
    "scaled_expert_down_shared": Sample(
        "scaled_expert_down_shared",
        {
            "activated": (4, 10, 256),
            "down": (512, 2048, 256),
            "scale": (512, 16, 2),
            "ids": (4, 10),
            "weights": (4, 10),
            "shared": (4, 256),
            "shared_down": (2048, 256),
            "shared_scale": (16, 2),
            "share": (4, 1),
        },
        f32=("scale", "weights", "shared_scale", "share"),
        f8=("down", "shared_down"),
    ),
    "scaled_expert_gate_up": Sample(
        "scaled_expert_gate_up",
        {"x": (4, 2048), "gate_up": (512, 512, 2048), "scale": (512, 4, 16), "ids": (4, 10)},
        f32=("scale",),
        f8=("gate_up",),
    ),
    "scaled_expert_down": Sample(
        "scaled_expert_down",
        {"activated": (4, 10, 256), "down": (512, 2048, 256), "scale": (512, 16, 2), "ids": (4, 10), "weights": (4, 10)},
        f32=("scale", "weights"),
        f8=("down",),
    ),
    "scaled_experts": Sample(
        "scaled_experts",
        {**_EXPERTS, **_SCALED},
        {"block": 16},
        f32=("weights", "gate_up_scale", "down_scale"),
        f8=("gate_up", "down"),
    ),
    "quantised": Sample("quantised", {"x": (4, 2048)}),
    "quantised_experts": Sample(
        "quantised_experts",
        {"codes": (4, 16, 128), "codes_scale": (4, 16), **{n: s for n, s in (_EXPERTS | _SCALED).items() if n != "x"}},
        {"block": 64},
        f32=("codes_scale", "weights", "gate_up_scale", "down_scale"),
        f8=("codes", "gate_up", "down"),
    ),
}
GOLDEN = {
    **SAMPLES,
    "topk_softmax_float32": replace(SAMPLES["topk_softmax"], dtype="float32", shapes={"logits": (4, 60)}),
    "gate_projections_rows": replace(
        SAMPLES["gate_projections"],
        schedule="activated(tile:T:128 loop:D:64 tile:I:64 parts:D:4 pair:gate_up) "
        "logits(tile:T:128 loop:D:64 tile:E:128 parts:D:4) "
        "share(tile:T:128 loop:D:128 tile:G:16 parts:D:4 prefetch:shared_gate) warps:8 stages:4 dependent abreast:T",
    ),
}
