"""Files that are not what they should be: refused in one sentence before a tensor is read, or read as transformers does."""

import json
import os
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import Qwen3NextForCausalLM

from moekit.models.qwen3next import CheckpointError, ConfigError, load
from moekit.models.qwen3next.checkpoint import Checkpoint
from tests.models.micro import INDEX, SINGLE, micro, put_together, take_apart

HEAD, EMBED, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture
def refused(mesh, monkeypatch):
    """From a folder to the sentence that refuses it; nothing may have been read of any tensor."""

    def read(self, slab):
        raise AssertionError(f"{slab.key} was read")

    def sentence(directory, kind=CheckpointError):
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "read", read)
            with pytest.raises(kind) as caught:
                load(directory, mesh(1))
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 800
        return str(caught.value)

    return sentence


@pytest.fixture
def header(tmp_path, refused):
    """From a change to the header of a one-file checkpoint to the sentence that refuses it."""

    def sentence(change):
        file = micro(tmp_path / "micro") / SINGLE
        raw, data = take_apart(file)
        changed = change(raw)
        text = changed if isinstance(changed, bytes) else json.dumps(raw if changed is None else changed).encode()
        file.write_bytes(put_together(text, data))
        return refused(file.parent)

    return sentence


def test_a_header_that_is_a_list(header):
    assert header(lambda raw: [1]).startswith(f"{SINGLE} has no readable safetensors header: it holds list where a JSON object")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("dtype", None, "has dtype missing where a name such as F32"),
        ("dtype", 3, "has dtype 3 where a name"),
        ("shape", "null", "has shape None where a list of sizes is needed"),
        ("shape", [6, 4.0], "has shape [6, 4.0] where"),
        ("shape", [6, True], "has shape [6, True] where"),
        ("shape", [-6, -4], "has shape [-6, -4] where"),
        ("shape", [2**70], "has shape [1180591620717411303424] where"),
        ("shape", [6, 4] + [1] * 40, "where a list of sizes is needed"),
        ("shape", [6, 5], "has 96 bytes where 120 are needed for its shape [6, 5] of F32"),
        ("dtype", "F16", "has 96 bytes where 48 are needed"),
        ("data_offsets", ["0", "96"], "has data_offsets ['0', '96'] where a list of two numbers of bytes"),
        ("data_offsets", [96, 0], "has data_offsets [96, 0] where"),
        ("data_offsets", [0, 48, 96], "has data_offsets [0, 48, 96] where"),
    ],
)
def test_an_entry_of_wrong_types(header, field, value, words):
    def change(raw):
        if value is None:
            del raw[EMBED][field]
        else:
            raw[EMBED][field] = None if value == "null" else value

    said = header(change)
    assert said.startswith(f"{SINGLE}: tensor {EMBED} has ")
    assert words in said


def test_an_entry_that_is_no_object(header):
    assert f"tensor {NORM} is [1] where a JSON object is needed" in header(lambda raw: raw.update({NORM: [1]}))


def test_a_header_nested_too_deeply(header):
    assert "it is nested too deeply" in header(lambda raw: b'{"a":' * 100_000)


def test_a_name_that_is_there_twice(header):
    def twice(raw):
        return json.dumps(raw)[:-1].encode() + b"," + json.dumps({NORM: raw[NORM]})[1:].encode()

    assert f"the key '{NORM}' is there twice" in header(twice)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff\xfe{}", "can't decode byte 0xff"),
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM"),
        ("{}".encode("utf-16-le"), "cannot be read as JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b"null", "holds NoneType where a JSON object is needed"),
        (b"", "cannot be read as JSON"),
    ],
)
def test_text_that_is_no_json_object(header, text, words):
    assert words in header(lambda raw: text)


def test_a_length_beyond_what_the_library_reads(tmp_path, refused):
    file = micro(tmp_path / "micro") / SINGLE
    with file.open("r+b") as stream:
        stream.write(struct.pack("<Q", 100_000_001))
        stream.truncate(100_000_100)
    assert refused(file.parent).startswith(f"{SINGLE} has a header of 100000001 bytes where at most 100000000 are read")


