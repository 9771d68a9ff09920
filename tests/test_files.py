"""Files are written whole or not at all and in UTF-8, by one function, everywhere in the package."""

import ast
import os
import stat
from pathlib import Path

import pytest

from moekit import files
from moekit.errors import FileError

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for folder in ("moekit", "bench", "examples") for p in (ROOT / folder).rglob("*.py"))


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "µs →\n")
    assert path.read_bytes() == "µs →\n".encode()
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    path.chmod(0o640)
    before = path.open("rb")
    files.write_text(path, "new\r\n")
    assert before.read() == "µs →\n".encode()  # who had it open still reads the old one
    before.close()
    assert path.read_bytes() == b"new\r\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_link_is_followed_and_a_pipe_written_to(tmp_path):
    path, link, pipe = (tmp_path / n for n in ("file", "link", "pipe"))
    path.write_text("old", encoding="utf-8")
    link.symlink_to(path)
    files.write_text(link, "new")
    assert link.is_symlink()
    assert path.read_text(encoding="utf-8") == "new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.check_writable(pipe)
    files.write_text(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    files.write_text("/dev/null", "gone")
    assert not os.path.isfile("/dev/null")


@pytest.mark.parametrize("failing", ["replace", "chmod", "text"])
def test_what_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.json"
    path.write_text("old", encoding="utf-8")

    def full(*_):
        raise OSError(28, "No space left on device")

    if failing == "text":
        with pytest.raises(UnicodeEncodeError):
            files.write_text(path, "half \ud800")
    else:
        monkeypatch.setattr(*((os, "replace") if failing == "replace" else (Path, "chmod")), full)
        with pytest.raises(FileError, match=rf"{path} cannot be written: No space left on device"):
            files.write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_cannot_be_written_is_said_in_a_sentence_before_and_after(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    cases = [("none/a", "there is no directory"), ("", "it is a directory"), ("file/a", "there is no directory"),
             ("n" * 300, "File name too long")]  # fmt: skip
    for name, words in cases:
        for call in (files.check_writable, lambda p: files.write_text(p, "x")):
            with pytest.raises(FileError, match=f"cannot be written: {words}"):
                call(tmp_path / name)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(FileError, match="it may not be written"):
        files.check_writable(tmp_path / "file")
    files.check_writable(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[" * 100_000])
def test_json_that_is_none_is_a_sentence(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(FileError, match=r"a\.json cannot be read as JSON"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(FileError, match=r"b\.json cannot be read: No such file"):
        files.read_json(tmp_path / "b.json")


def faults(path):
    """Where a file writes by itself, or reads or listens in the encoding of the locale."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        method, name = getattr(node.func, "attr", None), getattr(node.func, "id", None)
        given = {k.arg for k in node.keywords}
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        plain = (name == "open" or method == "open") and not any("b" in m for m in modes) and (name or modes)
        if (
            method in ("write_text", "write_bytes")
            or (method == "read_text" and "encoding" not in given)
            or (plain and "encoding" not in given)
            or ("text" in given and method in ("run", "Popen", "check_output"))
        ):
            yield f"{path.relative_to(ROOT)}:{node.lineno}"


def test_no_other_function_writes_files_and_none_goes_by_the_locale():
    found = [fault for path in SOURCES for fault in faults(path)]
    assert [f for f in found if not f.startswith("examples/export_a_kernel.py")] == []
