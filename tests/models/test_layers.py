"""One layer at a time against transformers' own modules, and the parts that have two ways of being computed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P

from moekit.models.qwen3next import attention, gdn, moe
from moekit.models.qwen3next.cache import KeyValues, delta_specs
from moekit.models.qwen3next.delta_rule import chunked_delta_rule, inverse
from moekit.models.qwen3next.delta_rule_turns import delta_rule_in_turns
from moekit.models.qwen3next.kernels import named
from moekit.models.qwen3next.layer import Layer, arranged
from moekit.models.qwen3next.numerics import product
from moekit.models.qwen3next.sharding import specs

CASES = ("four-layers", "sixteen-value-heads", "odd-experts")
CUT = P(None, "tp")
B, S = 2, 67


def hidden(zoo, case):
    x = np.random.default_rng(3).standard_normal((B, S, zoo.config(case).hidden_size))
    return x.astype(np.float32)


def summed(model, layer, block, *inputs, out=None, extra=()):
    """A block of one layer over all ranks, its partial outputs summed; `extra` specs for what follows x."""
    weights = model.params["layers"]
    own = specs(model.params, model.config, model.tp)["layers"]

    def local(weights, x, *rest):
        partial_sum, *others = block(weights[layer], x, *rest)
        return (jax.lax.psum(partial_sum, "tp"), *others)

    places = (own, P(), *extra)
    run = jax.shard_map(local, mesh=model.mesh, in_specs=places, out_specs=(P(), *(out or ())), check_vma=False)
    return jax.jit(run)(weights, *inputs)


def close(mine, theirs, tolerance=2e-5):
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert np.abs(np.asarray(mine) - theirs).max() <= tolerance * np.abs(theirs).max()


def beside(*others):
    """(case, tp, kernels): kernels of every case on four ranks, which are most that can go wrong, and others of one case."""
    return pytest.mark.parametrize(("case", "tp", "kernels"), [*((case, 4, "pallas") for case in CASES), *others])


@beside((CASES[0], 1, "xla"), (CASES[1], 4, "xla"), (CASES[2], 1, "pallas"))
def test_gated_delta_net_prefill_then_steps(zoo, case, tp, kernels):
    """With kernels a prompt goes from chunk to chunk by one of them."""
    model, config = zoo.model(case, tp=tp), zoo.config(case)
    theirs = zoo.transformers(case).model.layers[0].linear_attn
    x = hidden(zoo, case)
    expected = theirs(torch.tensor(x)).detach().numpy()
    state = delta_specs()

    def prompt(weights, x, lengths):
        return gdn.prefill.__wrapped__(x, weights, lengths, config, named(kernels))  # not one traced before

    def token(weights, x, memory):
        return gdn.decode(x, weights, memory, None, config, named("pallas"))

    # The second sequence is shorter, and its padding is loud: neither its output nor its state may hear it.
    lengths = np.array([S - 3, S - 5], np.int32)
    loud = np.where(np.arange(S)[:, None] < lengths[:, None, None], x, 1e3).astype(np.float32)
    out, memory = summed(model, 0, prompt, loud, lengths, out=(state,), extra=(P(),))
    for row in range(B):
        close(np.asarray(out)[row, : lengths[row]], expected[row, : lengths[row]])
    for step in range(3):
        now = x[np.arange(B), lengths + step]
        out, memory = summed(model, 0, token, now, memory, out=(state,), extra=(state,))
        close(out, expected[np.arange(B), lengths + step])


@beside((CASES[0], 1, "pallas"), (CASES[1], 1, "xla"), (CASES[2], 4, "xla"))
def test_gated_attention_prefill_then_steps(zoo, case, tp, kernels, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 16)  # 67 tokens are more than four
    monkeypatch.setattr(attention, "ROWS", 16)
    model, config = zoo.model(case, tp=tp), zoo.config(case)
    layer = config.layer_types.index("full_attention")
    reference = zoo.transformers(case).model
    x = hidden(zoo, case)
    positions = reference.rotary_emb(torch.tensor(x), torch.arange(S)[None])
    causal = torch.full((S, S), float("-inf")).triu(1)[None, None]
    expected = reference.layers[layer].self_attn(torch.tensor(x), positions, causal)[0].detach().numpy()
    memory_spec = KeyValues(CUT, CUT)

    def prompt(weights, x):
        return attention.prefill(x, weights, 80, config, named(kernels))

    def token(weights, x, memory, lengths):
        return attention.decode(x, weights, memory, lengths, config, named(kernels))

    lengths = np.array([S - 3, S - 5], np.int32)
    out, memory = summed(model, layer, prompt, x, out=(memory_spec,))
    close(out, expected)
    for step in range(3):
        now = x[np.arange(B), lengths + step]
        places = (memory_spec, P())
        out, memory = summed(model, layer, token, now, memory, lengths + step, out=(memory_spec,), extra=places)
        close(out, expected[np.arange(B), lengths + step])


@pytest.mark.parametrize("longest", [11, 10])
def test_attention_in_blocks_and_its_gradient_are_those_of_all_scores_at_once(longest, monkeypatch):
    """Of a length that no block divides: blocks of queries, and of a longer one of keys, too."""
    rng, length = np.random.default_rng(9), 11
    q = rng.standard_normal((2, length, 2, 3, 8)).astype(np.float32)
    keys, values = rng.standard_normal((2, 2, 2, length, 8)).astype(np.float32)
    weights = rng.standard_normal(q.shape).astype(np.float32)

    def of(*given):
        return jnp.sum(attention._causal(*given) * weights)

    wanted = jax.value_and_grad(of, argnums=(0, 1, 2))(q, keys, values)
    for name, size in (("BLOCK", 4), ("ROWS", 4), ("LONG", longest)):
        monkeypatch.setattr(attention, name, size)
    found = jax.value_and_grad(of, argnums=(0, 1, 2))(q, keys, values)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        close(mine, np.asarray(theirs))


def test_cudnn_is_asked_for_the_same_attention(monkeypatch):
    """Of grouped queries, in the order in which it has heads; and where it refuses, it is not taken."""
    rng, asked = np.random.default_rng(4), jax.nn.dot_product_attention
    shapes = (2, 11, 2, 3, 8), (2, 2, 11, 8), (2, 2, 11, 8)
    given = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]
    wanted = attention._causal(*given).astype(jnp.float32)
    assert not attention._flash_takes(*given)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not attention._flash_takes(*(jnp.zeros((*shape[:-1], 264), jnp.bfloat16) for shape in shapes))  # says jax
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **o: asked(*a, implementation="xla", **o))
    assert attention._flash_takes(*given)
    assert not attention._flash_takes(*(a.astype(jnp.float32) for a in given))
    close(attention._flash(*given).astype(jnp.float32), np.asarray(wanted), 2**-7)


@beside((CASES[0], 4, "xla"), (CASES[1], 1, "pallas"), (CASES[2], 1, "xla"))
def test_mixture_of_experts(zoo, case, tp, kernels):
    model, config = zoo.model(case, tp=tp), zoo.config(case)
    x = hidden(zoo, case)
    expected = zoo.transformers(case).model.layers[1].mlp(torch.tensor(x)).detach().numpy().reshape(B * S, -1)

    def block(weights, x):
        return (moe.moe(x, weights, config, named(kernels)),)

    rows = x.reshape(B * S, -1)
    close(summed(model, 1, block, rows[:20])[0], expected[:20])
    close(summed(model, 1, block, rows[:1])[0], expected[:1])  # few tokens gather their experts


def stacked(gate_up, down):
    """A layer that holds experts and nothing else."""
    shapes = {"experts_gate_up": (gate_up.shape, "rows"), "experts_down": (down.shape, "down")}
    layout = arranged(shapes, gate_up.shape[2], [shapes])
    rows = jnp.asarray(gate_up.reshape(layout.shapes[0]))
    return Layer(rows, jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.asarray(down), jnp.int32(0), layout)


def routed(tokens, count=11, width=10, hidden_size=24, k=3, seed=5):
    """Operands of routed experts, some ids of no expert here, and their weighted sum in float64."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, hidden_size)).astype(np.float32)
    gate_up = rng.standard_normal((count, 2 * width, hidden_size)).astype(np.float32)
    down = rng.standard_normal((count, width, hidden_size)).astype(np.float32)
    ids = np.argsort(rng.random((tokens, count + 2)))[:, :k].astype(np.int32)
    chosen = rng.random((tokens, k)).astype(np.float32)
    expected = np.zeros((tokens, hidden_size))
    for t in range(tokens):
        for weight, e in zip(chosen[t], ids[t], strict=True):
            if e < count:
                first, second = np.split(gate_up[e].astype(np.float64) @ x[t], 2)
                expected[t] += weight * (first / (1 + np.exp(-first)) * second) @ down[e]
    return (jnp.asarray(x), jnp.asarray(chosen), jnp.asarray(ids)), stacked(gate_up, down), expected


