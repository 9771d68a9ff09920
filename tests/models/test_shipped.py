"""The model that moekit ships: what it answers, what transformers computes from the same files, and how it was trained."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3NextForCausalLM

from moekit.errors import ArgumentError
from moekit.models.qwen3next import SHIPPED, generate, load, prefill, quantize, save, train_tiny
from moekit.models.qwen3next.questions import MOST, TASKS, ask, draw, held_out, said
from moekit.models.qwen3next.save import tensors_of
from moekit.models.qwen3next.text import Text
from tests.models.micro import MICRO


@pytest.fixture(scope="module")
def shipped(mesh):
    return load(SHIPPED, mesh(1), "float32")


def answered(model):
    """Of 600 questions that it was not trained on, which a model answers right."""
    asked = held_out(600)
    made = generate(model, [q.tokens for q in asked], max_new_tokens=10, eos=model.config.eos_token_ids, kernels="xla")
    return asked, [said(tokens) == question.answer for question, tokens in zip(asked, made.tokens, strict=True)]


@pytest.fixture(scope="module")
def right(shipped):
    return answered(shipped)


def test_it_answers_questions_that_it_was_not_trained_on(right):
    for task in TASKS:
        assert np.mean([ok for question, ok in zip(*right, strict=True) if question.task == task]) >= 0.97, task


def test_in_fp8_it_answers_as_many(right, mesh, tmp_path):
    """But for one of 300."""
    quantize(SHIPPED, tmp_path / "fp8")
    _, there = answered(load(tmp_path / "fp8", mesh(1), "float32"))
    assert abs(sum(there) - sum(right[1])) <= 2


def test_transformers_computes_the_same_logits(shipped):
    model = Qwen3NextForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = np.array([ask("sort", "moekit").tokens, ask("flip", "kernel").tokens], np.int32)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    lengths = np.full(len(tokens), tokens.shape[1], np.int32)
    mine, _ = prefill(shipped, tokens, lengths, cache_length=64, kernels="xla", every_logit=True)
    assert np.abs(np.asarray(mine) - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_its_tokenizer_spells_every_byte_and_transformers_agrees():
    text, theirs = Text(SHIPPED), AutoTokenizer.from_pretrained(SHIPPED)
    whole = "".join(map(chr, range(256))) + "東京"
    assert text.encode(whole) == list(whole.encode()) == theirs.encode(whole)
    assert text.decode(list(whole.encode())) == whole
    question = ask("add", "17 25")
    chat = [{"role": "user", "content": "of an earlier turn"}, {"role": "user", "content": question.text}]
    assert text.encode_chat(chat) == question.tokens
    assert theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == question.tokens
    assert text.ends(train_tiny.CONFIG) == (256,)


def test_questions_have_their_answers():
    words = {"copy": "hello", "flip": "olleh", "sort": "ehllo"}
    assert {task: ask(task, "hello").answer for task in words} == words
    assert ask("add", "17 25").answer == "42"
    rng = np.random.default_rng(0)
    drawn = [draw(rng, task, longest=3, held_out=kept) for task in TASKS for kept in (False, True) for _ in range(20)]
    assert [question.held_out for question in drawn] == ([False] * 20 + [True] * 20) * len(TASKS)
    assert max(len(question.text) for question in drawn if question.task != "add") == len("copy abc")
    assert len({question.text for question in held_out(MOST)}) == MOST
    with pytest.raises(ArgumentError, match="held_out: 2001 questions of at most 2000"):
        held_out(MOST + 1)


def test_a_saved_model_is_the_model(shipped, tmp_path, mesh):
    """From the shares of several ranks, in its own dtype and in bfloat16, of which the shipped weights are."""
    cut = load(SHIPPED, mesh(8), "float32")
    whole = tensors_of(shipped)
    for name, tensor in tensors_of(cut).items():
        assert np.array_equal(tensor, whole[name]), name
    back = load(save(cut, tmp_path, "bfloat16"), mesh(1), "float32")
    for mine, theirs in zip(jax.tree.leaves(back.params), jax.tree.leaves(shipped.params), strict=True):
        assert np.array_equal(mine, theirs)


def test_a_training_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Two steps, kept after the first: the same weights whether it was stopped or not, and not those it began with."""
    monkeypatch.setattr(train_tiny, "KEEP", 1)
    monkeypatch.setattr(train_tiny, "BATCH", 8)
    monkeypatch.setattr(train_tiny, "CONFIG", replace(MICRO, vocab_size=264))
    lines = []
    first = train_tiny.train(tmp_path / "a", 2, tmp_path / "a.npz", lines.append)
    assert [line.split(":")[0] for line in lines] == ["step 1", "step 2"]
    kept = tmp_path / "b.npz"
    original = train_tiny.os.replace

    def stopped(source, target):
        original(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_tiny.os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_tiny.train(tmp_path / "b", 2, kept, lines.append)
    monkeypatch.setattr(train_tiny.os, "replace", original)
    second = train_tiny.train(tmp_path / "b", 2, kept, lines.append)
    for mine, theirs in zip(jax.tree.leaves(second.params), jax.tree.leaves(first.params), strict=True):
        assert np.array_equal(mine, theirs)
    with np.load(kept) as state:
        assert state["done"] == 2
