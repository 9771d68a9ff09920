"""FlashInfer's attention of one new token, for bench/attention.py: a maker per side takes a call's tensors and its length.

FlashInfer has caches in pages, so a maker copies the cache into pages of its own, in their order; what a server does once a
step for all layers (its plan, page tables) is in the maker, too. Lengths are then fixed, as they are for torch.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from moekit.testing import others

WORKSPACE = 256 * 2**20  # bytes; XQA's counters are among them, and must begin as zeros


@functools.lru_cache(maxsize=4)
def _workspace(side: str, device: torch.device) -> torch.Tensor:
    """One for each side: what one writes would be another's counters."""
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


def _pages(cache: torch.Tensor, length: int, page: int) -> torch.Tensor:
    """The first `length` tokens of [T, heads, room, D] as pages [T·pages, heads, page, D]."""
    batch, heads, _, depth = cache.shape
    count = -(-length // page)
    pages = cache.new_zeros(batch, count, heads, page, depth)
    whole = torch.nn.functional.pad(cache[:, :, :length], (0, 0, 0, count * page - length))
    pages.copy_(whole.view(batch, heads, count, page, depth).transpose(1, 2))
    return pages.flatten(0, 1)


@functools.lru_cache(maxsize=2)
def _planned(tensor_cores: bool, shape: torch.Size, heads: int, length: int, page: int, dtype: torch.dtype, device: Any) -> Any:
    """A wrapper planned for caches of one size, which all layers of a step share."""
    batch, count = shape[0], -(-length // page)
    decode = others.module("flashinfer.decode").BatchDecodeWithPagedKVCacheWrapper
    wrapper = decode(_workspace(f"wrapper {tensor_cores}", device), "HND", use_tensor_cores=tensor_cores)
    first = torch.arange(batch + 1, dtype=torch.int32) * count
    numbers = torch.arange(batch * count, dtype=torch.int32, device=device)
    last = torch.full((batch,), length - (count - 1) * page, dtype=torch.int32)
    kinds = {"q_data_type": dtype, "kv_data_type": dtype}
    wrapper.plan(first, numbers, last, heads * shape[2], heads, shape[3], page, sm_scale=shape[3] ** -0.5, **kinds)
    return wrapper


def batch_decode(tensor_cores: bool, page: int = 16) -> Callable[[Any, int], Callable[[], torch.Tensor]]:
    """`BatchDecodeWithPagedKVCacheWrapper`, on tensor cores (its FA2 kernel of prompts) or without."""

    def make(c: Any, length: int) -> Callable[[], torch.Tensor]:
        q, heads = c.q.flatten(1, 2), c.keys.shape[1]
        wrapper = _planned(tensor_cores, c.q.shape, heads, length, page, q.dtype, q.device)
        cache, out = tuple(_pages(x, length, page) for x in (c.keys, c.values)), torch.empty_like(q)
        return lambda: wrapper.run(q, cache, out=out).view(c.q.shape)

    return make


def xqa(c: Any, length: int, page: int = 64) -> Callable[[], torch.Tensor]:
    """`trtllm_batch_decode_with_kv_cache` with its XQA kernels, which are TensorRT-LLM's for this GPU."""
    decode, (batch, _, _, depth) = others.module("flashinfer.decode"), c.q.shape
    q, cache = c.q.flatten(1, 2), tuple(_pages(x, length, page) for x in (c.keys, c.values))
    count, out = -(-length // page), torch.empty_like(q)
    tables = torch.arange(batch * count, dtype=torch.int32, device=q.device).view(batch, count)
    given = (_workspace("xqa", q.device), tables, c.lengths, length, depth**-0.5)
    call = functools.partial(decode.trtllm_batch_decode_with_kv_cache, q, cache, *given, out=out, backend="xqa")
    return lambda: call().view(c.q.shape)


SIDES = {"flashinfer": batch_decode(True), "flashinfer, no tensor cores": batch_decode(False), "flashinfer xqa": xqa}
