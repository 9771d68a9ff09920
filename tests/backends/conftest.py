"""Backend tests see the heuristic's schedules on every machine: what a GPU's table says is no part of them."""

import pytest

import moekit.tune.table


@pytest.fixture(scope="module", autouse=True)  # of a session it would hold in the folders after this one, too
def untuned():
    """No tuned schedules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moekit.tune.table, "table", lambda device: {})
        yield
