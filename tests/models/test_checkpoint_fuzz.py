"""Random damage to small checkpoints: they load with exactly the right tensors, or one sentence refuses them.

A case follows from its number. `make test` runs the first few hundred; `MOEKIT_FILE_CASES=0:100000` before pytest runs
those from 0 up to 100000, and a failure says which case to run alone.
"""

import copy
import json
import os
import random
import re
import resource
import shutil
import struct
import time
from collections import Counter

import pytest

from moekit.models.qwen3next import CheckpointError, Config, ConfigError, write_random_checkpoint
from moekit.models.qwen3next.checkpoint import Checkpoint
from moekit.models.qwen3next.config import check_tensor_parallel
from moekit.models.qwen3next.sharding import Slab, checkpoint_shapes
from tests.models.micro import INDEX, MICRO, SINGLE, check_same, check_sentence, put_together, take_apart, theirs

FIRST, LAST = (int(n) for n in os.environ.get("MOEKIT_FILE_CASES", "0:600").split(":"))
SECONDS, GROWTH = 10, 512 << 20  # of the processor and of memory, a hundred times what a case takes

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
NUMBERS = [0, 1, -1, 2, 3, 7, 1.0, 0.5, 10**9, 2**31, 2**63 - 1, 2**63, 10**30, -(10**30), float("nan"), float("inf"), 1e-300]
VALUES = [None, True, False, "", "x", "F32", "F16", "F64", "default", "yarn", "../x", "\ud800", "é\n", [], {}, [0], {"a": 0}]
KEYS = ["", "x", "mtp.x", "../x", "\n", "__metadata__", "lm_head.weight"]
PLACES = ["../x.safetensors", "/dev/zero", "/tmp/x.safetensors", "x.safetensors", ".", "a/../a.safetensors", INDEX]
CONFIGS = [
    {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}, "rope_parameters": {"rope_theta": 1.0}},
    {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}},
    {"quantization": {"bits": 4}},
    {"attn_output_gate": False},
    {"num_hidden_layers": 10**9, "layer_types": None},
    {"num_experts": 10**9},
    {"vocab_size": 10**9, "hidden_size": 10**9},
    {"tie_word_embeddings": True},
    {"dtype": "bfloat16"},
]


class Folder:
    """A checkpoint taken apart, damaged, and written. harmless: whether it must load all the same."""

    def __init__(self, whole, rng):
        self.config, self.index, self.shards = copy.deepcopy(whole)
        self.rng, self.harmless, self.steps = rng, True, []
        self.texts, self.bytes, self.disk = [], [], []  # what is done to a JSON text, a file's bytes, and on the disk

    def damage(self, kinds):
        kind = self.rng.choice(kinds)
        self.steps.append(kind.__name__)
        kind(self)

    def write(self, directory):
        texts = {"config.json": json.dumps(self.config)}
        if self.index is not None:
            texts[INDEX] = json.dumps(self.index)
        texts |= {name: json.dumps(header) for name, (header, _) in self.shards.items()}
        for change in self.texts:
            name = self.rng.choice(sorted(texts))
            texts[name] = change(self.rng, texts[name])
        files = {name: text.encode("utf-8", "surrogatepass") for name, text in texts.items()}
        files |= {name: put_together(files[name], data) for name, (_, data) in self.shards.items()}
        for change in self.bytes:
            name = self.rng.choice(sorted(files))
            files[name] = change(self.rng, files[name])
        for name, content in files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
        for change in self.disk:
            change(self.rng, directory, self.rng.choice(sorted(files)))


# ------------------------------------------------------------------------------------------------- damage to the JSON


