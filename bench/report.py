"""Fill the pages of docs/ from the result files, and draw their plots: no figure in them is typed by hand.

    python bench/report.py [--check]

Between `<!-- NAME FILE -->` and `<!-- end -->` in a page stands what NAME makes of bench/results/FILE: `made` (device, versions
and command), or one of the tables in `MAKERS`. `--check` changes nothing and exits with 1 if a page is not up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import targets
from bench.common import load
from moekit.files import write_text

ROOT = Path(__file__).parents[1]
PAGE_NAMES = ("performance", "performance_kernels", "performance_tried", "numerics", "torch")
PAGES = tuple(ROOT / "docs" / f"{name}.md" for name in PAGE_NAMES)
RESULTS, PLOT, STEP = ROOT / "bench" / "results", ROOT / "docs" / "performance.svg", ROOT / "docs" / "step_80b.svg"
PLOTTED = ("add_rms_norm 2048", "silu_and_mul 512", "topk_softmax 512/10", "shared_expert_combine 2048", "gate_gemm 648",
           "gate_block 648")  # fmt: skip


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def made(result: dict) -> str:
    """Device, versions, ceilings, what the run says of itself, and command."""
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    lines = [result["device"] + (f", CUDA {result['cuda']}" if "cuda" in result else "") + f"; {versions}."]
    if "ceilings" in result:
        c = result["ceilings"]
        by_itself = c.get("smallest kernel by itself µs")
        without = f" ({by_itself:.2f} without dependent launch)" if by_itself else ""
        lines.append(f"Ceilings in the same run: copy {c['copy TB/s']:.2f} TB/s, bfloat16 product {c['matmul TFLOP/s']:.0f} "
                     f"TFLOP/s, smallest kernel in a graph {c['smallest kernel µs']:.2f} µs{without}.")  # fmt: skip
    lines += [result["note"]] if "note" in result else []
    return "\n".join([*lines, "", "    " + result["command"]])


def judged(result: dict) -> str:
    """The targets of a run."""
    return targets.table(targets.judge(result["rows"], result.get("ceilings", {})))


def _cell(row: dict | None, best: float) -> str:
    if row is None:
        return ""
    if "us" not in row:
        return "–"
    text = f"{row['us']:.2f}" if row["us"] < 100 else f"{row['us']:.0f}"
    return f"**{text}**" if row["us"] == best else text


def _error(row: dict | None) -> str:
    """How right moekit's outputs were."""
    if row is None:
        return ""
    parts = [f"{row[k]:.2g}" + (" rel." if k == "relative" else "") for k in ("error", "relative") if k in row][:1]
    return ", ".join([*parts, *([f"ids {row['ids']:.0%}"] if "ids" in row else [])])


def _table(rows: list[dict], ceilings: dict[str, float]) -> str:
    """One case: µs per T and side, the best in bold, and what share of its ceiling the fastest of moekit's reaches."""
    sides, tokens = list(dict.fromkeys(r["side"] for r in rows)), sorted({r["T"] for r in rows})
    lines = []
    for t in tokens:
        here = {r["side"]: r for r in rows if r["T"] == t}
        best = min((r["us"] for r in here.values() if "us" in r), default=0.0)
        mine, share = targets.fastest(list(here.values()), targets.OURS) or here.get("moekit"), ""
        if ceilings and mine and "us" in mine:
            share = _share(mine, ceilings)
        lines.append([str(t), *(_cell(here.get(s), best) for s in sides), *([share] if ceilings else []), _error(mine)])
    return markdown(["T", *sides, *(["of the ceiling"] if ceilings else []), "error"], lines)


def _share(row: dict, ceilings: dict[str, float]) -> str:
    """How near a time is to the ceiling it is nearest to: the copy's rate, the product's, or a kernel that does nothing."""
    copy, flops = row["TB/s"] / ceilings["copy TB/s"], row["TFLOP/s"] / ceilings["matmul TFLOP/s"]
    share, name = max((copy, "copy"), (flops, "product"), (_smallest(ceilings) / row["us"], "launch"))
    return f"{share:.0%} {name}"


