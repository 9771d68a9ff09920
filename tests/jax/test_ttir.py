"""Kernels without Pallas: what Triton's printer has printed, behind XLA's arrays (moekit/jax/ttir.py)."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moekit.fusions import FUSIONS
from moekit.jax import add_rms_norm, doors, op, silu_and_mul, ttir, view
from moekit.jax.program import launched
from moekit.testing import operands
from tests.backends.samples import SAMPLES

pytest.importorskip("triton")

ENTRIES = """
import numpy as np, torch
from moekit.backends.loaded import load
from moekit.backends.triton_entry import entry
from moekit.fusions import FUSIONS
from moekit.jax import ttir
from moekit.compile.tile import interpret
from moekit.testing import Call, check, operands
from moekit.testing.interpreted import mend

SIZES = {
    "gate_gemm": dict(T=5, P=19, D=38), "silu_and_mul": dict(T=7, I=37), "topk_softmax": dict(T=5, E=60),
    "shared_expert_combine": dict(T=5, H=50), "add_rms_norm": dict(T=5, H=50), "gated_rms_norm": dict(T=3, V=4, D=33),
    "delta_rule_step": dict(T=3, K=2, V=4, Dk=8, Dv=9), "gate_projections": dict(T=3, D=35, I=5, E=9, G=1),
    "row_product": dict(T=3, D=35, P=9), "add_norm_gate_projections": dict(T=3, H=35, I=5, E=9, G=1),
    "gate_topk": dict(T=3, D=35, I=5, E=19, G=1), "down_combine": dict(T=3, H=19, I=33, **{"H?": 1}),
    "expert_gate_up": dict(T=3, D=35, I=5, E=7, K=3), "expert_down": dict(T=3, H=19, I=9, E=7, K=3),
    "expert_down_shared": dict(T=3, H=19, I=9, J=21, E=7, K=3, **{"H?": 1}), "causal_conv1d_step": dict(T=3, C=19, S=3),
    "attention_decode": dict(T=3, K=2, G=3, L=20, D=6, Dv=9), "qkv_norm_rope": dict(T=2, Q=2, K=1, L=3, R=2, N=6, Dv=7),
    "gated_attention_decode": dict(T=3, K=2, G=3, Q=6, L=20, D=6, Dv=9), "conv_projections": dict(T=2, D=35, C=9, P=5, S=3),
    "experts": dict(T=5, D=35, I=17, H=19, E=7, K=3), "moe_align": dict(T=40, K=3), "scaled_product": dict(T=3, D=35, P=9),
    "scaled_expert_gate_up": dict(T=3, D=35, I=5, E=7, K=3), "scaled_expert_down": dict(T=3, H=19, I=9, E=7, K=3),
}
entered = []


def tensor(x):
    x = np.ascontiguousarray(x)
    return torch.from_numpy(x.reshape(-1).view(np.uint8).copy()).view(getattr(torch, x.dtype.name)).reshape(x.shape)


def numbers(x, dtype):
    return x.reshape(-1).view(torch.uint8).numpy().view(dtype).reshape(x.shape)


def by_triton(plan, lying, lengths, names, kinds, sizes, wanted, *arrays):
    held = {n: tensor(np.asarray(x)) for n, x in zip(names, arrays, strict=True)}
    kinds = dict(kinds) | {s.name: (s.shape(sizes), s.dtype) for s in plan.scratch}
    held |= {b: tensor(interpret.poison(*kind)) for b, kind in kinds.items() if b not in held}
    for program in plan.programs:
        made = entry(program, {p.name: lying[p.name] for p in program.params})
        function = load("triton", made.name, made.source)[made.name]
        function[(program.programs(sizes),)](*(held[b] for b in (*made.read, *made.written)))
        entered.append(program.name)
    return [numbers(held[b], np.dtype(kinds[b][1])) for b in wanted]


mend()
ttir.unavailable, ttir._on_host = (lambda: None), by_triton
for name, sizes in SIZES.items():
    fusion = FUSIONS[name]
    params = {n: v for n, v in dict(k=10, experts=7, block=4, rows=8, columns=8, inner=8).items() if n in fusion.params}
    for dtype, layout in (("float32", "dense"), ("float32", "strided"), ("float16", "transposed padded")):
        call = Call(fusion, operands(fusion, sizes, dtype, "normal", 7, params), params)
        layouts = {} if layout == "dense" else dict.fromkeys([*call.operands, *call.names], layout)
        check("triton-jax", Call(fusion, call.operands, params, layouts))
print(len(entered), "launches")
"""


@pytest.mark.timeout(600)
def test_entries_in_tritons_interpreter():
    """Every fusion through the text that XLA is given, on arrays and Views, against its reference."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", ENTRIES], env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 60


def test_a_view_is_a_constant_of_the_entry():
    """Where a View lies is said in the entry, what is picked is loaded there, and one array is passed once."""
    base, at, hidden = jnp.zeros((3, 4, 64), jnp.bfloat16), jnp.int32(1), jnp.zeros((4, 16), jnp.bfloat16)

    def call(b, i, h):
        mine = view(b)[i, :, 40:56]
        return add_rms_norm(h, mine, view(b)[2, 3, 16:32], out=(None, mine), implementation="triton")

    sources = []
    original = ttir.entry

    def seen(program, lying):
        sources.append(original(program, lying))
        return sources[-1]

    launched.cache_clear()
    ttir.compiled.cache_clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ttir, "entry", seen)
        jax.jit(call).trace(base, at, hidden).lower(lowering_platforms=("cuda",))
    (made,) = sources
    text = made.source[made.source.index("def add_rms_norm(") :]
    assert made.read == ("x", "residual", "residual_at_0")
    assert "residual_out_ref + 40 + tl.load(residual_at_0_ref).to(tl.int64) * 256," in text
    assert "residual_out_ref + 720," in text


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(n for n, s in SAMPLES.items() if s.fusion in FUSIONS))
def test_bits_are_pallas_s(name):
    """Both doors have the same programs and compiler: ids and what is rounded before it is added up must be equal, the rest
    within what two orders of a sum may differ by."""
    sample = SAMPLES[name]
    fusion = FUSIONS[sample.fusion]
    values = operands(fusion, dict(sample.bound()[1].sizes), "bfloat16", "normal", 3)
    by = {}
    for door in doors.DOORS:
        outs = jax.jit(lambda *xs, d=door: op(fusion)(*xs, **sample.params, implementation=d))(*values.values())
        by[door] = [np.asarray(x) for x in (outs if isinstance(outs, tuple) else (outs,))]
    for mine, theirs in zip(by["triton"], by["pallas"], strict=True):
        if mine.dtype.kind in "iub":
            np.testing.assert_array_equal(mine, theirs)
        else:
            np.testing.assert_allclose(mine.astype(np.float32), theirs.astype(np.float32), rtol=2e-2, atol=2e-2)


def test_it_is_interpreted_on_a_cpu_as_pallas_is():
    """Bit for bit here, where both add up as numpy does, with what lies around an output untouched."""
    rng = np.random.default_rng(0)
    base, x = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((5, 96), (3, 5, 80)))

    def call(door):
        with jax.default_device(jax.devices("cpu")[0]):
            return jax.jit(lambda b, a, i: silu_and_mul(view(a)[i, :, 8:72], out=view(b)[:, ::3], implementation=door))(
                base, x, jnp.int32(2)
            )

    np.testing.assert_allclose(call("triton"), call("pallas"), rtol=1e-6)
    np.testing.assert_array_equal(np.delete(np.asarray(call("triton")), np.s_[::3], 1), np.delete(base, np.s_[::3], 1))
