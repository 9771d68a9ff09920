"""The emitted kernels themselves, on Triton's interpreter, through the functions of the package: a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = """
import torch
import moekit.torch as mt
from moekit.compile.schedule import Schedule
from moekit.fusions import FUSIONS
from moekit.testing import as_torch, operands
from moekit.testing.interpreted import mend
from tests.sizes import every

mend()  # loops to a run-time end
SIZES = every({"T": 3, "D": 24, "P": 17, "I": 5, "E": 20, "H": 9, "V": 4, "K": 2, "Dk": 4, "Dv": 9, "G": 3,
               "Q": 6, "L": 300, "C": 9, "S": 3, "R": 2, "N": 6, "J": 20,
               "M": 2, "Cq": 5, "Ck": 5, "Cv": 5, "Lr": 4, "Lc": 4})
for name, sizes in SIZES.items():
    params = {n: x for n, x in {"k": 3, "experts": 7}.items() if n in FUSIONS[name].params}
    for i, layout in enumerate(("dense", "padded", "transposed") * 2):
        dtype, tolerance = (("float32", 2e-5), ("float16", 4e-3))[i // 3]
        make = lambda: [as_torch(x, layout) for x in operands(FUSIONS[name], sizes, dtype).values()]
        face = mt.op(FUSIONS[name], in_place=i % 2 == 1)  # of each layout in one of the dtypes
        got = face(*make(), **params, implementation="triton")
        wanted = face(*make(), **params, implementation="eager")
        pairs = zip(got, wanted) if isinstance(got, tuple) else [(got, wanted)]
        for a, b in pairs:  # a sum's noise goes by its terms
            a, b = (c.float() if c.dtype == torch.float8_e4m3fn else c for c in (a, b))
            largest = max([1.0, *b.abs().flatten().tolist()])
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest)
x, packed = torch.randn(5, 32), torch.randn(16, 32)
split = Schedule.parse(
    "tile:D.part:1 tile:T:16 tile:P:16 loop:D:16 split:D:2 warps:1 stages:1 then loop:D.part:1 tile:T:1 tile:P:64 warps:1"
)
torch.testing.assert_close(mt.gate_gemm(x, packed, implementation="triton", schedule=split), x @ packed.T)
x = torch.randn(3, 8, requires_grad=True)
mt.silu_and_mul(x, implementation="triton").sum().backward()
wanted = torch.autograd.grad((torch.nn.functional.silu(x[:, :4]) * x[:, 4:]).sum(), x)[0]
torch.testing.assert_close(x.grad, wanted)
print("kernels agree")
"""


def test_kernels_agree_with_array_evaluation():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kernels agree" in done.stdout
