"""The engine: each sequence gets the tokens it gets alone, whoever joins and leaves meanwhile."""

import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch

from moekit.errors import ArgumentError, ShapeError
from moekit.models.qwen3next import Engine, FitError, FullError, Result, Sampling, extend, generate
from moekit.models.qwen3next import engine as module
from moekit.models.qwen3next.engine import _advance, _join

CASE, LENGTH, PIECE, MOST = "two-layers", 256, 64, 12
SIZES = (63, 64, 65, 127, 200, 3, 244)  # around a piece and a chunk of the delta rule, and to the last place


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(2)
    return [rng.integers(0, 256, n).tolist() for n in SIZES]


@pytest.fixture(scope="module")
def alone(zoo, prompts):
    """The greedy tokens of each prompt, by `generate`."""
    return generate(zoo.model(CASE), prompts, max_new_tokens=MOST, kernels="xla").tokens


@pytest.fixture
def engine(zoo):
    """Engines of one model, which share their compiled programs."""

    def made(**options):
        return Engine(zoo.model(CASE), **{"slots": 3, "length": LENGTH, "piece": PIECE, "kernels": "xla", **options})

    return made


def test_more_sequences_than_slots_each_as_alone(engine, prompts, alone):
    made = engine()
    numbers = [made.add(prompt, max_new_tokens=most) for prompt, most in zip(prompts, (12, 1, 5, 2, 12, 7, 12), strict=True)]
    results = made.results()
    assert list(results) != numbers  # shorter ones ended first
    for number, whole, most in zip(numbers, alone, (12, 1, 5, 2, 12, 7, 12), strict=True):
        assert results[number] == Result(whole[:most], "length")
    assert not made.busy
    assert made.results() == {}


def test_joining_between_steps_and_end_tokens(engine, prompts, alone):
    """One at a time, some steps apart; each stops at a token of its own."""
    made, numbers, events = engine(ahead=3), [], []
    stops = [row[4] for row in alone]
    for prompt, stop in zip(prompts, stops, strict=True):
        numbers.append(made.add(prompt, max_new_tokens=MOST, eos=[stop]))
        for _ in range(3):
            events += made.step()
    while made.busy:
        events += made.step()
    for number, row, stop in zip(numbers, alone, stops, strict=True):
        mine = [event for event in events if event.sequence == number]
        assert tuple(event.token for event in mine) == row[: row.index(stop) + 1]
        assert [event.end for event in mine] == [None] * (len(mine) - 1) + ["stop"]


def test_an_end_token_ends_where_transformers_ends(zoo, engine, prompts, alone):
    made, theirs = engine(), zoo.transformers(CASE)
    for i in (0, 5):
        stop, ids = alone[i][4], torch.tensor([prompts[i]])
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MOST,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=0,
        )
        number = made.add(prompts[i], max_new_tokens=MOST, eos=stop)
        assert made.results()[number] == Result(tuple(out[0, len(prompts[i]) :].tolist()), "stop")


def test_what_an_engine_refuses(engine, monkeypatch):
    made = engine(slots=1, waiting=1)
    with pytest.raises(ArgumentError, match="a prompt of 250 tokens and 7 new ones are more than the engine's length of 256"):
        made.add([1] * 250, max_new_tokens=7)
    with pytest.raises(ShapeError, match="prompt is empty"):
        made.add([], max_new_tokens=1)
    with pytest.raises(ArgumentError, match="outside the vocabulary"):
        made.add([256], max_new_tokens=1)
    for _ in range(2):
        made.add([1], max_new_tokens=1)
    with pytest.raises(FullError, match="2 sequences wait already"):
        made.add([1], max_new_tokens=1)
    with pytest.raises(ArgumentError, match="sampling is a float; a Sampling is needed"):
        made.add([1], max_new_tokens=1, sampling=0.7)
    with pytest.raises(ArgumentError, match="sequences are at work"):
        made.warmup()
    with pytest.raises(ArgumentError, match="waiting = -1 where at least 0 is needed"):
        engine(waiting=-1)
    monkeypatch.setattr(module, "empty_cache", None)
    for wrong in ("nope", 3):
        with pytest.raises(ArgumentError, match=rf"kernels={wrong!r} is not known; choose 'pallas', 'pallas-triton',"):
            engine(kernels=wrong)


