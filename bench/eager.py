"""The fusions in plain PyTorch, as Hugging Face writes them: the unfused side, and what torch.compile is given."""

from collections.abc import Callable

import torch
from torch.nn.functional import linear, rms_norm, sigmoid, silu, softplus


def compiled(function: Callable, **options) -> Callable:
    """`torch.compile` of a function, anew for every size; past dynamo's limit on that it would silently run eagerly."""
    config = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = 10_000
    config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False, **options)


def add_rms_norm(x, residual, weight):
    """out, residual."""
    total = x + residual
    t = total.float()
    return (t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + weight.float())).to(x.dtype), total


def silu_and_mul(gate_up):
    """silu(gate)·up."""
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


def topk_softmax(logits, k):
    """weights, ids."""
    weights, ids = torch.topk(torch.softmax(logits.float(), -1), k)
    return weights / weights.sum(-1, keepdim=True), ids.int()


def shared_expert_combine(hidden, shared, gate):
    """hidden."""
    return hidden + sigmoid(gate) * shared


def gate_gemm(x, packed):
    """x · packedᵀ by cuBLAS."""
    return linear(x, packed)


def gate_projections(x, gate_up, router, shared_gate):
    """activation, router logits, sigmoid(shared gate): three products, as the model has them."""
    return silu_and_mul(linear(x, gate_up)), linear(x, router), sigmoid(linear(x, shared_gate))


def down_combine(hidden, activated, down, share):
    """hidden + share·(activated·downᵀ)."""
    return scaled_sum(hidden, linear(activated, down), share)


def scaled_sum(hidden, shared, share):
    """hidden + share·shared, where share is a sigmoid already."""
    return hidden + share.to(hidden.dtype) * shared


def gated_rms_norm(x, z, weight):
    """rms_norm(x)·weight·silu(z), rounded to x's dtype after the norm."""
    normal = rms_norm(x.float(), (x.shape[-1],), eps=1e-6).to(x.dtype)
    return (normal * weight.to(x.dtype) * silu(z.float())).to(x.dtype)


def delta_rule_step(q, k, v, a, b, A_log, dt_bias, state):
    """out, state."""
    group = v.shape[1] // q.shape[1]
    q, k = (t.float() * torch.rsqrt(t.float().pow(2).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    q, k = (t.repeat_interleave(group, 1) for t in (q * q.shape[-1] ** -0.5, k))
    state = state * torch.exp(-A_log.exp() * softplus(a.float() + dt_bias))[..., None, None]
    delta = (v.float() - (k[..., None] * state).sum(-2)) * sigmoid(b.float())[..., None]
    state = state + k[..., None] * delta[..., None, :]
    return (q[..., None] * state).sum(-2).to(v.dtype), state
