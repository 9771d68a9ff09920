"""Backend tests see the heuristic's schedules on every machine: what a GPU's table says is no part of them."""

import pytest

import moekit.tune.table


@pytest.fixture(scope="session", autouse=True)
def untuned():
    """No tuned schedules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moekit.tune.table, "table", lambda device: {})
        yield
