"""bench/device_jax.py: a profile's events come apart into calls, and a call's time is that of its kernels alone."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from bench.child import Child
from bench.device_jax import Event, apart, between_calls, summary, timed, typical

FLUSH, RUN = "jit_between_calls", "jit_run"


def profile(calls):
    """Events of calls, each a list of (begin, end, name), with two kernels of the flush before each."""
    found = []
    for number, kernels in enumerate(calls):
        at = 1000.0 * number
        found += [Event(at, at + 60, "input_reduce_fusion", FLUSH), Event(at + 60, at + 120, "input_reduce_fusion", FLUSH)]
        found += [Event(at + a, at + b, name, RUN) for a, b, name in kernels]
    return found


def test_one_long_wait_is_not_typical():
    """Of kernels that are called alike but for XLA's number the median counts, each time."""
    kernels = [(0, 90, "link"), (90, 93, "link_1"), (93, 96, "link_2"), (96, 97, "copy")]
    assert typical([Event(*kernel, RUN) for kernel in kernels]) == 3 * 3 + 1
    assert typical([]) == 0


def test_calls_are_what_lies_between_two_flushes():
    """One kernel has the flush's name; what tells them apart is the function they are of."""
    calls = [[(200, 210, "input_reduce_fusion"), (210, 215, "b")], [(300, 304, "b")]]
    got = apart(profile(calls), between_calls.__name__)
    assert [[e.name for e in call] for call in got] == [["input_reduce_fusion", "b"], ["b"]]


def test_gaps_count_and_the_flush_and_the_wait_before_the_first_kernel_do_not():
    """Two links: 16 µs with a gap of 2 in the middle, then 20 µs and 24."""
    calls = [[(200, 208, "a_1"), (210, 216, "a_22")], [(150, 160, "a_1"), (160, 170, "b")], [(130, 154, "b")]]
    got = summary(apart(profile(calls), between_calls.__name__), 2)
    assert got["us"] == 10.0
    assert got["spread"] == 4.0
    assert got["kernels"] == {"b": round((10 + 24) / 6, 3), "a": round((8 + 6 + 10) / 6, 3)}


def copies():
    """Copies of 64 and 128 MiB."""
    grow = jax.jit(lambda x: x + 1)
    programs = {str(n): partial(grow, jnp.zeros(n * 2**20)) for n in (16, 32)}
    yield timed(programs, 1, 5)


@pytest.mark.gpu
def test_a_copy_twice_as_long_takes_about_twice_as_long():
    """Long enough that nothing but the bandwidth counts; repeatable; twice in one process, which is JAX's own."""
    child = Child(copies)
    for _ in range(2):
        (found,) = child.rows()
        assert "problem" not in found, found
        assert found["16"]["us"] * 1.7 < found["32"]["us"] < found["16"]["us"] * 2.3
        assert all(f["spread"] < 0.1 * f["us"] for f in found.values())
        assert all(len(f["kernels"]) == 1 for f in found.values())
    child.close()
