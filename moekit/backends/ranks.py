"""Every rank's part of a value over a mesh axis, as array evaluation gets it: an all-gather of each array library.

`parts(name, x, over, ranks)` is a list of arrays in the order of ranks, which array evaluation adds up in that order; `name` is
the fusion's, for errors. A sum that the library makes itself, in an order of its own, is a list of one.
"""

from __future__ import annotations

from typing import Any

from moekit.errors import ShapeError, UnavailableError


def numpy_parts(name: str, x: Any, over: str, ranks: int) -> list[Any]:
    """numpy has one rank: all are played by `array.evaluate_ranks`."""
    raise UnavailableError(f"{name}: one process of numpy is one rank of {ranks} over {over}; use evaluate_ranks")


def jax_parts(name: str, x: Any, over: str, ranks: int) -> list[Any]:
    """`lax.all_gather`; the sum then counts as varying over the axis, though it is the same on all ranks."""
    from jax import lax

    _jax_ranks(name, over, ranks)
    gathered = lax.all_gather(x, over)
    return [gathered[rank] for rank in range(ranks)]


def jax_sum(name: str, x: Any, over: str, ranks: int) -> list[Any]:
    """`lax.psum` in float32, in whatever order the backend has: held to the error bound alone."""
    import jax.numpy as jnp
    from jax import lax

    _jax_ranks(name, over, ranks)
    return [lax.psum(x.astype(jnp.float32), over)]


def _jax_ranks(name: str, over: str, ranks: int) -> None:
    from jax import lax

    try:
        found = lax.axis_size(over)
    except NameError:
        raise UnavailableError(f"{name}: there is no mesh axis {over!r} here; call it inside jax.shard_map over it") from None
    if found != ranks:
        raise ShapeError(f"{name}: mesh axis {over!r} has {found} ranks, the call says {over}={ranks}; pass {over}={found}")


def torch_parts(name: str, x: Any, over: str, ranks: int) -> list[Any]:
    """`torch.distributed.all_gather` over the default group; it has no derivative, so none is asked of it."""
    import torch
    from torch import distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise UnavailableError(f"{name}: {over}={ranks}, but no process group; call torch.distributed.init_process_group")
    if (found := dist.get_world_size()) != ranks:
        raise ShapeError(f"{name}: the process group has {found} ranks, the call says {over}={ranks}; pass {over}={found}")
    if torch.is_grad_enabled() and x.requires_grad:
        raise UnavailableError(f"{name}: an all-reduce over {over} has no gradient in PyTorch; call it under torch.no_grad()")
    mine = x.detach().contiguous()
    parts = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(parts, mine)
    return parts
