"""bench/ceilings.py on a GPU: figures that no machine can be far from."""

import pytest

from bench import ceilings


@pytest.mark.gpu
def test_the_ceilings_are_plausible(monkeypatch):
    """A copy of less bytes is as fast; other tests share the GPU, so that no order of the times is asked for."""
    monkeypatch.setattr(ceilings, "COPIED", 2**28)
    found = ceilings.ceilings()
    assert 0.1 < found["copy TB/s"] < 10
    assert 10 < found["matmul TFLOP/s"] < 5000
    assert 0.2 < found["smallest kernel µs"] < 20
    assert 0.2 < found["smallest kernel by itself µs"] < 20
