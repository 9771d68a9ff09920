"""What every test stands on: jax's devices, the `gpu` mark, Hypothesis profiles and seconds per folder."""

import gc
import os
import sys
from collections import Counter
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import HealthCheck, settings

from moekit.cli.platform import gpu_count, prepare_jax

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores
if gpu_count() == 0:  # XLA's compiler is most of what the tests take, and its code runs for microseconds
    # Its newer emitters of fused loops go through MLIR, which takes as long again as all the rest (jax 0.11.2).
    quick = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    one = "--xla_cpu_parallel_codegen_split_count=1"  # module of LLVM for a program: the other processes have the other cores
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick} {one}".strip()
prepare_jax()  # before anything imports jax
gc.set_threshold(20_000, 20, 20)  # each collection calls XLA's, too; and what is traced is made of very many small objects

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "nightly",
    deadline=None,
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "1_000_000")),
    suppress_health_check=[HealthCheck.too_slow],
)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.load_profile(PROFILE)
if PROFILE == "nightly":
    os.environ.setdefault("PYTEST_TIMEOUT", "0")  # a test runs until it is stopped, or has had its million examples

FIRST = (  # what once failed, then the longest
    "tests/regressions/", "tests/models/", "tests/backends/test_triton_interpreter.py", "tests/torch/test_export.py",
)  # fmt: skip
MANY_MAPPINGS = 15_000  # of a process: each program takes some
_seconds: Counter[str] = Counter()
_tests: Counter[str] = Counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Regressions first, then the longest files, so that no process ends long after the others; skip what needs a GPU."""
    items.sort(key=lambda item: next((i for i, folder in enumerate(FIRST) if item.nodeid.startswith(folder)), len(FIRST)))
    if gpu_count() > 0:
        return
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Forget compiled programs between files where they are many: Linux has 65,530 mappings for a process, and XLA crashes."""
    yield
    if "jax" in sys.modules and Path("/proc/self/maps").read_bytes().count(b"\n") > MANY_MAPPINGS:
        sys.modules["jax"].clear_caches()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up a folder's set-ups, calls and tear-downs; xdist replays each report in the parent process."""
    folder = str(PurePosixPath(report.nodeid.split("::")[0]).parent)
    _seconds[folder] += report.duration
    _tests[folder] += report.when == "call"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the seconds spent in each test folder, all processes added up."""
    if not _seconds:
        return
    terminalreporter.section("seconds per folder")
    for folder, seconds in _seconds.most_common():
        terminalreporter.line(f"{seconds:8.1f} s  {_tests[folder]:5d} tests  {folder}")
    terminalreporter.line(f"{sum(_seconds.values()):8.1f} s  {sum(_tests.values()):5d} tests  in all")
