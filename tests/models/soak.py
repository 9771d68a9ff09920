"""Many sequences of random lengths through one engine: each gets the tokens it gets alone, memory stays flat, nothing compiles.

    python -m tests.models.soak --sequences 2000

The model is tiny and random; test_soak.py runs a few dozen sequences.
"""

import argparse
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from moekit.models.qwen3next import Engine, Model, generate, load, write_random_checkpoint
from tests.models.micro import MICRO

WIDER = replace(MICRO, vocab_size=101, hidden_size=32, head_dim=16, rotary_dim=8, linear_key_head_dim=8, num_experts=4)
PROMPT, NEW, LENGTH = 32, 16, 64  # tokens at most, so that `generate` has two sizes of prompts and one of caches
COMPILED = "/jax/core/compile/backend_compile_duration"

compiled: list[str] = []  # an entry for each program that jax has compiled since this was imported
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name) if name == COMPILED else None)


@dataclass(frozen=True)
class Case:
    """A sequence to come: its prompt, the most tokens it may make, and those that end it."""

    prompt: list[int]
    most: int
    ends: list[int]


@dataclass(frozen=True)
class Soaked:
    """What a soak comes to. wrong: sequences whose tokens are not those they get alone. compiled: programs, after warm-up.

    held: bytes of all arrays on the devices, at the start and at the end. resident: of the process, at each tenth.
    """

    sequences: int
    tokens: int
    steps: int
    seconds: float
    wrong: list[int]
    compiled: int
    held: tuple[int, int]
    resident: list[int]


def model_of(directory: Path) -> Model:
    """A tiny random model on one device."""
    write_random_checkpoint(directory, WIDER, seed=3)
    return load(directory, Mesh(np.array(jax.devices("cpu")[:1]), ("tp",)))


def cases(count: int, seed: int = 0) -> list[Case]:
    """Random prompts and lengths; a token in four ends every second one."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        prompt = rng.integers(0, WIDER.vocab_size, rng.integers(1, PROMPT + 1)).tolist()
        ends = rng.choice(WIDER.vocab_size, WIDER.vocab_size // 4, replace=False).tolist() if i % 2 else []
        found.append(Case(prompt, int(rng.integers(1, NEW + 1)), ends))
    return found


def alone(model: Model, case: Case) -> tuple[int, ...]:
    """The tokens that a sequence gets by itself."""
    made = generate(model, [case.prompt], max_new_tokens=NEW, eos=case.ends, kernels="xla")
    return made.tokens[0][: case.most]


def soak(model: Model, given: list[Case], slots: int = 16) -> Soaked:
    """All cases through an engine of so many slots, a few added between two steps, as many at most as can wait."""
    wanted = [alone(model, case) for case in given]
    rng = np.random.default_rng(1)
    engine = Engine(model, slots=slots, length=LENGTH, piece=16, waiting=2 * slots, kernels="xla")
    engine.warmup()
    before, held = len(compiled), device_bytes()
    made: dict[int, list[int]] = {}
    numbers, resident, ended, steps = [], [], 0, 0
    start = time.perf_counter()
    while engine.busy or len(numbers) < len(given):
        some = min(int(rng.integers(0, 4)), len(given) - len(numbers), 3 * slots - (len(numbers) - ended))
        for case in given[len(numbers) : len(numbers) + some]:
            numbers.append(engine.add(case.prompt, max_new_tokens=case.most, eos=case.ends))
        steps += 1
        for token in engine.step():
            made.setdefault(token.sequence, []).append(token.token)
            ended += token.end is not None
        while len(resident) <= 10 * ended // len(given):
            resident.append(resident_bytes())
    seconds = time.perf_counter() - start
    wrong = [i for i, (number, tokens) in enumerate(zip(numbers, wanted, strict=True)) if tuple(made[number]) != tokens]
    total = sum(map(len, wanted))
    return Soaked(len(given), total, steps, seconds, wrong, len(compiled) - before, (held, device_bytes()), resident)


def device_bytes() -> int:
    """What all arrays of jax hold."""
    return sum(array.nbytes for array in jax.live_arrays())


def resident_bytes() -> int:
    """What this process has of the machine's memory, on Linux."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Soak and say what came of it; the exit code is 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=2000)
    parser.add_argument("--slots", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = soak(model_of(Path(scratch) / "model"), cases(args.sequences), args.slots)
    print(f"{found.sequences} sequences, {found.tokens} tokens, {found.steps} steps, {found.seconds:.1f} s")
    print(f"with other tokens than alone: {len(found.wrong)} {found.wrong[:10]}")
    print(f"programs compiled after warm-up: {found.compiled}")
    print(f"bytes of arrays at the start and at the end: {found.held[0]}, {found.held[1]}")
    print("MiB of the process at each tenth:", *(f"{size / 2**20:.1f}" for size in found.resident))
    raise SystemExit(bool(found.wrong or found.compiled or found.held[1] > found.held[0]))


if __name__ == "__main__":
    main()
