"""Forward mode: tangents of every fusion by every way there is, against differences of the numpy references."""

from zlib import crc32

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import moekit.torch as mt
from moekit.errors import MoekitError, UnavailableError
from moekit.fusions import FUSIONS
from moekit.torch import ops

from .derivatives import Differences, as_tuple, close

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
pytestmark = pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr:UserWarning")


class LookingOn(TorchDispatchMode):
    """A mode that changes nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def floats(outs) -> tuple:
    return tuple(x for x in as_tuple(outs) if x.is_floating_point())


def with_duals(call, primals, tangents) -> list:
    """The tangents of a call's float outputs, by dual numbers."""
    with forward_ad.dual_level():
        outs = floats(call(*map(forward_ad.make_dual, primals, tangents)))
        return [forward_ad.unpack_dual(x).tangent for x in outs]


def without_grad(call, primals, tangents) -> list:
    with torch.no_grad():
        return with_duals(call, primals, tangents)


def looked_at(call, primals, tangents) -> list:
    def under(*xs):
        with LookingOn():
            return call(*xs)

    return with_duals(under, primals, tangents)


def recorded(call, primals, tangents) -> list:
    """Operands that autograd records, too."""
    return with_duals(call, [x.clone().requires_grad_() for x in primals], tangents)


def by_jvp(call, primals, tangents):
    return torch.func.jvp(lambda *xs: floats(call(*xs)), primals, tangents)[1]


def by_linearize(call, primals, tangents):
    return torch.func.linearize(lambda *xs: floats(call(*xs)), *primals)[1](*tangents)


def by_vmap_of_jvp(call, primals, tangents):
    pushed = torch.vmap(lambda *vs: by_jvp(call, primals, vs))(*(torch.stack([v, 2 * v]) for v in tangents))
    return [both[1] / 2 for both in pushed]


def twice_backwards(call, primals, tangents):
    """The transpose of the transpose: reverse mode over reverse mode."""

    def pulled(*xs):
        outs, pull = torch.func.vjp(lambda *ys: floats(call(*ys)), *xs)
        return outs, pull

    outs, pull = pulled(*primals)
    return torch.func.vjp(lambda *gs: pull(gs), *map(torch.zeros_like, outs))[1](tangents)


