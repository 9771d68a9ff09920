"""Candidates, the search and the tables of tuned schedules, without a GPU: times are made up."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest

from moekit.compile.plan import plan
from moekit.compile.rules import heuristic, spread
from moekit.compile.schedule import Abreast, Loop, Pair, Prefetch, Rounds, Schedule, Split, Stages, Tile, Warps
from moekit.compile.schedule.directives import text_of
from moekit.compile.schedule.legal import legal
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example
from moekit.tune import search as searching
from moekit.tune import table
from moekit.tune.search import Bench, Timed, mean, neighbours, search, winners
from moekit.tune.table import Entry, bucket, buckets, kernels_of, order_of, stale
from tests.sizes import every

RANK = {"T": 3, "D": 2048, "P": 648, "I": 512, "E": 512, "H": 2048, "H?": 1, "V": 4, "K": 2, "Dk": 128, "Dv": 128, "G": 8,
        "Q": 16, "L": 1024, "C": 1024, "S": 3, "R": 32, "N": 192, "J": 512, "M": 1, "Cq": 16, "Ck": 16, "Cv": 16,
        "Lr": 16, "Lc": 16}  # fmt: skip
SIZES = every(RANK)  # a decode step's
shipped = table.table  # other folders take it away for a session
FEW = {1: (1, 16), 17: (64,)}


def graph(name: str, dtype: str = "bfloat16", sizes: Mapping[str, int] | None = None):
    """The graph of a fusion, at a decode step's sizes where nothing is said."""
    return FUSIONS[name].trace(example(FUSIONS[name], {"T": 3, **(sizes or SIZES[name])}, dtype))


def heuristics(traced, *rows: int) -> set[Schedule]:
    """The heuristic's schedules for these numbers of rows."""
    return {heuristic(traced, r) for r in rows}


def block(schedule: Schedule, axis: str) -> int:
    """Elements of an axis in the first launch, whose sections have the same of it."""
    return schedule.launches[0].sections[0].block(axis)


def warps(schedule: Schedule) -> int:
    """Of the first launch."""
    return schedule.launches[0].warps


def changed(schedule: Schedule, *directives) -> Schedule:
    """A schedule of one launch of one section with other directives."""
    (launch,) = schedule.launches
    (section,) = launch.sections
    shared = [d for d in directives if isinstance(d, Warps | Stages)]
    own = [d for d in directives if d not in shared]
    return Schedule((replace(launch, sections=(section.but(*own),)).but(*shared),))


def right(schedules: Sequence[Schedule]) -> list[str | None]:
    """A check that finds nothing."""
    return [None] * len(schedules)


@pytest.mark.parametrize("name", list(FUSIONS))
def test_neighbours_are_legal_and_differ(name):
    """Several of them, none twice, none the schedule itself."""
    traced = graph(name)
    base = heuristic(traced)
    found = neighbours(traced, base)
    assert len(set(found)) == len(found) >= 3
    assert base not in found
    assert all(legal(traced, s) is None for s in found)
    assert {warps(s) for s in found} >= {warps(base) * 2}


def test_a_products_neighbours_change_its_parts_and_stay_on_the_matrix_unit():
    """More parts, fewer, none, and the same one after the other; no tile under 16."""
    traced = graph("gate_gemm")
    found = neighbours(traced, heuristic(traced))
    done = {(s.launches[0].cut, s.launches[0].sections[0].parts.get("D")) for s in found}
    assert done >= {(Split("D", 2), None), (Split("D", 8), None), (None, None), (None, 4)}
    assert min(block(s, a) for s in found for a in "TDP") >= 16
    assert {bool(s.launches[0].sections[0].all(Prefetch)) for s in found} == {True, False}