@pytest.mark.parametrize(("kernels", "tokens"), [("pallas", 1), ("pallas", 37), *(("xla", n) for n in (1, 3, 37, 300))])
def test_routed_experts_of_few_tokens_and_of_many(kernels, tokens, monkeypatch):
    """Those of no expert here, as of another group of ranks, add nothing."""
    monkeypatch.setattr(moe, "SORTED", 8)  # many blocks, and many turns
    monkeypatch.setattr(moe, "TOGETHER", 16)
    given, layer, expected = routed(tokens)
    close(moe.experts(*given, layer, named(kernels), ep=2), expected, 1e-6)


def test_all_experts_at_once_where_a_token_chooses_many_of_them():
    (x, chosen, ids), layer, expected = routed(20, count=5, k=2)
    close(moe.experts(x, chosen, ids, layer, named("xla")), expected, 1e-6)


@pytest.mark.parametrize(("kernels", "count"), [("pallas", 40), ("xla", 3), ("xla", 40)])
def test_an_expert_that_nobody_chose_may_hold_infinities(kernels, count, monkeypatch):
    monkeypatch.setattr(moe, "SORTED", 16)
    x = jnp.ones((40, 8))
    gate_up, down = np.ones((count, 4, 8), np.float32), np.ones((count, 2, 8), np.float32)
    gate_up[2] = np.inf
    ids = np.tile(np.array([[0, 1]], np.int32), (40, 1))
    chosen = np.ones((40, 2), np.float32)
    for tokens in (1, 40):
        some = x[:tokens], chosen[:tokens], ids[:tokens]
        assert np.isfinite(moe.experts(*some, stacked(gate_up, down), named(kernels))).all()


