"""Strided slices of one fused GEMM, read and written in place: no tensor is ever made contiguous.

    python examples/strided_slices.py

A fused projection leaves [gate | up | router logits | shared gate] in one tensor. Its parts are views with the row stride of
the whole; fusions read them where they are, and write into slices of other buffers.
"""

import torch

from moekit.errors import AliasError
from moekit.torch import silu_and_mul, topk_softmax

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
tokens, inner, experts = 5, 96, 40
fused = torch.randn(tokens, 2 * inner + experts + 8, device=device)
gate_up, logits = fused[:, : 2 * inner], fused[:, 2 * inner : 2 * inner + experts]
print(f"gate_up has strides {gate_up.stride()}, logits {logits.stride()}")

# Outputs may be slices as well: the left half of a buffer, the right half stays as it is.
buffer = torch.full((tokens, 2 * inner), -1.0, device=device)
silu_and_mul(gate_up, out=buffer[:, :inner])
torch.testing.assert_close(buffer[:, :inner], torch.nn.functional.silu(gate_up[:, :inner]) * gate_up[:, inner:])
assert (buffer[:, inner:] == -1).all()

weights, ids = topk_softmax(logits, 4)
torch.testing.assert_close(weights.sum(-1), torch.ones(tokens, device=device))

# Column halves of one buffer may be operand and output, even the unused columns of the fused tensor itself …
wide = torch.randn(tokens, 3 * inner, device=device)
expected = silu_and_mul(wide[:, : 2 * inner])
silu_and_mul(wide[:, : 2 * inner], out=wide[:, 2 * inner :])
torch.testing.assert_close(wide[:, 2 * inner :], expected)

# … but an output that shares elements with an operand is refused, before anything is written.
try:
    silu_and_mul(gate_up, out=fused[:, inner : 2 * inner])
except AliasError as error:
    print(f"refused: {error}")

# Transposed operands too: a column-major tensor costs no copy.
torch.testing.assert_close(silu_and_mul(gate_up.T.contiguous().T), silu_and_mul(gate_up))
print("strided slices: all as they should be")