def test_every_directive_is_searched():
    """Pairs, prefetches, sections abreast or not, and each section's own tiles, in the first launch and in the second."""
    traced = graph("gate_projections")
    many = heuristic(traced, 4096)
    assert many.launches[0].all(Abreast)
    assert many.launches[0].sections[0].all(Pair)
    found = neighbours(traced, many)
    assert {bool(s.launches[0].all(Abreast)) for s in found} == {True, False}
    assert {bool(s.launches[0].sections[0].all(Pair)) for s in found} == {True, False}
    near = FUSIONS["attention_decode"]
    parts = near.trace(example(near, {"T": 1, "K": 1, "G": 2, "L": 4096, "D": 16, "Dv": 16}, "bfloat16"))
    taking = {text_of(d) for s in neighbours(parts, heuristic(parts)) for d in s.launches[0].sections[0].all(Rounds)}
    assert taking == {"rounds:L.part:8"}
    few = heuristic(traced)
    second = [s.launches[1] for s in neighbours(traced, few) if len(s.launches) == 2]
    assert {launch.warps for launch in second} > {few.launches[1].warps}
    assert {launch.dependent for launch in second} == {True, False}  # not of the first, whose weights are asked for ahead
    assert {launch.sections[1].block("E") for launch in second} > {128, 512}


@pytest.mark.parametrize("name", list(FUSIONS))
def test_the_heuristic_adds_up_in_one_order(name):
    """Whatever the number of rows: a row's bits do not depend on it."""
    traced = graph(name)
    assert len({order_of(traced, s) for s in heuristics(traced, 1, 17, 64, 128, 256, 2048, 16384)}) == 1