def test_a_step_reads_its_cache_alone_and_no_further(zoo):
    """What stands behind a sequence's last token may be anything; a capacity of several parts, and lengths around one."""
    config, model = zoo.config("two-layers"), zoo.model("two-layers")
    layer, room = model.params["layers"][config.layer_types.index("full_attention")], 600
    rng, lengths = np.random.default_rng(8), np.array([0, 255, 256, 599], np.int32)
    x = rng.standard_normal((4, config.hidden_size)).astype(np.float32)
    shape = (4, config.num_key_value_heads, room, config.head_dim)
    keys, values = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    wanted, _ = attention.decode(x, layer, KeyValues(keys, values), lengths, config, named("xla"))
    behind = (np.arange(room) > lengths[:, None])[:, None, :, None]
    loud = KeyValues(*(jnp.where(behind, jnp.nan, held) for held in (keys, values)))
    found, after = attention.decode(x, layer, loud, lengths, config, named("pallas"))
    close(found, wanted, 1e-5)
    same = np.arange(room) != lengths[:, None]
    for mine, before in ((after.keys, loud.keys), (after.values, loud.values)):
        assert np.array_equal(np.moveaxis(mine, 2, 1)[same], np.moveaxis(before, 2, 1)[same], equal_nan=True)


def recurrence(q, k, v, decay, beta):
    """The delta rule of one sequence itself, token by token in float64: what is read, and the state after."""
    keys, values = q.shape[2], v.shape[2]
    memory, read = np.zeros((values, q.shape[3], v.shape[3])), np.zeros(v.shape[1:])
    for t in range(v.shape[1]):
        for h in range(values):
            key, query = k[0, t, h * keys // values], q[0, t, h * keys // values]
            memory[h] *= np.exp(decay[0, t, h])
            memory[h] += np.outer(key, (v[0, t, h] - key @ memory[h]) * beta[0, t, h])
            read[t, h] = query @ memory[h]
    return read, memory


LENGTHS = (1, 63, 64, 130, 700, 1100)  # around a chunk; groups one after the other; chunks of twice the length


@pytest.mark.parametrize(("length", "wide"), [*((length, False) for length in LENGTHS), (130, True)])
def test_chunked_delta_rule_is_the_recurrence(length, wide):
    """Where JAX has 64 bits, too."""
    rng = np.random.default_rng(length)
    keys, values, key_dim, value_dim = 2, 6, 8, 5
    q, k = (rng.standard_normal((1, length, keys, key_dim)) for _ in range(2))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.standard_normal((1, length, values, value_dim))
    decay, beta = -rng.exponential(1.0, (1, length, values)), rng.random((1, length, values))
    arguments = (jnp.asarray(a, jnp.float32) for a in (q, k, v, decay, beta))
    with jax.enable_x64(wide):
        read, state = jax.jit(chunked_delta_rule)(*arguments)
    assert (read.dtype, state.dtype) == (np.float32, np.float32)
    expected, memory = recurrence(q, k, v, decay, beta)
    close(read[0], expected, 1e-5)
    close(state[0], memory, 1e-5)


@pytest.mark.parametrize("alike", [0.01, 0.3])
def test_keys_that_are_nearly_alike_and_never_forgotten_lose_no_digits(alike):
    """Each token takes back nearly all that the one before it wrote: powers of the system are far larger than its inverse.

    q and k are narrow, with their norms beside them.
    """
    rng, length, keys, dim = np.random.default_rng(2), 200, 1, 16
    q, k = (rng.standard_normal((1, length, keys, dim)) for _ in range(2))
    q, k = (np.asarray(jnp.asarray(a, jnp.bfloat16)) for a in (q, 1 + alike * k))
    v, beta = rng.standard_normal((1, length, 2 * keys, dim)), np.full((1, length, 2 * keys), 0.999)
    scales = [1 / np.linalg.norm(a.astype(np.float64), axis=-1) for a in (q, k)]
    wide = (a.astype(np.float64) * scale[..., None] for a, scale in zip((q, k), scales, strict=True))
    expected, memory = recurrence(*wide, v, np.zeros_like(beta), beta)
    given = (jnp.asarray(a, jnp.float32) for a in (v, np.zeros_like(beta), beta))
    read, state = chunked_delta_rule(q, k, *given, None, tuple(jnp.asarray(a, jnp.float32) for a in scales))
    close(read[0], expected, 3e-6)
    close(state[0], memory, 3e-6)


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("size", [8, 16, 64])
def test_an_inverse_by_halves(size, by_kernel):
    """Of systems whose powers are far larger than the inverse, small ones by products and by a kernel."""
    system = np.tril(0.9 + 0.1 * np.random.default_rng(size).random((3, size, size)), -1).astype(np.float32)
    solve = named("pallas").unit_lower_inverse if by_kernel else None
    found = jax.jit(partial(inverse, times=partial(product, exact=True), solve=solve))(system)
    close(found, np.linalg.inv(np.eye(size) + system.astype(np.float64)), 1e-5)


def in_turns(q, k, v, decay, beta, state, scales, kind):
    """`delta_rule_in_turns` of arrays of q, k and v, whose heads it takes out of the columns of one."""
    columns = jnp.concatenate([jnp.asarray(a).reshape(*a.shape[:2], -1) for a in (q, k, v)], axis=-1)
    given = (jnp.asarray(a, jnp.float32) for a in (decay, beta))
    scales = tuple(jnp.asarray(a, jnp.float32) for a in scales)
    return jax.jit(partial(delta_rule_in_turns, dims=(q.shape[3], v.shape[3]), kernels=named(kind)))(
        columns, decay=next(given), beta=next(given), state=state, scales=scales
    )


@pytest.mark.parametrize(
    ("length", "kind", "value_dim"), [(1, "pallas", 8), (63, "pallas", 5), (130, "pallas", 8), (64, "xla", 8), (300, "xla", 8)]
)
def test_the_delta_rule_in_turns_is_the_recurrence(length, kind, value_dim):
    """Chunks that are full and not, one and several; heads of q, k and v as one array's, and of widths that differ."""
    rng, (keys, values, key_dim) = np.random.default_rng(length), (2, 4, 8)
    q, k = (rng.standard_normal((1, length, keys, key_dim)) for _ in range(2))
    v, beta = rng.standard_normal((1, length, values, value_dim)), rng.random((1, length, values))
    decay, scales = -rng.exponential(0.1, (1, length, values)), [1 / np.linalg.norm(a, axis=-1) for a in (q, k)]
    expected, memory = recurrence(q * scales[0][..., None], k * scales[1][..., None], v, decay, beta)
    q, k, v = (a.astype(np.float32) for a in (q, k, v))
    read, state = in_turns(q, k, v, decay, beta, None, scales, kind)
    close(read[0], expected, 1e-5)
    close(state[0], memory, 1e-5)


@pytest.mark.parametrize("kind", ["xla", "pallas"])
def test_in_turns_from_a_state_with_narrow_keys_that_are_nearly_alike(kind):
    """Read is rounded to bfloat16, the state is not: factors of two parts lose 2⁻¹⁶, not bfloat16's 2⁻⁸."""
    rng, length, keys, dim = np.random.default_rng(2), 200, 1, 8
    q, k = (rng.standard_normal((1, length, keys, dim)) for _ in range(2))
    q, k, v = (np.asarray(jnp.asarray(a, jnp.bfloat16)) for a in (q, 1 + 0.01 * k, rng.standard_normal((1, length, 2, dim))))
    beta, scales = np.full((1, length, 2), 0.999), [1 / np.linalg.norm(a.astype(np.float64), axis=-1) for a in (q, k)]
    wide = [a.astype(np.float64) for a in (q, k, v)]
    expected, memory = recurrence(wide[0] * scales[0][..., None], wide[1] * scales[1][..., None], wide[2], 0 * beta, beta)
    reads, state = [], None
    for some in (slice(0, 100), slice(100, length)):
        parts = (a[:, some] for a in (q, k, v, 0 * beta, beta))
        read, state = in_turns(*parts, state, [a[:, some] for a in scales], kind)
        reads.append(np.asarray(read[0], np.float64))
    close(np.concatenate(reads), expected, 5e-3)
    close(state[0], memory, 2e-4)


def test_strong_decay_over_a_chunk_stays_finite():
    shape = (1, 64, 1)
    q = k = v = jnp.ones((*shape, 4)) / 2
    read, state = chunked_delta_rule(q, k, v, jnp.full(shape, -80.0), jnp.full(shape, 0.5))
    assert np.isfinite(read).all()
    assert np.isfinite(state).all()
