"""One shared-expert block captured in a CUDA graph and replayed, with every output in memory of its own choice.

    python examples/cuda_graph.py

Nothing but outputs is allocated, nothing synchronises and nothing depends on the contents of a tensor, so a call can be
captured as it is. Without a GPU the block runs once, uncaptured.
"""

import torch

from moekit.torch import add_rms_norm_, gate_gemm, pack_gate, shared_expert_combine_, silu_and_mul, topk_softmax

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
tokens, hidden, inner, experts = 16, 256, 128, 64


def weight(*shape: int) -> torch.Tensor:
    """A random weight of a sensible size."""
    return torch.randn(*shape, device=device) * shape[-1] ** -0.5


norm, down = weight(hidden), weight(hidden, inner)
packed = pack_gate(weight(2 * inner, hidden), weight(experts, hidden), weight(1, hidden))
x, residual, routed = (torch.zeros(tokens, hidden, device=device) for _ in range(3))


def block():
    """Norm, one GEMM for three gates, router and activation on views of it, down projection, combine."""
    normed, _ = add_rms_norm_(x, residual, norm)
    gate = gate_gemm(normed, packed)
    weights, ids = topk_softmax(gate.router_logits, 8)
    shared = silu_and_mul(gate.gate_up) @ down.T
    return shared_expert_combine_(routed, shared, gate.shared_gate), weights, ids


def fill(seed: int) -> None:
    """New contents for the block's inputs, in the same memory."""
    generator = torch.Generator(device).manual_seed(seed)
    for tensor in (x, residual, routed):
        tensor.normal_(generator=generator)


fill(0)
wanted = [t.clone() for t in block()]  # also compiles: capture finds the kernels ready

if device == "cuda":
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = block()
    fill(0)
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(got, expected)
    print(f"captured and replayed: {len(outputs)} outputs as before")
else:
    print(f"no GPU here: ran once, outputs of shapes {[tuple(t.shape) for t in wanted]}")