def nodes(value, found):
    """Every (container, key) below a JSON value."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        found.append((value, key))
        nodes(member, found)
    return found


def a_node(folder):
    """Of one of the JSON documents; the short ones are as likely as the long."""
    documents = [folder.config, *(header for header, _ in folder.shards.values())] + [folder.index] * (folder.index is not None)
    return folder.rng.choice(nodes(folder.rng.choice(documents), []) or [({"x": 0}, "x")])


def put_another_value(folder):
    container, key = a_node(folder)
    container[key] = folder.rng.choice([*NUMBERS, *VALUES])
    folder.harmless = False


def shift_a_number(folder):
    container, key = a_node(folder)
    if isinstance(container[key], (int, float)):
        container[key] += folder.rng.choice([-8, -4, -1, 1, 4, 8])
    folder.harmless = False


def exchange_two(folder):
    (a, i), (b, j) = a_node(folder), a_node(folder)
    a[i], b[j] = copy.deepcopy(b[j]), copy.deepcopy(a[i])
    folder.harmless = False


def remove_a_node(folder):
    container, key = a_node(folder)
    del container[key]
    folder.harmless = False


def rename_a_key(folder):
    container, key = a_node(folder)
    if isinstance(container, dict):
        container[folder.rng.choice([*KEYS, key + "x"])] = container.pop(key)
    folder.harmless = False


def nest_a_value(folder):
    container, key = a_node(folder)
    for _ in range(folder.rng.choice([1, 2, 400])):
        container[key] = [container[key]]
    folder.harmless = False


def set_a_field(folder):
    folder.config |= copy.deepcopy(folder.rng.choice(CONFIGS))
    folder.harmless = False


def point_elsewhere(folder):
    if folder.index is not None:
        listed = folder.index["weight_map"]
        if isinstance(listed, dict) and listed:
            listed[folder.rng.choice(sorted(listed))] = folder.rng.choice([*PLACES, *folder.shards])
    folder.harmless = False


def double_a_key(folder):
    def change(rng, text):
        keys = list(re.finditer(r'"(\w[^"\\]*)": ', text))
        if not keys:
            return text
        key = rng.choice(keys)
        return text[: key.start()] + f'"{key[1]}": {rng.choice(["0", "null", "{}"])}, ' + text[key.start() :]

    folder.texts.append(change)
    folder.harmless = False


def break_the_text(folder):
    def change(rng, text):
        where = rng.randrange(len(text) + 1)
        return rng.choice(
            [
                text[:where],
                text[:where] + rng.choice(['"', "{", "}", "[", ",", "\\", "\0", "9" * 5000, "NaN", "é"]) + text[where:],
                "[" * rng.choice([3, 100_000]) + text,
                "\ufeff" + text,
                "[" + text + "]",
                "",
            ]
        )

    folder.texts.append(change)
    folder.harmless = False


# ------------------------------------------------------------------------------------- damage to bytes and on the disk


def flip_a_byte(folder):
    def change(rng, content):
        where = rng.choice([rng.randrange(8), rng.randrange(len(content))]) if content else 0
        return content[:where] + bytes([rng.randrange(256)]) + content[where + 1 :]

    folder.bytes.append(change)
    folder.harmless = False


def cut_or_add_bytes(folder):
    def change(rng, content):
        where, some = rng.randrange(len(content) + 1), rng.randbytes(rng.choice([1, 4, 64]))
        return rng.choice([content[:where], content[:-1], content + some, content[:where] + some + content[where:], b"", some])

    folder.bytes.append(change)
    folder.harmless = False


def change_the_length(folder):
    def change(rng, content):
        (length,) = struct.unpack("<Q", content[:8].ljust(8))
        lengths = [0, 1, length - 1, length + 1, length + 8, len(content), len(content) - 8, 10**8, 2**63, 2**64 - 1]
        return struct.pack("<Q", rng.choice(lengths) % 2**64) + content[8:]

    folder.bytes.append(change)
    folder.harmless = False


def put_something_else(folder):
    def change(rng, directory, name):
        path = directory / name
        if path.is_dir():
            return
        path.unlink(missing_ok=True)
        kind = rng.choice(["FIFO", "directory", "nothing", "/dev/zero", "/dev/null", "/proc/self/mem", "nowhere", name, "."])
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        elif kind != "nothing":
            path.symlink_to(kind)

    folder.disk.append(change)
    folder.harmless = False


def put_another_file(folder):
    """One file's content in place of another's."""

    def change(rng, directory, name):
        others = sorted(path for path in directory.iterdir() if path.is_file() and path.stat().st_size)  # no /proc/self/mem
        target = directory / rng.choice([name, SINGLE, INDEX])
        if others and not target.is_dir():
            content = rng.choice(others).read_bytes()
            target.unlink(missing_ok=True)  # what a link leads to is not written to
            target.write_bytes(content)

    folder.disk.append(change)
    folder.harmless = False


# ------------------------------------------------------------------------------------------------ what does no damage


def other_fields(folder):
    folder.config |= {"some_field": folder.rng.choice(VALUES[:9]), "num_local_experts": 3, "intermediate_size": 9}
    folder.config |= {"rope_scaling": None, "quantization_config": None, "attn_output_gate": True, "output_gate_type": "swish"}


def other_order(folder):
    for value in (folder.config, *(header for header, _ in folder.shards.values())):
        members = list(value.items())
        folder.rng.shuffle(members)
        value.clear()
        value.update(members)


def more_metadata(folder):
    for header, _ in folder.shards.values():
        header["__metadata__"] = {"format": "pt", "note": "é\n"}
    if isinstance(folder.index, dict):
        folder.index["metadata"] = {"total_size": -1, "x": float("nan")}


def another_model_beside(folder):
    """The tensors of the multi-token-prediction layer, of a dtype that is not served."""
    name = sorted(folder.shards)[-1]
    header, data = folder.shards[name]
    if "mtp.scale" not in header:
        header["mtp.scale"] = {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [len(data), len(data) + 8]}
        folder.shards[name] = header, data + bytes(8)


def in_a_folder_below(folder):
    if folder.index is not None and isinstance(folder.index.get("weight_map"), dict):
        folder.shards = {f"a/{name}": shard for name, shard in folder.shards.items()}
        folder.index["weight_map"] = {key: f"./a//{name}" for key, name in folder.index["weight_map"].items()}


def links_to_blobs(folder):
    def change(rng, directory, name):
        path = directory / name
        if path.is_file() and not path.is_symlink():
            path.rename(path.with_suffix(".blob"))
            path.symlink_to(path.with_suffix(".blob").name)

    folder.disk.append(change)


def old_files_beside(folder):
    def change(rng, directory, name):
        (directory / "model-00001-of-00009.safetensors").write_bytes(b"old")
        (directory / "notes.safetensors").mkdir(exist_ok=True)

    folder.disk.append(change)


HARMLESS = [other_fields, other_order, more_metadata, another_model_beside, in_a_folder_below, links_to_blobs, old_files_beside]
DAMAGE = [put_another_value] * 3 + [shift_a_number] * 2 + [set_a_field] * 2 + [
    *(exchange_two, remove_a_node, rename_a_key, nest_a_value, point_elsewhere, double_a_key, break_the_text),
    *(flip_a_byte, cut_or_add_bytes, change_the_length, put_something_else, put_another_file),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the test


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Checkpoints in one, two and three files, of two dtypes, taken apart."""
    found = []
    for files, dtype in ((1, "float32"), (2, "float32"), (3, "bfloat16"), (1, "float16")):
        where = write_random_checkpoint(tmp_path_factory.mktemp("whole"), MICRO, files, dtype, files)
        index = json.loads((where / INDEX).read_text()) if files > 1 else None
        shards = {file.name: take_apart(file) for file in where.glob("*.safetensors")}
        found.append((json.loads((where / "config.json").read_text()), index, shards))
    return found


