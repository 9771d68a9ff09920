"""The targets, and whether a run's rows meet them."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.common import markdown

SMALL = (1, 4, 16, 64, 256)
DECODE = (1, 4, 16, 64)
LARGE = (16384, 65536)
ALL = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
OURS = ("moekit", "moekit, epilogue")  # ways of computing a block: kernel by kernel, and with fewer


@dataclass(frozen=True)
class Target:
    """For the cases named, at the tokens given: the fastest of `ours` takes at most `limit` times the fastest of `rivals`;

    without rivals, it reaches at least `limit` of the copy bandwidth.
    """

    cases: tuple[str, ...]
    tokens: tuple[int, ...]
    limit: float
    rivals: tuple[str, ...] = ()
    ours: tuple[str, ...] = ("moekit",)


NORMS = ("add_rms_norm 2048", "add_rms_norm 4096")
SILUS = ("silu_and_mul 64", "silu_and_mul 512", "silu_and_mul 1024")
TOPKS = ("topk_softmax 512/10", "topk_softmax 256/8")
COMBINES = ("shared_expert_combine 2048", "shared_expert_combine 4096")
GEMMS = ("gate_gemm 648", "gate_gemm 1544")
PROJECTIONS = ("gate_projections 648", "gate_projections 1544")
BLOCKS = ("gate_block 648", "gate_block 1544")
SEQUENCES = tuple(
    f"peers: {norm} norm, {gemm}" for norm in ("sgl", "flashinfer") for gemm in ("three gemms", "one padded gemm")
)
XLA = ("xla, three gemms", "xla, one gemm", "jnp, three gemms", "jnp, one gemm")

TARGETS = (
    Target(NORMS, SMALL, 0.95, ("sgl-kernel", "flashinfer", "flashinfer cuda", "liger", "torch.compile")),
    Target(NORMS, LARGE, 0.95),
    Target(SILUS, ALL, 1.0, ("flashinfer",)),
    Target(TOPKS, SMALL, 0.28, ("sgl-kernel",)),
    Target(TOPKS, (4096,), 0.12, ("sgl-kernel",)),
    Target(COMBINES, ALL, 0.95, ("torch.compile",)),
    Target(COMBINES, LARGE, 0.90),
    Target(GEMMS, DECODE, 0.7, ("cublas padded",)),
    Target(GEMMS, DECODE, 0.25, ("three gemms",)),
    Target(PROJECTIONS, DECODE, 0.6, ("cublas padded + flashinfer",)),
    Target(PROJECTIONS, (256, 1024, 4096, 16384), 1.0, ("cublas padded",)),
    Target(BLOCKS, SMALL, 0.5, SEQUENCES, OURS),
    Target(("jax gate block, tp 8", "jax gate block, tp 1"), SMALL, 0.7, XLA, OURS),
)


def tokens(case: str) -> list[int]:
    """The tokens for which a case has a target."""
    return sorted({t for target in TARGETS if case in target.cases for t in target.tokens})


def sides(case: str) -> set[str]:
    """The sides that a case's targets speak of."""
    return {s for target in TARGETS if case in target.cases for s in (*target.ours, *target.rivals)}


def fastest(rows: Sequence[dict], sides: tuple[str, ...]) -> dict | None:
    """The fastest row of these sides that was timed."""
    return min((r for r in rows if r["side"] in sides and "us" in r), key=lambda r: r["us"], default=None)


def judge(rows: Sequence[dict], ceilings: dict[str, float]) -> list[dict]:
    """One row per target, case and T that was measured: ours, the best rival or the copy, the ratio, whether it is met,

    and which rivals did not run."""
    found = []
    for target in TARGETS:
        for case in target.cases:
            for t in target.tokens:
                here = [r for r in rows if (r["case"], r["T"]) == (case, t)]
                ours, rival = fastest(here, target.ours), fastest(here, target.rivals)
                if ours is None or (target.rivals and rival is None):
                    continue
                row = {"case": case, "T": t, "us": ours["us"], "limit": target.limit}
                if rival is not None:
                    ratio = ours["us"] / rival["us"]
                    row |= {"rival": rival["side"], "rival us": rival["us"], "met": ratio <= target.limit}
                    ran = {r["side"] for r in here if "us" in r}
                    row["not run"] = [s for s in target.rivals if s not in ran]
                else:
                    ratio = ours["TB/s"] / ceilings["copy TB/s"]
                    row |= {"rival": "copy bandwidth", "rival us": None, "met": ratio >= target.limit}
                found.append(row | {"ratio": round(ratio, 3)})
    return found


def table(judged: Sequence[dict]) -> str:
    """The targets as a Markdown table."""
    lines = []
    for r in judged:
        bandwidth = r["rival us"] is None
        sign, its = ("≥", "") if bandwidth else ("≤", f"{r['rival us']:.2f}")
        missing = f" (not run: {', '.join(r['not run'])})" if r.get("not run") else ""
        met = "yes" if r["met"] else "no"
        cells = [r["case"], str(r["T"]), f"{r['us']:.2f}", f"{r['rival']}{missing}", its]
        lines.append([*cells, f"{r['ratio']:.2f}", f"{sign} {r['limit']}", met])
    head = ["fusion", "T", "ours, µs", "rival", "its µs", "ratio", "target", "met"]
    return f"{markdown(head, lines)}\n\n{sum(r['met'] for r in judged)} of {len(judged)} targets met"


def told(result: dict) -> str:
    """Judge a run's rows: the verdicts become part of it, and the table is returned."""
    result["targets"] = judge(result["rows"], result.get("ceilings", {}))
    return table(result["targets"])
