"""Engines and `generate` with a channel: who may have one, and what becomes of sequences whose ranks do not come.

On a CPU no packet goes, so the ranks gather; what is held here is how links and words of errors are handed on.
"""

from importlib import import_module

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from moekit.errors import ArgumentError, RankError
from moekit.jax import Channel
from moekit.models.qwen3next import Engine, Result, Sampling, exchanged, generate
from moekit.models.qwen3next import engine as module

generating = import_module("moekit.models.qwen3next.generate")  # the package has a function of that name
CASE, TP, LENGTH, MOST = "two-layers", 2, 64, 6
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]


@pytest.fixture
def opened(monkeypatch):
    """Channels of virtual devices that were not proved."""
    monkeypatch.setattr("moekit.jax.channel.refusal", lambda mesh: None)
    monkeypatch.setattr(Channel, "_prove", lambda self: None)
    return lambda mesh, **room: Channel(mesh, **{"rows": 2, "width": 128, "looks": 9, **room})


@pytest.fixture
def made(zoo, opened):
    """An engine of two slots and its channel."""
    model = zoo.model(CASE, tp=TP)
    channel = opened(model.mesh)
    return Engine(model, slots=2, length=LENGTH, piece=16, kernels="xla", channel=channel), channel


def missed(channel: Channel, rank: int, epoch: int) -> None:
    """What a wait of `rank` for rank 0 leaves behind."""
    words = np.zeros((TP, channel.mail.size // TP), np.int32)
    words[rank, -4:-2] = epoch, 1
    channel.mail = jax.device_put(words.reshape(-1), channel.spread)


def test_each_sequence_gets_its_tokens(zoo, made):
    """By likeliest tokens and by drawn ones; every step takes the link that the one before gave back."""
    engine, channel = made
    alone = generate(zoo.model(CASE, tp=TP), PROMPTS, max_new_tokens=MOST, kernels="xla").tokens
    numbers = [engine.add(prompt, max_new_tokens=MOST) for prompt in PROMPTS]
    before = channel.link.epochs
    assert engine.results() == {n: Result(row, "length") for n, row in zip(numbers, alone, strict=True)}
    assert before.is_deleted()  # it was donated, so no step can take it a second time
    drawn = engine.add(PROMPTS[0], max_new_tokens=MOST, sampling=Sampling(temperature=1.0, seed=3))
    other = Engine(zoo.model(CASE, tp=TP), slots=2, length=LENGTH, piece=16, kernels="xla")
    same = other.add(PROMPTS[0], max_new_tokens=MOST, sampling=Sampling(temperature=1.0, seed=3))
    assert engine.results()[drawn] == other.results()[same]


def test_a_rank_that_does_not_come_ends_all_and_the_engine_goes_on(zoo, made):
    """No token of that step is told; the channel has other mailboxes, and what is added then gets its tokens."""
    engine, channel = made
    (alone,) = generate(zoo.model(CASE, tp=TP), PROMPTS[:1], max_new_tokens=MOST, kernels="xla").tokens
    numbers, told = [engine.add(prompt, max_new_tokens=MOST) for prompt in PROMPTS], []
    told += engine.step() + engine.step()
    missed(channel, 1, 17)
    mail = channel.mail
    with pytest.raises(RankError, match="rank 0 did not come: rank 1 waited for packet 17"):
        engine.results()
    assert {event.sequence: event.end for event in engine.step()} == dict.fromkeys(numbers, "failed")
    assert channel.mail is not mail
    again = engine.add(PROMPTS[0], max_new_tokens=MOST)
    assert engine.results() == {again: Result(alone, "length")}
    assert {event.token for event in told if event.sequence == numbers[0]} <= {*alone}


def test_a_step_that_fails_takes_its_link_along(zoo, made, monkeypatch):
    """The channel is made anew before the next one."""
    engine, channel = made
    (alone,) = generate(zoo.model(CASE, tp=TP), PROMPTS[:1], max_new_tokens=MOST, kernels="xla").tokens
    real = module._advance

    def breaking(*arguments, **options):
        jax.tree.map(lambda array: array.delete(), channel.link)
        raise jax.errors.JaxRuntimeError("INTERNAL: a device is gone")

    monkeypatch.setattr(module, "_advance", breaking)
    engine.add(PROMPTS[0], max_new_tokens=MOST)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a device is gone"):
        engine.results()
    monkeypatch.setattr(module, "_advance", real)
    engine.step()
    again = engine.add(PROMPTS[0], max_new_tokens=MOST)
    assert engine.results() == {again: Result(alone, "length")}


def test_each_failure_while_a_prompt_is_read_is_said(zoo, opened, monkeypatch):
    """A rank that does not come, again and again, and a piece that takes its link along; then the engine goes on."""
    model, real = zoo.model(CASE, tp=TP), module.extend
    channel = opened(model.mesh, rows=2)
    (alone,) = generate(model, PROMPTS[:1], max_new_tokens=MOST, kernels="xla").tokens
    engine = Engine(model, slots=2, length=LENGTH, piece=16, kernels="xla", channel=channel)

    def late(*given, **options):
        made = real(*given, **options)
        missed(channel, 1, 17)
        return made

    def breaking(*given, **options):
        jax.tree.map(lambda array: array.delete(), channel.link)
        raise jax.errors.JaxRuntimeError("INTERNAL: a device is gone")

    for way, error in ((late, RankError), (late, RankError), (breaking, jax.errors.JaxRuntimeError)):
        monkeypatch.setattr(module, "extend", way)
        engine.add(PROMPTS[0], max_new_tokens=MOST)
        with pytest.raises(error):
            engine.results()
        engine.step()
    monkeypatch.setattr(module, "extend", real)
    again = engine.add(PROMPTS[0], max_new_tokens=MOST)
    assert engine.results() == {again: Result(alone, "length")}


def test_a_generation_whose_step_fails_leaves_a_channel_of_use(zoo, opened, monkeypatch):
    """The link went with the step; and what others' failures took away is no result."""
    model, real = zoo.model(CASE, tp=TP), generating.greedy_step
    channel = opened(model.mesh, rows=3)
    whole = generate(model, PROMPTS, max_new_tokens=MOST, kernels="xla").tokens

    def breaking(*given, link, **options):
        jax.tree.map(lambda array: array.delete(), link)
        raise jax.errors.JaxRuntimeError("INTERNAL: a device is gone")

    def renewed(*given, link, **options):
        channel.reset()
        return real(*given, link=channel.link, **options)

    for way, error in ((breaking, jax.errors.JaxRuntimeError), (renewed, RankError)):
        monkeypatch.setattr(generating, "greedy_step", way)
        with pytest.raises(error):
            generate(model, PROMPTS, max_new_tokens=MOST, kernels="xla", channel=channel)
    monkeypatch.setattr(generating, "greedy_step", real)
    assert generate(model, PROMPTS, max_new_tokens=MOST, kernels="xla", channel=channel).tokens == whole


def test_a_generation_says_who_did_not_come(zoo, opened):
    """Rather than that its logits are no numbers, which may follow from it."""
    model = zoo.model(CASE, tp=TP)
    channel = opened(model.mesh, rows=3)
    whole = generate(model, PROMPTS, max_new_tokens=MOST, kernels="xla").tokens
    assert generate(model, PROMPTS, max_new_tokens=MOST, kernels="xla", channel=channel).tokens == whole
    missed(channel, 0, 3)
    with pytest.raises(RankError, match="rank 0 waited for packet 3 of a row in vain"):
        generate(model, PROMPTS, max_new_tokens=MOST, kernels="xla", channel=channel)


def test_channels_that_do_not_serve_are_refused(zoo, opened):
    """Before a row is placed."""
    model, of = zoo.model(CASE, tp=TP), {"slots": 2, "length": LENGTH, "kernels": "xla"}
    wide = model.config.hidden_size
    asked, least = f"2 slots of {wide} elements where the channel serves", wide - 1
    for room, serves in (({"rows": 1}, "1 rows of 128"), ({"width": least}, f"2 rows of {least}")):
        with pytest.raises(ArgumentError, match=f"{asked} {serves}"):
            Engine(model, channel=opened(model.mesh, **room), **of)
    with pytest.raises(ArgumentError, match=r"the channel is of another mesh than the model; make one of model\.mesh"):
        Engine(model, channel=opened(zoo.model(CASE, tp=4).mesh), **of)


def test_what_a_channel_has_room_for(opened):
    """As many rows as are asked for, up to what packets serve; the same channel for the same."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    channel, said = exchanged.channel_of(mesh, 3, 256, "pallas")
    assert (channel.rows, channel.width) == (3, 256)
    assert said == "one kernel with the norm behind it, by packets"
    assert exchanged.channel_of(mesh, 3, 256, "pallas")[0] is channel
    exchanged.channel_of.cache_clear()
    assert exchanged.channel_of(mesh, 129, 256, "pallas")[1].startswith("psum: 129 rows are more than the 128")
