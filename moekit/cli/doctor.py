"""`moekit doctor`: versions, devices, and what each implementation can do here and why not."""

from __future__ import annotations

import json
import os
import platform as host
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import click

from moekit import __version__, compat
from moekit.cli import platform
from moekit.cli.output import console, print_json, table
from moekit.errors import UnavailableError
from moekit.peers import unreachable

DOORS = ("pallas", "triton", "mosaic")  # by which kernels get into a JAX program

PACKAGES = (
    "numpy", "ml_dtypes", "torch", "triton", "jax", "jaxlib", "jax-cuda13-plugin", "safetensors",
    "transformers", "click", "rich", "platformdirs",
)  # fmt: skip
OLDEST_GPU = (8, 0)  # bfloat16 on the matrix unit


@dataclass(frozen=True)
class Finding:
    """What an implementation can do on this machine. state: `runs`, `compiles` (but cannot run) or `no`."""

    implementation: str
    framework: str
    state: str
    why: str


@click.command(short_help="Versions, devices, and what works here and why not.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--warm", is_flag=True, help="Also call every fusion in PyTorch twice, and say what the first call costs.")
def doctor(as_json: bool, warm: bool) -> None:
    """Say what is installed, what devices there are, and what each implementation can do here and why not.

    With --warm: what the first call of each fusion costs in PyTorch (tracing, compiling or reading Triton's cache) and what
    the next one does. It compiles as `moekit.torch.warmup` does, so later processes find the kernels in Triton's cache.
    """
    report = {
        "moekit": __version__,
        "python": host.python_version(),
        "packages": {name: compat.version(name) for name in PACKAGES},
        "devices": devices(),
        "peers": peers(),
        "implementations": [asdict(finding) for finding in findings()],
    }
    report["untested"] = compat.untested({"python": report["python"], **report["packages"]})
    if warm:
        report["warm"] = warmed()
    if as_json:
        print_json(report)
        return
    out = console()
    out.print(f"moekit {__version__}, Python {report['python']} at {sys.executable}", soft_wrap=True)
    versions = table("package", "version", title="")
    for name, version in report["packages"].items():
        versions.add_row(name, version or "[dim]not installed[/dim]")
    out.print(versions)
    for sentence in report["untested"]:
        out.print(f"[yellow]{sentence}[/yellow]", soft_wrap=True)
    _print_devices(report["devices"])
    out.print(f"ranks of one process {'send each other packets' if report['peers']['reach'] else 'go by psum'}: "
              f"{report['peers']['why']}")  # fmt: skip
    rows = table("implementation", "framework", "here", "why", title="")
    for row in report["implementations"]:
        colour = {"runs": "green", "compiles": "yellow", "no": "red"}[row["state"]]
        rows.add_row(row["implementation"], row["framework"], f"[{colour}]{row['state']}[/{colour}]", row["why"])
    out.print(rows)
    if warm:
        _print_warm(report["warm"])


def warmed() -> dict:
    """What the first call of every form costs in PyTorch, in seconds; raises UnavailableError without torch."""
    if not platform.installed("torch"):
        raise UnavailableError("doctor --warm: torch is not installed; install moekit[torch]")
    import torch

    from moekit.torch import warmup

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = warmup()
    calls = [asdict(w) | {"sizes": dict(w.sizes)} for w in found]
    return {"device": where, "calls": calls, "seconds": sum(w.first for w in found)}


def _print_warm(found: dict) -> None:
    rows = table("fusion", "first call", "next call", title=f"\nfirst calls in PyTorch on {found['device']}")
    for call in found["calls"]:
        name = call["fusion"] + "_" * call["in_place"]
        rows.add_row(name, f"{call['first'] * 1e3:.1f} ms", f"{call['next'] * 1e3:.3f} ms")
    console().print(rows)
    console().print(f"{found['seconds']:.1f} s in all; moekit.torch.warmup pays it before the first request")


def devices() -> dict:
    """The CPU and the GPUs, as the system and the driver describe them."""
    return {
        "cpu_cores": len(os.sched_getaffinity(0)),
        "cuda": platform.cuda_version(),
        "gpus": [asdict(gpu) for gpu in platform.gpus()],
    }


def peers() -> dict:
    """Whether ranks on several GPUs can send each other packets, and why not: what `moekit.jax.Channel` asks first."""
    count = platform.gpu_count()
    why = unreachable(range(count)) if count else "no NVIDIA GPU here"
    return {"reach": why is None, "why": why or f"each of {count} GPUs reaches the others' memory"}


def findings() -> list[Finding]:
    """One line per implementation, in the order of the design's table."""
    gpus = platform.gpus()
    too_old = next((g for g in gpus if g.capability < OLDEST_GPU), None)
    no_gpu = "no NVIDIA GPU here" if not gpus else f"{too_old.name} is older than sm_80" if too_old else None
    return [
        Finding("reference", "numpy", "runs", "the independent float64 oracle, on CPU"),
        Finding("interpret", "numpy", "runs", "executes the tile program block by block, on CPU"),
        _eager(bool(gpus)),
        _triton(no_gpu),
        _xla(bool(gpus)),
        *_doors(no_gpu, gpus),
    ]