def _smallest(ceilings: dict[str, float]) -> float:
    """µs of a kernel that does nothing, by itself or overlapping the one before, whichever is shorter."""
    return min(us for name, us in ceilings.items() if name.startswith("smallest kernel"))


def times(result: dict) -> str:
    """Every case of a run, a table each."""
    cases = dict.fromkeys(r["case"] for r in result["rows"])
    each = {c: _table([r for r in result["rows"] if r["case"] == c], result.get("ceilings", {})) for c in cases}
    return "\n\n".join(f"### {name}\n\n{table}" for name, table in each.items())


def tuned(result: dict) -> str:
    """The heuristic's time over the tuned one, by fusion and rows; in parentheses over that of the best schedule for those rows

    alone, where that is more than 5 % better than what all rows can share. Rows that only some were timed at stand in the last
    column, the most only.
    """
    every = [{t["rows"]: t["us"] for t in r["times"]} for r in result["rows"]]
    rows = sorted(n for n in {n for times in every for n in times} if 2 * sum(n in times for times in every) > len(every))
    lines = []
    for r in sorted(result["rows"], key=lambda r: (r["fusion"], str(r["sizes"]))):
        sizes = " ".join(f"{a}={n}" for a, n in r["sizes"].items() if not a.endswith("?"))
        times = {t["rows"]: t["us"] for t in r["times"]}
        rest = max((n for n in times if n not in rows), key=lambda n: times[n]["heuristic"] / times[n]["tuned"], default=None)
        last = f"{_nearness(times[rest])} at {rest}" if rest else ""
        lines.append([f"{r['fusion']} {sizes} {r['dtype']}", *(_nearness(times.get(n)) for n in rows), last])
    return markdown(["fusion", *map(str, rows), "at most between"], lines)


def _nearness(us: dict[str, float] | None) -> str:
    if us is None:
        return ""
    shared, alone = us["heuristic"] / us["tuned"], us["heuristic"] / us["free"]
    return f"{shared:.2f}" + (f" ({alone:.2f})" if alone > 1.05 * shared else "")


def errors(result: dict) -> str:
    """The worst error of each implementation: ulps, and in parentheses the ratio to the bound's float32 part."""
    names, rows = result["implementations"], {(r["fusion"], r["dtype"], r["implementation"]): r for r in result["rows"]}
    lines = [
        [fusion, dtype, *(f"{rows[fusion, dtype, i]['ulps']:.2f} ({rows[fusion, dtype, i]['ratio']:.2f})" for i in names)]
        for fusion, dtype in dict.fromkeys(key[:2] for key in rows)
    ]
    return markdown(["fusion", "dtype", *names], lines)


def host(result: dict) -> str:
    """Microseconds of host time of each op, by the way it is called."""
    ways = list(dict.fromkeys(r["way"] for r in result["rows"]))
    times = {(r["op"], r["way"]): f"{r['us']:.1f}" for r in result["rows"]}
    return markdown(
        ["", *ways], [[f"`{op}`", *(times.get((op, w), "") for w in ways)] for op in dict.fromkeys(o for o, _ in times)]
    )


def patched(result: dict) -> str:
    """A decode step by batch: times and kernels with the patch (twice: before and after the unpatched side) and without."""
    ways = list(dict.fromkeys(r["way"] for r in result["rows"]))
    rows = {(r["batch"], r["way"]): r for r in result["rows"]}
    lines = [
        [str(batch), *(f"{rows[batch, w]['step_ms']:.2f}, {rows[batch, w]['launches']}" for w in ways)]
        for batch in dict.fromkeys(b for b, _ in rows)
    ]
    return markdown(["batch", *(f"{w}: ms, kernels" for w in ways)], lines)


