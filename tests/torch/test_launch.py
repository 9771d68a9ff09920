"""The short way to a kernel: the same results as the front door, and how many kernels are compiled."""

import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch

import moekit.torch as mt
from moekit.compile import tile as t
from moekit.compile.rules import row_classes
from moekit.compile.rules.order import order
from moekit.compile.schedule import Schedule
from moekit.compile.tile.layouts import contiguous
from moekit.errors import AliasError
from moekit.fusions import FUSIONS
from moekit.lang import In, contract, f32, fusion
from moekit.lang.arguments import example
from moekit.torch import fast, launch
from moekit.torch.call import Call
from moekit.torch.launch import layout
from moekit.tune.run import SIZES
from tests.declarations import DECLARATIONS

TRITON, EAGER = {"implementation": "triton"}, {"implementation": "eager"}


def norm_operands(tokens: int, hidden: int, dtype=torch.float32, seed: int = 0):
    make = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(tokens, hidden, generator=make).to(dtype) for _ in range(2))
    return x, residual, torch.randn(hidden, generator=make).to(dtype)


def same(got, wanted) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_second_call_takes_the_short_way(emulated):
    for seed in range(3):
        operands = norm_operands(5, 48, seed=seed)
        same(mt.add_rms_norm(*operands, **TRITON), mt.add_rms_norm(*operands, **EAGER))
    assert (emulated.front, emulated.short) == (1, 2)


