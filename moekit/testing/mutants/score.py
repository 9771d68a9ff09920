"""Applying mutants to a copy of the package, and running what may kill them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moekit
from moekit.errors import FileError, MoekitError, UnavailableError
from moekit.files import write_text
from moekit.testing.mutants.killer import ARRAYS, STAGES
from moekit.testing.mutants.table import Mutant

SECONDS = 90.0  # for one stage of one mutant
ARRAY_FILES = ("backends/array.py", "backends/libraries.py", "backends/torch_product.py")
SEEN = (  # the file (or several), the folder (none: ""), and the stages in which a change of them alone can be seen
    ("backends/triton.py", "", ("triton-interpreter",)),
    ("backends/pallas.py", "", ("pallas",)),
    ("backends/printer.py", "", STAGES[1:]),
    (ARRAY_FILES, "", ARRAYS),
    ("torch/overlap.py", "", ("eager", "triton-interpreter")),
    ("backends/triton.py", "torch/", ("triton-interpreter", "eager")),
    ("backends/pallas.py", "jax/", ("pallas", "xla")),
)
UTF8: Any = {"encoding": "utf-8", "errors": "replace"}  # of what other programs say, whatever the locale
UNCHANGED = "unchanged"
PACKAGE = Path(moekit.__file__).parent
ONE_THREAD = "--xla_force_host_platform_device_count=1 --xla_cpu_multi_thread_eigen=false"


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: killed or not, at which stage, after how many cases, by what."""

    name: str
    file: str
    about: str
    killed: bool
    stage: str
    cases: int
    seconds: float
    by: str


def stages_of(files: Iterable[str]) -> tuple[str, ...]:
    """The stages in which a change of these files can be seen."""
    files = list(files)
    for ends, folder, seen in SEEN:
        if all(f.endswith(ends) or (folder and f"/{folder}" in f"/{f}") for f in files):
            return seen
    return (*STAGES, *ARRAYS) if any(f.endswith(ARRAY_FILES) for f in files) else STAGES


def copy_package(folder: Path) -> Path:
    """A copy of the package in `folder`."""
    target = folder / "moekit"
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def mutate(mutant: Mutant, package: Path) -> None:
    """Apply a mutant to a copy of the package; raises MoekitError where its text is not there any more."""
    path = package / mutant.file
    text = path.read_text(encoding="utf-8")
    for old, new in mutant.edits:
        if old not in text:
            raise MoekitError(
                f"mutant {mutant.name}: {mutant.file} has no {old.strip()[:60]!r} any more; write the mutant anew"
            )
        text = text.replace(old, new)
    write_text(path, text)


def apply_patch(patch: Path, folder: Path) -> list[str]:
    """Apply a unified diff (paths as in the repository) to a copy in `folder`; the files it changes.

    Raises MoekitError if it does not apply, and UnavailableError where there is no `patch` to apply it.
    """
    try:
        text = patch.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{patch} cannot be read: {error}") from None
    program = shutil.which("patch")
    if program is None:
        raise UnavailableError("the program `patch`, which applies a diff, is not on the path; install it")
    files = [line.split("\t")[0].split()[1] for line in text.splitlines() if line.startswith("+++ ")]
    strip = "-p1" if files and files[0].startswith("b/") else "-p0"
    done = subprocess.run(
        [program, strip, "--no-backup-if-mismatch", "-d", str(folder)], input=text, capture_output=True, check=False, **UTF8
    )
    if done.returncode or not files:
        raise MoekitError(f"{patch}: it does not apply: {(done.stdout + done.stderr).strip()[:300] or 'it is no unified diff'}")
    return [f.removeprefix("b/").removeprefix("moekit/") for f in files]


def try_mutant(mutant: Mutant, seconds: float = SECONDS) -> Outcome:
    """Run the stages against a mutant until one kills it."""
    with tempfile.TemporaryDirectory(prefix="moekit-mutant-") as folder:
        mutate(mutant, copy_package(Path(folder)))
        return hunt(mutant.name, mutant.about, [mutant.file], Path(folder), seconds)


def try_patch(patch: Path, seconds: float = SECONDS) -> Outcome:
    """Run the stages against a patch from outside."""
    with tempfile.TemporaryDirectory(prefix="moekit-mutant-") as folder:
        copy_package(Path(folder))
        files = apply_patch(patch, Path(folder))
        return hunt(patch.stem, f"patch {patch.name}", files, Path(folder), seconds)


def try_unchanged(seconds: float = SECONDS) -> Outcome:
    """Run all stages against the package as it is: unless it survives, the kills of others mean nothing."""
    with tempfile.TemporaryDirectory(prefix="moekit-mutant-") as folder:
        copy_package(Path(folder))
        return hunt(
            UNCHANGED, "nothing: the package as it is", ["compile/passes/nest.py", "backends/array.py"], Path(folder), seconds
        )


def hunt(name: str, about: str, files: list[str], folder: Path, seconds: float) -> Outcome:
    """Run every stage that can see the files, each in a process of its own with `folder` first on its path."""
    begin, cases = time.monotonic(), 0
    for stage in stages_of(files):
        found = run_stage(stage, folder, seconds)
        cases += found["ran"]
        if found["killed"]:
            return Outcome(name, ", ".join(files), about, True, stage, cases, time.monotonic() - begin, found["by"])
    return Outcome(name, ", ".join(files), about, False, "", cases, time.monotonic() - begin, "")


def run_stage(stage: str, folder: Path, seconds: float) -> dict:
    """One stage in a process: its JSON line; a process that dies or hangs has killed the mutant."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu",
                   "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "XLA_FLAGS": ONE_THREAD}  # fmt: skip
    environment.pop("TRITON_INTERPRET", None)
    if stage == "triton-interpreter":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "moekit.testing.mutants.killer", stage, str(seconds)]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, timeout=seconds + 120, check=False, **UTF8
        )
    except subprocess.TimeoutExpired:
        return {"killed": True, "ran": 0, "by": "it did not end"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"killed": True, "ran": 0, "by": f"its process died with exit code {done.returncode}: {last}"[:200]}
    return json.loads(lines[-1])


def score_all(
    mutants: Iterable[Mutant | Path | None],
    seconds: float = SECONDS,
    watch: Callable[[Outcome], None] = lambda outcome: None,
    workers: int = 1,
) -> list[Outcome]:
    """Try mutants, patches and (None) the package as it is, `workers` at a time; `watch` is told of each as it ends.

    The outcomes come in the order given.
    """

    def tried(mutant: Mutant | Path | None) -> Outcome:
        if mutant is None:
            return try_unchanged(seconds)
        return try_patch(mutant, seconds) if isinstance(mutant, Path) else try_mutant(mutant, seconds)

    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(tried, m) for m in mutants]
        try:
            for done in as_completed(running):
                watch(done.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [r.result() for r in running]


def markdown(outcomes: Iterable[Mapping]) -> str:
    """The table of a run, from its JSON, as docs/fuzzing.md has it."""
    rows = ["| mutant | file | killed by | cases | what it does |", "|---|---|---|---|---|"]
    for o in outcomes:
        killer = o["stage"] if o["killed"] else "**survived**"
        rows.append(f"| {o['name']} | {o['file']} | {killer} | {o['cases']:,} | {o['about']} |")
    return "\n".join(rows)
