"""Applying mutants to a copy of the package, and running what may kill them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moekit
from moekit.errors import FileError, MoekitError, UnavailableError
from moekit.files import write_text
from moekit.testing.mutants.killer import ARRAYS, STAGES
from moekit.testing.mutants.table import Mutant

SECONDS = 90.0  # of the processor, for one stage of one mutant
PATIENCE = 6  # times as many seconds until a stage is taken to hang
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


@contextlib.contextmanager
def planted(*changes: Mutant | Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder with a copy of the package in which mutants and patches are applied, and the files that they change.

    Raises MoekitError for a change that does not apply.
    """
    with tempfile.TemporaryDirectory(prefix="moekit-planted-") as name:
        folder, files = Path(name), []
        shutil.copytree(PACKAGE, folder / "moekit", ignore=shutil.ignore_patterns("__pycache__"))
        for change in changes:
            if isinstance(change, Mutant):
                mutate(change, folder / "moekit")
            files += [change.file] if isinstance(change, Mutant) else apply_patch(change, folder)
        yield folder, files


@contextlib.contextmanager
def workers_have(*changes: Mutant | Path) -> Iterator[None]:
    """While this lasts, processes that are started find the package with these changes; this one keeps the one that it has."""
    with planted(*changes) as (folder, _):
        sys.path.insert(0, str(folder))
        try:
            yield
        finally:
            sys.path.remove(str(folder))


def hunt(change: Mutant | Path | None, seconds: float = SECONDS) -> Outcome:
    """Run the stages against a mutant, a patch from outside or (None) the package as it is, until one kills it.

    Unless the package as it is survives, the kills of others mean nothing. Every stage that can see the files that are changed
    has a process of its own.
    """
    begin, cases = time.monotonic(), 0
    name, about = UNCHANGED, "nothing: the package as it is"
    if isinstance(change, Mutant):
        name, about = change.name, change.about
    elif change is not None:
        name, about = change.stem, f"patch {change.name}"
    with planted(*([] if change is None else [change])) as (folder, files):
        files = files or ["compile/passes/nest.py", "backends/array.py"]
        for stage in stages_of(files):
            found = run_stage(stage, folder, seconds)
            cases += found["ran"]
            if found["killed"]:
                break
    killed = found["killed"]
    spent = time.monotonic() - begin
    return Outcome(name, ", ".join(files), about, killed, stage if killed else "", cases, spent, found["by"])


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
            command, cwd=folder, env=environment, capture_output=True, timeout=PATIENCE * seconds + 120, check=False, **UTF8
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
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(hunt, m, seconds) for m in mutants]
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
