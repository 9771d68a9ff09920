"""The machine for PTX: what the matrix unit is given and gives, element by element."""

import ml_dtypes
import numpy as np
import pytest

from .ptx import LANES, THREADS, Machine

PRODUCT = """.visible .entry product(.param .u64 product_param_0) .maxntid 128 {
mma.sync.aligned.m16n8k16.row.col.f32.KIND.KIND.f32 {%r10,%r11,%r12,%r13}, {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%r6,%r7,%r8,%r9};
ret;
}"""


def place_of(operand: str, lane: int, i: int) -> tuple[int, int]:
    """Row and column of element i that a lane has, as the PTX ISA says of mma.m16n8k16 with .f16 or .bf16."""
    group, thread = lane >> 2, lane % 4
    if operand == "a":
        return group + 8 * (i % 4 >= 2), 2 * thread + (i & 1) + 8 * (i >= 4)
    if operand == "b":
        return 2 * thread + (i & 1) + 8 * (i >= 2), group
    return group + 8 * (i >= 2), 2 * thread + (i & 1)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", ml_dtypes.bfloat16), ("f16", np.float16)])
def test_a_product_of_the_matrix_unit(kind, dtype):
    """Four warps, each with matrices of its own, against numpy's product."""
    rng = np.random.default_rng(2)
    shapes = {"a": ((16, 16), 8), "b": ((16, 8), 4), "c": ((16, 8), 4)}
    whole = {n: rng.standard_normal((4, *shape)).astype(np.float32 if n == "c" else dtype) for n, (shape, _) in shapes.items()}
    machine = Machine(PRODUCT.replace("KIND", kind), [], 1)
    register = 0
    for n, (_, count) in shapes.items():
        every = [[whole[n][t // LANES][place_of(n, t % LANES, i)] for i in range(count)] for t in range(THREADS)]
        for held in np.array(every, whole[n].dtype).view(np.uint32).T:
            machine.registers[f"%r{register}"] = held.copy()
            register += 1
    machine.run()
    wanted = whole["a"].astype(np.float64) @ whole["b"].astype(np.float64) + whole["c"]
    for t in range(THREADS):
        for i in range(4):
            got = machine.registers[f"%r{10 + i}"].view(np.float32)[t]
            np.testing.assert_allclose(got, wanted[t // LANES][place_of("c", t % LANES, i)], rtol=1e-6, atol=1e-6)


def test_a_product_takes_whole_warps():
    machine = Machine(PRODUCT.replace("KIND", "bf16").replace("mma.sync", "@%p0 mma.sync"), [], 1)
    machine.registers["%p0"] = np.arange(THREADS) != 5
    with pytest.raises(AssertionError, match="without some lanes"):
        machine.run()
