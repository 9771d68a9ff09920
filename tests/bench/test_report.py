"""bench/report.py: the page says what the result files say."""

import pytest

from bench import parts, plots, report
from bench.common import load, write
from moekit.fusions import FUSIONS

RUNS = [load(report.RESULTS / f"{name}_h200.json") for name in ("decode_80b", "decode_jax")]
DECODED = [row for run in RUNS for row in run["rows"] if "by name" in row]


def result(**more) -> dict:
    """A small run."""
    head = {"device": "NVIDIA H200", "cuda": "13.0", "versions": {"moekit": "0.1.0"}, "command": "python bench/fusions.py"}
    head["ceilings"] = {"copy TB/s": 4.2, "matmul TFLOP/s": 700.0, "smallest kernel µs": 0.6,
                        "smallest kernel by itself µs": 0.5}  # fmt: skip
    rates = {"TB/s": 2.1, "TFLOP/s": 7.0}
    rows = [
        {"case": "add_rms_norm 2048", "T": 1, "side": "moekit", "us": 1.234, "error": 0.98} | rates,
        {"case": "add_rms_norm 2048", "T": 1, "side": "liger", "us": 1.5, "error": 1.2} | rates,
        {"case": "add_rms_norm 2048", "T": 16, "side": "moekit", "us": 211.4} | rates,
        {"case": "add_rms_norm 2048", "T": 16, "side": "liger", "problem": "it fell"},
        {"case": "silu_and_mul 64", "T": 1, "side": "moekit", "us": 0.8, "TB/s": 0.1, "TFLOP/s": 0.0},
        {"case": "gate_gemm 648", "T": 4096, "side": "moekit", "us": 50.0, "TB/s": 0.5, "TFLOP/s": 350.0},
    ]
    return head | {"rows": rows} | more


def test_a_section_is_filled_and_stays_so(tmp_path):
    """What stands between the markers is replaced, the rest stays, and filling twice is filling once."""
    write(tmp_path / "r.json", result())
    page = "before\n<!-- times r.json -->\nold figures\n<!-- end -->\nafter <!-- made r.json -->\n<!-- end -->"
    once = report.filled(page, tmp_path)
    assert "old figures" not in once
    assert once.startswith("before\n")
    assert "| 1 | **1.23** | 1.50 | 50% copy | 0.98 |" in once
    assert "| 16 | **211** | – | 50% copy |  |" in once
    assert "copy 4.20 TB/s" in once
    assert "smallest kernel in a graph 0.60 µs (0.50 without dependent launch)." in once
    assert "| 1 | **0.80** | 62% launch |  |" in once
    assert "| 4096 | **50.00** | 50% product |  |" in once
    assert report.filled(once, tmp_path) == once


def test_targets_and_missing_files(tmp_path):
    """The targets are judged from the rows; a file that is not there is said not to be."""
    write(tmp_path / "r.json", result())
    page = report.filled("<!-- targets r.json -->\n<!-- end -->\n<!-- blocks no.json -->\n<!-- end -->", tmp_path)
    assert "| add_rms_norm 2048 | 1 | 1.23 | liger (not run: sgl-kernel, flashinfer" in page
    assert "| 1.50 | 0.82 | ≤ 0.95 | yes |" in page
    assert "Not measured yet: there is no bench/results/no.json." in page


def test_tuned_times(tmp_path):
    """A row per graph; what only these rows could have is in parentheses, and rows that few were timed at come last."""
    us = [{"heuristic": 2.0, "tuned": 2.0, "free": 1.6}, {"heuristic": 3.3, "tuned": 3.0, "free": 2.99}]
    times = [{"rows": n, "us": u} for n, u in zip((1, 64), us, strict=True)]
    rows = [{"fusion": "gate_gemm", "sizes": {"P": 8, "H?": 1}, "dtype": "float16", "times": times[:n]} for n in (1, 2)]
    write(tmp_path / "r.json", result(rows=rows))
    page = report.filled("<!-- tuned r.json -->\n<!-- end -->", tmp_path)
    assert "| fusion | 1 | at most between |" in page
    assert "| gate_gemm P=8 float16 | 1.00 (1.25) |  |" in page
    assert "| gate_gemm P=8 float16 | 1.00 (1.25) | 1.10 at 64 |" in page


