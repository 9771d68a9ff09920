"""`expert_down_shared` of weights in FP8, with a scale for each of their blocks."""

from moekit.fusions.scaled import BLOCK, STORED, counted, of_rows, products
from moekit.fusions.scaled_down_combine import reference as combined
from moekit.fusions.scaled_expert_down import reference as routed_alone
from moekit.fusions.scaled_expert_down import scaled_expert_down
from moekit.lang import In, cast, f32, fusion, round_to


def reference(activated, down, scale, ids, weights, shared, shared_down, shared_scale, share, columns, inner, shared_inner):
    """float64, rounded where the declaration rounds: each pair, and the routed experts' sum."""
    routed = routed_alone(activated, down, scale, ids, weights, columns, inner)["out"]
    made = combined(round_to(routed, activated.dtype), shared, shared_down, shared_scale, share, columns, shared_inner)
    return {"out": made["hidden"]}


@fusion(
    reference,
    activated=In("T K I"), down=In("E H I", dtype=STORED), scale=In("E Hb Ib", dtype="float32"),
    ids=In("T K", dtype=("int32", "int64")), weights=In("T K"), shared=In("T J"), shared_down=In("H J", dtype=STORED),
    shared_scale=In("Hb Jb", dtype="float32"), share=In("T H?"),
    axes={"Ib": counted("I", "inner"), "Hb": counted("H", "columns"), "Jb": counted("J", "shared_inner")},
)  # fmt: skip
def scaled_expert_down_shared(
    activated, down, scale, ids, weights, shared, shared_down, shared_scale, share,
    columns: int = BLOCK, inner: int = BLOCK, shared_inner: int = BLOCK,
):  # fmt: skip
    """out = scaled_expert_down(activated, down, …) + share·(shared·shared_downᵀ), both weights times scales.

    activated [T, K, I], down [E, H, I] in float8_e4m3fn (or a wider float), scale [E, ⌈H/columns⌉, ⌈I/inner⌉] float32, ids
    and weights [T, K], shared [T, J], shared_down [H, J] as down, shared_scale [⌈H/columns⌉, ⌈J/shared_inner⌉] float32, share
    [T, 1] or [T, H] -> out [T, H] in activated's dtype. A pair's product and the routed experts' sum are rounded to that
    dtype, and so is what is returned.
    """
    routed = scaled_expert_down.fn(activated, down, scale, ids, weights, columns, inner)["out"]
    scales = of_rows(shared_scale, "H", "Hb", columns)
    product = products(shared, shared_down, scales, "J", "Jb Ji", shared_inner)
    return {"out": cast(f32(routed) + f32(share) * product, activated.dtype)}