def accuracy(result: dict) -> str:
    """How far the original and the patched model are from float32 by batch, with their own experts and with its."""
    pairs: dict[int, dict[str, dict]] = {}
    for row in result["rows"]:
        pairs.setdefault(row["batch"], {})[row["way"]] = row
    columns = [f"{way}{of}" for of in ("", ", same experts") for way in ("original", "patched")]
    lines = []
    for batch, ways in pairs.items():
        errors = [ways[w][kind] for kind in ("error", "same experts") for w in ("original", "patched")]
        others = " and ".join(f"{100 * ways[w]['other']:.0f} %" for w in ("original", "patched"))
        lines.append([str(batch), *map(str, errors), others])
    return markdown(["batch", *columns, "tokens with another expert"], lines)


def beside(result: dict) -> str:
    """Two sides in one table: a row per case and T, the ratio of their times, and how right moekit's outputs were."""
    sides, rows = list(dict.fromkeys(r["side"] for r in result["rows"])), {}
    for r in result["rows"]:
        rows.setdefault((r["case"], r["T"]), {})[r["side"]] = r
    lines = []
    for (case, t), here in rows.items():
        us = [here[s]["us"] for s in sides if "us" in here.get(s, {})]
        ratio = f"{us[0] / us[1]:.2f}" if len(us) == 2 else ""
        lines.append(
            [case, str(t), *(_cell(here.get(s), min(us, default=0.0)) for s in sides), ratio, _error(here.get(sides[0]))]
        )
    return markdown(["fusion", "T", *sides, "ratio", "error"], lines)


def ratios(result: dict) -> str:
    """A row per case, a column per T: the time of the fastest of moekit's forms over that of the fastest peer.

    A peer that does only the first of what another does together (`a` beside `a + b`) is none of the whole fusion.
    """
    sides = {c: {r["side"] for r in result["rows"] if r["case"] == c} for c in dict.fromkeys(r["case"] for r in result["rows"])}
    tokens = sorted({r["T"] for r in result["rows"]})
    lines = []
    for case, names in sides.items():
        rivals = tuple(s for s in names if s not in targets.OURS and not any(n.startswith(f"{s} + ") for n in names))
        cells, peers = [], {}
        for t in tokens:
            here = [r for r in result["rows"] if (r["case"], r["T"]) == (case, t)]
            ours, rival = targets.fastest(here, targets.OURS), targets.fastest(here, rivals)
            cells.append(f"{ours['us'] / rival['us']:.2f}" if ours and rival else "")
            peers |= {rival["side"].removeprefix("peers: "): None} if ours and rival else {}
        if peers:
            lines.append([case, *cells, "; ".join(peers)])
    return markdown(["fusion", *map(str, tokens), "best peers"], lines)


def step(result: dict) -> str:
    """A decode step by the number of sequences and the kind of kernels."""
    return _calls(result, "T", "sequences", lambda r: [_number(r.get("floor ms"))], lambda r: r.get("floor ms"))


def prefill(result: dict) -> str:
    """Prefill by the shape of the prompts and the kind of kernels, with two floors: of its bytes and of its products."""
    names = {f"floor of {of} ms": f"floor of {of}, ms" for of in ("bytes", "products")}

    def floors(row: dict) -> list[str]:
        return [_number(row.get(name)) for name in names]

    def floor(row: dict) -> float | None:
        return max((row[name] for name in names if name in row), default=None)

    return _calls(result, "prompts", "prompts", floors, floor, tuple(names.values()))


def engine(result: dict) -> str:
    """An engine by its slots, beside the bare step of as many rows."""
    head = ["slots", "kernels of", "sequences", "tokens/s, prompts read between", "tokens/s of its steps", "of the bare step"]
    rates = ("tokens/s", "steps alone tokens/s", "bare tokens/s")
    rows = [(r, [_number(r[name]) for name in rates]) for r in result["rows"]]
    return markdown(head, [[str(r["slots"]), r["side"], str(r["sequences"]), *found] for r, found in rows])