def test_numbers_of_any_kind_are_numbers(engine, prompts, alone):
    made = engine(slots=np.array(2), length=np.array(LENGTH), piece=np.int64(PIECE))
    number = made.add(np.array(prompts[5]), max_new_tokens=np.array(MOST))
    assert made.results()[number].tokens == alone[5]


def test_rows_that_do_not_fit_are_refused_before_one_is_placed(engine, monkeypatch):
    monkeypatch.setattr(module, "empty_cache", None)
    with pytest.raises(FitError, match=r"engine: 1000000000 \+ 1 rows of 256 tokens take .* GB on each rank"):
        engine(slots=10**9)


def test_one_that_is_read_has_its_slot(engine):
    """It takes no more from those that may wait than one that has been read."""
    made = engine(slots=1, waiting=1)
    made.add([1] * 100, max_new_tokens=1)
    made.step()
    assert made._reading
    made.add([1], max_new_tokens=1)
    with pytest.raises(FullError, match="1 sequences wait already"):
        made.add([1], max_new_tokens=1)


@pytest.mark.parametrize("where", ["empty_cache", "extend", "_join", "_advance", "np"])
def test_an_interrupt_leaves_nothing_half_done(engine, prompts, alone, monkeypatch, where):
    """It comes at the second call of a function, and once more at the fifth."""
    calls, real = [], getattr(module, where)

    def interrupted(*arguments, **options):
        calls.append(where)
        if len(calls) in (2, 5):
            raise KeyboardInterrupt
        return (np.asarray if where == "np" else real)(*arguments, **options)

    stand_in = SimpleNamespace(**{**vars(np), "asarray": interrupted}) if where == "np" else interrupted
    monkeypatch.setattr(module, where, stand_in)
    made, results = engine(), {}
    numbers = [made.add(prompt, max_new_tokens=MOST) for prompt in prompts]
    while made.busy:
        try:
            results |= made.results()
        except KeyboardInterrupt:
            assert len(calls) in (2, 5)
    assert len(calls) > 5
    assert [results[number].tokens for number in numbers] == list(alone)


def ended(events):
    return {event.sequence: event.end for event in events if event.end}


def test_an_engine_that_is_only_stepped_keeps_nothing(engine, prompts):
    made = engine()

    def held():
        return {name: len(value) for name, value in vars(made).items() if hasattr(value, "__len__")}

    before, told = held(), {}
    for i in range(8):
        number = made.add(prompts[5], max_new_tokens=1 + i % 2)
        while made.busy:
            told |= ended(made.step())
        assert told[number] == "length"
    assert held() == before
    assert made.results() == {}, "what a step has told is told once"


def test_sequences_are_cancelled_wherever_they_are(engine, prompts, alone):
    """One with a slot, one that is read and one that waits; what they leave goes to others, which are as alone."""
    made, events = engine(slots=2), []
    first, other, second, third, last = (made.add(prompts[i], max_new_tokens=MOST) for i in (5, 6, 0, 1, 2))
    for _ in range(3):
        events += made.step()
    assert made._reading[0].number == other
    assert [made.cancel(number) for number in (first, other, third, 99)] == [True, True, True, False]
    events += made.step()
    assert ended(events) == dict.fromkeys((first, other, third), "cancelled")
    assert not made.cancel(first)
    assert [event.token for event in events if event.end] == [-1] * 3
    results = made.results()
    assert results == {second: Result(alone[0], "length"), last: Result(alone[2], "length")}
    fourth = made.add(prompts[5], max_new_tokens=MOST)
    made.step()
    assert made.cancel(fourth)
    assert made.results()[fourth].end == "cancelled"
    assert not made.busy


