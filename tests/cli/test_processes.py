"""A command as one of several processes: two of four virtual devices each share a model, and one of them prints."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import jax
import pytest

from moekit.cli import generate as generate_command
from moekit.cli import run
from moekit.models.qwen3next import TINY, generate, load, write_random_checkpoint
from moekit.models.qwen3next.config import ATTENTION, GDN
from moekit.models.qwen3next.text import Text
from tests.models.words import write_words

SMALL = replace(TINY, layer_types=(GDN, ATTENTION), num_experts=4, num_experts_per_tok=2, vocab_size=264)
PROMPT, NEW = "Once", 3


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_words(write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", SMALL))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_generate_what_one_does(small, tmp_path):
    """The first prints, the second does not, nor does what joins their devices: JSON stands alone."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)  # where programs are kept
    asked = ["generate", "--checkpoint", str(small), "--prompt", PROMPT, "--max-new-tokens", str(NEW), "--length", "64"]
    whole = [sys.executable, "-m", "moekit.cli", *asked, "--kernels", "xla", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    both = [subprocess.Popen([*whole, "--process", str(i)], **pipes) for i in (1, 0)]
    second, first = (process.communicate(timeout=300) for process in both)
    assert [process.returncode for process in both] == [0, 0], first[1] + second[1]
    report = json.loads(first[0])
    assert report["tp"] == 8
    assert second[0] == ""
    assert "loading" not in second[1]
    assert "loading" in first[1]
    with jax.default_device(jax.devices("cpu")[0]):
        alone = load(small, jax.sharding.Mesh(jax.devices("cpu")[:1], ("tp",)))
        (wanted,) = generate(alone, [Text(small).encode(PROMPT)], max_new_tokens=NEW, kernels="xla").tokens
    assert report["answers"][0]["tokens"] == list(wanted)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--coordinator", "a:1"], "--coordinator, --processes and --process go together"),
        (["--processes", "2", "--process", "0"], "go together: give all three or none"),
        (["--coordinator", "a:1", "--processes", "2", "--process", "2"], "2 is none of 2 processes, from 0"),
        (["--coordinator", "here", "--processes", "2", "--process", "0"], "'here' is no HOST:PORT"),
    ],
)
def test_what_is_asked_wrongly(moekit, small, arguments, said):
    result = moekit("decode", "--checkpoint", str(small), *arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_a_conversation_is_with_one_process(moekit, small, monkeypatch):
    monkeypatch.setattr(generate_command, "process_count", lambda: 2)
    result = moekit("generate", "--checkpoint", str(small), "--chat", input="Hi\n")
    assert result.exit_code == 2
    assert "a conversation is with one process" in result.stderr


def test_others_that_do_not_come_are_a_sentence(moekit, small, monkeypatch):
    def nobody(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.\nMissing: 1")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    result = moekit("decode", "--checkpoint", str(small), "--coordinator", "a:1", "--processes", "2", "--process", "0")
    assert result.exit_code == 3
    assert "process 0 of 2 found no others at a:1: DEADLINE_EXCEEDED: Barrier timed out. Missing: 1" in result.stderr


def test_a_process_without_a_device_is_refused(moekit, small, monkeypatch):
    class Device:
        platform = "cpu"

        def __init__(self, process):
            self.process_index = process

    monkeypatch.setattr(run, "devices", lambda: [Device(i // 4) for i in range(8)])
    result = moekit("decode", "--checkpoint", str(small), "--tp", "4")
    assert result.exit_code == 2
    assert "4 leaves process 1 without a device" in " ".join(result.stderr.split())