def test_errors_host_times_and_steps(tmp_path):
    """Tables by what was measured."""
    one = {"fusion": "silu_and_mul", "ulps": 0.5, "ratio": 0.123}
    rows = [one | {"dtype": d, "implementation": i} for d in ("float16", "float32") for i in ("triton", "xla")]
    write(tmp_path / "e.json", result(rows=rows, implementations=["triton", "xla"]))
    write(tmp_path / "h.json", result(rows=[{"op": "norm_", "way": w, "us": 3.21} for w in ("raw", "function")]))
    step = {"batch": 16, "step_ms": 7.129, "gpu_ms": 7.0, "launches": 310}
    write(tmp_path / "p.json", result(rows=[step | {"way": w} for w in ("patched", "original")]))
    off = {"batch": 1, "error": 0.126, "other": 0.359, "same experts": 0.0363}
    write(tmp_path / "a.json", result(rows=[off | {"way": "original"}, off | {"way": "patched", "error": 0.116}]))
    page = "".join(f"<!-- {name} {name[0]}.json -->\n<!-- end -->\n" for name in ("errors", "host", "patched", "accuracy"))
    page = report.filled(page, tmp_path)
    assert "| silu_and_mul | float32 | 0.50 (0.12) | 0.50 (0.12) |" in page
    assert "| `norm_` | 3.2 | 3.2 |" in page
    assert "| batch | patched: ms, kernels | original: ms, kernels |" in page
    assert "| 16 | 7.13, 310 | 7.13, 310 |" in page
    assert "| batch | model | off | off, same experts | tokens with another expert |" in page
    assert "| 1 | patched | 0.116 | 0.0363 | 36% |" in page


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.stem)
def test_a_page_is_what_the_results_make_of_it(page):
    """It was filled from bench/results as they are now."""
    assert "<!-- made " in page.read_text()
    assert report.filled(page.read_text(), report.RESULTS) == page.read_text()


def call(side: str, ms: float, **more) -> dict:
    """A row of bench/decode_jax.py; `more` replaces what it has."""
    names = {"expert_gate_up": [48.0, 300.0], "gemm_fusion_dot": [49.0, 500.0], "psum_7_0_fusion": [96.0, 200.0]}
    row = {"case": "decode step, 48 layers", "tp": 2, "T": 1, "side": side, "ms": ms, "alone ms": 5.78, "dispatch ms": 4.016}
    row |= {"tokens/s": 241.6, "floor ms": 1.25, "copy TB/s": 3.249, "compile s": 7.2, "arguments": 223, "kernels": 193}
    row |= {"arguments GiB": 74.701, "temporaries GiB": 0.049, "kernels ms": 1.0, "by name": names}
    return row | {"floor by part": {"experts": 1.0, "states": 0.05, "head": 0.2}} | more


def test_decode_steps(tmp_path):
    """A row per number of sequences and side; ratios to XLA's kernels and equal tokens only where both were measured."""
    rows = [call("pallas", 4.0, **{"same tokens": 1.0}), call("pallas without collectives", 3.0), {"problem": "it fell"}]
    write(tmp_path / "r.json", result(rows=rows))
    page = report.filled("<!-- step r.json -->\n<!-- end -->", tmp_path)
    assert "| sequences | kernels of | ms | ms alone | tokens/s | floor, ms | ms / floor | dispatch, ms | arrays |" in page
    assert "| 1 | pallas | 4.00 | 5.78 | 242 | 1.25 | 3.20 | 4.02 | 223 | 193 | 74.7 + 0.05 | 7.2 |" in page
    assert "Not measured: it fell." in page
    assert "copy 3.25 TB/s." in page
    write(tmp_path / "r.json", result(rows=[*rows[:2], call("xla", 5.0, **{"same tokens": 0.5})]))
    page = report.filled("<!-- step r.json -->\n<!-- end -->", tmp_path)
    assert "| ms / floor | ms / XLA's | dispatch, ms |" in page
    assert "| 1 | pallas | 4.00 | 5.78 | 242 | 1.25 | 3.20 | 0.80 | 4.02 | 223 | 193 | 74.7 + 0.05 | 7.2 | 100% |" in page
    assert "| 1 | xla | 5.00 | 5.78 | 242 | 1.25 | 4.00 |  | 4.02 | 223 | 193 | 74.7 + 0.05 | 7.2 | 50% |" in page


def test_prefill(tmp_path):
    """The ratio is to the larger floor; prompts that do not fit say so."""
    floors = {"prompts": "8 × 1024", "floor of bytes ms": 20.0, "floor of products ms": 40.0}
    rows = [call("pallas", 100.0, **floors), {"prompts": "1 × 8192", "side": "xla", "problem": "out of memory"}]
    write(tmp_path / "r.json", result(rows=rows))
    page = report.filled("<!-- prefill r.json -->\n<!-- end -->", tmp_path)
    assert "| prompts | kernels of | ms | ms alone | tokens/s | floor of bytes, ms | floor of products, ms |" in page
    assert "| 8 × 1024 | pallas | 100 | 5.78 | 242 | 20.0 | 40.0 | 2.50 |" in page
    assert "| 1 × 8192 | xla | – |" in page
    assert "Not measured: 1 × 8192 xla: out of memory." in page


