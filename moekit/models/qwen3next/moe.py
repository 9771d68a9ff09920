"""The mixture of experts: router, routed experts and the gated shared expert.

`moe` computes one rank's partial output from its slice of every expert; the caller sums over ranks, once,
since the shared and the routed part are added before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf

import jax
import jax.numpy as jnp
from jax import lax

from moekit.jax import View
from moekit.models.qwen3next.config import Config
from moekit.models.qwen3next.kernels import Kernels
from moekit.models.qwen3next.layer import SCALE, Layer
from moekit.models.qwen3next.numerics import einsum, linear, round_to
from moekit.models.qwen3next.projected import MOST, projected, widened
from moekit.models.qwen3next.sharding import AXIS

# With kernels: pairs for each expert up to which blocks of so many are the fastest; 0: two kernels that read an expert for each
# pair. Measured on an H200 (docs/performance_kernels.md), but for some places between. Of float8 two kernels took 0.90 of what
# blocks did at 5/16 and 1.41 at 5/4 (bench/experts.py --float8), one pair a program on the matrix unit more than they at each;
# with 20 pairs an expert blocks of 32 took 0.98 of those of 16 and 0.84 of 64; with 40, 64 took 0.78 of 32; with 80, 128 took
# 0.90 of 64.
FORMS = ((1 / 4, 0), (16, 16), (48, 64), (inf, 128))
SCALED_FORMS = ((3 / 8, 0), (19, 16), (27, 32), (68, 64), (inf, 128))
# Of float8 rows, from QUANTISED pairs an expert on: at 5 they took as long as others, at 20, 40 and 80 0.8, 0.7 and 0.65 of it
# (bench/experts.py --float8).
QUANTISED, QUANTISED_FORMS = 9, ((26, 32), (inf, 64))
ROWS = 16  # up to which the router chooses in the launch that adds up its products: one block of the matrix unit's
# With arrays: all experts run over all tokens, which reads each once, up to as many tokens as a block has and where a token
# chooses one of at most DENSE; else pairs are sorted into blocks of SORTED, of which TOGETHER pairs are a turn.
DENSE, SORTED, TOGETHER = 4, 128, 4096


@partial(jax.jit, static_argnames=("config", "kernels"))
def moe(x: jax.Array, weights: Layer, config: Config, kernels: Kernels) -> jax.Array:
    """x [T, H] -> one rank's partial sum of the routed and the shared experts, [T, H]."""
    return _of_routed(x, routed(x, weights, config, kernels), weights, config, kernels)


@partial(jax.jit, static_argnames=("config", "kernels"))
def moe_behind_norm(
    hidden: jax.Array, residual: jax.Array, weights: Layer, config: Config, kernels: Kernels
) -> tuple[jax.Array, jax.Array]:
    """`moe` of the norm of hidden + residual, and that sum: of one row, whose gates make the norm in their own launch."""
    given = hidden, residual, weights.view("post_attention_layernorm"), *gate_weights(weights)
    if "gate_up" + SCALE in weights.layout:
        made = kernels.scaled_add_norm_gate_projections(*given, **gate_blocks(weights), eps=config.rms_norm_eps)
    else:
        made = kernels.add_norm_gate_projections(*given, eps=config.rms_norm_eps)
    normed, total, activated, logits, share = made
    chosen, ids = kernels.topk_softmax(logits, config.num_experts_per_tok, renormalize=config.norm_topk_prob)
    return _of_routed(normed, (activated, share, chosen, ids), weights, config, kernels), total


def _of_routed(x: jax.Array, gates: tuple[jax.Array, ...], weights: Layer, config: Config, kernels: Kernels) -> jax.Array:
    """`moe` of a row whose gates are there, as `routed` gives them."""
    activated, share, chosen, ids = gates
    x, chosen, ids = lax.optimization_barrier((x, chosen, ids))  # the logits are dead while the routed experts run
    ids = _among_held(ids, config)
    alike = ("experts_down" + SCALE in weights.layout) == ("shared_down" + SCALE in weights.layout)
    if kernels.fused and alike and _form(ids.size, config.num_experts, weights) == 0:
        return _few(x, chosen, ids, activated, share, weights, kernels)
    hidden = experts(x, chosen, ids, weights, kernels, config.ep, config.activations)
    if "shared_down" + SCALE not in weights.layout:
        return kernels.down_combine(hidden, activated, weights.view("shared_down").T, share)
    if x.shape[0] > MOST:
        return kernels.down_combine(hidden, activated, widened(weights, "shared_down", dtype=x.dtype), share)
    down, scale = weights.view("shared_down"), weights.view("shared_down" + SCALE)
    columns, inner = weights.block("shared_down")
    return kernels.scaled_down_combine(hidden, activated, down, scale, share, columns=columns, inner=inner)