@pytest.mark.parametrize("where", ["extend", "_join", "_advance", "np"])
def test_an_error_of_the_devices_ends_all_and_the_engine_goes_on(engine, prompts, alone, monkeypatch, where):
    """It comes at the third call, and what had been given to the devices is gone."""
    calls, real, made = [], getattr(module, where), engine(slots=2)

    def breaking(*arguments, **options):
        calls.append(where)
        if len(calls) == 3:
            jax.tree.map(lambda array: array.delete(), made._rows)
            raise jax.errors.JaxRuntimeError("INTERNAL: a device is gone")
        return (np.asarray if where == "np" else real)(*arguments, **options)

    stand_in = SimpleNamespace(**{**vars(np), "asarray": breaking}) if where == "np" else breaking
    monkeypatch.setattr(module, where, stand_in)
    numbers = [made.add(prompts[i], max_new_tokens=MOST) for i in (5, 5, 0, 6)]
    with pytest.raises(jax.errors.JaxRuntimeError, match="a device is gone"):
        made.results()
    lost = ended(made.step())
    assert lost == dict.fromkeys(numbers[-len(lost) :], "failed")
    assert not made.busy
    assert made.step() == []
    again = made.add(prompts[5], max_new_tokens=MOST)
    before = numbers[: -len(lost)]  # ended before the error came
    assert made.results() == dict.fromkeys([*before, again], Result(alone[5], "length"))


def test_threads_add_and_cancel_while_another_steps(engine, prompts, alone):
    made, found, numbers = engine(slots=2), [], {}
    begun = threading.Barrier(5)

    def client(i):
        begun.wait()
        for turn in range(3):
            numbers[i, turn] = made.add(prompts[5], max_new_tokens=2 + i)
            if turn == 1:
                made.cancel(numbers[i, turn])

    clients = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    for each in clients:
        each.start()
    begun.wait()
    while any(each.is_alive() for each in clients) or made.busy:
        found += made.step()
    assert len(set(numbers.values())) == 12
    ends = ended(found)
    for (i, turn), number in numbers.items():
        tokens = tuple(event.token for event in found if event.sequence == number and event.token >= 0)
        assert tokens == alone[5][: len(tokens)]
        assert (ends[number], len(tokens)) == ("length", 2 + i) or (turn == 1 and ends[number] == "cancelled")


def test_nothing_is_compiled_after_warmup(engine, prompts):
    made = engine()
    made.warmup()
    functions = (extend.function, _join, _advance)
    before = [function._cache_size() for function in functions]
    for i, prompt in enumerate(prompts):
        made.add(prompt, max_new_tokens=3, sampling=Sampling(temperature=float(i % 2), seed=i))
    made.results()
    assert [function._cache_size() for function in functions] == before


def test_a_sequence_that_fails_leaves_the_others_and_its_slot_clean(engine, prompts, alone, monkeypatch):
    """Its memory is made NaN; the others go on, and the next in its slot is as alone."""
    made = engine()
    first, other = (made.add(prompts[i], max_new_tokens=MOST) for i in (0, 5))
    while made._slots.count(None) != 1:
        made.step()
    bad = made._slots.index(next(s for s in made._slots if s.number == first))
    held = made._rows.cache
    spoiled = jax.tree.map(lambda a: a.at[bad].set(np.nan) if a.dtype != np.int32 else a, held)
    object.__setattr__(made._rows, "cache", spoiled)
    third = made.add(prompts[6], max_new_tokens=MOST)
    results = made.results()
    assert results[first].end == "failed"
    assert results[first].tokens == alone[0][: len(results[first].tokens)]
    assert results[other] == Result(alone[5], "length")
    assert results[third] == Result(alone[6], "length")


def test_sampled_tokens_follow_from_the_seed_whatever_the_batch(engine, prompts):
    how = [Sampling(temperature=0.9, top_k=20, top_p=0.95, seed=seed) for seed in range(len(prompts))]

    def tokens(made, chosen):
        numbers = [made.add(prompts[i], max_new_tokens=MOST, sampling=how[i]) for i in chosen]
        results = made.results()
        return [results[number].tokens for number in numbers]

    together = tokens(engine(), range(len(prompts)))
    assert tokens(engine(), reversed(range(len(prompts)))) == together[::-1]
    assert tokens(engine(), [4]) == [together[4]]
    other = engine()
    number = other.add(prompts[4], max_new_tokens=MOST, sampling=Sampling(0.9, 20, 0.95, seed=77))
    assert other.results()[number].tokens != together[4]
