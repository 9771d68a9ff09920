"""Sums over ranks: every rank of a case played, its packets in an order that is drawn, beside array evaluation of all ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

import numpy as np

from moekit.backends import packet
from moekit.backends.array import evaluate_ranks
from moekit.compile.plan import plan
from moekit.compile.tile.interpret import poison
from moekit.compile.tile.layouts import PAIR, contiguous, epochs_name, mail_name, pitch
from moekit.compile.tile.ranks import Mail, Mailboxes, play
from moekit.lang.graph import Graph, made_of
from moekit.testing.case import FuzzCase
from moekit.testing.executors import Executor

Operands = Sequence[Mapping[str, np.ndarray]]  # of a call, by rank
CALLS = 3  # one after the other: with two slots the third uses the first one's again
CLOSE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}  # of a sum in another order
BEGIN = (0, -2, 5)  # the last epochs: none, the last but one there is, any


def ranks_add_up(executor: Executor, case: FuzzCase) -> list[str]:
    """Two to four ranks with other operands each, called again and again, have what array evaluation has."""
    mesh = case.declaration.mesh
    if not mesh or executor.name != "interpret" or (wrong := _packet_problems()):
        return wrong if mesh and executor.name == "interpret" else []
    ranks = 2 + case.seed % 3
    case = replace(case, params={**case.params, **dict.fromkeys(mesh, ranks)}, layouts={}, mode="out", operands=None)
    given = [[replace(case, seed=case.seed + 97 * c + r).values() for r in range(ranks)] for c in range(CALLS)]
    try:
        found = played(case.graph, given, case.extents, case.seed)
    except IndexError as error:
        return [str(error)]
    return [problem for c in range(CALLS) for problem in _differ(case, given[c], [mine[c] for mine in found])]


def _packet_problems() -> list[str]:
    """What is wrong with the text of packets, which no CPU runs: data and epoch of each are one access of 64 bits, both ways;
    two may be one vector access; and each one's epoch is looked at."""
    problems = []
    for words in range(1, PAIR + 1):
        texts = packet.send(words).text, packet.receive(words, 1).text
        stores, loads = (re.findall(r"@\w+ (st|ld)(\S+) [^;]*packet", text) for text in texts)
        shape = ".relaxed.sys.global" + ".v2" * (words == 2) + ".b64"
        looked = sorted(re.findall(r"setp\.ne\S+ \w+, (epoch\w+),", texts[1]))
        if (stores, loads) != ([("st", shape)], [("ld", shape)]):
            problems.append(f"{words} packets are written by {stores} and read by {loads}, not each by one access of 64 bits")
        if looked != [f"epoch0_{w}" for w in range(words)]:
            problems.append(f"of {words} packets a wait looks at {looked}, not at every epoch")
    return problems


def played(graph: Graph, given: Sequence[Operands], sizes: Mapping[str, int], seed: int) -> list[list[dict]]:
    """What every rank has after every call: `given[c][r]` are the operands of call c on rank r, which are left as they are."""
    ranks, calls = len(given[0]), len(given)
    made = plan(graph, None, contiguous(graph, sizes))
    memories: list[list[dict]] = []
    axes = {n.attr("over"): graph.nodes[n.args[0]].axes for n in graph.live_nodes("all_reduce")}
    extents = {over: [sizes[a] for a in own] for over, own in axes.items()}
    boxes = {over: Mailboxes(ranks, (*most, pitch(last))) for over, (*most, last) in extents.items()}
    for r in range(ranks):
        link = {mail_name(a): Mail(box, r) for a, box in boxes.items()}
        link |= {epochs_name(a): np.full(box.shape[0], BEGIN[seed % len(BEGIN)], np.int32) for a, box in boxes.items()}
        outs = {w.tensor: graph.tensors[w.tensor] for w in graph.writes}
        fresh = {n: (tuple(sizes[d.text] for d in x.dims), x.dtype) for n, x in outs.items() if x.role == "Out"}
        mine = [{n: np.array(x) for n, x in given[c][r].items()} for c in range(calls)]
        memories.append([{**each, **{n: poison(*kind) for n, kind in fresh.items()}, **link} for each in mine])
    play([made] * calls, memories, [sizes] * calls, Random(seed))
    return memories


def _differ(case: FuzzCase, given: Operands, found: list[dict]) -> list[str]:
    """Where ranks have something else than array evaluation: other bits of what no sum within a rank reaches."""
    problems, graph = [], case.graph
    value = {w.tensor: w.value for w in graph.writes}
    for rank, wanted in enumerate(evaluate_ranks(graph, given, case.extents)):
        for name, x in wanted.items():
            got, near = found[rank][name].astype(np.float64), CLOSE.get(x.dtype.name, 0.0)
            exact = not any(graph.nodes[i].op == "reduce" for i in made_of(graph.nodes, value[name]))
            with np.errstate(all="ignore"):
                same = np.isclose(got, x.astype(np.float64), 0 if exact else near, 0 if exact else near, equal_nan=True)
            if not same.all():
                problems.append(f"{name} of rank {rank} of {len(given)} has {int((~same).sum())} of {same.size} other elements")
    return problems
