"""The cases, sides, correctness and targets of bench/fusions.py, on a CPU: what can be right or wrong without a GPU."""

import functools

import pytest
import torch

from bench import eager, layer_jax, targets
from bench.cases import CASES
from bench.common import load, write
from bench.correctness import Checker
from bench.fusions import QUESTION, cases
from bench.plots import times
from bench.sides import sides

# Of each fusion one size; what the larger ones are held to on a GPU is the same. The blocks have a file of their own, and the
# routed experts a gigabyte of weights.
QUICK = ["add_rms_norm 2048", "silu_and_mul 64", "topk_softmax 512/10", "topk_softmax 256/8", "shared_expert_combine 2048",
         "gate_gemm 648", "gate_projections 648", "down_combine 64", "gated_rms_norm 4x128", "delta_rule_step 2/4"]  # fmt: skip
OWN = ("moekit", "moekit, contiguous")
ON_CPU = (*OWN, "eager", "cublas padded", "three gemms")


@functools.cache
def checker(case: str) -> Checker:
    """Nine rows: four from either end are looked at."""
    torch.manual_seed(5)
    return Checker(CASES[case], CASES[case].make(9, torch.bfloat16))


PAIRS = [(c, s) for c in QUICK for s in sides(CASES[c], compiled=False) if s in ON_CPU]


@pytest.mark.parametrize(("case", "side"), PAIRS)
def test_a_side_computes_what_it_should(case, side):
    """moekit within its bound; one that rounds elsewhere may be beyond it, but only by roundings. Ids are the reference's."""
    make = sides(CASES[case], compiled=False)[side]
    found = checker(case)(lambda o: make(o)())
    assert 0 < found["relative"] < (0.005 if side in OWN else 0.01)
    assert found["error"] > 0
    if side != "eager":
        assert found["error"] <= 1
    if side in OWN:
        assert found.get("ids", 1.0) == 1.0


def test_the_checker_sees_a_wrong_row_at_the_end():
    """It looks at the last rows too, and at a copy of the operands."""
    case = CASES["silu_and_mul 64"]
    operands = case.make(40, torch.bfloat16)
    before = operands["gate_up"].clone()

    def wrong(o):
        gate, up = o["gate_up"].float().chunk(2, -1)
        out = torch.nn.functional.silu(gate) * up
        out[-1] += 0.5
        o["gate_up"].zero_()
        return out.bfloat16()

    assert Checker(case, operands)(wrong)["error"] > 2
    assert torch.equal(operands["gate_up"], before)


def test_the_checker_sees_what_is_no_number_and_what_is_not_made():
    """NaN is infinitely wrong; an output that a side does not make is left out, but not one that it forgot."""
    case = CASES["gate_projections 648"]
    checker = Checker(case, case.make(3, torch.float32))
    active, logits, share = eager.gate_projections(*checker.operands.values())
    assert checker(lambda o: (active, logits.where(logits < 0.5, torch.nan), share))["error"] == float("inf")
    assert checker(lambda o: (None, logits, None))["error"] <= 1
    assert checker(lambda o: (None, logits + 1e-3, None))["error"] > 1
    with pytest.raises(ValueError, match="longer"):
        checker(lambda o: (active, logits))


def row(case: str, t: int, side: str, us: float) -> dict:
    """A measured row."""
    return {"case": case, "T": t, "side": side, "us": us, "TB/s": 4.0 / us}


def test_targets_take_the_best_rival_and_the_copy_bandwidth():
    """The fastest rival counts, sides that no target names and failed ones do not."""
    name = "add_rms_norm 2048"
    measured = {"moekit": 0.96, "sgl-kernel": 1.2, "liger": 1.0, "quack": 0.1}
    failed = {"case": name, "T": 1, "side": "flashinfer", "problem": "none"}
    rows = [*(row(name, 1, side, us) for side, us in measured.items()), failed, row(name, 16384, "moekit", 1.0)]
    small, large = targets.judge(rows, {"copy TB/s": 4.2})
    assert (small["rival"], small["ratio"], small["met"]) == ("liger", 0.96, False)
    assert small["not run"] == ["flashinfer", "flashinfer cuda", "torch.compile"]
    assert "liger (not run: flashinfer," in targets.table([small])
    assert (large["rival"], large["ratio"], large["met"]) == ("copy bandwidth", 0.952, True)
    assert "1 of 2 targets met" in targets.table([small, large])


def test_every_target_names_cases_and_sides_that_exist():
    """A target for a side that no bench has would never be judged."""
    for target in targets.TARGETS:
        for case in target.cases:
            if case.startswith("jax"):  # measured by bench/moe_block.py
                assert {*target.ours, *target.rivals} <= set(layer_jax.layers())
                continue
            assert {*target.ours, *target.rivals} <= set(sides(CASES[case])), case
            assert set(target.tokens) <= set(targets.tokens(case))


def asked(*argv: str) -> dict[str, list[int]]:
    """Tokens by case."""
    found: dict[str, list[int]] = {}
    for head, _ in cases(QUESTION.arguments(argv)):
        found.setdefault(head["case"], []).append(head["T"])
    return found


def test_cases_are_measured_in_the_order_asked_for():
    """So that what there may be no time for comes last; without names all that have a target, each once."""
    assert list(asked("--targets")) == [name for name in CASES if targets.tokens(name)]
    assert list(asked("--targets", "--fusions", "gate_projections,gate_,add")) == [
        "gate_projections 648", "gate_projections 1544", "gate_gemm 648", "gate_gemm 1544", "gate_block 648", "gate_block 1544",
        "add_rms_norm 2048", "add_rms_norm 4096",
    ]  # fmt: skip
    only = asked("--targets", "--fusions", "gate_projections 6")
    assert only == {"gate_projections 648": [1, 4, 16, 64, 256, 1024, 4096, 16384]}
    assert asked("--targets", "--tokens", "4,7", "--fusions", "topk_softmax 5") == {"topk_softmax 512/10": [4]}


def test_what_does_not_fit_is_left_out():
    """Two sets of operands have to."""
    assert asked("--fusions", "delta_rule_step 16/32") == {"delta_rule_step 16/32": [1, 4, 16, 64, 256, 1024]}


def test_results_survive_the_file_and_become_a_plot(tmp_path):
    """One row a line, read back as written; the plot is the same each time."""
    rows = [row("silu_and_mul 64", t, side, 1.0 + t) for t in (1, 16) for side in ("moekit", "flashinfer")]
    result = {"device": "NVIDIA H200", "versions": {"torch": "2"}, "rows": rows}
    write(tmp_path / "r.json", result)
    assert load(tmp_path / "r.json") == result
    assert len((tmp_path / "r.json").read_text().splitlines()) > len(rows)
    for name in ("a.svg", "b.svg"):
        times(result, tmp_path / name)
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "b.svg").read_text()
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_every_size_is_compiled():
    """More sizes than dynamo recompiles for by default: none of them may run eagerly under the name of torch.compile."""
    frames = []

    def backend(graph, inputs):
        frames.append(inputs)
        return graph.forward

    fast = eager.compiled(eager.silu_and_mul, backend=backend)
    for t in range(1, 13):
        fast(torch.ones(t, 8))
    assert len(frames) == 12
