"""Adapters of others' kernels, with kernels made up here in their stead: right ones pass, wrong ones are found."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from moekit.backends.array import evaluate
from moekit.cli.app import cli
from moekit.errors import UnavailableError
from moekit.fusions import FUSIONS
from moekit.testing import others
from moekit.testing.batch import replay
from moekit.testing.case import FuzzCase
from moekit.testing.draw import Limits, draw_call
from moekit.testing.executors import executor
from moekit.testing.layouts import Layout, numpy_source
from moekit.testing.oracle import Oracle
from moekit.testing.peers import PEERS, _in_place_norm, _returning, _topk, _writing, may_ask, vectors
from moekit.testing.standards import wrong_ids
from moekit.testing.tasks import Task, run_task

COUNT = itertools.count()


def stand_in(monkeypatch, name: str, call) -> str:
    """The name, used once, of peer `name` with `call` as its kernel."""
    fake = f"fake {name} {next(COUNT)}"
    monkeypatch.setitem(PEERS, fake, replace(PEERS[name], call=call, load=lambda: None))
    return fake


def campaign(monkeypatch, name: str, call, combos: int = 6):
    """The adapter of peer `name` with `call` as its kernel, on a few hundred cases: counted cases and failures."""
    fake = stand_in(monkeypatch, name, call)
    counted, failures = 0, []
    for combo in range(combos):
        report = run_task(Task(PEERS[name].fusion, fake, 5, combo, 0, groups=3, layouts=4))
        counted += report.coverage.counted
        failures += report.failures
    return counted, failures


def norm(x, residual, weight, eps, offset):
    """What FlashInfer documents, in float32."""
    total = x.float() + residual.float()
    scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
    residual.copy_(total.to(residual.dtype))
    x.copy_((total * scale * (weight.float() + offset)).to(x.dtype))


def norm_without_strides(x, residual, weight, eps, offset):
    """Takes rows to lie one after the other."""
    flat = [torch.as_strided(t, t.shape, (t.shape[1], 1)) for t in (x, residual)]
    norm(*flat, weight, eps, offset)


def norm_late(x, residual, weight, eps, offset):
    """Forms 1 + weight in the weight's dtype, which loses small weights."""
    norm(x, residual, weight + offset, eps, 0.0)


def test_an_in_place_norm(monkeypatch):
    """The right one passes on every layout that is asked for."""
    counted, failures = campaign(monkeypatch, "flashinfer-add-norm", _in_place_norm(norm), 12)
    assert counted > 50
    assert not failures


@pytest.mark.parametrize("kernel", [norm_without_strides, norm_late])
def test_a_wrong_in_place_norm_is_found(monkeypatch, kernel):
    """A row stride ignored, and 1 + weight in bfloat16: both happened to others."""
    _, failures = campaign(monkeypatch, "flashinfer-add-norm", _in_place_norm(kernel), 12)
    assert failures


