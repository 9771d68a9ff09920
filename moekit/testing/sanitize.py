"""compute-sanitizer over one pass of every kernel: `python -m moekit.testing.sanitize`, or `make sanitize`.

Each tool (memcheck: accesses out of bounds or misaligned; racecheck: races in shared memory) first runs kernels with planted
faults, which it must find, and then `moekit.testing.gpu_pass` in several processes, which must be clean and whose kernels must
all have run. Exit codes: 0 clean, 1 findings, 2 a place that cannot be written, 3 no GPU or no compute-sanitizer here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from moekit.cli import platform
from moekit.files import check_writable, read_json, write_text
from moekit.fusions import FUSIONS
from moekit.testing.gpu_pass import SLOWEST, cases, cell, mark
from moekit.testing.probes import PROBES

GRACE = 60  # seconds for the case that a process is at when its time is over
FOUND = 99  # the exit code by which the sanitizer says that it found something
TOOLS = {
    "memcheck": ("--report-api-errors", "no", "--padding", "512"),
    "racecheck": (),
}
SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")
HAZARD = re.compile(r"between Write access at (\S+) in <moekit triton ([^>]+)>\S*\s+=*\s*and Write access at \1 in")
REPLICATED = ("Triton hands a sum, of which every lane that has it has the same bits, to another layout through shared memory; "
              "all write it (`st.shared.v4` without a predicate), and racecheck compares no values of 16 bytes")  # fmt: skip
# A kernel as it is printed, and why its writes from one instruction to one place are no race; another text is judged anew.
EXPLAINED = {"expert_down b48eadc8ec06 b0807f8d": REPLICATED, "expert_down_shared 3deef253b54b 7df976d5": REPLICATED}
ENVIRONMENT = {
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # one allocation per tensor
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer=",
    "PYTHONWARNINGS": "ignore",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # what one tool compiled the next one loads
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@dataclass(frozen=True)
class Part:
    """Every `of`-th case from the `number`-th on, of some fusions and probes."""

    number: int = 1
    of: int = 1
    names: tuple[str, ...] = (*FUSIONS, *PROBES)

    @classmethod
    def parse(cls, text: str) -> Part:
        """`2/3`, say; raises ArgumentTypeError for what is none."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise argparse.ArgumentTypeError(f"{text} is no part; give I/N with I from 1 to N, such as 2/3")
        return cls(int(found[1]), int(found[2]))


def known(name: str) -> str:
    """The name of a fusion or probe; raises ArgumentTypeError for another."""
    if name not in Part.names:
        raise argparse.ArgumentTypeError(f"{name} is no fusion or probe; `moekit list` has the fusions")
    return name


@dataclass
class Verdict:
    """What came of one tool: cases that ran under it and that are left, kernels that ran, and one sentence per finding."""

    tool: str
    cases: int = 0
    left: int = 0
    kernels: int = 0
    seconds: float = 0.0
    doors: dict[str, int] = field(default_factory=dict)
    cells: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    explained: dict[str, int] = field(default_factory=dict)
    slow: list[tuple[float, str]] = field(default_factory=list)