def _eager(gpu: bool) -> Finding:
    if not platform.installed("torch"):
        return Finding("eager", "torch", "no", "torch is not installed; install moekit[torch]")
    where = "CPU and GPU" if gpu and torch_sees_cuda() else "CPU"
    return Finding("eager", "torch", "runs", f"array evaluation on {where}")


def _triton(no_gpu: str | None) -> Finding:
    for needed in ("torch", "triton"):
        if not platform.installed(needed):
            return Finding("triton", "torch", "no", f"{needed} is not installed; install moekit[torch]")
    if no_gpu:
        return Finding("triton", "torch", "compiles", f"{no_gpu}; compiles for sm_90, sm_100 and gfx942")
    if not torch_sees_cuda():
        return Finding("triton", "torch", "compiles", "torch sees no CUDA device: its build or the driver does not fit")
    return Finding("triton", "torch", "runs", "the default for CUDA tensors")


def _xla(gpu: bool) -> Finding:
    if not platform.installed("jax"):
        return Finding("xla", "jax", "no", "jax is not installed; install moekit[jax]")
    where = "CPU and GPU" if gpu and platform.jax_has_cuda() else "CPU"
    return Finding("xla", "jax", "runs", f"array evaluation on {where}")


def _doors(no_gpu: str | None, gpus: Sequence[platform.Gpu]) -> list[Finding]:
    """By what kernels get into a JAX program: the second door is taken where the first is not there."""
    if not platform.installed("jax"):
        return [Finding(name, "jax", "no", "jax is not installed; install moekit[jax]") for name in DOORS]
    refused = doors_refused()
    plugin = None if platform.jax_has_cuda() else "jax's CUDA plugin is not installed; install moekit[cuda]"
    sees = not (no_gpu or plugin) and jax_sees_cuda()
    when = "as there is no pallas" if refused["pallas"] else "where it is named"
    by = {"pallas": f"through Pallas's Triton lowering{_measured(gpus)}", "triton": f"by XLA's own Triton, {when}"}
    by |= {"mosaic": "through Mosaic GPU, where it is named or pallas takes it, of fusions that have such kernels"}
    old = dict.fromkeys(DOORS, no_gpu) | {"mosaic": _before_hopper(gpus)}
    return [_door(name, refused[name], old[name], plugin, sees, compiled) for name, compiled in by.items()]


def _measured(gpus: Sequence[platform.Gpu]) -> str:
    """What is to be said of pallas where a table of the GPU here says that Mosaic GPU is faster for some calls."""
    from moekit.tune.way import won

    return f", or Mosaic GPU, faster for {named}" if gpus and (named := ", ".join(won(gpus[0].name))) else ""


def _before_hopper(gpus: Sequence[platform.Gpu]) -> str | None:
    """Why no GPU here runs a warpgroup's layouts, which are compiled for sm_90 and later."""
    if max((g.capability for g in gpus), default=(0, 0)) >= (9, 0):
        return None
    return f"{gpus[0].name} is older than sm_90" if gpus else "no NVIDIA GPU here"


def _door(name: str, refused: str | None, no_gpu: str | None, plugin: str | None, sees: bool, compiled: str) -> Finding:
    if refused:
        return Finding(name, "jax", "no", refused)
    if no_gpu and plugin:
        return Finding(name, "jax", "runs", f"interpreted on CPU only: {no_gpu}, and {plugin}")
    if no_gpu:
        return Finding(name, "jax", "runs", f"interpreted on CPU: {no_gpu}; compiles for an absent H200")
    if plugin:
        return Finding(name, "jax", "runs", f"interpreted on CPU only: {plugin}")
    if not sees:
        return Finding(name, "jax", "compiles", "jax sees no CUDA device: its plugin or the driver does not fit")
    return Finding(name, "jax", "runs", f"compiled for the GPU {compiled}")


def doors_refused() -> dict[str, str | None]:
    """Why kernels cannot go by each of jax's doors, None where they can; asked in a process of its own."""
    program = "import json; from moekit.jax import doors; print(json.dumps({d: doors.refusal(d) for d in doors.KERNELS}))"
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False)
    if asked.returncode:
        why = f"jax does not work here: {(asked.stderr.strip() or 'no reason given').splitlines()[-1]}"
        return dict.fromkeys(DOORS, why)
    return json.loads(asked.stdout.splitlines()[-1])


def torch_sees_cuda() -> bool:
    """Whether torch, asked in a process of its own, finds a CUDA device."""
    return _says_yes("import torch; print(torch.cuda.is_available())")


def jax_sees_cuda() -> bool:
    """Whether jax, asked in a process of its own, finds a CUDA device."""
    return _says_yes("import jax; print(len(jax.devices('cuda')) > 0)")


def _says_yes(program: str) -> bool:
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    return asked.stdout.strip().endswith(b"True")


def _print_devices(found: dict) -> None:
    out = console()
    out.print(f"\nCPU: {found['cpu_cores']} cores; `moekit decode` makes {platform.VIRTUAL_DEVICES} virtual devices of them")
    if found["cuda"] is None:
        out.print("GPU: no NVIDIA driver")
        return
    out.print(f"GPU: {len(found['gpus'])}, driver for CUDA {found['cuda']}")
    for gpu in found["gpus"]:
        major, minor = gpu["capability"]
        out.print(f"  {gpu['name']}, sm_{major}{minor}, {gpu['gigabytes']:.0f} GiB")