def _few(
    x: jax.Array, chosen: jax.Array, ids: jax.Array, activated: jax.Array, share: jax.Array, weights: Layer, kernels: Kernels
) -> jax.Array:
    """The routed and the shared experts of few pairs: two kernels, the second of which adds both up."""
    gate_up, down = weights.view("experts_gate_up"), weights.view("experts_down")
    if "experts_down" + SCALE not in weights.layout:
        pairs = kernels.expert_gate_up(x, gate_up, ids)
        return kernels.expert_down_shared(pairs, down, ids, chosen, activated, weights.view("shared_down").T, share)
    blocks = dict(zip(("columns", "inner"), weights.block("experts_down"), strict=True))
    pairs = kernels.scaled_expert_gate_up(x, gate_up, weights.view("experts_gate_up" + SCALE), ids, **blocks)
    routed = pairs, down, weights.view("experts_down" + SCALE), ids, chosen
    shared = activated, weights.view("shared_down"), weights.view("shared_down" + SCALE), share
    width = weights.block("shared_down")[1]  # both have as many columns a block
    return kernels.scaled_expert_down_shared(*routed, *shared, **blocks, shared_inner=width)


def routed(x: jax.Array, weights: Layer, config: Config, kernels: Kernels) -> tuple[jax.Array, ...]:
    """The shared expert's activation [T, I] and its share [T, 1], and the weights and numbers of the experts chosen, [T, k]."""
    k, more = config.num_experts_per_tok, {"renormalize": config.norm_topk_prob}
    if kernels.fused and x.shape[0] <= ROWS:
        if "gate_up" + SCALE not in weights.layout:
            return kernels.gate_topk(x, *gate_weights(weights), k, **more)
        return kernels.scaled_gate_topk(x, *gate_weights(weights), k, **more, **gate_blocks(weights))
    activated, logits, share = gate(x, weights, kernels)
    return activated, share, *kernels.topk_softmax(logits, k, **more)


def gate(x: jax.Array, weights: Layer, kernels: Kernels) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The shared expert's activation [T, I], the router's logits [T, E] and the shared expert's share [T, 1], float32."""
    names, scaled = ("gate_up", "router", "shared_gate"), "gate_up" + SCALE in weights.layout
    if kernels.fused and scaled and x.shape[0] <= MOST:
        return kernels.scaled_gate_projections(x, *gate_weights(weights), **gate_blocks(weights))
    if kernels.fused:
        wide = widened(weights, "gate_up", dtype=x.dtype) if scaled else weights.view("gate_up")
        return kernels.gate_projections(x, wide, *map(weights.view, names[1:]))
    gate_up, logits, shared_gate = (projected(x, weights, name) for name in names)
    return _activation(gate_up, 1.0, x.dtype), logits, jax.nn.sigmoid(shared_gate.astype(jnp.float32))


def gate_weights(weights: Layer) -> tuple[View, ...]:
    """The gates' weights, with the scales behind the first where the shared expert is float8."""
    scale = ("gate_up" + SCALE,) if "gate_up" + SCALE in weights.layout else ()
    return tuple(map(weights.view, ("gate_up", *scale, "router", "shared_gate")))


def gate_blocks(weights: Layer) -> dict[str, int]:
    """What a scale of the shared expert's is of, as kernels take it."""
    return dict(zip(("inner", "columns"), weights.block("gate_up"), strict=True))