def find_sanitizer() -> str | None:
    """Where compute-sanitizer is: on the path, or in a CUDA toolkit."""
    homes = [f"{home}/bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *homes]))


def text_of(path: Path) -> str:
    """What a file says; nothing where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def found(log: str) -> int | None:
    """How many errors or hazards a log sums up; None if it ends without a summary."""
    sums = [int(a or b) for a, b in SUMMARY.findall(log)]
    return sum(sums) if sums else None


def explained(log: str) -> Counter[str]:
    """The hazards of a log that are explained: how many of each kernel."""
    return Counter(kernel for _, kernel in HAZARD.findall(log) if kernel in EXPLAINED)


def run_pass(sanitizer: str, tool: str, arguments: list[str], base: Path, seconds: float) -> int | None:
    """A process of the pass under a tool, its log in `base`.txt and what it prints in `base`.out: its exit code, or None if it

    had to be stopped after `seconds`. What it compiles is kept in folders beside them.
    """
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only", *TOOLS[tool]]
    command = [sanitizer, *options, "--log-file", f"{base}.txt", sys.executable, "-m", "moekit.testing.gpu_pass", *arguments]
    with open(f"{base}.out", "wb") as sink:
        kept = {"JAX_COMPILATION_CACHE_DIR": str(base.parent / "jax"), "TRITON_CACHE_DIR": str(base.parent / "triton")}
        process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT, **kept}, stdout=sink, stderr=subprocess.STDOUT,
                                   start_new_session=True)  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            return None


def run_tool(sanitizer: str, tool: str, workers: int, seconds: float, folder: Path, part: Part = Part()) -> Verdict:
    """The control, in which the tool must find what is planted; then the pass, or a part of it, in `workers` processes, which

    take no case after `seconds` and are stopped `GRACE` later. Cases that an earlier run with this folder took are not run
    again, but for those of its processes in which something was wrong.
    """
    begin, verdict = time.monotonic(), Verdict(tool)
    (folder / f"{tool}.control.txt").unlink(missing_ok=True)  # that of an earlier run would speak for this one
    run_pass(sanitizer, tool, ["control"], folder / f"{tool}.control", seconds)
    if not found(text := text_of(folder / f"{tool}.control.txt")):
        verdict.findings.append(f"{tool}: it did not find the planted fault: {text.strip()[-300:] or 'its log is empty'}")
    (taken := folder / f"{tool}.taken").mkdir(exist_ok=True)
    before, until = {p.name for p in taken.iterdir()}, seconds - (time.monotonic() - begin)

    def share(i: int) -> int | None:
        for end in ("json", "txt", "out"):
            (folder / f"{tool}.{i}.{end}").unlink(missing_ok=True)
        report = folder / f"{tool}.{i}.json"
        arguments = [",".join(part.names), str(part.number), str(part.of), str(taken), str(report), str(until)]
        return run_pass(sanitizer, tool, arguments, folder / f"{tool}.{i}", until + GRACE)

    with ThreadPoolExecutor(workers) as threads:
        codes = list(threads.map(share, range(workers)))
    doors, cells, hazards = Counter(), Counter(), Counter()
    for i, code in enumerate(codes):
        log, report, output = (folder / f"{tool}.{i}.{end}" for end in ("txt", "json", "out"))
        verdict.findings += (wrong := judge(tool, code, log, report, output))
        for p in taken.iterdir() if wrong else ():  # the next run with this folder takes them again
            if p.name not in before and p.read_text(encoding="utf-8") == report.name:
                p.unlink()
        hazards.update(explained(text_of(log)))
        if report.exists():
            told = read_json(report)
            verdict.cases += told["cases"]
            verdict.slow += told["slow"]
            doors.update(told["doors"])
            cells.update(told["cells"])
    now = {p.name for p in taken.iterdir()}
    mine = {mark(*one): cell(*one) for one in list(cases(part.names))[part.number - 1 :: part.of]}
    if mine.keys() <= before:
        verdict.findings.append(f"{tool}: no case ran; earlier runs with {folder} took all, so give another folder")
    wanted = dict.fromkeys(c for name, c in mine.items() if name in now - before)
    verdict.findings += [f"{tool}: no kernel ran for {c}" for c in wanted if not cells[c]]
    if left := len(mine.keys() - now):
        verdict.left = left
        verdict.findings.append(
            f"{tool}: {left} of {len(mine)} cases are left; the same command with --folder {folder} goes on"
        )
    verdict.doors, verdict.cells, verdict.kernels = dict(doors), dict(cells), doors.total()
    verdict.explained, verdict.slow = dict(hazards), sorted(verdict.slow, reverse=True)[:SLOWEST]
    verdict.seconds = time.monotonic() - begin
    return verdict


def judge(tool: str, code: int | None, log: Path, report: Path, output: Path) -> list[str]:
    """What is wrong with one process: what the tool found, what its outputs were, how it ended."""
    text, findings = text_of(log), []
    known = explained(text).total()
    errors = None if (said := found(text)) is None else said - known
    if errors:
        findings.append(f"{tool}: {errors} found; {log.name} begins:\n{text[:3000]}")
    if errors is None:
        how = "stopped" if code is None else f"exit code {code}"
        findings.append(f"{tool}: {log.name} has no summary ({how}): {ending(output)}")
    elif code != (FOUND if known else 0) and not errors:
        findings.append(f"{tool}: exit code {code}: {ending(output)}")
    if not report.exists():
        findings.append(f"{tool}: {report.name} was not written: its share did not end")
    else:
        findings += [f"{tool}: {p}" for p in read_json(report)["problems"]]
    return findings


def ending(output: Path) -> str:
    """The case that a process was at, the last it named, and the end of what it printed."""
    text = text_of(output).strip()
    case = next((line for line in reversed(text.splitlines()) if line.startswith("case ")), None)
    tail = text[-500:]
    return tail if case is None or case in tail.splitlines() else f"{case[:400]}\n{tail}"


def main(arguments: list[str] | None = None) -> int:
    """Run the tools and print what they found."""
    parser = argparse.ArgumentParser(
        prog="python -m moekit.testing.sanitize", description="Every kernel under compute-sanitizer."
    )
    parser.add_argument("--tool", action="append", choices=list(TOOLS), help="one tool (repeatable; default: both)")
    parser.add_argument("names", nargs="*", type=known, metavar="NAME", help="fusions and probes (default: all)")
    parser.add_argument("--workers", type=int, default=max(1, min(16, os.cpu_count() or 1)), help="processes")
    parser.add_argument("--part", type=Part.parse, default=Part(), metavar="I/N", help="every N-th case, from the I-th on")
    parser.add_argument("--seconds", type=float, default=540.0, help="after which a tool takes no further case")
    parser.add_argument("--folder", type=Path, help="where logs are kept, and which cases were taken: a run with the folder of "
                        "one that had not time for all goes on where it ended (default: a temporary folder)")  # fmt: skip
    parser.add_argument("--json-file", type=Path, help="write what came of it as JSON")
    options = parser.parse_args(arguments)
    sanitizer, gpus = find_sanitizer(), platform.gpu_count()
    if not gpus or sanitizer is None:
        lack = "compute-sanitizer is not on the path nor in CUDA_HOME" if gpus else "there is no NVIDIA GPU here"
        print(f"sanitize: {lack}; run it on a GPU machine with a CUDA toolkit", file=sys.stderr)
        return 3
    with tempfile.TemporaryDirectory(prefix="moekit-sanitize-") as temporary:
        folder = options.folder or Path(temporary)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            check_writable(options.json_file or folder / "log")
        except OSError as error:
            print(f"sanitize: {error}", file=sys.stderr)
            return 2
        verdicts, part = [], replace(options.part, names=tuple(options.names) or Part.names)
        for tool in options.tool or TOOLS:
            verdicts.append(run_tool(sanitizer, tool, max(1, options.workers), options.seconds, folder, part))
            tell(verdicts[-1])
            if options.json_file:
                write_text(options.json_file, json.dumps([asdict(v) for v in verdicts], indent=1))
    return 1 if any(v.findings for v in verdicts) else 0


def tell(verdict: Verdict) -> None:
    """Print a verdict."""
    word = f"{len(verdict.findings)} findings" if verdict.findings else "clean"
    print(f"{verdict.tool}: {word}; {verdict.cases} cases, {verdict.kernels} kernels in {verdict.seconds:.0f} s; the planted "
          f"fault was {'not ' if any('planted' in f for f in verdict.findings) else ''}found", flush=True)  # fmt: skip
    print("  " + ", ".join(f"{door}: {n}" for door, n in verdict.doors.items()), flush=True)
    for kernel, n in verdict.explained.items():
        print(f"  {n} hazards of {kernel} are explained: {EXPLAINED[kernel]}", flush=True)
    for finding in verdict.findings[:20]:
        print(finding, flush=True)


if __name__ == "__main__":
    sys.exit(main())
