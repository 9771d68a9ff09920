"""Fill the pages of docs/ from the result files, and draw their plots: no figure in them is typed by hand.

    python bench/report.py [--check]

Between `<!-- NAME FILE -->` and `<!-- end -->` in a page stands what NAME makes of bench/results/FILE: `made` (device, versions
and command), or one of the tables in `MAKERS`. `--check` changes nothing and exits with 1 if a page is not up to date.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import targets
from bench.common import load, markdown
from moekit.files import write_text

ROOT = Path(__file__).parents[1]
PAGE_NAMES = ("performance", "performance_kernels", "performance_tried", "numerics", "torch")
PAGES = tuple(ROOT / "docs" / f"{name}.md" for name in PAGE_NAMES)
RESULTS, PLOT, STEP = ROOT / "bench" / "results", ROOT / "docs" / "performance.svg", ROOT / "docs" / "step_80b.svg"
PLOTTED = ("add_rms_norm 2048", "silu_and_mul 512", "topk_softmax 512/10", "shared_expert_combine 2048", "gate_gemm 648",
           "gate_block 648")  # fmt: skip


FLOAT8 = "float8, "  # how sides begin that have such weights
OTHERS = ("vllm", "sglang", "triton_kernels", "torch", "flashinfer", "fla")  # how those begin that are not moekit's


Cell = Callable[[dict], str]


def made(result: dict) -> str:
    """Device, versions, ceilings, what the run says of itself, and its command if the bench is still there."""
    versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
    lines = [result["device"] + (f", CUDA {result['cuda']}" if "cuda" in result else "") + f"; {versions}."]
    if "ceilings" in result:
        c = result["ceilings"]
        by_itself = c.get("smallest kernel by itself µs")
        without = f" ({by_itself:.2f} without dependent launch)" if by_itself else ""
        lines.append(f"Ceilings in the same run: copy {c['copy TB/s']:.2f} TB/s, bfloat16 product {c['matmul TFLOP/s']:.0f} "
                     f"TFLOP/s, smallest kernel in a graph {c['smallest kernel µs']:.2f} µs{without}.")  # fmt: skip
    lines += [result["note"]] if "note" in result else []
    script = re.match(r"python (\S+)", result["command"])
    kept = script is None or (ROOT / script.group(1)).is_file()
    return "\n".join([*lines, *(["", f"    {result['command']}"] if kept else [])])


def judged(result: dict) -> str:
    """The targets of a run."""
    return targets.table(targets.judge(result["rows"], result.get("ceilings", {})))


def listed(rows: Sequence[dict], columns: Mapping[str, Cell]) -> str:
    """A line per row; a column that is empty in all of them is left out."""
    lines = [{name: cell(row) for name, cell in columns.items()} for row in rows]
    names = [name for name in columns if any(line[name] for line in lines)]
    return markdown(names, [[line[name] for name in names] for line in lines])


def crossed(rows: Sequence[dict], by: Mapping[str, Cell], across: Cell, cell: Cell) -> str:
    """A line per value of `by`, whose names are its columns' heads, and a column per value of `across`."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        lines.setdefault(tuple(key(row) for key in by.values()), {})[across(row)] = cell(row)
    names = dict.fromkeys(name for line in lines.values() for name in line)
    return markdown([*by, *names], [[*key, *(line.get(name, "") for name in names)] for key, line in lines.items()])


def text(key: str, form: str = "{}") -> Cell:
    """A value of a row, if it has it."""
    return lambda row: form.format(row[key]) if key in row else ""


def number(key: str) -> Cell:
    """A number of a row, if it has it: three digits, and all of those before the point."""

    def cell(row: dict) -> str:
        value = row.get(key)
        if value is None:
            return ""
        return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"

    return cell


def grouped(rows: Sequence[dict], *keys: str) -> dict[tuple, dict[str, dict]]:
    """Rows by side, by the values of `keys`, in the order in which they came."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), {})[row["side"]] = row
    return found


def _time(row: dict | None, best: float) -> str:
    if row is None or "us" not in row:
        return "" if row is None else "–"
    shown = f"{row['us']:.2f}" if row["us"] < 100 else f"{row['us']:.0f}"
    return f"**{shown}**" if row["us"] == best else shown


def _error(row: dict | None) -> str:
    """How right moekit's outputs were."""
    if row is None:
        return ""
    parts = [f"{row[k]:.2g}" + (" rel." if k == "relative" else "") for k in ("error", "relative") if k in row][:1]
    return ", ".join([*parts, *([f"ids {row['ids']:.0%}"] if "ids" in row else [])])


def _times(here: Mapping[str, dict], sides: Iterable[str]) -> list[str]:
    """The times of some sides, the best in bold."""
    best = min((r["us"] for r in here.values() if "us" in r), default=0.0)
    return [_time(here.get(side), best) for side in sides]