def test_the_library_has_the_last_word(header):
    """What our own checks let through, the library's refuse: also before anything is read."""
    said = header(lambda raw: raw.update({"__metadata__": {"format": 1}}))
    assert said.startswith(f"{SINGLE} is no valid safetensors file: ")
    said = header(lambda raw: raw.update({"mtp.a": {"dtype": "F99", "shape": [0], "data_offsets": [0, 0]}}))
    assert "unknown variant `F99`" in said


def test_overlapping_tensors(header):
    def overlap(raw):
        first = min(raw, key=lambda key: raw[key].get("data_offsets", [1])[0])
        twin = next(key for key in raw if key != first and raw[key].get("shape") == raw[first]["shape"])
        raw[twin]["data_offsets"] = raw[first]["data_offsets"]

    assert "overlaps the tensor before it: it begins at byte " in header(overlap)


def test_a_gap_between_tensors(header):
    def gap(raw):
        entries = sorted((entry["data_offsets"][0], key) for key, entry in raw.items() if key != "__metadata__")
        del raw[entries[3][1]]

    assert "leaves a gap before it: it begins at byte " in header(gap)


def test_appended_bytes(tmp_path, refused):
    file = micro(tmp_path / "micro") / SINGLE
    file.write_bytes(file.read_bytes() + b"\0\0\0")
    assert refused(file.parent).startswith(f"{SINGLE} has 3 bytes after its last tensor where none are needed")


def test_a_broken_last_shard_is_found_before_anything_is_read(tmp_path, refused):
    directory = micro(tmp_path / "micro", files=3)
    last = directory / "model-00003-of-00003.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    assert refused(directory).startswith(f"{last.name}: tensor ")
    last.write_bytes(b"")
    assert refused(directory).startswith(f"{last.name} is truncated: it has 0 bytes")


def test_sizes_of_ten_to_the_nine(tmp_path, refused):
    directory = micro(tmp_path / "micro", num_experts=10**9)
    assert "num_experts = 1000000000 need 6000000000 for experts alone" in refused(directory)
    micro(directory, num_hidden_layers=10**9, layer_types=None)
    assert "num_hidden_layers is 1000000000 where at most 65536 is needed" in refused(directory, ConfigError)
    micro(directory, num_hidden_layers=65536, num_experts=10**9, layer_types=None)
    assert "need 196608000000000 for experts alone" in refused(directory)
    micro(directory, hidden_size=2**31 - 1)
    assert f"tensor {EMBED} has shape [6, 4] where [6, 2147483647] is needed" in refused(directory)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["config.json", SINGLE, INDEX, "model-00001-of-00002.safetensors"])
@pytest.mark.parametrize("kind", ["a FIFO", "a directory", "a character device", "a link to nothing", "a link to itself"])
def test_something_else_in_place_of_a_file(tmp_path, refused, name, kind):
    directory = micro(tmp_path / "micro", files=1 if name == SINGLE else 2)
    path = directory / name
    path.unlink()
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    else:
        targets = {"a character device": "/dev/zero", "a link to nothing": "nowhere", "a link to itself": name}
        path.symlink_to(targets[kind])
    said = refused(directory, ConfigError if name == "config.json" else CheckpointError)
    assert said.split(":")[0].split(" ")[0].endswith(name)
    ends = {"a link to nothing": "does not exist", "a link to itself": "Too many levels of symbolic links"}
    assert ends.get(kind, f"is {kind} where a regular file is needed") in said


@pytest.mark.parametrize("name", ["config.json", SINGLE])
def test_a_file_that_must_not_be_read(tmp_path, refused, monkeypatch, name):
    directory = micro(tmp_path / "micro")
    original = Path.open

    def opened(self, *args, **kwargs):
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    assert "cannot be read: Permission denied; make it readable" in refused(
        directory, ConfigError if name == "config.json" else CheckpointError
    )


# ------------------------------------------------------------------------------------------------------------- an index


