"""How long JAX programs take on the device, as XLA's profiler has it: every kernel's begin and end by the device's own clock.

A host's clock sees the host: it takes 0.5 ms to dispatch 48 layers, and where a buffer moved, a command buffer's kernels are
set up anew. Slopes between two lengths of chain, by that clock, came out between -3 and 28 µs for a kernel that takes 1.2. Here
the device is busy with something else until a call is dispatched, and of the call only its kernels count: from the begin of the
first to the end of the last, gaps included. Repeated, that agrees within 1 % (24 layers, an H200).
"""

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

FLUSHED = 2**26  # float32 numbers: 256 MiB, more than the L2 holds
Program = jax.stages.Compiled | Exception  # or what kept it from being compiled
SWEEPS = 48  # over them between two calls: 3 ms


@dataclass(frozen=True, order=True)
class Event:
    """What ran on the device: begin and end in µs, its name, and the jitted function it is of."""

    begin: float
    end: float
    name: str
    module: str


def between_calls(filler: jax.Array) -> jax.Array:
    """Read the filler many times over: the host gets ahead of the device, and the L2 is full of something else."""
    return lax.fori_loop(0, SWEEPS, lambda _, scale: jnp.mean(filler * scale), jnp.float32(1))


def compiled[K: Hashable](
    lowered: Mapping[K, Callable[[], jax.stages.Lowered]], at_once: int | None = None
) -> dict[K, Program]:
    """Compile programs, several at once.

    XLA has the device to itself while it tunes a product, but where several programs of one process are tuned at once, it warns
    that its measurements are less accurate. It remembers what it found: what is tuned should be compiled one at a time first.
    """

    def one(lower: Callable[[], jax.stages.Lowered]) -> Program:
        try:
            return lower().compile()
        except Exception as error:
            return error

    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip(lowered, pool.map(one, lowered.values()), strict=True))


def made(program: Program) -> jax.stages.Compiled:
    """One of the programs that `compiled` gives; raises what kept it from being compiled."""
    if isinstance(program, Exception):
        raise program
    return program


def timed(programs: Mapping[str, Callable[[], object]], links: int, rounds: int) -> dict[str, dict]:
    """µs per link of each program, a chain of so many links: all in turn, `rounds` times over, after two calls of each.

    `us` and `spread` (interquartile range over rounds), and `kernels`, what each of them takes in a link. Where there is no
    GPU, one call by the host's clock stands for that. Raises RuntimeError if the profiler did not see every call.
    """
    if jax.default_backend() != "gpu":
        return {name: {"us": round(alone(call, 1) * 1e3 / links, 3)} for name, call in programs.items()}
    flush, filler = jax.jit(between_calls), jnp.ones(FLUSHED, jnp.float32)

    def flushed(name: str) -> None:
        jax.block_until_ready((flush(filler), programs[name]()))

    for name in [*programs] * 2:
        flushed(name)
    order = [name for _ in range(rounds) for name in programs]
    calls = apart(profiled(lambda: [flushed(name) for name in order]), between_calls.__name__)
    if len(calls) != len(order):
        raise RuntimeError(f"the profiler saw {len(calls)} of {len(order)} calls on a GPU; take fewer rounds")
    return {name: summary([c for n, c in zip(order, calls, strict=True) if n == name], links) for name in programs}


def alone(call: Callable[[], object], calls: int) -> float:
    """ms of a call that is awaited before the next, by the host's clock; the median."""
    found = []
    for _ in range(calls):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        found.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(found)


def profiled(run: Callable[[], object], device: int | None = None) -> list[Event]:
    """All that runs on the devices, or on one of them, while `run` is called; none where there is no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        return events(file, device)


def events(file: Path, device: int | None = None) -> list[Event]:
    """All that ran on the devices of a profile, or on one of them, in order."""
    found, named = [], "/device:GPU:" + ("" if device is None else f"{device}")
    profile = jax.profiler.ProfileData.from_file(str(file))  # what it hands out is gone with it
    for plane in profile.planes:
        for line in plane.lines if f"{plane.name} ".startswith(named if device is None else f"{named} ") else ():
            for e in line.events if line.name.startswith("Stream") else ():
                module = next((str(value) for key, value in e.stats if key == "hlo_module"), "")
                found.append(Event(e.start_ns / 1e3, (e.start_ns + e.duration_ns) / 1e3, e.name, module))
    return sorted(found)


def apart(found: Sequence[Event], between: str) -> list[list[Event]]:
    """The events of each call: those between two runs of the function named `between`."""
    calls: list[list[Event]] = []
    before = True
    for event in found:
        flushing = between in event.module
        if before and not flushing:
            calls.append([])
        if not flushing:
            calls[-1].append(event)
        before = flushing
    return calls


def summary(calls: Sequence[Sequence[Event]], links: int) -> dict:
    """What one program's calls come to."""
    spans = [(max(e.end for e in call) - call[0].begin) / links for call in calls]
    quarters = statistics.quantiles(spans, n=4)
    kernels = totals([event for call in calls for event in call], links * len(calls))
    return {
        "us": round(statistics.median(spans), 3),
        "spread": round(quarters[2] - quarters[0], 3),
        "kernels": {name: round(us, 3) for name, (_, us) in kernels.items()},
    }


def typical(found: Sequence[Event]) -> float:
    """µs of some kernels if each took the median of those called like it: the first of a chain over several devices, which
    waits for one that begins later, counts as any other."""
    kernels: dict[str, list[float]] = {}
    for event in found:
        kernels.setdefault(re.sub(r"[_.\d]+$", "", event.name), []).append(event.end - event.begin)
    return sum(statistics.median(times) * len(times) for times in kernels.values())


def totals(found: Sequence[Event], calls: int) -> dict[str, tuple[float, float]]:
    """By name, how many kernels a call has and µs of them all; the longest first."""
    kernels: dict[str, tuple[float, float]] = {}
    for event in found:
        name = re.sub(r"[_.\d]+$", "", event.name)  # XLA numbers its copies
        n, us = kernels.get(name, (0.0, 0.0))
        kernels[name] = n + 1 / calls, us + (event.end - event.begin) / calls
    return dict(sorted(kernels.items(), key=lambda item: -item[1][1]))
