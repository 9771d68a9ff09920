"""What this machine has, found without importing jax or torch, and what jax must be told before it is imported."""

import ctypes
import importlib.util
import os

VIRTUAL_DEVICES = 8
_HOST_DEVICES = "--xla_force_host_platform_device_count"


def gpu_count() -> int:
    """How many NVIDIA GPUs the driver shows to this process; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def jax_has_cuda() -> bool:
    """True where jax is installed with a CUDA plugin."""
    return any(installed(f"jax_cuda{version}_plugin") for version in (13, 12))


def installed(module: str) -> bool:
    """True where a module can be imported; it is not imported."""
    return importlib.util.find_spec(module) is not None


def prepare_jax() -> bool:
    """Set jax's environment; True where it will run on GPUs. It must run before jax is first imported.

    CPU devices are made 8 in either case: they stand in for GPUs where there are none, and a test can shard over them where
    there are some. What the user has set stays as it is.
    """
    use_gpu = gpu_count() > 0 and jax_has_cuda() and os.environ.get("JAX_PLATFORMS", "cuda") != "cpu"
    os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if use_gpu else "cpu")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags = os.environ.get("XLA_FLAGS", "")
    if _HOST_DEVICES not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_HOST_DEVICES}={VIRTUAL_DEVICES}".strip()
    return use_gpu