def test_what_changes_the_order():
    """Warps and blocks of a sum over a row, parts of a product; not a product's tiles; nothing where nothing is added."""
    norm, product, silu = graph("add_rms_norm"), graph("gate_gemm"), graph("silu_and_mul")
    base = heuristic(norm)
    for other in (changed(base, Tile("T", 2)), changed(base, Loop("H", 512)), changed(base, Warps(warps(base) // 2))):
        assert order_of(norm, other) != order_of(norm, base)
    assert order_of(norm, changed(base, Stages(4))) == order_of(norm, base)
    tile = spread(product, "tile:T:16 loop:D:256 tile:P:32 split:D:4 warps:4 stages:4")
    same = (
        "tile:T:64 loop:D:128 tile:P:64 split:D:4 warps:8 stages:3",
        "tile:T:16 loop:D:64 tile:P:16 parts:D:4 warps:2 stages:2",
    )
    other = ("tile:T:16 loop:D:256 tile:P:32 split:D:8 warps:4 stages:4", "tile:T:16 loop:D:256 tile:P:32 warps:4 stages:4")
    assert {order_of(product, spread(product, s)) for s in same} == {order_of(product, tile)}
    assert order_of(product, tile) not in {order_of(product, spread(product, s)) for s in other}
    deep, shallow = (spread(product, f"tile:T:16 loop:D:{n} tile:P:32 split:D:3 warps:4 stages:2") for n in (512, 256))
    assert order_of(product, deep) != order_of(product, shallow)  # parts begin elsewhere
    assert {order_of(silu, s) for s in neighbours(silu, heuristic(silu))} == {frozenset()}


def test_search_checks_before_it_times():
    """A wrong candidate is never timed, a failing one does not end the search, each bucket gets the fastest right one."""
    traced = graph("silu_and_mul")
    timed = []

    def measure(schedule: Schedule, rows: int) -> float:
        timed.append(schedule)
        if block(schedule, "T") == 4:
            raise RuntimeError("out of resources")
        return warps(schedule) if rows <= 16 else 40 / warps(schedule)

    check = lambda schedules: ["wrong" if warps(s) == 16 else None for s in schedules]  # noqa: E731
    told = []
    found = search(traced, Bench(check, measure, lambda trial, spent: told.append(trial)), 60, FEW)
    assert all(warps(s) != 16 for s in timed)
    assert {t.problem for t in found.trials if warps(t.schedule) == 16} == {"wrong"}
    assert {t.problem for t in found.trials if block(t.schedule, "T") == 4} >= {"RuntimeError: out of resources"}
    assert list(found.trials) == told
    assert found.free == found.together
    base = warps(heuristic(traced))
    assert {b: warps(s) for b, s in found.free.items()} == {1: 1, 17: base}
    best = min(t.ratio for t in found.trials if t.bucket == 1)
    assert math.isclose(best, 1 / base)


def test_search_keeps_to_its_budget():
    """Without time, the heuristic alone; a product has one for each class of rows."""
    traced = graph("silu_and_mul")
    found = search(traced, Bench(right, lambda schedule, rows: 1.0), 0, FEW)
    assert {t.schedule for t in found.trials} == {heuristic(traced)} == set(found.together.values())
    product = graph("gate_gemm")
    found = search(product, Bench(right, lambda schedule, rows: 1.0), 0, FEW)
    assert {t.schedule for t in found.trials} == {heuristic(product), heuristic(product, 17)}
    assert found.together == {1: heuristic(product), 17: heuristic(product, 17)}


def test_search_ends_in_time_where_measuring_is_slow(monkeypatch):
    """What is begun is ended, and the heuristic is measured in any case; no more."""
    begin = time.monotonic()
    now = [begin]
    monkeypatch.setattr("moekit.tune.search.time.monotonic", lambda: now[0])

    def measure(schedule: Schedule, rows: int) -> float:
        now[0] += 1
        return 1.0 / warps(schedule)

    traced = graph("gate_projections")
    search(traced, Bench(right, measure), 60, buckets(traced))
    assert now[0] - begin <= 60 + 2 * len(buckets(traced))


def test_what_was_found_for_some_rows_serves_them_beside_others():
    """Where all schedules are of one order, without another step: it need not be among those that are fastest elsewhere."""
    traced = graph("silu_and_mul")

    def measure(schedule: Schedule, rows: int) -> float:
        return abs(block(schedule, "T") - 16) + 60 if rows > 512 else block(schedule, "T") / warps(schedule)

    rows = {1: (1,), 17: (64,), 513: (1024,)}
    run = searching._Search(traced, Bench(right, measure), rows)
    own = {b: heuristic(traced) for b in rows}
    free = run.descend({b: [s] for b, s in own.items()}, 60)
    assert block(free[513], "T") == 16
    together = searching._together(run, own, free, 0)
    assert all(measure(together[b], r) <= measure(free[b], r) for b, (r,) in rows.items())


def test_a_product_keeps_its_parts_for_all_rows_or_gets_others_for_all():
    """Tiles go by the number of rows, parts do not, however fast others would be for some rows."""
    traced = graph("gate_gemm")

    def measure(schedule: Schedule, rows: int) -> float:
        cut = schedule.launches[0].cut
        parts = cut.count if isinstance(cut, Split) else 1
        wide = block(schedule, "P") / 32
        return (1 + abs(parts - (8 if rows <= 16 else 2)) / 10) * (2 - wide / 4 if rows > 16 else 1 + wide)

    found = search(traced, Bench(right, measure), 60, FEW)
    assert {b: s.launches[0].cut for b, s in found.free.items()} == {1: Split("D", 8), 17: Split("D", 2)}
    assert len({order_of(traced, s) for s in found.together.values()}) == 1
    assert block(found.together[1], "P") < block(found.together[17], "P")


def test_all_rows_together_add_up_in_one_order():
    """A norm that is fastest with other warps for few rows than for many gets those that are slower for none; if there are none

    such, those that are best for all. An entry is worth it only where none is slower.
    """
    traced = graph("add_rms_norm")

    def together(many: dict[int, float]) -> tuple[set[int], bool]:
        def measure(schedule: Schedule, rows: int) -> float:
            (launch, *rest) = schedule.launches
            plain = not rest and block(schedule, "T") == 1 and launch.sections[0].mode("H") == "whole"
            return ({8: 1.0, 4: 0.5, 16: 0.97} if rows <= 16 else many).get(launch.warps, 2.0) if plain else 2.0

        found = search(traced, Bench(right, measure), 60, FEW)
        assert {b: warps(s) for b, s in found.free.items()} == {1: 4, 17: min(many, key=lambda w: many[w])}
        us = {r: {"heuristic": 1.0, "tuned": measure(found.together[b], r), "free": 1.0} for b in FEW for r in FEW[b]}
        worth = winners(traced, found.together, [Timed(b, r, us[r], {}) for b in FEW for r in FEW[b]])
        assert worth in ({}, found.together)
        return {warps(s) for s in found.together.values()}, bool(worth)

    assert together({8: 1.0, 4: 1.1, 16: 0.9}) == ({16}, True)
    assert together({8: 1.0, 4: 1.1, 16: 1.05}) == ({8}, False)
    assert together({8: 1.0, 4: 1.01, 16: 0.9}) == ({4}, True)


def test_winners_are_those_worth_an_entry():
    """Five per cent, no number of rows of the bucket slower; buckets of the heuristic's own order one by one."""
    traced = graph("silu_and_mul")
    one = changed(heuristic(traced), Tile("T", 4))

    def timed(*ratios: float) -> list[Timed]:
        rows = [(b, r) for b in FEW for r in FEW[b]]
        return [Timed(b, r, {"heuristic": 1.0, "tuned": x, "free": x}, {}) for (b, r), x in zip(rows, ratios, strict=True)]

    together = dict.fromkeys(FEW, one)
    assert winners(traced, together, timed(0.9, 0.9, 1.2)) == {1: one}
    assert winners(traced, together, timed(0.7, 1.1, 0.96)) == {}
    norm = graph("add_rms_norm")
    together = dict.fromkeys(FEW, changed(heuristic(norm), Warps(4), Stages(1)))
    assert winners(norm, together, timed(0.9, 0.9, 1.2)) == {}
    assert winners(norm, together, timed(0.8, 0.8, 1.0)) == together


def test_means_and_buckets():
    """Geometric; a bucket is named by its least number of rows."""
    assert math.isclose(mean([0.5, 2.0]), 1.0)
    edges = (1, 17, 128)
    assert [bucket(edges, n) for n in (0, 1, 16, 17, 127, 128, 10**6)] == [1, 1, 1, 17, 17, 128, 128]


WIDTHS = [("silu_and_mul", {"I": 100}), ("silu_and_mul", {"I": 64}), ("gate_gemm", {"D": 2048, "P": 1544})]


@pytest.mark.parametrize(("name", "sizes"), [*SIZES.items(), *WIDTHS], ids=str)
def test_a_bucket_has_one_class_of_rows(name, sizes):
    """Whatever the width: an entry of a bucket stands beside one schedule of the heuristic's, and is timed within it."""
    traced = graph(name, sizes=sizes)
    found = buckets(traced)
    ends = [*list(found)[1:], 10**6]
    for (least, measured), end in zip(found.items(), ends, strict=True):
        assert len(heuristics(traced, least, *measured, end - 1)) == 1
        assert measured
        assert all(bucket(found, n) == least for n in (least, *measured, end - 1))


def test_between_the_edges_of_a_class_the_table_has_a_bucket(monkeypatch):
    """Rows of 100 are many from 10486 on: an entry for 8192 says nothing of them."""
    traced = graph("silu_and_mul", sizes={"I": 100})
    assert list(buckets(traced)) == [1, 17, 128, 512, 2048, 8192, 10486]
    faster = "tile:T:8 tile:I:128 warps:4 stages:1"
    in_table(monkeypatch, traced, entry(traced, from_8192=faster))
    assert [str(table.tuned("NVIDIA H200", traced, {"T": t})) for t in (8191, 8192, 10485, 10486)] == [
        "None",
        faster,
        faster,
        "None",
    ]


def entry(traced, **schedules: str) -> Entry:
    """An entry that holds today."""
    parsed = {int(b.removeprefix("from_")): Schedule.parse(s) for b, s in schedules.items()}
    return Entry(parsed, kernels_of(traced, parsed)[0])


FASTER = "tile:T:4 tile:I:512 warps:8 stages:1"


def in_table(monkeypatch, traced, made: Entry) -> None:
    """Put an entry into the table of every H200."""
    monkeypatch.setattr(table, "_checked", {})
    monkeypatch.setattr(table, "table", lambda d: {table.graph_key(traced): made.to_json()} if "H200" in d else {})


def test_tables_are_found_by_device_sizes_and_rows(monkeypatch):
    """Other static sizes, dtypes and devices have no entry, other buckets are the heuristic's."""
    traced = graph("silu_and_mul")
    in_table(monkeypatch, traced, entry(traced, from_17=FASTER))
    assert str(table.tuned("NVIDIA H200", traced, {"T": 64})) == FASTER
    assert str(table.scheduled("NVIDIA H200", traced, {"T": 64})) == FASTER
    assert table.tuned("NVIDIA H200", traced, {"T": 5000}) is None
    assert table.tuned("NVIDIA H100", traced, {"T": 64}) is None
    assert table.tuned("NVIDIA H200", graph("silu_and_mul", "float16"), {"T": 64}) is None
    product = graph("gate_gemm")
    assert table.scheduled("NVIDIA H200", product, {"T": 64}) == heuristic(product, 17)


def test_a_stale_entry_is_not_used(monkeypatch):
    """Where a kernel reads otherwise, the tuned one's or the heuristic's, where a schedule is illegal, where orders differ."""
    traced = graph("silu_and_mul")
    made = entry(traced, from_17=FASTER)
    assert stale(traced, made) is None
    assert Entry.parse(json.loads(json.dumps(made.to_json()))) == made
    unlike = Entry({17: Schedule.parse("tile:T:4 tile:I:512 warps:4 stages:1")}, made.kernels)
    assert "moekit tune silu_and_mul" in (stale(traced, unlike) or "")
    illegal = Entry({17: Schedule.parse("tile:T:3 tile:I:512 warps:4 stages:1")}, made.kernels)
    assert "power of two" in (stale(traced, illegal) or "")
    for broken in (unlike, illegal):
        in_table(monkeypatch, traced, broken)
        assert table.scheduled("NVIDIA H200", traced, {"T": 64}) == heuristic(traced)
    in_table(monkeypatch, traced, made)
    monkeypatch.setattr(table, "heuristic", lambda g, tokens=None: changed(heuristic(g, tokens), Tile("T", 1)))
    assert table.tuned("NVIDIA H200", traced, {"T": 64}) is None  # it was compared with another heuristic
    norm = graph("add_rms_norm")
    monkeypatch.undo()
    assert "same order" in (stale(norm, entry(norm, from_17="tile:T:1 whole:H:2048 warps:4 stages:1")) or "")
    everywhere = {f"from_{b}": "tile:T:1 whole:H:2048 warps:4 stages:1" for b in buckets(norm)}
    assert stale(norm, entry(norm, **everywhere)) is None


def test_another_triton_has_no_table(monkeypatch):
    """What was timed was what that Triton compiled."""
    found = {"made with": {"triton": "3.6.0"}, "entries": {"a": {}}}
    monkeypatch.setattr(table.json, "loads", lambda text: found)
    for version, expected in (("3.6.0", {"a": {}}), ("3.7.0", {}), (None, {})):
        monkeypatch.setattr(table, "_triton", lambda version=version: version)
        shipped.cache_clear()
        assert shipped("NVIDIA H200") == expected
    shipped.cache_clear()


def test_shipped_tables_can_be_read():
    """Every schedule parses, and what was gained is said."""
    for path in (resources.files("moekit.tune") / "tables").iterdir():
        for row in json.loads(path.read_text())["entries"].values():
            for least, text in row["schedules"].items():
                assert int(least) >= 1
                assert str(Schedule.parse(text)) == text
            assert max(row["time over the heuristic's"].values()) <= 1.02


def test_shipped_entries_keep_the_contract():
    """Each entry that holds today serves every number of rows with one order of adding up; a page says where one does not."""
    from moekit.tune.run import SIZES as MODEL
    from moekit.tune.run import params_of

    page = (Path(__file__).parents[2] / "docs" / "performance_tried.md").read_text(encoding="utf-8")
    shipped, passed_over = table.table("NVIDIA H200"), []
    for name, several in MODEL.items():
        for sizes in several:
            traced = FUSIONS[name].trace(example(FUSIONS[name], {"T": 3, **sizes}, "bfloat16", params_of(name, sizes)))
            row = shipped.get(table.graph_key(traced))
            if row is None:
                continue
            if stale(traced, Entry.parse(row)):
                passed_over.append(name)
                continue
            used = [table.scheduled("NVIDIA H200", traced, {"T": t}) for t in (1, 17, 65, 128, 300, 2048, 5000)]
            assert len({order_of(traced, s) for s in used}) == 1
            assert all(plan(traced, s, table.contiguous(traced, {"T": 8})).programs for s in used)
    assert bool(passed_over) == ("entries are passed over today" in " ".join(page.split())), passed_over