@pytest.fixture
def index(tmp_path, refused):
    """From a change to the index of a checkpoint in two files to the sentence that refuses it."""

    def sentence(change):
        path = micro(tmp_path / "micro", files=2) / INDEX
        raw = json.loads(path.read_text())
        changed = change(raw)
        path.write_text(json.dumps(raw if changed is None else changed))
        return refused(path.parent)

    return sentence


@pytest.mark.parametrize("value", [[], ["a"], {}, None, 3, "x"])
def test_a_weight_map_that_is_no_object(index, value):
    said = index(lambda raw: raw.update(weight_map=value))
    assert said.startswith(f"{INDEX} cannot be read as a safetensors index: weight_map is {value!r} where a JSON object")


@pytest.mark.parametrize("value", [[], "x"])
def test_an_index_that_is_no_object(index, value):
    assert f"{INDEX} holds {type(value).__name__} where a JSON object is needed" in index(lambda raw: value)


OUTSIDE = ("../outside/model.safetensors", "a/../../x.safetensors", "..", "/etc/passwd", "/dev/stdin.safetensors")
NO_NAMES = ("", ".", "model.bin", "x\0.safetensors", "x\n.safetensors", "\ud800.safetensors", 3, None, ["a"], {}, True)


@pytest.mark.parametrize("name", OUTSIDE + NO_NAMES)
def test_names_that_lead_out_of_the_folder_are_never_looked_up(index, tmp_path, monkeypatch, name):
    original = os.stat

    def looked_up(path, *args, **kwargs):
        assert "outside" not in str(path)
        assert "passwd" not in str(path)
        return original(path, *args, **kwargs)

    shutil.copytree(micro(tmp_path / "a"), tmp_path / "outside")
    monkeypatch.setattr(os, "stat", looked_up)
    said = index(lambda raw: raw["weight_map"].update({NORM: name}))
    assert said.startswith(f"{INDEX}: weight_map names ")
    assert f"for tensor {NORM} where a .safetensors file inside the folder is needed" in said


def test_an_absolute_name_even_of_the_folder_itself(index, tmp_path):
    name = str(tmp_path / "micro" / "model-00002-of-00002.safetensors")
    assert "inside the folder is needed" in index(lambda raw: raw["weight_map"].update({NORM: name}))


def test_a_tensor_in_two_files_of_which_the_index_names_the_other_than_transformers_reads(tmp_path, mesh, refused):
    directory = micro(tmp_path / "micro", files=2)
    first, last = sorted(directory.glob("*.safetensors"))
    tensors, key = load_file(first), "model.layers.1.self_attn.q_norm.weight"
    tensors[key] = np.full(4, 7, np.float32)  # the last file has it too
    save_file(tensors, first)
    raw = json.loads((directory / INDEX).read_text())
    assert raw["weight_map"][key] == last.name
    check_as_transformers_reads(directory, mesh)
    raw["weight_map"][key] = first.name
    (directory / INDEX).write_text(json.dumps(raw))
    said = refused(directory)
    assert said.startswith(f"{last.name}: tensor {key} is also in {first.name}, and {INDEX} names {first.name}; remove it")


# ------------------------------------------------------------------------------------------------ as transformers reads


def check_as_transformers_reads(directory, mesh):
    """Load with both; compare the parameters that have the same layout in both, and return them by name."""
    model = load(directory, mesh(1))
    theirs = Qwen3NextForCausalLM.from_pretrained(directory).eval()
    ours = {
        HEAD: model.params["lm_head"],
        EMBED: model.params["embed_tokens"],
        NORM: model.params["norm"],
    }
    for i, layer in enumerate(model.params["layers"]):
        for name in ("input_layernorm", "post_attention_layernorm"):
            ours[f"model.layers.{i}.{name}.weight"] = layer[name]
        for name in {"q_norm", "k_norm"} & {name for name, _ in layer.layout.parts}:  # small: float32, of values of the dtype
            own = layer[name].astype(model.dtype)
            assert np.array_equal(np.asarray(own, np.float32), layer[name])
            ours[f"model.layers.{i}.self_attn.{name}.weight"] = own
    for name, value in ours.items():
        want = theirs.get_parameter(name).detach()
        assert str(want.dtype) == f"torch.{value.dtype}", name
        assert torch.equal(torch.tensor(np.asarray(value, np.float32)), want.float()), name
    return ours


