"""What the machine itself can do, measured in the run whose rows are held to it.

On an H200 (torch 2.11.0, triton 3.6.0, `moekit.tune.timer`):

- Copying 1 GiB: 4.29 TB/s read and written by a kernel (`torch.neg`; Triton copies in blocks of 1024 to 16384 come to 4.06 to
  4.26), and 2.77 by `copy_`, which in a CUDA graph is a copy node and no kernel. Reading alone 4.30, writing alone 3.38.
- A bfloat16 product of random numbers: 4096 × 8192 × 8192 796 TFLOP/s, 4096³ 785, 8192³ 681 to 754, larger ones 660 to 690; of
  zeros 876 at the first shape and 869 at the second. What stands between them is power, so the best shape is the ceiling.
- A kernel that does nothing: 0.75 µs with programmatic dependent launch, which moekit's kernels have, 0.87 without.
  (`zero_` of one element, a memset node, takes 1.13, and the addition of a number to it 1.47.)
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moekit.tune.timer import microseconds

COPIED = 2**30  # bytes
PRODUCTS = ((4096, 4096, 4096), (4096, 8192, 8192), (8192, 8192, 8192))  # rows, columns, depth


@triton.jit
def empty_kernel(PDL: tl.constexpr):
    """Begins as moekit's kernels do, and ends there."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


def copy_bandwidth() -> float:
    """TB/s, read and written, of a kernel that reads 1 GiB and writes as much."""
    source = [torch.randn(COPIED // 2, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    target = [torch.empty_like(s) for s in source]
    us = microseconds([lambda s=s, t=t: torch.neg(s, out=t) for s, t in zip(source, target, strict=True)])
    return 2 * COPIED / us / 1e6


def product_rate(rows: int, columns: int, depth: int) -> float:
    """TFLOP/s of a bfloat16 product of random numbers by cuBLAS."""
    a = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(depth, columns, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16)
    return 2 * rows * columns * depth / microseconds([lambda: torch.mm(a, b, out=out)] * 4, 15) / 1e6


def empty_launch(overlap: bool) -> float:
    """µs of a kernel that does nothing, in a graph of them; `overlap`: with programmatic dependent launch."""
    options = {"launch_pdl": True} if overlap else {}
    return microseconds([lambda: empty_kernel[(1,)](overlap, num_warps=1, **options)] * 200)


def ceilings() -> dict[str, float]:
    """TB/s of a large copy (read and written), TFLOP/s of the best large bfloat16 product, µs of a kernel that does nothing

    with and without programmatic dependent launch.
    """
    new = torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)
    alone = empty_launch(False)
    return {
        "copy TB/s": copy_bandwidth(),
        "matmul TFLOP/s": max(product_rate(*shape) for shape in PRODUCTS),
        "smallest kernel µs": empty_launch(True) if new else alone,
        "smallest kernel by itself µs": alone,
    }
