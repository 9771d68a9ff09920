"""The engine: each sequence gets the tokens it gets alone, whoever joins and leaves meanwhile."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from moekit.errors import ArgumentError, ShapeError
from moekit.models.qwen3next import Engine, FitError, FullError, Sampling, empty_cache, extend, generate, prefill
from moekit.models.qwen3next import engine as module
from moekit.models.qwen3next.engine import _advance, _join
from moekit.models.qwen3next.sampling import GREEDY, Draws, draw

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
        assert results[number] == whole[:most]
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


def test_what_an_engine_refuses(engine):
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
    assert [results[number] for number in numbers] == list(alone)


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
    events = []
    while made.busy:
        events += made.step()
    assert [event.end for event in events if event.sequence == first][-1] == "failed"
    results = made.results()
    assert results[other] == alone[5]
    assert results[third] == alone[6]


def test_sampled_tokens_follow_from_the_seed_whatever_the_batch(engine, prompts):
    how = [Sampling(temperature=0.9, top_k=20, top_p=0.95, seed=seed) for seed in range(len(prompts))]

    def tokens(made, chosen):
        numbers = [made.add(prompts[i], max_new_tokens=MOST, sampling=how[i]) for i in chosen]
        results = made.results()
        return [results[number] for number in numbers]

    together = tokens(engine(), range(len(prompts)))
    assert tokens(engine(), reversed(range(len(prompts)))) == together[::-1]
    assert tokens(engine(), [4]) == [together[4]]
    other = engine()
    number = other.add(prompts[4], max_new_tokens=MOST, sampling=Sampling(0.9, 20, 0.95, seed=77))
    assert other.results()[number] != together[4]


def test_pieces_at_a_time_give_the_logits_of_a_whole_prompt(zoo):
    """Of several sequences of unequal lengths, over two ranks."""
    model, rng = zoo.model(CASE, tp=2), np.random.default_rng(4)
    tokens, lengths = rng.integers(0, 256, (2, 96)).astype(np.int32), np.array([90, 33], np.int32)
    wanted, whole = prefill(model, tokens, lengths, cache_length=128, kernels="xla")
    cache, read = empty_cache(model, 2, 128, "xla"), np.zeros(2, np.int32)
    for counts in ([32, 1], [26, 31], [32, 1]):
        piece = np.stack([np.pad(row[at : at + n], (0, 32 - n)) for row, at, n in zip(tokens, read, counts, strict=True)])
        logits, cache = extend(model, piece, np.array(counts, np.int32), cache, kernels="xla")
        read = read + counts
    np.testing.assert_allclose(logits, wanted, atol=1e-4 * np.abs(wanted).max())
    assert cache.lengths.tolist() == lengths.tolist()
    for mine, theirs in zip(jax.tree.leaves(cache.deltas), jax.tree.leaves(whole.deltas), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)
    for mine, theirs in zip(jax.tree.leaves(cache.attentions), jax.tree.leaves(whole.attentions), strict=True):
        np.testing.assert_allclose(mine[:, :, :33], theirs[:, :, :33], atol=2e-4)
    with pytest.raises(ShapeError, match="one row each is needed"):
        extend(model, piece[:1], np.array([1], np.int32), cache, kernels="xla")
    full, cache = extend(model, piece, np.array([1, 32], np.int32), cache, kernels="xla")
    assert np.isfinite(full).all()
    full, cache = extend(model, piece, np.array([32, 32], np.int32), cache, kernels="xla")
    full, cache = extend(model, piece, np.array([32, 31], np.int32), cache, kernels="xla")
    assert np.isnan(full).all(axis=1).tolist() == [True, False]
    assert cache.lengths.tolist() == [-1, 128]


# ------------------------------------------------------------------------------------------------------------- sampling


def kept_by_hand(logits, how):
    """Probabilities after temperature, the k likeliest and the fewest that reach p, by sorting, in float64."""
    scaled = logits.astype(np.float64) / how.temperature
    order = np.argsort(-scaled, kind="stable")[: how.top_k or None]
    shares = np.exp(scaled[order] - scaled[order].max())
    shares /= shares.sum()
    reach = np.searchsorted(np.cumsum(shares), how.top_p) + 1
    found = np.zeros(len(logits))
    found[order[:reach]] = shares[:reach] / shares[:reach].sum()
    return found


@pytest.mark.parametrize("how", [Sampling(0.7), Sampling(1.3, top_k=5), Sampling(1.0, top_p=0.6), Sampling(0.8, 9, 0.9)])
def test_draws_have_the_distribution_that_is_asked_for(how):
    """Chi-square on 100,000 draws: of as many seeds, and of one seed's tokens one after the other."""
    logits = np.random.default_rng(0).normal(size=24).astype(np.float32) * 2
    count, wanted = 100_000, kept_by_hand(logits, how)
    many = Draws.of([how] * count)
    run = jax.jit(lambda row, draws: draw(jnp.broadcast_to(row, (count, 24)), draws))
    for draws in (
        Draws(many.temperature, many.top_k, many.top_p, np.arange(count, dtype=np.uint32), many.made),
        Draws(many.temperature, many.top_k, many.top_p, many.seed, np.arange(count, dtype=np.int32)),
    ):
        seen = np.bincount(np.asarray(run(logits, draws)), minlength=24)
        assert seen[wanted == 0].sum() == 0
        assert chisquare(seen[wanted > 0], wanted[wanted > 0] * count).pvalue > 1e-4


def test_greedy_rows_beside_drawn_ones_and_rows_of_nan():
    logits = np.random.default_rng(1).normal(size=(3, 50)).astype(np.float32)
    logits[2, 7] = np.nan
    tokens = draw(logits, Draws.of([GREEDY, Sampling(2.0), Sampling(1.0)]))
    assert tokens[0] == logits[0].argmax()
    assert tokens[2] == -1


@pytest.mark.parametrize("how", [Sampling(1.5e-38), Sampling(1e-300), Sampling(1.0, top_p=1e-44), Sampling(1.0, top_p=1e-300)])
def test_what_is_next_to_nothing_takes_the_likeliest(how):
    assert draw(np.array([[7.0, 1.0, 9.0, 8.0]], np.float32), Draws.of([how])).tolist() == [2]


WRONG = [{"temperature": value} for value in (-1.0, np.nan, np.inf, 1e39, 10**400, "hot", None, True)]
WRONG += [{"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"top_k": 1.5}, {"seed": 2**32}, {"seed": 1.5}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_sampling_refuses(wrong):
    with pytest.raises(ArgumentError, match=f"sampling: {next(iter(wrong))} is "):
        Sampling(**wrong)