def rounded_silu(gate_up):
    """What Liger computes."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate.float()).to(up.dtype) * up


def test_a_peer_is_held_to_its_own_rounding(monkeypatch):
    """Liger rounds silu before the product: that passes for it, and not rounding does not."""
    counted, failures = campaign(monkeypatch, "liger-silu", _returning(rounded_silu), 10)
    assert counted > 50
    assert not failures

    def unrounded(gate_up):
        gate, up = gate_up.float().chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)

    assert campaign(monkeypatch, "liger-silu", _returning(unrounded), 10)[1]


def test_a_kernel_that_writes_its_output(monkeypatch):
    """One that leaves the last row alone is found: outputs are poisoned."""

    def silu(gate_up, out):
        gate, up = gate_up.float().chunk(2, -1)
        out.copy_(torch.nn.functional.silu(gate) * up)

    counted, failures = campaign(monkeypatch, "flashinfer-silu", _writing(silu), 16)
    assert counted > 20
    assert not failures
    assert campaign(monkeypatch, "flashinfer-silu", _writing(lambda x, out: silu(x[:-1], out[:-1])), 16)[1]


def test_a_router(monkeypatch):
    """Any order among equal ids is right for a router that promises none; an id twice or a worse id is not."""

    def stable(logits, weights, ids, renormalize):
        order = torch.sort(logits, dim=-1, descending=True, stable=True)[1][:, : ids.shape[1]]
        chosen = torch.softmax(logits.float(), -1).gather(1, order)
        weights.copy_(chosen / chosen.sum(-1, keepdim=True) if renormalize else chosen)
        ids.copy_(order)

    def unstable(logits, weights, ids, renormalize):
        chosen, order = torch.softmax(logits.float(), -1).topk(ids.shape[1], -1)
        weights.copy_(chosen / chosen.sum(-1, keepdim=True) if renormalize else chosen)
        ids.copy_(order)

    def once_more(logits, weights, ids, renormalize):
        stable(logits, weights, ids, renormalize)
        ids[:, -1] = ids[:, 0]

    def second_best(logits, weights, ids, renormalize):
        stable(logits, weights, ids, renormalize)
        ids[:, 0] = torch.where(ids[:, 0] + 1 < logits.shape[1], ids[:, 0] + 1, 0)

    for right in (stable, unstable):
        counted, failures = campaign(monkeypatch, "sgl-topk", _topk(right), 12)
        assert counted > 20
        assert not failures
    for wrong in (once_more, second_best):
        assert campaign(monkeypatch, "sgl-topk", _topk(wrong), 3)[1]


def test_a_router_that_compares_the_softmax(monkeypatch):
    """Tiny logits that differ have one softmax in float32: any of them is right."""

    def by_softmax(logits, weights, ids, source, renormalize):
        chosen, order = by_share(logits)
        chosen, order = chosen[:, : ids.shape[1]], order[:, : ids.shape[1]]
        weights.copy_(chosen / chosen.sum(-1, keepdim=True) if renormalize else chosen)
        ids.copy_(order)

    params = {"k": 3, "renormalize": True, "nan_to_zero": False}
    case = FuzzCase("topk_softmax", {"T": 5, "E": 32}, {"logits": "float32"}, params, recipe="tiny", seed=3)
    ids = by_share(torch.from_numpy(case.values()["logits"]))[1][:, :3]
    assert (ids.numpy() != Oracle.of(case).want["ids"]).any(), "the case must have such ties to show anything"
    assert replay(case, stand_in(monkeypatch, "vllm-topk", _topk(by_softmax, True))) == []


def by_share(logits):
    """The float32 softmax, largest first, and the ids."""
    return torch.softmax(logits.float(), -1).sort(dim=-1, descending=True, stable=True)


def test_wrong_ids():
    """Which ids of which rows: a swap of equals is none, everything else is."""
    logits = np.array([[1.0, 2.0, 2.0, 0.0]] * 6, np.float32)
    want = np.array([[1, 2, 0]] * 6, np.int32)
    got = np.array([[1, 2, 0], [2, 1, 0], [2, 1, 3], [2, 2, 0], [1, 2, 4], [-1, 1, 0]], np.int32)
    wrong = wrong_ids({"logits": logits}, want, got)
    assert wrong.any(-1).tolist() == [False, False, True, True, True, True]
    assert wrong[2].tolist() == [False, False, True]
    apart = np.array([[1.0, 1.0 + 2.0**-20, 1.0 + 2.0**-8]], np.float32)
    assert not wrong_ids({"logits": apart}, np.array([[2, 1]]), np.array([[2, 0]])).any()
    assert wrong_ids({"logits": apart}, np.array([[2, 1]]), np.array([[1, 2]])).all()


def test_a_peer_that_reads_subnormals_as_zero(monkeypatch):
    """The contract lets them: a subnormal operand of a sum that stays unrounded may be lost, and shows in the output."""

    def flushed(x, residual, weight, eps, offset):
        small = [torch.where(t.abs() < 2.0**-126, torch.zeros_like(t), t) for t in (x, residual, weight)]
        x.copy_(small[0])
        residual.copy_(small[1])
        norm(x, residual, small[2], eps, offset)

    fake = stand_in(monkeypatch, "sgl-add-norm", _in_place_norm(flushed))
    dtypes = dict.fromkeys(("x", "residual", "weight"), "bfloat16")
    for found in ({"sizes": {"T": 63, "H": 32}, "seed": 675821985, "params": {"eps": 2e-06, "offset": 1.0}},
                  {"sizes": {"T": 15, "H": 33}, "seed": 984913470, "params": {"eps": 1e-06, "offset": 1.0}}):  # fmt: skip
        assert replay(FuzzCase("add_rms_norm", dtypes=dtypes, mode="in place", recipe="tiny", **found), fake) == []


def test_a_silu_close_to_a_tie(monkeypatch):
    """Float32 noise may round Liger's silu either way there, and there alone."""
    towards = {"right": 0.0, "other": 1e-7, "far": 1e-3}

    def silu(gate_up, off):
        gate, up = gate_up.chunk(2, -1)
        return (torch.nn.functional.silu(gate.float()) * (1 + off)).to(up.dtype) * up

    case = FuzzCase("silu_and_mul", {"T": 3, "I": 100}, {"gate_up": "float16"}, {}, seed=590296308)
    results = {}
    for name, off in towards.items():
        results[name] = replay(case, stand_in(monkeypatch, "liger-silu", _returning(functools.partial(silu, off=off))))
    assert not results["right"]
    assert not results["other"]
    assert results["far"]


