"""Products of float32 stay IEEE float32 where the caller lets torch round their operands."""

import pytest

torch = pytest.importorskip("torch")
from moekit.torch import gate_gemm  # noqa: E402


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_eager_products_are_ieee(precision):
    """`set_float32_matmul_precision` changes torch's products and not ours, and is as it was afterwards."""
    x, w = torch.randn(16, 512), torch.randn(24, 512)
    wanted = gate_gemm(x, w)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        got = gate_gemm(x, w)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got, wanted)