def test_short_way_in_place_and_out(emulated):
    for seed in range(3):
        x, residual, weight = norm_operands(4, 32, seed=seed)
        wanted = mt.add_rms_norm(x, residual, weight, **EAGER)
        given = residual.clone()
        version = given._version
        got = mt.add_rms_norm_(x, given, weight, **TRITON)
        same(got, wanted)
        assert got[1] is given
        assert given._version > version
        buffer = torch.full((4, 64), torch.nan)
        out = mt.add_rms_norm(x, residual, weight, out=buffer[:, 16:48], **TRITON)
        same(out, wanted)
        assert out[0].data_ptr() == buffer[:, 16:].data_ptr()
        assert buffer[:, :16].isnan().all()
        assert buffer[:, 48:].isnan().all()
    assert (emulated.front, emulated.short) == (2, 4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_operators_take_the_short_way(emulated, mode):
    with mode():
        x, residual, weight = norm_operands(4, 32)
        wanted = mt.add_rms_norm(x, residual, weight, **EAGER)
        outs = torch.empty_like(x), torch.empty_like(x)
        mt.add_rms_norm(x, residual, weight, **TRITON)
        mt.add_rms_norm(x, residual, weight, out=outs, **TRITON)
        mt.add_rms_norm_(x, residual.clone(), weight, **TRITON)
        same(torch.ops.moekit.add_rms_norm(x, residual, weight), wanted)
        assert torch.ops.moekit.add_rms_norm.out(x, residual, weight, out=outs[0], residual_out=outs[1]) is None
        same(outs, wanted)
        same((torch.ops.moekit.add_rms_norm_(x, residual, weight), residual), wanted)
    assert (emulated.front, emulated.short) == (3, 3)


def test_one_tensor_as_two_operands_is_not_taken_for_two(emulated):
    x, residual, weight = norm_operands(3, 16)
    same(mt.add_rms_norm(x, x, weight, **TRITON), mt.add_rms_norm(x, x, weight, **EAGER))
    same(mt.add_rms_norm(x, residual, weight, **TRITON), mt.add_rms_norm(x, residual, weight, **EAGER))
    assert (emulated.front, emulated.short) == (1, 1)


@pytest.mark.parametrize("start", [0, 16])
def test_overlap_is_checked_on_the_short_way_too(emulated, start):
    """Ranges that meet are told apart by distance: column halves are legal, a shifted window is not."""
    weight = torch.randn(16)
    for _ in range(2):
        apart = torch.randn(4, 48)
        x, residual = apart[:, 16:32], torch.randn(4, 16)
        wanted = mt.add_rms_norm(x, residual, weight, **EAGER)
        same(mt.add_rms_norm(x, residual, weight, out=apart[:, start * 2 : start * 2 + 16], **TRITON), wanted)
    assert emulated.short == 1
    before = apart.clone()
    with pytest.raises(AliasError, match="overlaps x"):
        mt.add_rms_norm(apart[:, 16:32], residual, weight, out=apart[:, 24:40], **TRITON)
    assert torch.equal(before, apart)


def test_output_over_its_own_operand(emulated):
    """What the declaration allows: silu(gate) written over the gate half is not allowed, a norm over x is."""
    for _ in range(2):
        x, residual, weight = norm_operands(4, 32)
        wanted = mt.add_rms_norm(x, residual, weight, **EAGER)
        got = mt.add_rms_norm_(x, residual, weight, out=x, **TRITON)
        same(got, wanted)
        assert got[0] is x
        assert got[1] is residual
    assert (emulated.front, emulated.short) == (1, 1)


def test_dtype_alignment_and_strides_have_entries_of_their_own(emulated):
    x, residual, weight = norm_operands(4, 33)
    wanted = mt.add_rms_norm(x[:, :32], residual[:, :32], weight[:32], **EAGER)
    same(mt.add_rms_norm(x[:, :32], residual[:, :32], weight[:32], **TRITON), wanted)
    wanted = mt.add_rms_norm(x[:, 1:], residual[:, 1:], weight[1:], **EAGER)
    same(mt.add_rms_norm(x[:, 1:], residual[:, 1:], weight[1:], **TRITON), wanted)
    half = [t.half() for t in (x, residual, weight)]
    same(mt.add_rms_norm(*half, **TRITON), mt.add_rms_norm(*half, **EAGER))
    assert (emulated.front, emulated.short) == (3, 0)


def test_split_schedule_has_scratch_on_the_short_way(emulated):
    from moekit.compile.schedule import Schedule

    x, packed = torch.randn(3, 64), torch.randn(8, 64)
    schedule = Schedule.parse(
        "tile:D.part:1 tile:T:4 tile:P:8 loop:D:16 split:D:2 warps:1 stages:1 then loop:D.part:1 tile:T:1 tile:P:64 warps:1"
    )
    for _ in range(2):
        got = mt.gate_gemm(x, packed, schedule=schedule, **TRITON)
        torch.testing.assert_close(got, x @ packed.T)
    assert (emulated.front, emulated.short) == (2, 2)


def test_zero_tokens_launch_nothing(emulated):
    for _ in range(2):
        out, residual = mt.add_rms_norm(torch.empty(0, 8), torch.empty(0, 8), torch.ones(8), **TRITON)
        assert out.shape == residual.shape == (0, 8)
    assert (emulated.front, emulated.short) == (0, 0)


def test_gradients_by_the_short_way(emulated):
    for _ in range(2):
        x, residual, weight = (t.requires_grad_() for t in norm_operands(3, 16))
        mt.add_rms_norm(x, residual, weight, **TRITON)[0].square().sum().backward()
        got = [t.grad for t in (x, residual, weight)]
        y, r, w = (t.detach().requires_grad_() for t in (x, residual, weight))
        mt.add_rms_norm(y, r, w, **EAGER)[0].square().sum().backward()
        same(got, [y.grad, r.grad, w.grad])
    assert (emulated.front, emulated.short) == (1, 1)


def transposed(shape, dtype):
    return torch.empty(*reversed(shape), dtype=dtype).permute(*reversed(range(len(shape))))


@pytest.mark.parametrize("fusion", ["add_rms_norm", "silu_and_mul", "topk_softmax", "gate_gemm", "shared_expert_combine"])
def test_new_token_counts_compile_nothing(fusion, emulated, monkeypatch):
    """T = 1 … 300, row-major and transposed: as many kernels as stride classes, for a GEMM times its classes of rows."""
    monkeypatch.setattr("moekit.compile.tile.interpret.execute", lambda *args: None)
    face, dtype = getattr(mt, fusion), torch.bfloat16
    shapes = {
        "add_rms_norm": lambda t: ((t, 64), (t, 64), (64,)),
        "silu_and_mul": lambda t: ((t, 64),),
        "topk_softmax": lambda t: ((t, 64),),
        "gate_gemm": lambda t: ((t, 64), (32, 64)),
        "shared_expert_combine": lambda t: ((t, 64), (t, 64), (t, 1)),
    }[fusion]
    extra = {"k": 4} if fusion == "topk_softmax" else {}
    for make, most in ((torch.empty, 1), (transposed, 2)):
        emulated.compiled.clear()
        for tokens in range(1, 301):
            operands = [make(s, dtype=dtype) if len(s) == 2 else torch.empty(s, dtype=dtype) for s in shapes(tokens)]
            face(*operands, **extra, **TRITON)
        gemm = FUSIONS["gate_gemm"].trace(example(FUSIONS["gate_gemm"], {"D": 64, "P": 32}, "bfloat16"))
        classes = sum(least <= 300 for least in row_classes(gemm)) if fusion == "gate_gemm" else 1
        assert len(emulated.compiled) <= (most + (make is transposed)) * classes


def test_tuned_schedules_are_used_where_there_is_a_table(emulated, monkeypatch):
    from moekit.compile.schedule import Schedule
    from moekit.tune import table as tables

    asked = []

    def table(device, graph, sizes):
        asked.append(graph.name)
        return Schedule.parse("tile:T:2 whole:H:32 warps:2 stages:1")

    monkeypatch.setattr(tables, "tuned", table)
    x, residual, weight = norm_operands(4, 32)
    same(mt.add_rms_norm(x, residual, weight, **TRITON), mt.add_rms_norm(x, residual, weight, **EAGER))
    ((program, _),) = emulated.compiled
    assert (program.warps, program.axis("T").block, asked) == (2, 2, ["add_rms_norm"])


CONTIGUOUS = [(FUSIONS[name], sizes) for name, several in SIZES.items() for sizes in several]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(("made", "sizes"), CONTIGUOUS, ids=lambda x: getattr(x, "name", str(x)))
def test_what_is_made_ahead_for_contiguous_tensors_is_what_a_launch_asks_for(made, sizes, rows):
    """`moekit tune`, `export` and `show` look at the kernel of a call, not at one that knows more or less of its strides."""
    binding = example(made, {**sizes, "T": rows}, "bfloat16", {})
    graph = made.trace(binding)
    extents = dict(binding.sizes)
    for name, told in contiguous(graph, extents).items():
        x = graph.tensors[name]
        shape = [1 if a is None else extents.get(a, graph.axes[a]) for a in x.axes]
        like = torch.empty(shape, dtype=getattr(torch, x.dtype), device="meta")
        assert told == layout(like, x.axes, frozenset(made.dynamic)), name


def test_a_contiguous_tensor_of_2_31_elements_is_wide():
    """Offsets along its static axes pass 2**31 - 1."""

    @fusion(None, x=In("T A B"))
    def rows(x):
        return f32(x) * 2.0

    graph = rows.trace(example(rows, {"T": 3, "A": 2**16 + 1, "B": 2**15}, "bfloat16", {}))
    assert contiguous(graph, {"T": 3})["x"].wide
    assert not contiguous(rows.trace(example(rows, {"T": 2**20, "A": 2, "B": 2**15}, "bfloat16", {})), {"T": 2**20})["x"].wide


def test_launches_are_dependent_where_the_schedule_says_so(monkeypatch):
    """And the device can; the kept launch passes on what the first one did."""
    device, program = torch.device("cpu"), t.TileProgram("made_up", (), (), (), (), 8, 1)
    for able, said in itertools.product((True, False), repeat=2):
        monkeypatch.setattr(launch, "overlapping", lambda device, able=able: able)
        one = launch.Launch(program, 1, ("x",), (), said)
        kept = fast.ready(one, SimpleNamespace(run=1, function=2, packed_metadata=3), ("x",), device)
        assert kept is not None
        assert kept.rest == (one.overlaps(device),) == (able and said,)
    schedule = "tile:T:1 whole:E:512 whole:K:16 warps:1 stages:1"
    cases = [("", 2047, True), ("", 2048, False), (schedule, 3, False), (f"{schedule} dependent", 5000, True)]
    for text, rows, dependent in cases:
        given = Schedule.parse(text) if text else None
        call = Call(FUSIONS["topk_softmax"], {"logits": torch.zeros(rows, 512)}, {"k": 10}, False, None, given)
        assert [one.dependent for one in call.prepare().launches] == [dependent], (text, rows)


def test_a_kernel_that_is_launched_again_stays_loaded():
    """Triton 3.8 unloads a compiled kernel's code when nobody holds the object."""
    one = launch.Launch(t.TileProgram("made_up", (), (), (), (), 8, 1), 1, ("x",), (), False)
    compiled = SimpleNamespace(run=1, function=2, packed_metadata=3)
    assert fast.ready(one, compiled, ("x",), torch.device("cpu")).kernel is compiled


def test_tritons_launcher_takes_what_it_is_handed():
    """The short way calls it by position; `Emulated` stands in for it here."""
    from triton.backends.nvidia.driver import CudaLauncher

    named = [*inspect.signature(CudaLauncher.__call__).parameters][1:]
    first = ["gridX", "gridY", "gridZ", "stream", "function"]
    hooks = ["launch_metadata", "launch_enter_hook", "launch_exit_hook"]
    assert named in ([*first, "args"], [*first, "kernel_metadata", *hooks, "args"])  # to Triton 3.6, from 3.7 on


def test_rows_that_lie_across_memory_have_one_schedule():
    """Of rows that lie along memory, many have programs twice as large; the same elements the other way round have not."""
    x, weight = torch.zeros(1100, 4, 128), torch.zeros(128)
    across = torch.zeros(1100, 128, 4).transpose(1, 2)
    for one, few, many in ((x, 4, 8), (across, 4, 4), (x[..., ::2], 4, 4)):
        w = weight[: one.shape[-1]]
        warps = []
        for rows in (3, 1100):
            call = Call(FUSIONS["gated_rms_norm"], {"x": one[:rows], "z": one[:rows], "weight": w}, {}, False, None, None)
            warps.append(call.prepare().launches[0].program.warps)
        assert warps == [few, many]


GEMMS = [
    *((n, sizes) for n in ("gate_gemm", "gate_projections", "down_combine") for sizes in SIZES[n]),
    ("gate_block", {"D": 1024, "I": 64, "E": 512, "G": 1}),  # out of place, four of its parts would not be worth a launch
]


@pytest.mark.parametrize(("name", "sizes"), GEMMS, ids=str)
def test_calls_of_every_class_of_rows_add_up_in_one_order(name, sizes):
    """Of a model's widths, in place and not: what is launched, not what the heuristic says of a declaration."""
    declared, orders = DECLARATIONS[name], set()
    few = example(declared, {"T": 1, **sizes}, "bfloat16")
    for rows in row_classes(declared.trace(few)):
        for least in {max(1, rows - 1), max(1, rows), rows + 1}:
            bound = example(declared, {"T": least, **sizes}, "bfloat16")
            operands = {
                n: torch.empty([d.size(dict(bound.sizes)) for d in s.dims], dtype=getattr(torch, dict(bound.dtypes)[n]))
                for n, s in declared.tensors.items()
            }
            for in_place in {False, any(s.role == "InOut" for s in declared.tensors.values())}:
                made = Call(declared, operands, {}, in_place, None, None).prepare()
                orders.add(order([one.program for one in made.launches]))
    assert len(orders) == 1


@fusion(None, x=In("T D"), w=In("P D"), v=In("Q D"), u=In("T P"))
def spread_beside(x, w, v, u):
    """A product, and another one times what the first may be written over."""
    return {"a": contract(x, w, over="D") + f32(u), "b": contract(x, v, over="D") * f32(u)}


@pytest.mark.parametrize("depth", [64, 2048])
def test_an_output_over_an_operand_has_schedules_of_its_own_where_it_needs_them(depth):
    """Two sections become one, which cannot take their schedule: neither an error nor another order at other rows."""
    orders = set()
    for rows in (1, 17, 65, 300, 2100):
        sizes = {"x": (rows, depth), "w": (32, depth), "v": (64, depth), "u": (rows, 32)}
        operands = {n: torch.zeros(s, dtype=torch.float32 if n == "u" else torch.bfloat16) for n, s in sizes.items()}
        made = Call(spread_beside, operands, {}, False, (operands["u"], None), None).prepare()
        orders.add(order([one.program for one in made.launches]))
    assert len(orders) == 1
