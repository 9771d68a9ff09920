"""`moekit evaluate`: answers of the shipped model by arrays and by transformers, and what its report is made of."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from moekit.cli import answers, evaluate, run
from moekit.models.qwen3next import TINY, kernels, load, write_random_checkpoint
from moekit.models.qwen3next.config import ATTENTION, GDN
from moekit.models.qwen3next.questions import held_out


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """Evaluate on a CPU, also where there is a GPU."""
    monkeypatch.setattr(run, "devices", lambda: jax.devices("cpu"))
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def test_the_shipped_model_answers_and_transformers_agrees(moekit):
    asked = ("--questions", "16", "--batch", "16", "--new-tokens", "10", "--dtype", "float32")
    result = moekit("evaluate", *asked, "--kernels", "xla", "--kernels", "transformers", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    ours, theirs = report["rows"]
    assert (ours["kernels"], theirs["kernels"]) == ("xla", "transformers")
    assert ours["right"] >= 15
    assert [count for _, count in ours["tasks"].values()] == [4, 4, 4, 4]
    assert sum(right for right, _ in ours["tasks"].values()) == ours["right"]
    assert theirs["differ"] == 0
    assert ours["layer_error"]["error"] < 1e-5
    evaluate._show(report)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    config = replace(TINY, layer_types=(GDN, ATTENTION), num_experts=5, num_experts_per_tok=2, vocab_size=264)
    return load(write_random_checkpoint(tmp_path_factory.mktemp("small") / "small", config), run.mesh_of(1))


def test_a_layer_that_is_wrong_is_the_worst(small, monkeypatch):
    """A norm of the delta net's layer is planted wrong: its error stands out, and the number is that layer's."""
    prompts = [question.tokens for question in held_out(2)]
    original = kernels.named("xla")
    assert answers.layer_error(small, "xla", prompts)[1] < 1e-5
    wrong = replace(original, gated_rms_norm=lambda *a, **k: original.gated_rms_norm(*a, **k) * 1.01)
    at, error = answers.layer_error(small, wrong, prompts)
    assert at == 0
    assert 1e-4 < error < 0.1


def test_a_layer_without_a_number_is_the_worst(small, monkeypatch):
    """NaN is greater than nothing: it would be passed over."""
    original = answers.layer_output

    def lost(*arguments, at, **options):
        return original(*arguments, at=at, **options) * (np.nan if at == 0 else 1)

    monkeypatch.setattr(answers, "layer_output", lost)
    at, error = answers.layer_error(small, "xla", [question.tokens for question in held_out(2)])
    assert (at, error) == (0, np.inf)


def row(name, dtype, *texts, error=None):
    return answers.Row(name, dtype, list(texts), error)


def test_rows_are_scored_against_the_questions_and_the_unfused():
    asked = held_out(4)
    right = [question.answer for question in asked]
    rows = [
        row("pallas", "bfloat16", "?", *right[1:], error=(2, 0.5)),
        row("xla", "bfloat16", *right),
        row("xla", "float32", *right),
    ]
    first, second, _ = (answers.scored(each, asked, rows) for each in rows)
    assert first == {
        "kernels": "pallas",
        "dtype": "bfloat16",
        "right": 3,
        "tasks": {"copy": (0, 1), "flip": (1, 1), "sort": (1, 1), "add": (1, 1)},
        "differ": 1,
        "layer_error": {"layer": 2, "error": 0.5},
    }
    assert (second["right"], second["differ"], second["layer_error"]) == (4, None, None)


@pytest.mark.parametrize(
    ("pallas", "xla", "questions", "agree"), [(9, 9, 10, 1), (8, 9, 10, 1), (7, 9, 10, 0), (597, 599, 600, 1)]
)
def test_kernels_agree_but_for_one_of_300(pallas, xla, questions, agree):
    rows = [{"kernels": "pallas", "dtype": "float32", "right": pallas}, {"kernels": "xla", "dtype": "float32", "right": xla}]
    assert evaluate._agree([*rows, {"kernels": "pallas", "dtype": "bfloat16", "right": 0}], questions) == agree


def test_kernels_that_do_not_agree_are_a_failure(moekit, monkeypatch):
    def silent(model, name, prompts, *_):
        return [[256]] * len(prompts) if name == "pallas" else [[*q.answer.encode(), 256] for q in held_out(len(prompts))]

    monkeypatch.setattr(answers, "by", silent)
    monkeypatch.setattr(answers, "layer_error", lambda *_: (0, 0.0))
    result = moekit("evaluate", "--questions", "8", "--kernels", "pallas", "--kernels", "xla", "--dtype", "float32")
    assert result.exit_code == 1
    assert "0/8" in result.stdout
    assert "8/8" in result.stdout
    assert "moekit's kernels and xla do not have equally many answers right" in result.stderr


def test_a_batch_is_of_the_questions_there_are(moekit, monkeypatch):
    """It is filled up to its size, with questions asked again, so that more would be asked than there are."""
    monkeypatch.setattr(answers, "by", lambda model, name, prompts, batch, *_: [[*b"x" * batch]] * len(prompts))
    monkeypatch.setattr(answers, "layer_error", lambda *_: (0, 0.0))
    asked = ("--questions", "4", "--batch", "5000", "--kernels", "xla", "--dtype", "float32")
    report = json.loads(moekit("evaluate", *asked, "--json").stdout)
    assert (report["batch"], report["all_reduce"]) == (4, "one rank adds up nothing")


def test_one_program_serves_a_batch_that_is_not_full(small, monkeypatch):
    sizes = []

    def fake(model, prompts, **_):
        sizes.append(len(prompts))
        return type("Made", (), {"tokens": tuple((len(p),) for p in prompts)})

    monkeypatch.setattr(answers, "generate", fake)
    made = answers.by(small, "xla", [[1], [1, 2], [1, 2, 3]], 2, 4, (), lambda *_: None)
    assert (sizes, list(made)) == ([2, 2], [(1,), (2,), (3,)])


def test_an_answer_of_transformers_ends_at_its_end():
    assert answers._ended([5, 6, 256, 7], (256,)) == [5, 6, 256]
    assert answers._ended([5, 6], (256,)) == [5, 6]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--questions", "0"], 2, "0 is not in the range x>=1"),
        (["--questions", "2001"], 2, "2001 questions of at most 2000; ask fewer"),
        (["--kernels", "cuda"], 2, "'cuda' is not one of"),
        (["--tp", "3"], 2, "tp = 3 does not divide"),
        (["--tp", "1", "--kernels", "xla", "--activations", "float8_e4m3fn"], 2, "to which kernels xla round nothing"),
    ],
)
def test_what_is_asked_wrongly(moekit, arguments, code, said):
    result = moekit("evaluate", *arguments)
    assert result.exit_code == code
    assert said in " ".join(result.stderr.split())


def test_what_is_missing_is_said(moekit, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "installed", lambda module: module != "transformers")
    refused = moekit("evaluate", "--kernels", "transformers")
    assert (refused.exit_code, refused.stderr) == (
        3, "Error: --kernels transformers needs transformers and torch; install moekit[dev]\n")  # fmt: skip
    monkeypatch.setattr(evaluate, "installed", lambda module: module != "tokenizers")
    refused = moekit("evaluate")
    assert (refused.exit_code, refused.stderr) == (3, "Error: evaluate needs tokenizers; install moekit[text]\n")
