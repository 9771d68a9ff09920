"""Where the command is run: other encodings, places that cannot be written, no PATH, and Ctrl-C at any time. No traceback."""

import json
import os
import signal
import subprocess
import sys

import pytest

from moekit.cli import doctor, interrupt

PLAIN_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # as ASCII as it gets


def command(*arguments, **environment):
    """`moekit …` in a process of its own; its output as bytes."""
    done = subprocess.run([sys.executable, "-m", "moekit.cli", *arguments], capture_output=True, check=False, timeout=300,
                          env=os.environ | environment)  # fmt: skip
    assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    return done


def test_an_exported_file_is_utf_8_in_any_locale(moekit, tmp_path):
    """Where the locale is ASCII a file that was there was truncated; where it is Latin-1 the file was no Python."""
    expected = moekit("export", "silu_and_mul").stdout_bytes
    assert not expected.isascii()  # or it shows nothing
    compile(expected, "export", "exec")
    path = tmp_path / "silu.py"
    path.write_text("old", encoding="utf-8")
    assert command("export", "silu_and_mul", "-o", str(path), **PLAIN_C).returncode == 0
    assert path.read_bytes() == expected
    for encoding in ("ascii", "latin-1"):
        assert command("export", "silu_and_mul", PYTHONIOENCODING=encoding).stdout == expected


@pytest.mark.parametrize("arguments", [["list"], ["doctor"], ["mutants", "--list"]])
def test_an_ascii_terminal_gets_what_it_lacks_spelt_out(arguments):
    for environment in (PLAIN_C, {"PYTHONIOENCODING": "ascii"}):
        done = command(*arguments, **environment)
        assert done.returncode == 0
        assert done.stdout.isascii()
        assert done.stdout


PLACES = [
    ["export", "silu_and_mul", "-o"],
    ["fuzz", "silu_and_mul", "--json-file"],
    ["fuzz", "silu_and_mul", "--record"],
    ["mutants", "--json-file"],
    ["tune", "-o"],
    ["tune", "--json-file"],
]


@pytest.mark.parametrize("arguments", PLACES, ids=" ".join)
def test_places_that_cannot_be_written_are_refused_before_the_work(moekit, tmp_path, arguments):
    for place, said in ((tmp_path / "none" / "x", "there is no directory"), (tmp_path, "is a directory")):
        done = moekit(*arguments, str(place))
        assert done.exit_code == 2
        assert not done.stdout
        assert said in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


def test_files_to_which_nothing_can_be_added_are_refused_before_the_work(moekit, tmp_path):
    path = tmp_path / "broken.json"
    path.write_text("{", encoding="utf-8")
    for arguments in (["fuzz", "--record"], ["fuzz", "--replay"], ["mutants", "--markdown"], ["fuzz", "--save"]):
        done = moekit(*arguments, str(tmp_path if "--save" in arguments else path))
        assert done.exit_code == 2
        assert "broken.json" in " ".join(done.stderr.split())
    path.write_text("[1]", encoding="utf-8")
    for arguments in (["fuzz", "--replay"], ["mutants", "--markdown"]):
        assert moekit(*arguments, str(path)).exit_code == 2


def test_no_path(tmp_path):
    (tmp_path / "a.patch").write_text("--- a/x\n+++ b/x\n", encoding="utf-8")
    assert command("doctor", PATH="").returncode == 0
    for arguments in (["mutants"], ["fuzz", "silu_and_mul", "--examples", "1"]):
        done = command(*arguments, "--patch", str(tmp_path / "a.patch"), PATH="")
        assert done.returncode == 3
        assert done.stderr == b"Error: the program `patch`, which applies a diff, is not on the path; install it\n"


def test_a_patch_that_is_no_text_is_a_sentence(moekit, tmp_path):
    (tmp_path / "a.patch").write_bytes(b"\xe9")
    done = moekit("fuzz", "silu_and_mul", "--patch", str(tmp_path / "a.patch"))
    assert done.exit_code == 1
    assert "a.patch cannot be read" in done.stderr


def test_an_error_of_the_system_is_a_sentence(moekit, monkeypatch):
    """As Triton raises it where its cache cannot be made."""

    def warmed():
        raise PermissionError(13, "Permission denied", "/root/.triton/cache")

    monkeypatch.setattr(doctor, "warmed", warmed)
    done = moekit("doctor", "--warm")
    assert done.exit_code == 1
    assert done.stderr == "Error: /root/.triton/cache: Permission denied\n"


@pytest.mark.parametrize("arguments", [["list"], ["export", "silu_and_mul"], ["doctor", "--json"]])
def test_a_reader_that_has_seen_enough_ends_it_quietly(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "moekit.cli", *arguments], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert done.stderr == b""
    assert done.returncode == 1


def test_no_width_is_the_usual_width(moekit, monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    assert "silu_and_mul" in moekit("list").stdout


@pytest.mark.parametrize("imported", ["click.core", "rich.console", "moekit.testing.case", "moekit.testing.processes"])
def test_ctrl_c_while_fuzz_is_imported_ends_with_the_summary_too(imported):
    campaign = ["fuzz", "silu_and_mul", "--impl", "numpy", "--time", "300", "--workers", "1"]
    whole = ["-X", "importtime", "-m", "moekit.cli", *campaign]
    process = subprocess.Popen([sys.executable, *whole, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    for line in process.stderr:
        if line.split()[-1] == imported:
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the parent and its workers
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert json.loads(out)["stopped"] == "interrupted"
    assert "Aborted" not in errors
    assert "Traceback" not in errors


def test_ctrl_c_is_held_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interrupt.held() as pressed:
            os.kill(os.getpid(), signal.SIGINT)
        assert pressed == [signal.SIGINT]
        with interrupt.held():
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