def test_ratios(tmp_path):
    """moekit's fastest form over the fastest peer of the whole fusion, by T; a half of a peer is none."""
    us = {"moekit": 2.0, "moekit, epilogue": 1.0, "cublas": 1.1, "cublas + flashinfer": 4.0, "peers: sgl": 5.0}
    rows = [{"case": "gate_block 648", "T": 1, "side": side, "us": t} for side, t in us.items()]
    rows += [{"case": "gate_block 648", "T": 4, "side": "moekit", "us": 1.0}, {"case": "norm", "T": 1, "side": "a", "us": 1.0}]
    write(tmp_path / "r.json", result(rows=rows))
    page = report.filled("<!-- ratios r.json -->\n<!-- end -->", tmp_path)
    assert "| fusion | 1 | 4 | best peers |" in page
    assert "| gate_block 648 | 0.25 |  | cublas + flashinfer |" in page
    assert "norm" not in page


@pytest.mark.parametrize("name", FUSIONS)
def test_every_fusion_is_a_part_of_a_step(name):
    """None of moekit's kernels is taken for one of XLA's, whichever of its launches it is; nor is a sum over GPUs."""
    alike = name.endswith(("conv_projections", "_product"))
    projections = {parts.REST} if alike else set(parts.PARTS) - {parts.REST}
    ends = ("", "_partial", "_combine", "_staged_product_v21")
    assert {parts.part(name + end) for end in ends} <= projections - {parts.COLLECTIVES}
    assert {parts.part(n) for n in ("psum_721_0_fusion", "ncclDevKernel_AllGather_RING_LL(a)")} == {parts.COLLECTIVES}
    assert {parts.part(n) for n in ("gemm_fusion_dot", "input_reduce_fusion", "sort", "Memset ", "fusion")} == {parts.REST}


@pytest.mark.parametrize("row", DECODED, ids=lambda row: f"{row['T']} {row['side']}")
def test_the_parts_of_a_step_add_up(row):
    """Those of its kernels to what the kernels take, those of its floor to the floor."""
    assert sum(parts.spent(row).values()) == pytest.approx(row["kernels ms"], abs=2e-3)
    assert sum(parts.least(row).values()) == pytest.approx(row["floor ms"], abs=2e-3)


def test_the_plot_of_a_step(tmp_path):
    """It is drawn of what is there, and is the same file again; where nothing was timed there is none."""
    pytest.importorskip("matplotlib")
    rows = [call("pallas", 4.0), call("pallas without collectives", 3.0), call("xla", 5.0), call("pallas", 9.0, T=8)]
    for name in ("a.svg", "b.svg"):
        plots.steps(result(rows=rows), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    plots.steps(result(rows=[{"problem": "it fell"}]), tmp_path / "c.svg")
    assert not (tmp_path / "c.svg").exists()


def test_two_sides_in_one_table(tmp_path):
    """The ratio is the first side's time over the second's; one that was not timed has none."""
    times = {"moekit (jax)": {"us": 4.1, "error": 0.964}, "xla": {"us": 2.59}}
    rows = [{"case": "gate_gemm 648", "T": 1, "side": side} | more for side, more in times.items()]
    rows += [{"case": "gate_gemm 648", "T": 64, "side": "moekit (jax)", "us": 4.56}, {"case": "gate_gemm 648", "T": 64,
              "side": "xla", "problem": "it fell"}]  # fmt: skip
    write(tmp_path / "r.json", result(rows=rows))
    page = report.filled("<!-- beside r.json -->\n<!-- end -->", tmp_path)
    assert "| fusion | T | moekit (jax) | xla | ratio | error |" in page
    assert "| gate_gemm 648 | 1 | 4.10 | **2.59** | 1.58 | 0.96 |" in page
    assert "| gate_gemm 648 | 64 | **4.56** | – |  |  |" in page


def test_the_fastest_form_is_set_beside_each_peer(tmp_path):
    """Only with weights of the same kind; a peer that did not run has no figure."""
    times = {"moekit, block 1": 30.0, "moekit, block 16": 20.0, "vllm": 40.0, "torch grouped": 25.0}
    times |= {"float8, block 16": 15.0, "float8, vllm": 10.0}
    rows = [{"case": "experts 512", "T": 4, "side": side, "us": us} for side, us in times.items()]
    rows.append({"case": "experts 512", "T": 4, "side": "sglang", "problem": "it is not installed"})
    write(tmp_path / "r.json", result(rows=rows))
    page = report.filled("<!-- against r.json -->\n<!-- end -->", tmp_path)
    assert "| case | T | vllm | torch grouped | float8, vllm |" in page
    assert "| experts 512 | 4 | 0.50 | 0.80 | 1.50 |" in page