def test_an_index_and_one_file_side_by_side(tmp_path, mesh):
    """transformers reads the one file, whatever the index says, and whether its shards are there or not."""
    directory = micro(tmp_path / "micro", files=2)
    other = {key: value + 1 for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}
    save_file(other, directory / SINGLE)
    ours = check_as_transformers_reads(directory, mesh)
    assert np.array_equal(ours[NORM], other[NORM])
    for file in directory.glob("model-*"):
        file.unlink()
    check_as_transformers_reads(directory, mesh)


def test_a_folder_saved_twice(tmp_path, mesh):
    """In two files over three, with the old shards left behind: only what the index names is read."""
    directory = micro(tmp_path / "micro", files=3)
    micro(directory, files=2)
    assert len(list(directory.glob("*.safetensors"))) == 5
    check_as_transformers_reads(directory, mesh)


def test_an_index_that_names_the_wrong_one_of_its_files(tmp_path, mesh):
    directory = micro(tmp_path / "micro", files=2)
    raw = json.loads((directory / INDEX).read_text())
    first, last = sorted(set(raw["weight_map"].values()))
    raw["weight_map"][NORM] = first
    raw["weight_map"]["model.layers.9.of.an.older.save.weight"] = last
    (directory / INDEX).write_text(json.dumps(raw))
    check_as_transformers_reads(directory, mesh)


def test_shards_in_a_folder_below(tmp_path, mesh):
    directory = micro(tmp_path / "micro", files=2)
    (directory / "shards").mkdir()
    for file in directory.glob("*.safetensors"):
        file.rename(directory / "shards" / file.name)
    raw = json.loads((directory / INDEX).read_text())
    raw["weight_map"] = {key: f"shards/{name}" for key, name in raw["weight_map"].items()}
    (directory / INDEX).write_text(json.dumps(raw))
    check_as_transformers_reads(directory, mesh)


@pytest.mark.parametrize("files", [1, 2])
def test_a_cache_of_links_to_blobs(tmp_path, mesh, files):
    """As huggingface_hub lays it out: snapshots/<commit>/name -> ../../blobs/<hash>."""
    snapshot = micro(tmp_path / "snapshots" / "0123", files=files)
    (tmp_path / "blobs").mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(tmp_path / "blobs" / f"{i:040x}")
        file.symlink_to(f"../../blobs/{i:040x}")
    check_as_transformers_reads(snapshot, mesh)


def test_a_tied_config_whose_file_holds_another_head(tmp_path, mesh):
    """transformers keeps the head, and says so; it ties where the two are equal, which comes to the same."""
    directory = micro(tmp_path / "micro", tie_word_embeddings=True)
    tensors = load_file(directory / SINGLE)
    assert not np.array_equal(tensors[HEAD], tensors[EMBED])
    ours = check_as_transformers_reads(directory, mesh)
    assert np.array_equal(ours[HEAD], tensors[HEAD])
    save_file({**tensors, HEAD: tensors[EMBED]}, directory / SINGLE)
    check_as_transformers_reads(directory, mesh)
    del tensors[HEAD]
    save_file(tensors, directory / SINGLE)
    ours = check_as_transformers_reads(directory, mesh)
    assert np.array_equal(ours[HEAD], tensors[EMBED])


@pytest.mark.parametrize("named", ["float32", "bfloat16", "float16", None])
def test_the_dtype_that_the_config_names_goes_before_the_files(tmp_path, mesh, named):
    ours = check_as_transformers_reads(micro(tmp_path / "micro", dtype=named), mesh)
    assert ours[NORM].dtype == (named or "float32")
    assert jax.tree.leaves(load(tmp_path / "micro", mesh(1), dtype="float32").params)[0].dtype == "float32"


def test_a_folder_with_an_adapter(tmp_path, refused):
    directory = micro(tmp_path / "micro")
    (directory / "adapter_config.json").write_text("{}")
    assert "holds adapter_config.json, and adapters are not applied; merge" in refused(directory)
