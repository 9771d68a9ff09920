"""Pallas's kernels and XLA's in a narrow dtype: two runs whose tokens part by rounding agree, and a planted fault does not."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moekit.cli import agreement, decode, run
from moekit.models.qwen3next import TINY, Generation, generate, kernels, load, write_random_checkpoint
from moekit.models.qwen3next.config import ATTENTION, GDN

SMALL = replace(TINY, layer_types=(GDN, ATTENTION), num_experts=5, num_experts_per_tok=2, vocab_size=64)
SEED, PARTING = 1, 10  # of weights: of most tests, and of those whose greedy tokens part in bfloat16


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Decode on the virtual CPU devices, also where there is a GPU."""
    monkeypatch.setattr(run, "devices", lambda: jax.devices("cpu"))
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", SMALL, SEED)


def test_tokens_that_rounding_parts_are_no_disagreement(moekit, tmp_path, capsys):
    parting = write_random_checkpoint(tmp_path / "parting", SMALL, PARTING)
    done = moekit("decode", "--checkpoint", str(parting), "--tp", "1", "--dtype", "bfloat16", "--new-tokens", "24", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["agreement"]
    assert found["agree"]
    assert not found["equal"]  # or the weights show nothing
    logits = found["logits"]
    assert logits["rows"] == 48
    for which in ("all", "worst"):
        assert 0 < logits["pallas"][which] <= logits["bound"][which] < 0.1  # logits are of size 1
        assert 0.5 < logits["pallas"][which] / logits["xla"][which] < 2
    decode._show(json.loads(done.stdout))
    shown = capsys.readouterr().out
    assert "pallas and xla agree: fed the same tokens" in shown
    assert "in bfloat16 two near-equal logits fall either way" in shown


def last_row(out):
    """A wrong answer in the last row alone, as a mask at a tail would give."""
    return out.at[-1].multiply(1.25)


FAULTS = {
    "add_rms_norm": lambda f: lambda *a, **k: f(*a, **k | {"eps": 0.2}),
    "gated_rms_norm": lambda f: lambda *a, **k: last_row(f(*a, **k)),
    "delta_rule_step": lambda f: lambda *a, **k: (lambda read, state: (read, state * 0.9))(*f(*a, **k)),
    "down_combine": lambda f: lambda hidden, *a, **k: f(hidden * jnp.nan, *a, **k),
}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A bfloat16 model of the layer that has all the fusions, prompts and tokens to feed."""
    alone = replace(SMALL, layer_types=(GDN,))
    directory = write_random_checkpoint(tmp_path_factory.mktemp("narrow") / "alone", alone, SEED)
    with jax.default_device(jax.devices("cpu")[0]):
        model = load(directory, agreement_mesh(), "bfloat16")
        prompts = run.random_prompts(SMALL, 2, 8)
        return model, prompts, [[3, 60, 5, 7, 11, 2], [4, 4, 9]]


def agreement_mesh():
    return jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("tp",))


def placed(monkeypatch, fusion=None, fault=None):
    """Array evaluation in the place of Pallas's kernels, as it compiles sooner, with a fault in one of them."""
    original = kernels.named
    instead = original("xla")
    if fusion is not None:
        instead = replace(instead, **{fusion: fault(getattr(instead, fusion))})
    monkeypatch.setattr(kernels, "named", lambda name: instead if name == "pallas" else original(name))


def test_without_a_fault_they_are_close(narrow, monkeypatch):
    placed(monkeypatch)
    close = agreement.closeness(*narrow, "pallas")
    assert close.within
    assert close.fused == close.xla
    assert close.rows == 9


@pytest.mark.parametrize("fusion", FAULTS)
def test_a_planted_fault_is_found_in_bfloat16(narrow, monkeypatch, fusion):
    placed(monkeypatch, fusion, FAULTS[fusion])
    model, prompts, tokens = narrow
    if fusion in ("add_rms_norm", "down_combine"):
        tokens = [[3], [4]]  # these show in the logits of the prompt: no step is compiled
    assert not agreement.closeness(model, prompts, tokens, "pallas").within


def test_runs_of_which_one_ended_differ():
    made = [Generation(tokens, 1.0, 1.0, 1.0, 1) for tokens in (((1, 2), (3, 4, 5)), ((1, 2), (3, 4)))]
    assert agreement.difference(*made) == agreement.Difference(1, 2, (5, None))
    assert agreement.difference(made[0], made[0]) is None


def test_a_checkpoint_of_nan_fails_in_one_sentence(moekit, tmp_path):
    directory = write_random_checkpoint(tmp_path / "nan", SMALL)
    tensors = load_file(directory / "model.safetensors")
    save_file({name: np.full_like(t, np.nan) for name, t in tensors.items()}, directory / "model.safetensors")
    done = moekit("decode", "--checkpoint", str(directory), "--tp", "1")
    assert done.exit_code == 1
    assert not done.stdout
    assert "holds NaN or an infinity" in " ".join(done.stderr.split())


def test_logits_out_of_range_fail_in_one_sentence(moekit, tmp_path):
    """Finite weights in float16 whose sums are not: greedy tokens would be zeros from both kinds."""
    directory = write_random_checkpoint(tmp_path / "large", SMALL)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.0.linear_attn.in_proj_qkvz.weight"][:] = 6e4
    save_file(tensors, directory / "model.safetensors")
    done = moekit("decode", "--checkpoint", str(directory), "--tp", "1", "--dtype", "float16", "--kernels", "xla")
    assert done.exit_code == 1
    assert not done.stdout
    assert "logits of sequence 0 hold NaN or an infinity at new token 0" in " ".join(done.stderr.split())


@pytest.mark.parametrize(("text", "length"), [(None, 8), ("one", 3), ("list", 3), ("outside", 8)])
def test_the_checkpoints_end_tokens_end_a_sequence(moekit, small, tmp_path, monkeypatch, text, length):
    free = generate(load(small, agreement_mesh()), [[1, 2, 3]], max_new_tokens=8, kernels="xla").tokens[0]
    stop = free[2]
    assert stop not in free[:2]
    directory = tmp_path / "ends"
    directory.mkdir()
    for file in small.iterdir():
        (directory / file.name).symlink_to(file)
    ends = {"one": stop, "list": [63, stop] if 63 not in free[:2] else [stop], "outside": 64, None: None}[text]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    original = run.run
    monkeypatch.setattr(run, "run", lambda m, p, n, e, which, progress: original(m, p, n, e, "xla", progress))
    done = moekit("decode", "--checkpoint", str(directory), "--tp", "1", "--prompt-ids", "1,2,3", "--new-tokens", "8", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["tokens"] == [list(free[:length])]
    assert report["ends"] == ([] if text in (None, "outside") else ends if isinstance(ends, list) else [ends])
    assert ("the end token 64 is outside the vocabulary of 64" in done.stderr) == (text == "outside")