def compiled_jvp(call, primals, tangents, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(lambda ps, vs: by_jvp(call, ps, vs), backend=backend)(primals, tangents)


def run_jvp(call, primals, tangents):
    """The captured graph itself."""
    return compiled_jvp(call, primals, tangents, "eager")


def compiled_duals(call, primals, tangents):
    torch._dynamo.reset()
    return with_duals(torch.compile(call, backend="aot_eager"), primals, tangents)


WAYS = (with_duals, without_grad, looked_at, recorded, by_jvp, by_linearize, by_vmap_of_jvp, twice_backwards)


def placed(operands, xs) -> list:
    """All operands, those of floats given."""
    given = iter(xs)
    return [next(given) if x.is_floating_point() else x for x in operands]


def calls(name: str, params: dict, operands) -> dict:
    """A fusion's function and its operator, of the float operands alone."""
    face, plain = mt.op(FUSIONS[name]), ops.registered(FUSIONS[name]).plain
    return {
        "function": lambda *xs: face(*placed(operands, xs), **params),
        "operator": lambda *xs: plain(*placed(operands, xs), *params.values()),
    }


@pytest.mark.usefixtures("smooth")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_tangents(fused, params, tensors, way, device):
    """By the function and the operator in turns: every way of each, and every fusion by each."""
    operands = tensors(fused, device=device)
    primals, wanted = floats(operands), Differences(fused, operands, params)
    turn = (WAYS.index(way) + crc32(fused.encode())) % 2
    call = [*calls(fused, params, operands).values()][turn]
    call(*primals)  # so that the next call is of a layout seen before
    close(way(call, primals, wanted.directions(primals)), wanted.tangents())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", [compiled_jvp, run_jvp, compiled_duals], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["add_rms_norm", "gate_projections", "topk_softmax", "delta_rule_step"])
def test_tangents_under_torch_compile(tensors, name, way, device):
    params = {"k": 4} if name == "topk_softmax" else {}
    primals = tuple(x.clone() for x in tensors(name, device=device))  # torch traces no tangent of a slice
    wanted = Differences(name, primals, params)
    close(way(calls(name, params, primals)["function"], primals, wanted.directions(primals)), wanted.tangents())


@pytest.mark.usefixtures("smooth")
@pytest.mark.parametrize("device", DEVICES)
def test_second_derivatives(fused, params, tensors, device):
    """vᵀHv by every order of modes: of torch.func, of dual numbers and of autograd."""
    operands = tensors(fused, device=device)
    primals, wanted = floats(operands), Differences(fused, operands, params)
    v = wanted.directions(primals)

    def inner(found):
        return sum((g * y).sum() for g, y in zip(found, v, strict=True) if g is not None)

    for call in calls(fused, params, operands).values():

        def scalar(*xs, call=call):
            return wanted.scalar(as_tuple(call(*xs)))

        def along(*xs, f=scalar):
            return torch.func.jvp(f, xs, v)[1]

        def down(*xs, f=scalar):
            return inner(torch.func.grad(f, tuple(range(len(xs))))(*xs))

        close([torch.func.jvp(f, primals, v)[1] for f in (along, down)], 2 * [wanted.second()], 1e-2)
        gradients = [torch.func.grad(f, tuple(range(len(v))))(*primals) for f in (scalar, along, down)]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x.clone().requires_grad_(), y) for x, y in zip(primals, v, strict=True)]
            pulled = [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(scalar(*duals), duals)]
        roots = [x.clone().requires_grad_() for x in primals]
        first = torch.autograd.grad(scalar(*roots), roots, create_graph=True)
        second = torch.autograd.grad(inner(first), roots, allow_unused=True)
        close([inner(gradients[0]), inner(first)], 2 * [wanted.first()], 1e-3)
        close([inner(g) for g in (*gradients[1:], pulled, second)], 4 * [wanted.second()], 1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_jacobians_and_hessians(tensors, device):
    """silu(gate)·up by hand, in float64: its Jacobian both ways and its Hessian."""
    (x,) = tensors("silu_and_mul", sizes={"T": 1, "I": 3}, device=device)

    def by_hand(y):
        return y[:, :3] * torch.sigmoid(y[:, :3]) * y[:, 3:]

    for found in (torch.func.jacfwd(mt.silu_and_mul), torch.func.jacrev(mt.silu_and_mul)):
        close([found(x)], [torch.func.jacrev(by_hand)(x.double()).cpu()])
    found = torch.func.hessian(lambda y: mt.silu_and_mul(y).sum())(x)
    close([found], [torch.func.hessian(lambda y: by_hand(y).sum())(x.double()).cpu()])


@pytest.mark.usefixtures("smooth")
def test_tangents_of_fake_tensors(fused, params, tensors):
    with FakeTensorMode() as mode:
        operands = [torch.empty_like(mode.from_tensor(x)) for x in tensors(fused)]
        primals = floats(tuple(operands))
        for call in calls(fused, params, operands).values():
            outs = floats(call(*primals))
            found = with_duals(call, primals, [torch.empty_like(x) for x in primals])
            assert [t.shape for t in found] == [x.shape for x in outs]


@pytest.mark.usefixtures("smooth")
def test_kernels_seen_before_lose_no_tangent(fused, params, tensors, emulated):
    """The short way, which calls on the operands' layout alone, is not taken."""
    operands, face = tensors(fused), mt.op(FUSIONS[fused])
    for _ in range(2):
        face(*operands, **params, implementation="triton")
    assert emulated.short or fused == "qkv_norm_rope"  # caches written in part are copied first, which is the long way
    primals, wanted = floats(operands), Differences(fused, operands, params)
    for call in calls(fused, params, operands).values():
        close(with_duals(call, primals, wanted.directions(primals)), wanted.tangents())
    with pytest.raises(UnavailableError, match="Triton cannot push a tangent forward; use implementation='eager'"):
        with_duals(
            lambda *xs: face(*placed(operands, xs), **params, implementation="triton"), primals, wanted.directions(primals)
        )


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_tangent_kernels_serve_under_a_dual_level(tensors, device):
    x, residual, weight = tensors("add_rms_norm", device=device)
    wanted = mt.add_rms_norm(x, residual, weight)
    with forward_ad.dual_level():
        assert torch.equal(mt.add_rms_norm_(x, residual, weight)[0], wanted[0])
    with torch.inference_mode(), forward_ad.dual_level():  # which pushes no tangent either
        dual = forward_ad.make_dual(x.clone(), torch.ones_like(x))
        assert forward_ad.unpack_dual(mt.silu_and_mul(dual)).tangent is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("look", [False, True], ids=["alone", "looked at"])
def test_what_writes_refuses_tangents(tensors, device, look):
    """Of an operand, and of what is written to; nothing is written."""
    x, residual, weight = tensors("add_rms_norm", device=device)
    before, out = residual.clone(), torch.zeros_like(x)
    ours, other = torch.ops.moekit, torch.ones_like(x)
    writes = {
        "add_rms_norm_: x carries": lambda d: mt.add_rms_norm_(d, residual, weight),
        "add_rms_norm: x carries": lambda d: mt.add_rms_norm(d, residual, weight, out=(out, None)),
        "add_rms_norm_: out for residual carries": lambda d: mt.add_rms_norm_(x, d, weight),
        "add_rms_norm: out for out carries": lambda d: mt.add_rms_norm(x, residual, weight, out=(d, None)),
        r"add_rms_norm_: x carries a": lambda d: ours.add_rms_norm_(d, residual, weight),
        "add_rms_norm: out for out carries a": lambda d: ours.add_rms_norm.out(x, residual, weight, out=d, residual_out=other),
    }
    with forward_ad.dual_level():
        for sentence, call in writes.items():
            dual = forward_ad.make_dual(x.clone(), torch.ones_like(x))
            with LookingOn() if look else torch.no_grad(), pytest.raises(MoekitError, match=sentence) as refused:
                call(dual)
            assert str(refused.value).endswith("use the plain form")
    assert torch.equal(residual, before)
    assert not out.any()
