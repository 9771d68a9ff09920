"""`moekit decode`: one run for real in a process of its own, and everything around it here."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import pytest

from moekit.cli import decode, platform, run
from moekit.models.qwen3next import TINY, Generation, load, write_random_checkpoint
from moekit.models.qwen3next.config import ATTENTION, GDN
from moekit.models.qwen3next.kernels import FUSIONS

SMALL = replace(TINY, layer_types=(GDN, ATTENTION), num_experts=5, num_experts_per_tok=2, vocab_size=64)
PER_STEP = {  # kernels of one decode step of the shipped model: two layers of gated delta net and two of attention
    "add_rms_norm": 9,
    "gate_projections": 0,
    "topk_softmax": 0,
    "gate_topk": 4,
    "down_combine": 4,
    "expert_gate_up": 0,
    "expert_down_shared": 0,
    "experts": 20,
    "qkv_norm_rope": 2,
    "gated_attention_decode": 2,
    "gated_rms_norm": 2,
    "causal_conv1d_step": 2,
    "conv_projections": 0,
    "row_product": 0,
    "add_norm_gate_projections": 0,
    "delta_rule_step": 2,
    "delta_rule_chunks": 0,
    "unit_lower_inverse": 0,
    **dict.fromkeys((name for name in FUSIONS if name.startswith(("scaled_", "quantised"))), 0),
}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Decode on the virtual CPU devices, also where there is a GPU."""
    monkeypatch.setattr(run, "devices", lambda: jax.devices("cpu"))
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return str(write_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "small", SMALL))


def generation(*tokens: tuple[int, ...]) -> Generation:
    steps = len(tokens[0]) - 1
    return Generation(tokens, 2.0, 1.0 if steps else 0.0, 0.5 * max(0, steps - 1), max(0, steps - 1))


@pytest.fixture
def fake(monkeypatch):
    """Replace both runs by tokens that the test names."""

    def with_tokens(pallas, xla):
        runs = {"pallas": generation(*pallas), "xla": generation(*xla)}
        monkeypatch.setattr(run, "run", lambda model, prompts, new, ends, kernels, progress: runs[kernels])
        monkeypatch.setattr(run, "served", lambda *_: {"add_rms_norm": {"implementation": "xla", "kernels": 0}})

    return with_tokens


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")} | environment
    whole = [sys.executable, "-m", "moekit.cli", "decode", *arguments]
    return subprocess.run(whole, capture_output=True, text=True, check=False, env=env, timeout=600)


def test_with_no_arguments_at_all():
    """8 virtual devices, the shipped model's answers, both kinds of kernels, one verdict; nothing is written anywhere."""
    result = command("--json", XDG_CACHE_HOME="/proc/nothing", HOME="/proc/nothing", JAX_PLATFORMS="cpu")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["shipped"]
    assert report["dtype"] == "float32"
    assert (report["platform"], report["devices"], report["tp"]) == ("cpu", 8, 8)
    assert [asked["question"].split()[0] for asked in report["questions"]] == ["copy", "flip", "sort", "add"]
    assert all(asked["said"] == asked["answer"] for asked in report["questions"])
    assert all(tokens[-1] == 256 for tokens in report["tokens"])
    assert report["agreement"] == {"agree": True, "equal": True}
    served = report["served"]
    assert {name: how["kernels"] for name, how in served.items()} == PER_STEP
    assert {how["implementation"] for how in served.values() if how["kernels"]} == {"pallas, interpreted"}
    assert report["all_reduce"].startswith("psum: channel: ")
    for timing in report["timing"].values():
        assert timing["steady_steps"] > 1
        assert timing["steady_tokens_per_second"] > 0


def test_prompts_of_several_lengths_over_two_ranks(moekit, small):
    arguments = ("--checkpoint", small, "--prompt-ids", "1,2,3", "--prompt-ids", "4 5", "--tp", "2")
    result = moekit("decode", *arguments, "--new-tokens", "3")
    assert result.exit_code == 0, result.output
    assert "1 2 3 →" in result.stdout
    assert "4 5 →" in result.stdout
    assert "tp 2 of 8" in result.stdout
    assert "pallas and xla agree: all 6 new tokens are equal" in result.stdout


def test_xla_kernels_are_served_by_array_evaluation(small):
    model = load(small, run.mesh_of(1))
    assert run.served(model, 1, "xla") == {name: {"implementation": "xla", "kernels": 0} for name in FUSIONS}


@pytest.mark.gpu
def test_on_gpus(tmp_path):
    """As many GPUs as there are, compiled kernels."""
    result = command("--json", "--checkpoint", str(write_random_checkpoint(tmp_path / "tiny")))
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["platform"] == "gpu"
    assert report["agreement"] == {"agree": True, "equal": True}
    assert {way for how in report["served"].values() for way in how["implementation"].split(" and ")} <= {"pallas", "mosaic"}


