"""A Triton kernel behind whole arrays: an entry that takes buffers and nothing else, for XLA, which passes no numbers.

The printer's kernel takes a pointer to each tensor, and strides. Its entry takes each array that the tensors lie in, those it
reads first and then those it writes, and calls the kernel with where they lie in them, which is known when it is compiled, but
for what is picked at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from moekit.backends import pallas, triton
from moekit.backends.printer import kernel_name
from moekit.compile import tile as t
from moekit.compile.tile.layouts import strided
from moekit.lang.dtypes import itemsize

Lying = Mapping[str, t.Viewed | t.Mailbox]


@dataclass(frozen=True)
class Entry:
    """What a launch compiles. `read`, `written`: the arrays it takes, in order; `dtypes`: of what each of them points to."""

    name: str
    source: str
    read: tuple[str, ...]
    written: tuple[str, ...]
    dtypes: tuple[str, ...]


def strides_of(lying: t.Viewed) -> tuple[int, ...]:
    """From element to element of a part of an array along each of its dimensions, in elements of the array."""
    return tuple(step * prod(lying.base[axis + 1 :]) for axis, step in zip(lying.axes, lying.steps, strict=True))


def begins(lying: t.Viewed) -> int:
    """The first element of a part of an array, of those that are known when it is compiled."""
    known = (*zip(lying.axes, lying.starts, strict=True), *lying.fixed)
    return sum(n * prod(lying.base[axis + 1 :]) for axis, n in known)


def picks(lying: t.Viewed) -> list[tuple[str, int]]:
    """What says at run time how much further it begins: arrays of one number, each with the elements from one to the next."""
    return [(picked, prod(lying.base[axis + 1 :])) for axis, picked in lying.picked]


def behind(lying: t.Viewed | t.Mailbox, shape: Sequence[int], dtype: str) -> t.Strided | t.Mailbox:
    """The layout of a tensor of `shape`, as the printer's kernel has it: behind a pointer."""
    if isinstance(lying, t.Mailbox):
        return lying
    return strided(shape, strides_of(lying), [None] * len(shape), (), itemsize(dtype))


def buffers(kernel: t.Kernel, lying: Lying) -> tuple[list[str], list[str]]:
    """The arrays a kernel reads and the arrays it writes, each once; one in both lists is updated in place."""
    return pallas.touched([replace(p, layout=lying[p.name]) for p in kernel.params])


def entry(kernel: t.Kernel, lying: Lying) -> Entry:
    """The source of a kernel and, behind it, of the entry that is called as the kernel is named."""
    read, written = buffers(kernel, lying)
    names = {b: f"{b}_ref" for b in read} | {b: f"{b}_out_ref" if b in read else f"{b}_ref" for b in written}
    taken = [f"{b}_ref" for b in read] + [names[b] for b in written]
    passed = [_passed(kernel, a, lying, names) for a in triton.arguments(kernel)]
    lines = ["", "@triton.jit", f"def {kernel.name}({', '.join(taken)}):", f"    {kernel_name(kernel)}("]
    lines += [*(f"        {text}," for text in passed), "        PDL=False,", "    )", ""]
    kinds = _dtypes(kernel, lying)
    source = triton.emit(kernel) + "\n".join(lines)
    return Entry(kernel.name, source, tuple(read), tuple(written), tuple(kinds[b] for b in (*read, *written)))


def _passed(kernel: t.Kernel, argument: triton.Argument, lying: Lying, names: Mapping[str, str]) -> str:
    """What the kernel gets for one of its arguments."""
    if argument.kind == "extent":
        raise TypeError(f"{kernel.name}: the extent of {argument.subject} is to be known when it is compiled")
    at = lying[argument.subject]
    if isinstance(at, t.Mailbox):
        return names[at.buffer]
    if argument.kind == "stride":
        return str(strides_of(at)[argument.dim] // argument.unit)
    start = begins(at)
    terms = [names[at.buffer], *([str(start)] if start else [])]
    return " + ".join([*terms, *(f"tl.load({names[picked]}).to(tl.int64) * {step}" for picked, step in picks(at))])


def _dtypes(kernel: t.Kernel, lying: Lying) -> dict[str, str]:
    """What every array is of: addresses are of 64 bits, in whatever array they come."""
    found: dict[str, str] = {}
    for p in kernel.params:
        at = lying[p.name]
        if isinstance(at, t.Mailbox):
            found[at.buffer] = "int64"
        else:
            found |= {at.buffer: p.dtype, **{picked: "int32" for _, picked in at.picked}}
    return found
