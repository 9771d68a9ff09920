"""What this machine has, found without importing jax or torch, and what jax must be told before that."""

import ctypes
import importlib.util
import os
from dataclasses import dataclass

from moekit import compat
from moekit.peers import driver

VIRTUAL_DEVICES = 8
_HOST_DEVICES = "--xla_force_host_platform_device_count"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as its driver describes it."""

    name: str
    capability: tuple[int, int]
    gigabytes: float


def gpu_count() -> int:
    """How many NVIDIA GPUs the driver shows to this process; 0 without a driver."""
    count, cuda = ctypes.c_int(0), driver()
    if cuda is None or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs that the driver shows to this process."""
    cuda = driver()
    if cuda is None:
        return []
    found = []
    for ordinal in range(gpu_count()):
        device, name, size = ctypes.c_int(0), ctypes.create_string_buffer(256), ctypes.c_size_t(0)
        cuda.cuDeviceGet(ctypes.byref(device), ordinal)
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        capability = (_attribute(cuda, device, _MAJOR), _attribute(cuda, device, _MINOR))
        found.append(Gpu(name.value.decode(), capability, size.value / 2**30))
    return found


def _attribute(cuda: ctypes.CDLL, device: ctypes.c_int, which: int) -> int:
    value = ctypes.c_int(0)
    cuda.cuDeviceGetAttribute(ctypes.byref(value), which, device)
    return value.value


def cuda_version() -> str | None:
    """The newest CUDA that the driver serves, such as `13.0`; None without a driver."""
    value, cuda = ctypes.c_int(0), driver()
    if cuda is None or cuda.cuDriverGetVersion(ctypes.byref(value)) != 0:
        return None
    return f"{value.value // 1000}.{value.value % 1000 // 10}"


def jax_has_cuda() -> bool:
    """True where jax is installed with a CUDA plugin."""
    return any(installed(f"jax_cuda{version}_plugin") for version in (13, 12))


def installed(module: str) -> bool:
    """True where a module can be imported; it is not imported."""
    return importlib.util.find_spec(module) is not None


def prepare_jax() -> bool:
    """Set jax's environment; True where it will run on GPUs. It must run before jax is first imported.

    There are 8 CPU devices in either case: they stand in for GPUs where there are none, and a test can shard
    over them where there are some. What the user has set stays as it is.
    """
    use_gpu = gpu_count() > 0 and jax_has_cuda() and os.environ.get("JAX_PLATFORMS", "cuda") != "cpu"
    os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if use_gpu else "cpu")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = {_HOST_DEVICES: VIRTUAL_DEVICES} | (compat.xla_flags() if use_gpu else {})
    more = [f"{flag}={value}" for flag, value in wanted.items() if flag not in flags]
    os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *more])
    return use_gpu
