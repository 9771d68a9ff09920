"""The cases, sides, correctness and targets of bench/fusions.py, on a CPU: what can be right or wrong without a GPU."""

from argparse import Namespace

import pytest
import torch

from bench import eager, layer_jax, targets
from bench.cases import CASES
from bench.common import load, write
from bench.correctness import Checker
from bench.fusions import wanted
from bench.plots import times
from bench.sides import sides

QUICK = [n for n in CASES if n not in ("delta_rule_step 16/32", "gate_gemm 1544", "expert_down 512")]
OWN = ("moekit", "moekit, contiguous", "moekit, epilogue")
ON_CPU = (*OWN, "eager", "cublas padded", "three gemms")


def made(case: str, side: str):
    """What the checker says of a side."""
    torch.manual_seed(5)
    checker = Checker(CASES[case], CASES[case].make(21, torch.bfloat16))
    return checker(sides(CASES[case], compiled=False)[side])


PAIRS = [(c, s) for c in QUICK for s in sides(CASES[c], compiled=False) if s in ON_CPU]


@pytest.mark.parametrize(("case", "side"), [p for p in PAIRS if p[1] in OWN])
def test_moekit_is_within_its_bound_in_every_case(case, side):
    """In units of the bound for a fusion, relative to the norm for several together; ids are the reference's."""
    found = made(case, side)
    assert ("error" in found) == (not case.startswith("gate_block"))
    assert 0 < found.get("error", found["relative"]) <= (1 if "error" in found else 0.005)
    assert 0 < found["relative"] < 0.005
    assert found.get("ids", 1.0) == 1.0


@pytest.mark.parametrize(("case", "side"), [p for p in PAIRS if p[1] not in OWN])
def test_the_other_sides_compute_the_same(case, side):
    """A side that rounds elsewhere may be beyond the bound, but only by roundings."""
    found = made(case, side)
    assert found["relative"] < 0.01
    if side != "eager":
        assert found["error"] <= 1


def test_the_checker_sees_a_wrong_row_at_the_end():
    """It looks at the last rows too, and at a copy of the operands."""
    case = CASES["silu_and_mul 64"]
    operands = case.make(40, torch.bfloat16)
    before = operands["gate_up"].clone()

    def wrong(o):
        def call():
            gate, up = o["gate_up"].float().chunk(2, -1)
            out = torch.nn.functional.silu(gate) * up
            out[-1] += 0.5
            o["gate_up"].zero_()
            return out.bfloat16()

        return call

    assert Checker(case, operands)(wrong)["error"] > 2
    assert torch.equal(operands["gate_up"], before)


def test_the_checker_sees_what_is_no_number_and_what_is_not_made():
    """NaN is infinitely wrong; an output that a side does not make is left out, but not one that it forgot."""
    case = CASES["gate_projections 648"]
    checker = Checker(case, case.make(3, torch.float32))
    active, logits, share = eager.gate_projections(*checker.operands.values())
    assert checker(lambda o: lambda: (active, logits.where(logits < 0.5, torch.nan), share))["error"] == float("inf")
    assert checker(lambda o: lambda: (None, logits, None))["error"] <= 1
    assert checker(lambda o: lambda: (None, logits + 1e-3, None))["error"] > 1
    with pytest.raises(ValueError, match="shorter"):
        checker(lambda o: lambda: (active, logits))


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


def test_cases_are_measured_in_the_order_asked_for():
    """So that what there may be no time for comes last; without names all of them, each once."""
    asked = lambda fusions: wanted(Namespace(fusions=fusions, tokens="", targets=True))  # noqa: E731
    assert list(asked("")) == list(CASES)
    assert list(asked("gate_projections,gate_,add")) == [
        "gate_projections 648", "gate_projections 1544", "gate_gemm 648", "gate_gemm 1544", "gate_block 648", "gate_block 1544",
        "add_rms_norm 2048", "add_rms_norm 4096",
    ]  # fmt: skip
    assert asked("gate_projections 6")["gate_projections 648"] == [1, 4, 16, 64, 256, 1024, 4096, 16384]


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
