"""A command as one of several processes: two of four virtual devices each share a model, and one of them prints."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import jax
import pytest

from moekit.cli import generate as generate_command
from moekit.cli import processes, run
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
    flags = re.sub(r"(device_count)=\d+", r"\1=4", os.environ["XLA_FLAGS"])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
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
        (["--coordinator", "a:65536", "--processes", "2", "--process", "0"], "'a:65536' is no HOST:PORT"),
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


def joining(moekit, small, port, process):
    where = f"127.0.0.1:{port}"
    result = moekit("decode", "--checkpoint", str(small), "--coordinator", where, "--processes", "2", "--process", str(process))
    return result.exit_code, result.stderr, f"Error: process {process} of 2 found no others at {where}: "


@pytest.mark.parametrize(
    ("process", "why"),
    [(0, "process 1 did not come within 0.3 seconds"), (1, "[Errno 111] Connection refused, for 0.3 seconds")],
)
def test_others_that_do_not_come_are_a_sentence(moekit, small, monkeypatch, process, why):
    """jax itself is not asked: it would abort the process."""
    monkeypatch.setattr(processes, "SECONDS", 0.3)
    monkeypatch.setattr(jax.distributed, "initialize", None)
    code, said, start = joining(moekit, small, free_port(), process)
    assert (code, said) == (3, f"{start}{why}\n")


def test_a_port_that_is_taken_is_a_sentence(moekit, small, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", None)
    with socket.create_server(("", 0)) as other:
        code, said, start = joining(moekit, small, other.getsockname()[1], 0)
    assert code == 3
    assert said.startswith(start)
    assert "Address already in use" in said


def test_what_jax_says_of_others_is_a_sentence(moekit, small, monkeypatch):
    def nobody(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.\nMissing: 1")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    port = free_port()
    first = threading.Thread(target=processes._gather, args=(port, 2))
    first.start()
    code, said, start = joining(moekit, small, port, 1)
    first.join()
    assert (code, said) == (3, f"{start}DEADLINE_EXCEEDED: Barrier timed out. Missing: 1\n")


def test_whoever_else_knocks_at_the_port_is_nobody(monkeypatch):
    """All of three are there when the three are; a stranger, and a process that asks again, make no difference."""
    port, over = free_port(), []
    first = threading.Thread(target=processes._gather, args=(port, 3))
    second, third = (threading.Thread(target=lambda i=i: over.append(processes._report("127.0.0.1", port, i))) for i in (1, 2))
    knock, knocked = socket.create_connection, threading.Event()

    def noted(*args, **kwargs):
        connection = knock(*args, **kwargs)
        knocked.set()
        return connection

    monkeypatch.setattr(socket, "create_connection", noted)
    first.start()
    second.start()
    assert knocked.wait(20)  # before a stranger says its number
    for words in (b"GET / HTTP/1.1", b"1"):
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(words)
                break
            except ConnectionError:
                time.sleep(0.01)
    assert first.is_alive()
    third.start()
    for each in (first, second, third):
        each.join(20)
    assert over == [None, None]


def test_a_process_without_a_device_is_refused(moekit, small, monkeypatch):
    class Device:
        platform = "cpu"

        def __init__(self, process):
            self.process_index = process

    monkeypatch.setattr(run, "devices", lambda: [Device(i // 4) for i in range(8)])
    result = moekit("decode", "--checkpoint", str(small), "--tp", "4")
    assert result.exit_code == 2
    assert "4 leaves process 1 without a device" in " ".join(result.stderr.split())
