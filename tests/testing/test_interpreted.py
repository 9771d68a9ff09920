"""What is put right of Triton's interpreter, in a process of its own: Triton is interpreted or not for a whole process."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl
from moekit.testing import interpreted

interpreted.mend()
interpreted.mend()


@triton.jit
def casts(x_ptr, out_ptr, n):
    lanes = tl.arange(0, 64)
    total = tl.zeros((64,), tl.float32)
    for i in range(0, n):
        total += tl.load(x_ptr + lanes)
    tl.store(out_ptr + lanes, total.to(tl.bfloat16))


@triton.jit
def products(a_ptr, b_ptr, out_ptr, precision: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=precision))


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def extremes(x_ptr, out_ptr):
    at = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out_ptr + tl.arange(0, 4), tl.reduce(tl.load(x_ptr + at), 1, larger))


@triton.jit
def order(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


rng = np.random.default_rng(0)
x = rng.standard_normal(64).astype(np.float32)
x[:3] = [np.nan, np.inf, 1e-40]
out = torch.empty(64, dtype=torch.bfloat16)
casts[(1,)](torch.from_numpy(x), out, torch.tensor(3).item())
wanted = (x + x + x).astype(ml_dtypes.bfloat16).astype(np.float32)
assert np.array_equal(out.float().numpy(), wanted, equal_nan=True), (out, wanted)

a, b = (rng.standard_normal((16, 16)).astype(np.float32) for _ in range(2))
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    left, right = (torch.from_numpy(m).to(dtype) for m in (a, b))
    out = torch.empty(16, 16)
    products[(1,)](left, right, out, "ieee")
    exact = left.double() @ right.double()
    assert (out - exact).abs().max() < 1e-5, dtype
products[(1,)](torch.from_numpy(a), torch.from_numpy(b), out, "tf32")
off = (out - exact).abs().max()
assert 1e-5 < off < 1e-2, off

rows = rng.standard_normal((4, 8)).astype(np.float32)
rows[1, 3] = np.nan
out = torch.empty(4)
extremes[(1,)](torch.from_numpy(rows), out)
assert np.array_equal(out.numpy(), np.fmax.reduce(rows, axis=1)), out

last = torch.zeros(1, dtype=torch.int32)
order[(5,)](last)
assert last.item() == 4
interpreted.ORDER["backwards"] = True
order[(5,)](last)
assert last.item() == 0
"""


def test_it_is_put_right(tmp_path):
    """Casts and products of bfloat16, run-time loops, TF32, a maximum that drops NaN, and the order of programs."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
