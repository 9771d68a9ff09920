"""The versions that moekit is tested with, and what is done for the sake of some of them alone.

A row of DIFFERENCES says what some versions of a package do otherwise than others and where moekit, or a test, minds it. Each
names the version with which it can go: once that is the oldest of its package in TESTED, the row and what tells versions apart
there are of no more use. The page docs/versions.md shows both tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

#: package → the oldest and the newest version, by its first two numbers, that the tests have passed with
TESTED = {
    "python": ("3.12", "3.13"),
    "torch": ("2.11", "2.14"),
    "triton": ("3.6", "3.8"),
    "jax": ("0.11", "0.12"),
    "jaxlib": ("0.11", "0.12"),
    "jax-cuda13-plugin": ("0.11", "0.12"),
    "transformers": ("5.9", "5.24"),
}


@dataclass(frozen=True)
class Difference:
    """What `package` does otherwise in versions `since` … `until` (None: up to the newest), and the file that minds it.

    `goes`: with which oldest version the row can go, if not with the one that began it or came after it; "open" while none is
    known.
    """

    package: str
    since: str
    until: str | None
    what: str
    where: str
    goes: str = ""

    @property
    def unwanted(self) -> str:
        """With which oldest version the row can go: the first that does no longer so, or where all do from one on, that one."""
        if self.goes or self.until is None:
            return self.goes or self.since
        major, minor = release(self.until)
        return f"{major}.{minor + 1}"


DIFFERENCES = (
    Difference(
        "torch", "2.14", None, "`torch.compile` begins anew within its first call, with floats as constants",
        "tests/torch/test_compile.py",
    ),
    Difference(
        "triton", "3.6", "3.6", "the interpreter makes no number of an array of one element, which numpy refuses from 2.4 on",
        "moekit/testing/interpreted.py",
    ),
    Difference("triton", "3.6", "3.6", "the same in the self-test of an exported file", "moekit/export.py"),
    Difference(
        "triton", "3.6", "3.7", "the interpreter's maximum and minimum give NaN where a GPU's drop it",
        "moekit/testing/interpreted.py",
    ),
    Difference(
        "triton", "3.6", "3.7", "a sum of products along the middle of three axes becomes a product in TF32",
        "moekit/compile/passes/legalise.py",
    ),
    Difference("triton", "3.6", "3.6", "a launcher names nothing behind the function", "tests/torch/test_launch.py"),
    Difference(
        "triton", "3.7", None, "a compilation ahead of time wants every argument in its signature, constants too",
        "tests/backends/sm_90.py",
    ),
    Difference(
        "triton", "3.8", None, "each line of inline assembly is marked as one further down in the source",
        "tests/backends/sm_90.py",
    ),
    Difference(
        "triton", "3.8", None, "some kernels have more instructions or registers, and one of the tests' own spills two",
        "tests/data/limits.json",
    ),
    Difference("triton", "3.8", None, "a compiled kernel's code is unloaded with the object", "moekit/torch/fast.py"),
    Difference("jax", "0.11", "0.11", "all-reduces are launched outside of command buffers", "tests/models/test_h200.py"),
    Difference(
        "jax", "0.12", None, "XLA's own all-reduce ends in an error where NCCL has no symmetric windows",
        "moekit/cli/platform.py", "open",
    ),
    Difference(
        "jax", "0.11", None, "Pallas lowers to Triton, and warns that it will not in a version that it does not name",
        "moekit/jax/doors.py", "open",
    ),
)  # fmt: skip

#: Off, all-reduces are NCCL's; XLA's own wants symmetric windows of NCCL, which not every machine has.
ONE_SHOT = "--xla_gpu_unsupported_use_all_reduce_one_shot_kernel"


def xla_flags() -> dict[str, str]:
    """What XLA is to be told on GPUs: flag → value. One that it does not know would end the process."""
    found = version("jax")
    return {ONE_SHOT: "false"} if found and release(found) == (0, 12) else {}


def version(package: str) -> str | None:
    """The version of a package that is installed; None where it is not. It is not imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    first, second = re.findall(r"\d+", f"{version}.0")[:2]
    return int(first), int(second)


def untested(found: Mapping[str, str | None]) -> list[str]:
    """A sentence for each of these packages (→ its version, None: not installed) that is outside of what is tested."""
    sentences = []
    for package, (oldest, newest) in TESTED.items():
        have = found.get(package)
        if have is None or release(oldest) <= release(have) <= release(newest):
            continue
        side = f"older than {oldest}, the oldest" if release(have) < release(oldest) else f"newer than {newest}, the newest"
        sentences.append(f"{package} {have} is {side} that moekit's tests have passed with")
    return sentences
