"""A small soak; `python -m tests.models.soak` is the long one."""

from tests.models.soak import cases, model_of, soak


def test_each_of_many_sequences_gets_the_tokens_it_gets_alone(tmp_path):
    given = cases(60)
    found = soak(model_of(tmp_path / "model"), given)
    assert found.wrong == []
    assert found.compiled == 0
    assert found.held[0] == found.held[1]
    assert found.tokens > 250
