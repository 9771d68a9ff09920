"""`moekit doctor`, the entry point, and what they say where something is missing."""

import json
import subprocess
import sys

import pytest

from moekit import compat
from moekit.cli import doctor, platform
from moekit.cli.app import exit_code
from moekit.errors import MoekitError, ScheduleError, UnavailableError

IMPLEMENTATIONS = ["reference", "interpret", "eager", "triton", "xla", "pallas", "triton", "mosaic"]


def states() -> dict[str, tuple[str, str]]:
    """What is found of each implementation; of Triton kernels in jax as `jax triton`."""
    name = {("triton", "jax"): "jax triton"}
    return {name.get((f.implementation, f.framework), f.implementation): (f.state, f.why) for f in doctor.findings()}


def test_doctor_json(moekit):
    result = moekit("doctor", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert [row["implementation"] for row in report["implementations"]] == IMPLEMENTATIONS
    assert report["packages"]["numpy"]
    assert len(report["devices"]["gpus"]) == platform.gpu_count()


def test_doctor_says_of_every_implementation_what_it_can_do(moekit):
    shown = moekit("doctor").stdout
    for name in IMPLEMENTATIONS:
        assert name in shown


def test_doctor_names_versions_that_were_not_tested(moekit, monkeypatch):
    installed = {"torch": "2.10.0+cu130", "triton": "3.8.0", "jax": "0.13.0.dev1", "transformers": "5.10.2"}
    monkeypatch.setattr(compat, "version", installed.get)
    monkeypatch.setattr(doctor.host, "python_version", lambda: "3.12.9")
    sentences = [
        "torch 2.10.0+cu130 is older than 2.11, the oldest that moekit's tests have passed with",
        "jax 0.13.0.dev1 is newer than 0.12, the newest that moekit's tests have passed with",
    ]
    assert json.loads(moekit("doctor", "--json").stdout)["untested"] == sentences
    assert all(s in moekit("doctor").stdout for s in sentences)


def without(monkeypatch, *modules):
    installed = platform.installed
    monkeypatch.setattr(platform, "installed", lambda module: module not in modules and installed(module))


def test_doctor_without_torch_and_jax(monkeypatch):
    without(monkeypatch, "torch", "jax")
    found = states()
    for name in ("eager", "triton", "xla", "pallas", "jax triton", "mosaic"):
        assert found[name][0] == "no"
        assert "is not installed" in found[name][1]


def test_doctor_without_a_gpu(monkeypatch):
    monkeypatch.setattr(platform, "gpus", list)
    found = states()
    assert found["triton"][0] == "compiles"
    assert "no NVIDIA GPU" in found["triton"][1]
    assert found["pallas"][0] == "runs"
    assert "interpreted" in found["pallas"][1]
    assert found["jax triton"] == found["pallas"]


def test_doctor_with_gpus_of_several_kinds(monkeypatch):
    monkeypatch.setattr(doctor, "torch_sees_cuda", lambda: True)
    monkeypatch.setattr(doctor, "jax_sees_cuda", lambda: True)
    monkeypatch.setattr(platform, "jax_has_cuda", lambda: True)
    monkeypatch.setattr(platform, "gpus", lambda: [platform.Gpu("NVIDIA H200", (9, 0), 139.8)])
    found = states()
    assert found["triton"] == ("runs", "the default for CUDA tensors")
    assert found["pallas"][0] == "runs"
    assert "compiled" in found["pallas"][1]
    assert found["jax triton"] == ("runs", "compiled for the GPU by XLA's own Triton, where it is named")
    assert found["mosaic"][0] == "runs"
    assert "Mosaic GPU" in found["mosaic"][1]
    monkeypatch.setattr(platform, "gpus", lambda: [platform.Gpu("Tesla T4", (7, 5), 15.0)])
    found = states()
    assert found["triton"][0] == "compiles"
    assert "Tesla T4 is older than sm_80" in found["triton"][1]


def test_doctor_where_the_frameworks_do_not_see_the_gpu(monkeypatch):
    monkeypatch.setattr(doctor, "torch_sees_cuda", lambda: False)
    monkeypatch.setattr(doctor, "jax_sees_cuda", lambda: False)
    monkeypatch.setattr(platform, "jax_has_cuda", lambda: True)
    monkeypatch.setattr(platform, "gpus", lambda: [platform.Gpu("NVIDIA H200", (9, 0), 139.8)])
    found = states()
    assert found["triton"][0] == found["pallas"][0] == found["jax triton"][0] == "compiles"
    assert found["eager"] == ("runs", "array evaluation on CPU")


@pytest.mark.gpu
def test_gpus_are_described():
    gpu = platform.gpus()[0]
    assert gpu.capability >= (7, 0)
    assert gpu.gigabytes > 1
    assert platform.cuda_version()


@pytest.mark.parametrize(("error", "code"), [(MoekitError("x"), 1), (ScheduleError("x"), 2), (UnavailableError("x"), 3)])
def test_exit_codes(error, code):
    assert exit_code(error) == code


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_the_command_says_so_in_one_line(missing):
    result = python(f"import sys; sys.modules[{missing!r}] = None; from moekit.cli import main; main()")
    assert result.returncode == 3
    assert result.stderr == f"moekit: the command needs {missing}; install moekit[cli]\n"


def test_help_and_doctor_import_neither_torch_nor_jax():
    program = """
import sys
from click.testing import CliRunner
from moekit.cli.app import cli
from moekit.cli import platform
platform.gpus = list
for arguments in (["--help"], ["list"], ["show", "add_rms_norm", "--as", "triton"], ["doctor"]):
    assert CliRunner().invoke(cli, arguments).exit_code == 0, arguments
assert not {"torch", "triton", "jax"} & set(sys.modules)
"""
    result = python(program)
    assert result.returncode == 0, result.stderr


def environment_after_preparing(program: str) -> dict[str, str]:
    result = python(
        f"import json, os; from moekit.cli import platform; {program}; platform.prepare_jax(); "
        "print(json.dumps(dict(os.environ)))"
    )
    return json.loads(result.stdout)


def test_jax_is_told_what_there_is(monkeypatch):
    for name in ("JAX_PLATFORMS", "XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.delenv(name, raising=False)
    eight = "--xla_force_host_platform_device_count=8"
    without_gpu = environment_after_preparing("platform.gpu_count = lambda: 0")
    assert without_gpu["JAX_PLATFORMS"] == "cpu"
    assert without_gpu["XLA_FLAGS"] == eight
    fake = "platform.gpu_count = lambda: 1; platform.jax_has_cuda = lambda: True"
    with_gpu = environment_after_preparing(fake)
    assert with_gpu["JAX_PLATFORMS"] == "cuda,cpu"
    assert with_gpu["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    own = environment_after_preparing(fake)
    assert own["JAX_PLATFORMS"] == "cpu"
    assert own["XLA_FLAGS"].endswith("count=2")


@pytest.mark.parametrize(("version", "told"), [("0.11.2", ""), ("0.12.0.1", "=false"), ("0.12.0", "=true"), ("0.13.0", "")])
def test_jax_is_told_what_its_version_needs_on_gpus(monkeypatch, version, told):
    """The all-reduce of 0.12 fails at the first step on some machines; what the user has set stays as it is."""
    flag = "--xla_gpu_unsupported_use_all_reduce_one_shot_kernel"
    monkeypatch.setenv("XLA_FLAGS", f"{flag}=true" if told == "=true" else "")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    gpus = f"platform.compat.version = dict(jax={version!r}).get; platform.jax_has_cuda = lambda: True"
    for count in (0, 2):
        flags = environment_after_preparing(f"{gpus}; platform.gpu_count = lambda: {count}")["XLA_FLAGS"].split()
        assert [f for f in flags if f.startswith(flag)] == ([flag + told] if told == "=true" or (told and count) else [])
