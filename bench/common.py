"""Result files: what stands at their head, how they are written and read, and tables of them."""

import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from moekit import __version__
from moekit.files import read_json, write_text

PACKAGES = ("numpy", "torch", "triton", "jax", "flashinfer-python", "sglang", "sglang-kernel", "vllm", "liger-kernel",
            "quack-kernels", "nvidia-cutlass-dsl", "flash-linear-attention", "tokamax", "transformers")  # fmt: skip


def versions() -> dict[str, str]:
    """moekit's version, Python's, and those of the packages that are installed."""
    found = {"moekit": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict:
    """Device, versions and command: what stands at the head of a result file."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    arguments = [Path(a).name if a.startswith("/") else a for a in sys.argv[1:]]
    command = " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *arguments])
    return {"device": device, "cuda": torch.version.cuda, "versions": versions(), "command": command}


def write(path: str | Path, result: dict) -> None:
    """Write a result file: one row per line, so that two of them can be read side by side."""
    rows = result.get("rows", [])
    head = json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1)
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    write_text(path, head[:-2] + ',\n "rows": [\n' + body + "\n ]\n}\n")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def load(path: str | Path) -> dict:
    """Read a result file."""
    return read_json(path)