def test_runs_that_disagree_end_in_failure(moekit, small, fake):
    fake(pallas=[(1, 2, 3), (4, 5, 6)], xla=[(1, 2, 3), (4, 9, 9)])
    shown = moekit("decode", "--checkpoint", small)
    assert shown.exit_code == 1
    assert "disagree: new token 1 of sequence 1 is 5 with pallas and 9 with xla" in shown.stdout
    printed = moekit("decode", "--checkpoint", small, "--json")
    assert printed.exit_code == 1
    agreement = json.loads(printed.stdout)["agreement"]
    assert agreement == {"agree": False, "equal": False, "sequence": 1, "position": 1, "pallas": 5, "xla": 9}


def test_one_new_token_has_no_steady_state(moekit, small, fake):
    fake(pallas=[(7,)], xla=[(7,)])
    result = moekit("decode", "--checkpoint", small, "--batch", "1", "--new-tokens", "1")
    assert result.exit_code == 0
    assert "–" in result.stdout
    assert "all 1 new tokens are equal" in result.stdout


def test_the_kernels_asked_for_are_the_tokens_shown(moekit, small, fake):
    fake(pallas=[(1, 2)], xla=[(1, 3)])
    report = json.loads(moekit("decode", "--checkpoint", small, "--kernels", "xla", "--json").stdout)
    assert report["kernels"] == "xla"
    assert report["tokens"] == [[1, 3]]


def test_random_prompts_repeat_and_have_the_size_asked_for(moekit, small, fake):
    fake(pallas=[(1,), (1,), (1,)], xla=[(1,), (1,), (1,)])
    arguments = ("--checkpoint", small, "--batch", "3", "--prompt-len", "5", "--json")
    prompts = json.loads(moekit("decode", *arguments).stdout)["prompts"]
    assert [len(p) for p in prompts] == [5, 5, 5]
    assert json.loads(moekit("decode", *arguments).stdout)["prompts"] == prompts


def test_default_tp_is_the_most_that_the_heads_allow():
    assert run.largest_tp(TINY, 8) == 8
    assert run.largest_tp(TINY, 7) == 4
    assert run.largest_tp(replace(TINY, num_attention_heads=6, num_key_value_heads=2), 8) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt-ids", "1,x"], "'1,x' is not a list of token ids such as 1,2,3"),
        (["--prompt-ids", " "], "a prompt needs at least one token id"),
        (["--prompt-ids", "64"], "64 is no token id; the model has 64, from 0"),
        (["--prompt-ids", "-1"], "-1 is no token id"),
        (["--prompt-ids", "1", "--batch", "2"], "give one or the other"),
        (["--batch", "0"], "0 is not in the range x>=1"),
        (["--new-tokens", "0"], "0 is not in the range x>=1"),
        (["--kernels", "cuda"], "'cuda' is not one of"),
        (["--tp", "9"], "9 is more than the 8 cpu devices here"),
        (["--tp", "3"], "tp = 3 does not divide linear_num_key_heads = 8"),
    ],
)
def test_what_is_asked_wrongly_is_one_sentence_and_exit_code_2(moekit, small, arguments, said):
    result = moekit("decode", "--checkpoint", small, *arguments)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())
    assert not result.stdout


def test_a_checkpoint_that_is_not_there(moekit, tmp_path):
    assert moekit("decode", "--checkpoint", str(tmp_path / "none")).exit_code == 2
    empty = moekit("decode", "--checkpoint", str(tmp_path))
    assert empty.exit_code == 1
    assert "config.json does not exist" in " ".join(empty.stderr.split())


def test_a_truncated_checkpoint_is_one_sentence(moekit, tmp_path):
    directory = write_random_checkpoint(tmp_path / "cut", SMALL)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    result = moekit("decode", "--checkpoint", str(directory), "--tp", "1")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert "model.safetensors" in result.stderr


def test_without_jax_the_exit_code_is_3(moekit, monkeypatch):
    monkeypatch.setattr(decode, "installed", lambda module: module != "jax")
    result = moekit("decode")
    assert result.exit_code == 3
    assert result.stderr == "Error: decode needs jax; install moekit[jax]\n"


@pytest.mark.parametrize(("said", "shown"), [("ab", "right"), ("[x]", "wrong: ab")])
def test_answers_are_shown_as_right_or_wrong(capsys, said, shown):
    decode.console().print(decode._question_table([{"question": "flip ba", "answer": "ab", "said": said}]))
    printed = capsys.readouterr().out
    assert "flip ba" in printed
    assert said in printed
    assert shown in printed


def test_eight_virtual_devices_here():
    assert len(jax.devices("cpu")) == platform.VIRTUAL_DEVICES
