"""bench/runner.py: what every bench shares, with a question made up here."""

import os

import pytest

from bench import runner
from bench.common import load
from bench.runner import Option, Question, ask, beside

OPTIONS = (Option("tokens", (1, 4)), Option("kinds", ("a b", "c")), Option("rounds", 15), Option("full", False))


def measure(t, kind):
    if kind == "die":
        os._exit(3)
    if kind == "refuse":
        raise ValueError("no such kind\nat length")
    yield {"side": kind, "us": 2.5 * t}


def cases(args):
    for kind in args.kinds:
        for t in args.tokens:
            yield {"case": "made up", "T": t}, (t, kind)


def made(**more):
    return Question("Made up.", cases, measure, smoke="--tokens 1", options=OPTIONS, gpu=False, **more)


@pytest.mark.parametrize(("given", "tokens", "kinds"), [
    ("", (1, 4), ("a b", "c")),
    ("--tokens 2,8 --kinds x,y", (2, 8), ("x", "y")),
    ("--tokens 2 8", (2, 8), ("a b", "c")),
    ("--kinds x y,z without w --tokens 3", (3,), ("x y", "z without w")),
    ("--smoke --tokens 9", (1,), ("a b", "c")),
])  # fmt: skip
def test_several_values_have_commas_or_spaces_between_them(given, tokens, kinds):
    args = made().arguments(given.split())
    assert (args.tokens, args.kinds, args.rounds, args.full) == (tokens, kinds, 15, False)


def test_what_is_no_number_is_refused(capsys):
    with pytest.raises(SystemExit):
        made().arguments(["--tokens", "1,two"])
    assert "--tokens: invalid literal for int() with base 10: 'two'; it takes numbers" in capsys.readouterr().err


def test_rows_have_their_head_and_are_written(tmp_path, capsys):
    """And the device, the versions, the command and what the question adds."""
    path = tmp_path / "r.json"
    question = made(begin=lambda args: {"rounds": args.rounds}, end=lambda result: f"{len(result['rows'])} rows")
    result = ask(question, ["--kinds", "c", "--out", str(path)])
    assert load(path) == result
    assert result["rows"] == [{"case": "made up", "T": t, "side": "c", "us": 2.5 * t} for t in (1, 4)]
    assert result["rounds"] == 15
    assert {"device", "versions", "command"} <= set(result)
    said = capsys.readouterr().out
    assert "made up 4" in said
    assert "c us 10" in said
    assert said.endswith("2 rows\n")


def test_what_there_is_no_time_for_is_said(tmp_path):
    result = ask(made(), ["--seconds", "-1", "--tokens", "4"])
    assert (result["rows"], result["left out"]) == ([], [{"case": "made up", "T": 4}] * 2)


def test_a_process_that_dies_costs_its_case_alone():
    """Two at a time, one for all cases of theirs or a new one each; order is kept."""
    result = ask(made(patience=60, workers=2), ["--kinds", "c,die,refuse,d", "--tokens", "1"])
    assert [row.get("us", row.get("problem")) for row in result["rows"]] == [
        2.5, "its process died with exit code 3", "ValueError: no such kind", 2.5,
    ]  # fmt: skip
    assert all(row["T"] == 1 for row in result["rows"])


def test_without_a_gpu_only_a_smoke_run_is_made(monkeypatch):
    monkeypatch.setattr(runner, "gpu_count", lambda: 0)
    question = Question("Made up.", cases, measure, smoke="--tokens 1", options=OPTIONS)
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU, and there is none; --smoke"):
        ask(question, [])
    assert len(ask(question, ["--smoke"])["rows"]) == 2


def test_a_side_that_fails_says_why_and_the_others_are_timed():
    def prepare(side):
        if side == "b":
            raise RuntimeError("out of resources")
        return {"error": 0.5}, side * 2

    rows = beside("abc", prepare, lambda ready: {side: {"us": len(ready), "of": what} for side, what in ready.items()})
    assert rows == [
        {"side": "a", "error": 0.5, "us": 2, "of": "aa"},
        {"side": "b", "problem": "RuntimeError: out of resources"},
        {"side": "c", "error": 0.5, "us": 2, "of": "cc"},
    ]
