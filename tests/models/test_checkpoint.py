"""Checkpoints: each device reads its slices and no more, and what is wrong with a file is said in one sentence."""

import json
import shutil
import struct
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moekit.errors import MoekitError
from moekit.models.qwen3next import CheckpointError, load, write_random_checkpoint
from moekit.models.qwen3next.checkpoint import Checkpoint
from moekit.models.qwen3next.layer import HOMES
from moekit.models.qwen3next.sharding import REPLICATED, checkpoint_shapes, parameters

CASE = "sixteen-value-heads"  # spread over three files
ONE = "four-layers"  # one file
QKVZ = "model.layers.0.linear_attn.in_proj_qkvz.weight"


@pytest.fixture
def broken(zoo, tmp_path):
    """A copy of the one-file checkpoint and a function that rewrites its tensors."""
    directory = tmp_path / "broken"
    shutil.copytree(zoo.directory(ONE), directory)

    def rewrite(change):
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return directory, rewrite


def refusal(directory, mesh):
    with pytest.raises(CheckpointError) as caught:
        load(directory, mesh)
    assert isinstance(caught.value, MoekitError)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_tensor(broken, mesh):
    directory, rewrite = broken
    rewrite(lambda tensors: tensors.pop(QKVZ))
    assert f"tensor {QKVZ} of shape [768, 64] is missing from every file" in refusal(directory, mesh(1))


def test_an_extra_tensor(broken, mesh):
    directory, rewrite = broken
    rewrite(lambda tensors: tensors.update({"model.layers.4.extra.weight": np.zeros(3, np.float32)}))
    said = refusal(directory, mesh(1))
    assert "model.safetensors: tensor model.layers.4.extra.weight is not part of the model" in said


def test_multi_token_prediction_is_ignored(broken, mesh):
    directory, rewrite = broken
    rewrite(lambda tensors: tensors.update({"mtp.fc.weight": np.zeros((3, 4), np.float32)}))
    load(directory, mesh(1))


def test_a_misshaped_tensor(broken, mesh):
    directory, rewrite = broken
    rewrite(lambda tensors: tensors.update({QKVZ: tensors[QKVZ][:-1].copy()}))
    wanted = f"model.safetensors: tensor {QKVZ} has shape [767, 64] where [768, 64] is needed"
    assert refusal(directory, mesh(2)) == wanted


@pytest.mark.parametrize(("kind", "name"), [(np.float64, "F64"), (np.int8, "I8"), (np.float16, "F16")])
def test_a_tensor_of_another_dtype(broken, mesh, kind, name):
    directory, rewrite = broken
    rewrite(lambda tensors: tensors.update({QKVZ: tensors[QKVZ].astype(kind)}))
    wanted = f"model.safetensors: tensor {QKVZ} has dtype {name} where F32 is needed"
    assert refusal(directory, mesh(1)) == wanted


def test_a_whole_checkpoint_of_a_dtype_that_is_not_served(broken, mesh):
    directory, rewrite = broken
    rewrite(lambda tensors: tensors.update({k: v.astype(np.float64) for k, v in tensors.items()}))
    said = refusal(directory, mesh(1))
    assert said.startswith("model.safetensors: tensor model.embed_tokens.weight has dtype F64 where ")


def test_norms_and_the_router_may_be_float32_in_a_narrow_checkpoint(zoo, tmp_path, mesh):
    directory = tmp_path / "mixed"
    shutil.copytree(zoo.directory(ONE, "bfloat16"), directory)
    tensors = load_file(directory / "model.safetensors")
    for key in tensors:
        if key.endswith(("norm.weight", "mlp.gate.weight")):
            tensors[key] = tensors[key].astype(np.float32)
    save_file(tensors, directory / "model.safetensors")
    model, plain = load(directory, mesh(1)), zoo.model(ONE, "bfloat16", 1)
    assert all(
        a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(plain.params), strict=True)
    )


@pytest.mark.parametrize("cut", [1, 5000])
def test_a_truncated_tensor(zoo, broken, mesh, cut):
    directory, _ = broken
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    said = refusal(directory, mesh(1))
    assert said.startswith("model.safetensors: tensor ")
    assert f"is truncated: the file ends at byte {len(whole) - cut} where " in said
    assert said.split()[2] in checkpoint_shapes(zoo.config(ONE))


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 2) + b"{{"])
def test_a_file_that_is_no_safetensors(broken, mesh, content):
    directory, _ = broken
    (directory / "model.safetensors").write_bytes(content)
    said = refusal(directory, mesh(1))
    assert said.startswith("model.safetensors ")