def _among_held(ids: jax.Array, config: Config) -> jax.Array:
    """The numbers of experts among those that this rank's group holds; of another group's, the first that is none."""
    if config.ep == 1:
        return ids
    held = config.num_experts // config.ep
    own = ids - held * (lax.axis_index(AXIS) * config.ep // lax.axis_size(AXIS))
    return jnp.where((own >= 0) & (own < held), own, held)


def experts(
    x: jax.Array,
    chosen: jax.Array,
    ids: jax.Array,
    weights: Layer,
    kernels: Kernels,
    ep: int = 1,
    activations: str | None = None,
) -> jax.Array:
    """Weighted sum of the chosen experts, [T, H] in x's dtype; with kernels, of many tokens.

    x [T, H]; chosen, ids [T, k]: their weights and numbers among the experts of this rank; those of no expert here, which
    there are where ep is above 1 alone, add nothing. How it is computed follows from the shapes alone. With kernels a row's
    bits do not depend on the rows beside it; with another number of rows its products may be added up in another order, and
    with `activations` be of rows in float8.
    """
    names = ("experts_gate_up", "experts_down")  # [E, 2I, H] and [E, I, H], float8 ones [E, H, I]
    count, pairs = weights.layout[names[0]].shape[0] * ep, ids.size
    if kernels.fused and names[0] + SCALE in weights.layout:
        if activations and pairs > QUANTISED * count:
            return _quantised(x, chosen, ids, weights, kernels, _block(QUANTISED_FORMS, pairs, count))
        return _scaled(x, chosen, ids, weights, kernels, _form(pairs, count, weights))
    if kernels.fused:
        gate_up, down = map(weights.view, names)
        return kernels.experts(x, ids, chosen, gate_up, down, block=_form(pairs, count, weights) or FORMS[1][1])
    if pairs <= count:
        return round_to(_gathered(x, chosen, ids, weights, ep > 1), x.dtype)
    if x.shape[0] <= SORTED or count <= DENSE * ids.shape[1]:
        return round_to(_dense(x, chosen, ids, *(_matrices(weights, name, x.dtype, lambda a: a) for name in names)), x.dtype)
    return round_to(_sorted(x, chosen, ids, weights), x.dtype)


def _scaled(x: jax.Array, chosen: jax.Array, ids: jax.Array, weights: Layer, kernels: Kernels, block: int) -> jax.Array:
    """`experts` of weights that are float8, by kernels that take their scales."""
    (gate_up, gate_up_scale, down, down_scale), blocks = _codes(weights)
    if block == 0:
        activated = kernels.scaled_expert_gate_up(x, gate_up, gate_up_scale, ids, **blocks)
        return kernels.scaled_expert_down(activated, down, down_scale, ids, chosen, **blocks)
    return kernels.scaled_experts(x, ids, chosen, gate_up, gate_up_scale, down, down_scale, block=block, **blocks)


def _quantised(x: jax.Array, chosen: jax.Array, ids: jax.Array, weights: Layer, kernels: Kernels, block: int) -> jax.Array:
    """`experts` of weights that are float8, of rows that become so, too."""
    stacks, blocks = _codes(weights)
    codes, scale = kernels.quantised(x, columns=blocks["columns"])
    return kernels.quantised_experts(codes, scale, ids, chosen, *stacks, block=block, **blocks, dtype=x.dtype.name)


def _codes(weights: Layer) -> tuple[list[View], dict[str, int]]:
    """The experts' codes and scales, of gate and up and of down, and the sizes of their blocks."""
    stacks = [weights.view(name + end) for name in ("experts_gate_up", "experts_down") for end in ("", SCALE)]
    return stacks, dict(zip(("columns", "inner"), weights.block("experts_down"), strict=True))


def _matrices(weights: Layer, name: str, dtype: jnp.dtype, take: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Those of a stack of experts' matrices that `take` takes, [n, 2I, H] or [n, I, H]; float8 ones times their scales."""
    if name + SCALE not in weights.layout:
        return take(weights[name])
    codes, scales = take(weights[name]), take(weights[name + SCALE])
    for axis, block in enumerate(weights.block(name), 1):
        scales = jnp.repeat(scales, block, axis=axis)
    wide = (codes.astype(jnp.float32) * scales[:, : codes.shape[1], : codes.shape[2]]).astype(dtype)
    return jnp.swapaxes(wide, 1, 2) if name == "experts_down" else wide


def _form(pairs: int, count: int, weights: Layer) -> int:
    """How many pairs of one expert a program takes: the fewer it leaves empty, the oftener it reads that expert's weights."""
    forms = SCALED_FORMS if "experts_gate_up" + SCALE in weights.layout else FORMS
    return _block(forms, pairs, count)


def _block(forms: tuple[tuple[float, int], ...], pairs: int, count: int) -> int:
    return next(block for most, block in forms if pairs <= most * count)


def _sorted(x: jax.Array, chosen: jax.Array, ids: jax.Array, weights: Layer) -> jax.Array:
    """Pairs sorted by expert into blocks of one each, some blocks at a time as one product with a matrix for each."""
    count, width, _ = weights.layout["experts_gate_up"].shape
    scaled = "experts_gate_up" + SCALE in weights.layout
    # In a loop XLA (0.11.2) copies a slice of an array that a product reads; all rows are blocks of an expert's size.
    rows = None if scaled else weights.rows.reshape(-1, width, x.shape[1])
    pairs, experts, place = _blocks(ids.reshape(-1), count)

    def turn(held: jax.Array, piece: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        n, pairs, experts = piece
        take = partial(_taken, at=experts)
        gate_up = _matrices(weights, "experts_gate_up", x.dtype, take) if scaled else take(rows)
        both = einsum("bjd,bnd->bjn", _taken(x, pairs // ids.shape[1]), gate_up)
        active = _activation(round_to(both, x.dtype), 1.0, x.dtype)
        each = round_to(einsum("bji,bih->bjh", active, _matrices(weights, "experts_down", x.dtype, take)), x.dtype)
        return lax.dynamic_update_index_in_dim(held, each, n, 0), None

    begin = jnp.broadcast_to(x[0], (*pairs.shape, x.shape[1]))  # there by then: zeros XLA would make for all layers at once
    each = lax.scan(turn, begin, (jnp.arange(len(pairs)), pairs, experts))[0].reshape(-1, x.shape[1])
    each = jnp.take(each, place, axis=0, mode="fill", fill_value=0).reshape(*ids.shape, -1)
    return jnp.sum(each.astype(jnp.float32) * chosen[..., None].astype(jnp.float32), axis=1)


def _taken(a: jax.Array, at: jax.Array) -> jax.Array:
    return jnp.take(a, at, axis=0, mode="clip")


def _blocks(ids: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pairs in blocks of one expert each: whose they are, and where each pair stands.

    ids [n] of `count` experts -> pairs [turns, blocks, SORTED], experts [turns, blocks], places [n] among all of pairs, past
    their end for an id of no expert. What fills a block up is any pair, whose product nobody reads.
    """
    known = (ids >= 0) & (ids < count)
    keys = jnp.where(known, ids, count)
    order = jnp.argsort(keys, stable=True)
    counts = jnp.bincount(keys, length=count + 1)[:count]
    padded = -(-counts // SORTED) * SORTED
    stops = jnp.cumsum(padded)
    ahead = jnp.append(stops - padded - (jnp.cumsum(counts) - counts), 0)  # places left empty before an expert's first pair
    most = ids.size // SORTED + min(count, ids.size)
    together = min(TOGETHER // SORTED, most)
    blocks = -(-most // together) * together
    at = jnp.where(known[order], jnp.arange(ids.size) + ahead[keys[order]], blocks * SORTED)
    pairs = jnp.zeros(blocks * SORTED, jnp.int32).at[at].set(order.astype(jnp.int32), mode="drop")
    experts = jnp.searchsorted(stops, jnp.arange(blocks) * SORTED, side="right").astype(jnp.int32)
    places = jnp.zeros(ids.size, jnp.int32).at[order].set(at.astype(jnp.int32))
    return pairs.reshape(-1, together, SORTED), experts.reshape(-1, together), places


def _gathered(x: jax.Array, chosen: jax.Array, ids: jax.Array, weights: Layer, elsewhere: bool = False) -> jax.Array:
    """elsewhere: whether an id may be of no expert here, which stands for weights of zero."""
    # Sums of products, not dots: XLA then multiplies while it gathers rows, and stores none of them. To that end it wants a
    # flat list of experts, and each expert's sum for itself, which for one token it would merge with the last.
    flat, wide = ids.reshape(-1), jnp.float32
    mode = {"mode": "fill", "fill_value": 0} if elsewhere else {"mode": "clip"}
    take = partial(jnp.take, indices=flat, axis=0, **mode)
    rows = _matrices(weights, "experts_gate_up", wide, take).astype(wide)
    both = jnp.sum(jnp.repeat(x, ids.shape[1], axis=0)[:, None].astype(wide) * rows, axis=2)
    active = _activation(round_to(both, x.dtype), chosen.reshape(-1, 1), x.dtype).astype(wide)
    rows = _matrices(weights, "experts_down", wide, take).astype(wide)
    each = lax.optimization_barrier(jnp.sum(active[..., None] * rows, axis=1))
    return jnp.sum(each.reshape(*ids.shape, -1), axis=1)


def _dense(x: jax.Array, chosen: jax.Array, ids: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    count = down.shape[0]
    hit = ids[:, :, None] == jnp.arange(count)[None, None]
    share = jnp.sum(jnp.where(hit, chosen[:, :, None], 0.0), axis=1)[..., None]
    both = linear(x, gate_up.reshape(-1, x.shape[1])).reshape(x.shape[0], count, -1)
    active = jnp.where(hit.any(axis=1)[..., None], _activation(both, share, x.dtype), 0)
    return einsum("tn,nh->th", active.reshape(x.shape[0], -1), down.reshape(-1, x.shape[1]))


def _activation(both: jax.Array, share: jax.Array | float, dtype: jnp.dtype) -> jax.Array:
    """silu(gate)·up·share of both [..., 2I], rounded once."""
    half = both.shape[-1] // 2
    first, second = both[..., :half].astype(jnp.float32), both[..., half:].astype(jnp.float32)
    return round_to(first * jax.nn.sigmoid(first) * second * share, dtype)