def times(result: dict) -> str:
    """Every case, a table each: µs per T and side, what share of its ceiling moekit's fastest reaches, and its error."""
    ceilings, tables = result.get("ceilings", {}), []
    for case in dict.fromkeys(r["case"] for r in result["rows"]):
        rows = [r for r in result["rows"] if r["case"] == case]
        sides, lines = list(dict.fromkeys(r["side"] for r in rows)), []
        for (t,), here in sorted(grouped(rows, "T").items()):
            mine = targets.fastest(list(here.values()), targets.OURS) or here.get("moekit")
            share = [_share(mine, ceilings)] if ceilings else []
            lines.append([str(t), *_times(here, sides), *share, _error(mine)])
        head = ["T", *sides, *(["of the ceiling"] if ceilings else []), "error"]
        tables.append(f"### {case}\n\n{markdown(head, lines)}")
    return "\n\n".join(tables)


def _share(row: dict | None, ceilings: dict[str, float]) -> str:
    """How near a time is to the ceiling it is nearest to: the copy's rate, the product's, or a kernel that does nothing."""
    if row is None or "us" not in row:
        return ""
    smallest = min(us for name, us in ceilings.items() if name.startswith("smallest kernel"))  # by itself, or overlapping
    copy, flops = row["TB/s"] / ceilings["copy TB/s"], row["TFLOP/s"] / ceilings["matmul TFLOP/s"]
    share, name = max((copy, "copy"), (flops, "product"), (smallest / row["us"], "launch"))
    return f"{share:.0%} {name}"


def beside(result: dict) -> str:
    """Two sides in one table: a row per case and T, the ratio of their times, and how right moekit's outputs were."""
    sides, lines = list(dict.fromkeys(r["side"] for r in result["rows"])), []
    for (case, t), here in grouped(result["rows"], "case", "T").items():
        us = [here[s]["us"] for s in sides if "us" in here.get(s, {})]
        ratio = f"{us[0] / us[1]:.2f}" if len(us) == 2 else ""
        lines.append([case, str(t), *_times(here, sides), ratio, _error(here.get(sides[0]))])
    return markdown(["fusion", "T", *sides, "ratio", "error"], lines)


def ratios(result: dict) -> str:
    """A row per case, a column per T: the time of the fastest of moekit's forms over that of the fastest peer.

    A peer that does only the first of what another does together (`a` beside `a + b`) is none of the whole fusion.
    """
    rows, lines = result["rows"], []
    tokens = sorted({r["T"] for r in rows})
    for case in dict.fromkeys(r["case"] for r in rows):
        names = {r["side"] for r in rows if r["case"] == case}
        rivals = tuple(s for s in names if s not in targets.OURS and not any(n.startswith(f"{s} + ") for n in names))
        cells, peers = [], {}
        for t in tokens:
            here = [r for r in rows if (r["case"], r["T"]) == (case, t)]
            ours, rival = targets.fastest(here, targets.OURS), targets.fastest(here, rivals)
            cells.append(f"{ours['us'] / rival['us']:.2f}" if ours and rival else "")
            peers |= {rival["side"].removeprefix("peers: "): None} if ours and rival else {}
        lines += [[case, *cells, "; ".join(peers)]] if peers else []
    return markdown(["fusion", *map(str, tokens), "best peers"], lines)


def tuned(result: dict) -> str:
    """The heuristic's time over the tuned one, by fusion and rows; in parentheses over that of the best schedule for those rows

    alone, where that is more than 5 % better than what all rows can share. Rows that only some were timed at stand in the last
    column, the most only.
    """
    every = [{t["rows"]: t["us"] for t in r["times"]} for r in result["rows"]]
    rows = sorted(n for n in {n for times in every for n in times} if 2 * sum(n in times for times in every) > len(every))
    lines = []
    for r, times in sorted(zip(result["rows"], every, strict=True), key=lambda p: (p[0]["fusion"], str(p[0]["sizes"]))):
        sizes = " ".join(f"{a}={n}" for a, n in r["sizes"].items() if not a.endswith("?"))
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
    rows = [r for r in result["rows"] if "ulps" in r]
    by = {"fusion": text("fusion"), "dtype": text("dtype")}
    return crossed(rows, by, text("implementation"), lambda r: f"{r['ulps']:.2f} ({r['ratio']:.2f})")


def host(result: dict) -> str:
    """Microseconds of host time of each op, by the way it is called."""
    return crossed(result["rows"], {"": text("op", "`{}`")}, text("way"), text("us", "{:.1f}"))


def patched(result: dict) -> str:
    """A decode step by batch: times and kernels with the patch (twice: before and after the unpatched side) and without."""
    cell = lambda r: f"{r['step_ms']:.2f}, {r['launches']}"  # noqa: E731
    return crossed(result["rows"], {"batch": text("batch")}, text("way", "{}: ms, kernels"), cell)


def accuracy(result: dict) -> str:
    """How far the original and the patched model are from float32 by batch, with their own experts and with its."""
    columns = {"batch": "batch", "model": "way", "off": "error", "off, same experts": "same experts"}
    cells = {name: text(key) for name, key in columns.items()}
    return listed(result["rows"], cells | {"tokens with another expert": text("other", "{:.0%}")})


def step(result: dict) -> str:
    """A decode step by the number of sequences and the kind of kernels."""
    return _calls(result, "T", "sequences", {"floor, ms": "floor ms"})