def test_no_weights_at_all(broken, mesh):
    directory, _ = broken
    (directory / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refusal(directory, mesh(1))


def test_an_index_that_lies(zoo, tmp_path, mesh):
    directory = tmp_path / "sharded"
    shutil.copytree(zoo.directory(CASE), directory)
    index = directory / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    files = sorted(set(listed["weight_map"].values()))
    assert len(files) == 3
    (directory / files[2]).unlink()
    assert refusal(directory, mesh(1)).startswith(f"{files[2]} does not exist")
    listed["weight_map"] = dict.fromkeys(listed["weight_map"], files[0])
    index.write_text(json.dumps(listed))
    assert "is missing from every file" in refusal(directory, mesh(1))
    index.write_text("{}")
    assert "cannot be read as a safetensors index" in refusal(directory, mesh(1))


def test_one_file_or_many_give_the_same_model(zoo, tmp_path, mesh):
    config = zoo.config(ONE)
    many = load(write_random_checkpoint(tmp_path / "many", config, seed=0, files=4), mesh(2))
    one = zoo.model(ONE, tp=2)
    pairs = zip(jax.tree.leaves(many.params), jax.tree.leaves(one.params), strict=True)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


@pytest.mark.parametrize("case", ["four-layers", "sixteen-value-heads", "odd-experts"])
@pytest.mark.parametrize("tp", [1, 2, 8])
def test_a_rank_reads_its_own_slices_only(zoo, mesh, monkeypatch, case, tp):
    """Elements read of each tensor: all of it over all ranks, and none twice but what every rank has."""
    read = defaultdict(list)
    original = Checkpoint.read

    def counted(self, slab, **how):
        block = original(self, slab, **how)
        read[slab.key].append(block.size)
        return block

    monkeypatch.setattr(Checkpoint, "read", counted)
    load(zoo.directory(case), mesh(tp))
    config = zoo.config(case)
    copies = max(1, tp // config.num_key_value_heads)
    for key, shape in checkpoint_shapes(config).items():
        expected = int(np.prod(shape))
        if key.endswith(("k_proj.weight", "v_proj.weight")):
            expected *= copies
        elif key.endswith(("layernorm.weight", "_norm.weight", "attn.norm.weight", "mlp.gate.weight", "expert_gate.weight")):
            expected *= tp  # each rank has all of them, among its rows
        if config.tie_word_embeddings and "embed_tokens" in key:
            expected *= 2  # the embedding, and the same rows as the head
        assert sum(read[key]) == expected, key


@pytest.mark.parametrize("case", ["four-layers", "sixteen-value-heads", "odd-experts"])
@pytest.mark.parametrize("tp", [1, 2, 8])
def test_a_ranks_share_is_the_one_the_table_says(zoo, tp, case):
    """Each device's shard against the checkpoint, sliced here by hand from Hugging Face's layout."""
    model = zoo.model(case, tp=tp)
    config = model.config
    whole = {}
    for file in sorted(zoo.directory(case).glob("*.safetensors")):
        whole |= load_file(file)
    heads, ratio = config.linear_num_key_heads // tp, config.values_per_key
    dim, wide = config.linear_key_head_dim, ratio * config.linear_value_head_dim
    grouped = whole[QKVZ].reshape(config.linear_num_key_heads, 2 * dim + 2 * wide, -1)
    q, k, v, z = np.split(grouped, [dim, 2 * dim, 2 * dim + wide], axis=1)
    conv = whole["model.layers.0.linear_attn.conv1d.weight"][:, 0]
    keys = config.linear_num_key_heads * dim
    parts = conv[:keys], conv[keys : 2 * keys], conv[2 * keys :]
    gate, up = (whole[f"model.layers.0.mlp.shared_expert.{n}_proj.weight"] for n in ("gate", "up"))
    last = config.num_experts - 1
    down = whole[f"model.layers.0.mlp.experts.{last}.down_proj.weight"]
    for rank in range(tp):
        layer, mine = held(model, rank)[0], slice(rank * heads, (rank + 1) * heads)
        joined = np.concatenate([part[mine].reshape(-1, config.hidden_size) for part in (q, k, v, z)])
        assert np.array_equal(layer["in_proj_qkvz"], joined)
        striped = np.concatenate([share(part, rank, tp) for part in parts])
        assert np.array_equal(layer["conv1d"], striped)
        both = np.concatenate([share(gate, rank, tp), share(up, rank, tp)])
        assert np.array_equal(layer["gate_up"], both)
        own = share(down.T, rank, tp)
        assert np.array_equal(layer["experts_down"][last], own)
    attention = config.layer_types.index("full_attention")
    name = f"model.layers.{attention}.self_attn.k_proj.weight"
    k_proj = whole[name].reshape(config.num_key_value_heads, config.head_dim, -1)
    for rank in range(tp):
        first = rank * config.num_key_value_heads // tp
        count = max(1, config.num_key_value_heads // tp)
        expected = k_proj[first : first + count].reshape(-1, config.hidden_size)
        assert np.array_equal(held(model, rank)[attention]["k_proj"], expected)


def share(part, rank, tp):
    return np.split(part, tp)[rank]


def held(model, rank):
    """One rank's share of the layers."""
    return jax.tree.map(lambda array: jax.device_put(array.addressable_shards[rank].data), model.params["layers"])


@pytest.mark.parametrize("case", ["four-layers", "sixteen-value-heads", "odd-experts"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_bytes_per_rank(zoo, case, tp):
    """A rank holds the cut bytes / tp, plus exactly the parameters listed here, plus what makes layers of one size."""
    model = zoo.model(case, tp=tp)
    config = model.config
    everywhere = ("norm.weight", "layernorm.weight", "mlp.gate.weight", "expert_gate.weight", "embed_tokens.weight")
    if config.vocab_size % tp:
        everywhere += ("lm_head.weight",)
    sizes = {key: 4 * int(np.prod(shape)) for key, shape in checkpoint_shapes(config).items()}
    if config.tie_word_embeddings:
        sizes["lm_head.weight"] = sizes["model.embed_tokens.weight"]
    kv = sum(size for key, size in sizes.items() if key.endswith(("k_proj.weight", "v_proj.weight")))
    whole = sum(size for key, size in sizes.items() if key.endswith(everywhere))
    cut = sum(sizes.values()) - kv - whole
    layouts = model.params["layers"].layouts
    room = {home: {x.shapes[HOMES.index(home)] for x in layouts} for home in ("rows", "small")}
    ((rows, width),), ((small,),) = room.values()
    used = [[sum(p.stop - p.start for _, p in x.parts if p.home == home) for home in room] for x in layouts]
    block = 2 * config.moe_intermediate_size // tp
    spare = config.linear_value_head_dim - 1  # rows that a product of several weights may read besides
    assert rows == -(-(max(mine for mine, _ in used) + spare) // block) * block
    assert small == max(mine for _, mine in used)
    filling = sum(4 * ((rows - wide) * width + small - narrow) for wide, narrow in used)
    expected = cut / tp + whole + kv * max(1 / tp, 1 / config.num_key_value_heads) + filling
    held = [0] * tp
    for array in jax.tree.leaves(model.params):
        for rank, piece in enumerate(array.addressable_shards):
            held[rank] += piece.data.nbytes
    assert held == [expected] * tp


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_no_two_weights_of_a_layer_share_an_element(zoo, tp):
    for layout in zoo.model("four-layers", tp=tp).params["layers"].layouts:
        for home, shape in zip(HOMES, layout.shapes, strict=True):
            parts = sorted((p.start, p.stop) for _, p in layout.parts if p.home == home)
            assert all(stop <= start for (_, stop), (start, _) in pairwise(parts))
            if home == "rows8":  # of float8 weights alone
                assert not parts
                continue
            assert parts[0][0] == 0
            assert parts[-1][1] <= np.prod(shape if home == "small" else shape[:-1])


def test_a_view_of_a_weight_is_the_weight(zoo):
    for layer in zoo.model("four-layers").params["layers"]:
        for name, _ in layer.layout.parts:
            np.testing.assert_array_equal(layer.view(name).array().reshape(layer[name].shape), layer[name])


def test_every_replicated_weight_is_meant_to_be(zoo):
    """What is replicated for a tp that divides the vocabulary."""
    config = zoo.config("four-layers")
    leaves = jax.tree.leaves(parameters(config, 8))
    copied = {w.name for p in leaves for w, _ in p.weights if [w.slabs(r) for r in range(8)] == [w.slabs(0)] * 8}
    copied -= {"k_proj", "v_proj"}  # where heads are fewer than ranks, some share one; not all of them
    assert copied == {w.name for p in leaves for w, _ in p.weights if w.copied} == {
        "embed_tokens", "norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "router", "shared_gate",
    }  # fmt: skip
    assert {p.weights[0][0].name for p in leaves if p.spec == REPLICATED} == {"embed_tokens", "norm"}


def test_dtype_converts_all_but_the_decay(zoo, mesh):
    model = load(zoo.directory(ONE), mesh(2), dtype="bfloat16")
    exact = load(zoo.directory(ONE), mesh(2), dtype="float32")
    assert {a.dtype.name for a in jax.tree.leaves(model.params)} == {"bfloat16", "float32"}
    assert [a.dtype.name for a in jax.tree.leaves(replace(model.params["layers"], small=()))] == ["bfloat16"] * 10
    for rank in range(2):
        for layer, wide in zip(held(model, rank), held(exact, rank), strict=True):
            for name, part in layer.layout.parts:
                got, source = np.asarray(layer[name]), np.asarray(wide[name])
                rounded = source if name in ("A_log", "dt_bias") else source.astype("bfloat16")
                np.testing.assert_array_equal(got.astype(np.float32), rounded.astype(np.float32), err_msg=name)
                assert got.dtype == ("float32" if part.home == "small" else "bfloat16")