def test_fla_is_held_to_its_own_softplus(monkeypatch):
    """log(1 + exp(x)) loses what 1 swallows; a softplus that loses more is found."""

    def step(round_to_half):
        def call(q, k, v, a, b, A_log, dt_bias, state, *, eps):
            q, k, v, a, b, A_log, dt_bias = (t.float() for t in (q, k, v, a, b, A_log, dt_bias))
            q, k = (t * torch.rsqrt(t.pow(2).sum(-1, keepdim=True) + eps) for t in (q, k))
            heads = torch.arange(v.shape[1]) // (v.shape[1] // q.shape[1])
            q, k = q[:, heads] * q.shape[-1] ** -0.5, k[:, heads]
            x = a + dt_bias
            one = 1 + torch.exp(x.clamp(max=20))
            softplus = torch.where(x < 20, torch.log(one.half().float() if round_to_half else one), x)
            s = state * torch.exp(-torch.exp(A_log) * softplus)[..., None, None]
            delta = (v - torch.einsum("tvk,tvkd->tvd", k, s)) * torch.sigmoid(b)[..., None]
            s = s + k[..., None] * delta[..., None, :]
            return torch.einsum("tvk,tvkd->tvd", q, s), s

        return _returning(call)

    case = FuzzCase("delta_rule_step", {"T": 7, "K": 8, "Dk": 8, "V": 8, "Dv": 8},
                    dict.fromkeys(("q", "k", "v", "a", "b", "A_log", "dt_bias", "state"), "float32"), {"eps": 1e-06},
                    recipe="mixed", mode="in place", seed=318990029)  # fmt: skip
    results = {}
    for name, rounded in (("fine", False), ("coarse", True)):
        results[name] = replay(case, stand_in(monkeypatch, "fla-delta", step(rounded)))
    assert not results["fine"]
    assert results["coarse"]
    asked = replace(case, recipe="normal")
    assert may_ask("fla-delta", asked)
    assert not may_ask("fla-delta", replace(asked, recipe="huge")), "its softplus, 0 times infinity, is NaN"


def test_standards_compute_what_their_references_say():
    """Each declaration, evaluated by numpy in float32, is within its own bound."""
    for name, peer in PEERS.items():
        if peer.standard.declaration is None:
            continue
        for seed in range(6):
            source = numpy_source(seed)
            case = draw_call(peer.fusion, source, Limits(dtypes=peer.dtypes, elements=500))
            case = replace(case, recipe=("normal", "mixed", "ties")[seed % 3], seed=seed)
            graph = peer.standard.declaration.trace(case.binding)
            outputs = evaluate(graph, case.values(), case.extents, "numpy")
            assert not Oracle.of(case, name, peer.standard).compare(outputs).problems, (name, case)


def test_a_peer_is_not_asked_for_what_it_refuses():
    """Neither by a campaign nor in making a failure small."""
    case = FuzzCase("add_rms_norm", {"T": 3, "H": 16}, dict.fromkeys(("x", "residual", "weight"), "bfloat16"), {"offset": 1.0})
    assert may_ask("sgl-add-norm", case)
    assert not may_ask("sgl-add-norm", replace(case, dtypes=dict.fromkeys(case.dtypes, "float32")))
    assert may_ask("liger-add-norm", replace(case, dtypes=dict.fromkeys(case.dtypes, "float32")))
    padded = replace(case, layouts={"x": replace(Layout.dense(2), kind="padded 16", pads=(0, 8))})
    assert not may_ask("sgl-add-norm", padded)
    assert may_ask("flashinfer-add-norm", padded)
    assert not may_ask("sgl-add-norm", replace(case, sizes={"T": 0, "H": 16}))
    assert may_ask("interpret", padded)


def test_only_rows_that_begin_where_a_vector_may_are_asked_for():
    """`vectors` looks at every tensor's strides and offset: 8 numbers of 16 bits, or as many as divide the row."""
    case = FuzzCase("silu_and_mul", {"T": 3, "I": 16}, {"gate_up": "bfloat16"}, {})
    assert vectors(case)
    padded = replace(Layout.dense(2), kind="padded", pads=(0, 1))
    assert not vectors(replace(case, layouts={"gate_up": padded}))
    assert vectors(replace(case, layouts={"gate_up": replace(padded, pads=(0, 8))}))
    assert not vectors(replace(case, layouts={"gate_up": replace(Layout.dense(2), shift=1)}))
    assert not vectors(replace(case, layouts={"gate_up": replace(Layout.dense(2), steps=(1, 2))}))
    assert vectors(replace(case, sizes={"T": 3, "I": 9}))


@pytest.mark.parametrize("name", [n for n in PEERS if n != "compiled-eager"])
def test_a_peer_that_is_not_installed(name):
    """Says so in one sentence, and the command ends with 3."""
    try:
        PEERS[name].load()
    except UnavailableError:
        pass
    else:
        pytest.skip(f"{name} is installed here")
    with pytest.raises(UnavailableError, match=f"{name}: "):
        executor(name)
    ended = CliRunner().invoke(cli, ["fuzz", PEERS[name].fusion, "--impl", name, "--examples", "1"])
    assert ended.exit_code == 3, ended.output


def test_every_adapter_is_for_a_fusion():
    """The table names fusions that exist; an empty name is for all of them."""
    assert {p.fusion for p in PEERS.values()} <= {"", *FUSIONS}
    assert not others.installed("no_such_package_at_all")