def prefill(result: dict) -> str:
    """Prefill by the shape of the prompts and the kind of kernels, with two floors: of its bytes and of its products."""
    return _calls(result, "prompts", "prompts", {f"floor of {of}, ms": f"floor of {of} ms" for of in ("bytes", "products")})


def engine(result: dict) -> str:
    """An engine by its slots, beside the bare step of as many rows."""
    columns = {"slots": text("slots"), "kernels of": text("side"), "sequences": text("sequences")}
    columns["tokens/s, prompts read between"] = number("tokens/s")
    columns |= {"tokens/s of its steps": number("steps alone tokens/s"), "of the bare step": number("bare tokens/s")}
    return listed(result["rows"], columns)


def beside_floor(result: dict) -> str:
    """µs of every side by case, tokens and what a cache holds, and in parentheses the share of the floor's time."""
    by = {"case": text("case"), "T": text("T"), "tokens in the cache": text("length"), "room for": text("room")}
    rows = [row for row in result["rows"] if "us" in row]
    by = {head: cell for head, cell in by.items() if any(cell(row) for row in rows)}
    return crossed(rows, by, text("side"), lambda row: number("us")(row) + text("of floor", " ({:.2f})")(row))


def against(result: dict) -> str:
    """The time of the fastest of moekit's sides over each other side's; those with float8 weights beside their like."""
    best: dict[tuple, float] = {}
    rows = [row for row in result["rows"] if "us" in row]
    for row in rows:
        if not _theirs(row):
            best[_place(row)] = min(row["us"], best.get(_place(row), math.inf))
    by = {"case": text("case"), "T": text("T"), "tokens in the cache": text("length")}
    by = {head: cell for head, cell in by.items() if any(cell(row) for row in rows)}
    rivals = [row | {"over": best[_place(row)] / row["us"]} for row in rows if _theirs(row) and _place(row) in best]
    return crossed(rivals, by, text("side"), text("over", "{:.2f}"))


def _place(row: dict) -> tuple:
    return row["side"].startswith(FLOAT8), *(row.get(key) for key in ("case", "T", "length", "room"))


def _theirs(row: dict) -> bool:
    return row["side"].removeprefix(FLOAT8).startswith(OTHERS)


def _calls(result: dict, key: str, title: str, floors: Mapping[str, str]) -> str:
    """Calls of the whole model: a row per size (`key`) and side; a ratio to XLA's kernels only where those were measured."""
    rows = [r for r in result["rows"] if key in r and "side" in r]
    sizes = list(dict.fromkeys(r[key] for r in rows))
    rows.sort(key=lambda r: sizes.index(r[key]))  # kinds that were measured later stand with the others
    xla = {r[key]: r["ms"] for r in rows if r["side"] == "xla" and "ms" in r}
    compared = len({r["side"] for r in rows if "same tokens" in r}) > 1

    def over(row: dict, least: float | None) -> str:
        return f"{row['ms'] / least:.2f}" if "ms" in row and least else ""

    def over_xla(row: dict) -> str:
        whole = row["side"] != "xla" and "without" not in row["side"]  # what leaves something out is no rival
        return over(row, xla.get(row[key])) if whole else ""

    columns: dict[str, Cell] = {
        title: text(key),
        "kernels of": text("side"),
        "ms": lambda r: number("ms")(r) or "–",
        "ms alone": number("alone ms"),
        "tokens/s": number("tokens/s"),
        **{name: number(of) for name, of in floors.items()},
        "ms / floor": lambda r: over(r, max((r[of] for of in floors.values() if of in r), default=None)),
        "ms / XLA's": over_xla,
        "dispatch, ms": number("dispatch ms"),
        "arrays": text("arguments"),
        "kernels": text("kernels"),
        "GiB": lambda r: " + ".join(filter(None, (text("arguments GiB", "{:.1f}")(r), text("temporaries GiB", "{:.2f}")(r)))),
        "compile, s": text("compile s", "{:.1f}"),
        "same tokens": text("same tokens", "{:.0%}") if compared else lambda r: "",
    }
    rates = {"copy TB/s": "copy {:.2f} TB/s", "product TFLOP/s": "product {:.0f} TFLOP/s"}
    told = ", ".join(filter(None, (text(name, form)(row) for row in rows[:1] for name, form in rates.items())))
    problems = [f"{r.get(key, '')} {r.get('side', '')}: {r['problem']}".strip(" :") for r in result["rows"] if "problem" in r]
    notes = [f"Rates in the same run: {told}."] if told else []
    return "\n\n".join([listed(rows, columns), *notes, *(f"Not measured: {p}." for p in problems)])


MAKERS: dict[str, Callable[[dict], str]] = {
    "made": made, "targets": judged, "times": times, "blocks": times, "tuned": tuned, "errors": errors, "host": host,
    "patched": patched, "accuracy": accuracy, "beside": beside, "ratios": ratios, "step": step, "prefill": prefill,
    "engine": engine, "floors": beside_floor, "against": against,
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


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    return parser


def main() -> int:
    """Write the pages and the plots, or check the pages."""
    args = options().parse_args()
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
