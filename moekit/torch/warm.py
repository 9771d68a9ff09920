"""Compiling before the first request: `warmup` calls fusions once on zeros, so that nobody waits for a compiler later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moekit.errors import MoekitError
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example
from moekit.lang.fusion import Binding, Fusion
from moekit.torch.call import device_name
from moekit.torch.face import op
from moekit.tune.table import buckets, scheduled


@dataclass(frozen=True)
class Warmed:
    """One form that was called: seconds of the first call (compiling, or reading Triton's cache) and of the next.

    Where there are several classes of rows, `first` is that of all together, `next` that of the fewest rows.
    """

    fusion: str
    in_place: bool
    sizes: tuple[tuple[str, int], ...]
    first: float
    next: float


def warmup(
    fusions: Iterable[str | Fusion] | None = None,
    sizes: Mapping[str, int] | Sequence[Mapping[str, int]] | None = None,
    *,
    dtype: str = "bfloat16",
    params: Mapping[str, object] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Warmed, ...]:
    """Compile the kernels of `fusions` (names or declarations; moekit's own if None) for contiguous tensors, in every form.

    `sizes`: sizes of axes by name, or several such mappings (Qwen3-Next's where nothing is said; axes a fusion does not have
    are passed over). A fusion is called once for each class of rows that has a schedule of its own (`row_classes` of
    moekit.compile.rules), unless T is given: then for that alone. `params`: parameters by name, passed to the fusions that
    have them. `device`: the current CUDA device, or the CPU where there is none. Compiled kernels stay in Triton's own cache.
    Raises MoekitError for a fusion that is not there.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    every = [sizes or {}] if isinstance(sizes, Mapping) or sizes is None else list(sizes)
    chosen = [_fusion(f) for f in (FUSIONS.values() if fusions is None else fusions)]
    return tuple(
        _warmed(f, in_place, each, dtype, params or {}, device)
        for f in chosen
        for each in every
        for in_place in (False, True)
        if not in_place or any(s.role == "InOut" for s in f.tensors.values())
    )


def _fusion(wanted: str | Fusion) -> Fusion:
    if isinstance(wanted, Fusion):
        return wanted
    declared = getattr(wanted, "fusion", None) or FUSIONS.get(wanted)
    if declared is None:
        raise MoekitError(f"warmup: there is no fusion {wanted!r}; there are {', '.join(FUSIONS)}")
    return declared


def _warmed(fusion: Fusion, in_place: bool, sizes: Mapping[str, int], dtype: str, params: Mapping, device) -> Warmed:
    axes = {a for s in fusion.tensors.values() for d in s.dims for _, a in d.terms}
    sizes = {a: n for a, n in sizes.items() if a.removesuffix("?") in axes}
    given = {n: v for n, v in params.items() if n in fusion.params}
    binding = example(fusion, sizes, dtype, given)
    call, firsts, nexts = op(fusion, in_place), [], []
    for rows in _classes(fusion, binding, sizes, device):
        tensors = _zeros(fusion, example(fusion, {**sizes, **rows}, dtype, given), device)
        firsts.append(_seconds(call, tensors, binding, device))
        nexts.append(_seconds(call, tensors, binding, device))
    return Warmed(fusion.name, in_place, tuple(sizes.items()), sum(firsts), nexts[0])


def _classes(fusion: Fusion, binding: Binding, sizes: Mapping[str, int], device: torch.device) -> list[dict[str, int]]:
    """A size of the dynamic axes for each class of rows that has kernels of its own; nothing where there is one."""
    free = [a for a in fusion.dynamic if a not in sizes and a not in fusion.axes]
    graph, found = fusion.trace(binding), {}
    for least in buckets(graph):
        rows = dict.fromkeys(free, least)
        found.setdefault(scheduled(device_name(device), graph, dict(binding.sizes) | rows), rows)
    return list(found.values()) if len(found) > 1 else [{}]


def _seconds(call: Callable, tensors: Sequence[torch.Tensor], binding: Binding, device: torch.device) -> float:
    begin = time.perf_counter()
    with torch.no_grad():
        call(*tensors, **dict(binding.params))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _zeros(fusion: Fusion, binding: Binding, device: torch.device) -> list[torch.Tensor]:
    extents, dtypes, ones = dict(binding.sizes), dict(binding.dtypes), dict(binding.ones)
    return [
        torch.zeros(
            [1 if i in ones[n] else extents[d.text] for i, d in enumerate(s.dims)],
            dtype=getattr(torch, dtypes[n]),
            device=device,
        )
        for n, s in fusion.tensors.items()
    ]