def a_case(number, wholes, directory):
    """Write case `number`; returns the folder as it was made."""
    rng = random.Random(number)
    folder = Folder(rng.choice(wholes), rng)
    for _ in range(rng.choice([0, 0, 1, 2])):
        folder.damage(HARMLESS)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        folder.damage(DAMAGE)
    folder.write(directory)
    return folder


def check_the_tensors(directory, checkpoint):
    """Every tensor's bytes against those of the files that transformers reads, found here by hand."""
    names = [SINGLE]
    if not (directory / SINGLE).is_file():
        names = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
    wanted = {}
    for name in names:
        header, data = take_apart(directory / name)
        wanted |= {key: (entry, data) for key, entry in header.items() if key != "__metadata__"}
    for key in checkpoint_shapes(checkpoint.config):
        got, (entry, data) = checkpoint.read(Slab(key)), wanted[key]
        begin, end = entry["data_offsets"]
        assert (NAMES[got.dtype.name], list(got.shape)) == (entry["dtype"], entry["shape"]), key
        assert got.tobytes() == data[begin:end], key


def outcome(directory, folder):
    """What came of a case; any other error than the two, and any other tensor than the files', fails."""
    refusal = None
    try:
        config = Config.from_json(directory)
        check_tensor_parallel(config, 1)
        with Checkpoint(directory, config) as checkpoint:
            check_the_tensors(directory, checkpoint)
    except (ConfigError, CheckpointError) as error:
        refusal = error
    if refusal is not None:
        check_sentence(str(refusal).replace(str(directory), ""))
        assert not folder.harmless, refusal
        return type(refusal).__name__
    read = theirs(json.loads((directory / "config.json").read_text()))
    if read is not None:
        check_same(config, *read)
    return "loaded"


@pytest.mark.timeout(0 if LAST - FIRST > 1000 else 300)
def test_damaged_checkpoints(wholes, tmp_path, capsys):
    came, peak = Counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(FIRST, LAST):
        directory = tmp_path / str(number)
        directory.mkdir()
        folder = a_case(number, wholes, directory)
        start = time.process_time()
        try:
            came[outcome(directory, folder), folder.harmless] += 1
        except Exception as error:
            error.add_note(f"case {number} ({', '.join(folder.steps)}), alone: MOEKIT_FILE_CASES={number}:{number + 1}")
            raise
        assert time.process_time() - start < SECONDS, (number, folder.steps)
        shutil.rmtree(directory)
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) < GROWTH
    with capsys.disabled():
        if "MOEKIT_FILE_CASES" in os.environ:
            print({f"{what}{', undamaged' * harmless}": count for (what, harmless), count in sorted(came.items())})
    if LAST - FIRST >= 500:
        assert min(came["loaded", True], came["loaded", False], came["ConfigError", False], came["CheckpointError", False]) > 20