def _calls(
    result: dict,
    key: str,
    title: str,
    floors: Callable[[dict], list[str]],
    floor: Callable[[dict], float | None],
    floor_names: Sequence[str] = ("floor, ms",),
) -> str:
    """Calls of the whole model: a row per size (`key`) and side; a ratio to XLA's kernels only where those were measured."""
    rows = [r for r in result["rows"] if key in r and "side" in r]
    sizes = list(dict.fromkeys(r[key] for r in rows))
    rows.sort(key=lambda r: sizes.index(r[key]))  # kinds that were measured later stand with the others
    xla = {r[key]: r["ms"] for r in rows if r["side"] == "xla" and "ms" in r}
    compared = len({r["side"] for r in rows if "same tokens" in r}) > 1
    head = [title, "kernels of", "ms", "ms alone", "tokens/s", *floor_names, "ms / floor", *(["ms / XLA's"] if xla else [])]
    head += ["dispatch, ms", "arrays", "kernels", "GiB", "compile, s", *(["same tokens"] if compared else [])]
    lines = []
    for r in rows:
        ms, least, theirs = r.get("ms"), floor(r), xla.get(r[key])
        line = [str(r[key]), r["side"], _number(ms) if ms else "–", _number(r.get("alone ms")), _number(r.get("tokens/s"))]
        line += [*floors(r), f"{ms / least:.2f}" if ms and least else ""]
        whole = r["side"] != "xla" and "without" not in r["side"]  # what leaves something out is no rival
        line += [f"{ms / theirs:.2f}" if ms and theirs and whole else ""] if xla else []
        line += [_number(r.get("dispatch ms")), str(r.get("arguments", "")), str(r.get("kernels", "")), _gib(r)]
        line += [f"{r['compile s']:.1f}" if "compile s" in r else ""]
        lines.append(line + ([f"{r['same tokens']:.0%}" if "same tokens" in r else ""] if compared else []))
    problems = [f"{r.get(key, '')} {r.get('side', '')}: {r['problem']}".strip(" :") for r in result["rows"] if "problem" in r]
    rates = [f"{name.split()[0]} {rows[0][name]:.{digits}f} {name.split()[1]}"
             for name, digits in (("copy TB/s", 2), ("product TFLOP/s", 0)) if rows and name in rows[0]]  # fmt: skip
    notes = [f"Rates in the same run: {', '.join(rates)}."] if rates else []
    return "\n\n".join([markdown(head, lines), *notes, *(f"Not measured: {p}." for p in problems)])


def _number(value: float | None) -> str:
    """Three digits, and all of those before the point."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _gib(row: dict) -> str:
    """On a device: what a call is given and what it needs besides."""
    sizes = [row[f"{name} GiB"] for name in ("arguments", "temporaries") if f"{name} GiB" in row]
    return " + ".join(f"{size:.1f}" if i == 0 else f"{size:.2f}" for i, size in enumerate(sizes))


MAKERS: dict[str, Callable[[dict], str]] = {
    "made": made, "targets": judged, "times": times, "blocks": times, "tuned": tuned, "errors": errors, "host": host,
    "patched": patched, "accuracy": accuracy, "beside": beside, "ratios": ratios, "step": step, "prefill": prefill,
    "engine": engine,
}  # fmt: skip
SECTION = re.compile(rf"<!-- ({'|'.join(MAKERS)}) (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(text: str, results: Path) -> str:
    """A page with every section made anew; a section whose file is missing says so."""

    def section(match: re.Match) -> str:
        name, file = match.groups()
        path = results / file
        body = MAKERS[name](load(path)) if path.is_file() else f"Not measured yet: there is no bench/results/{file}."
        return f"<!-- {name} {file} -->\n{body}\n<!-- end -->"

    return SECTION.sub(section, text)


def main() -> int:
    """Write the pages and the plots, or check the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    before = {page: page.read_text(encoding="utf-8") for page in PAGES}
    after = {page: filled(text, RESULTS) for page, text in before.items()}
    if args.check:
        return int(after != before)
    for page, text in after.items():
        write_text(page, text)
    draw()
    return 0


def draw() -> None:
    """Draw the plots of the result files that are there."""
    from bench import plots  # a check needs no matplotlib

    if (path := RESULTS / "fusions_h200.json").is_file():
        plots.times(load(path), PLOT, PLOTTED, relative=True)
    if (path := RESULTS / "decode_80b_h200.json").is_file():
        plots.steps(load(path), STEP)


if __name__ == "__main__":
    sys.exit(main())
