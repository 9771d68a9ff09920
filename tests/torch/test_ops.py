"""`torch.ops.moekit.*`: schemas, opcheck, autograd, transforms, meta tensors and fusions of one's own."""

from zlib import crc32

import pytest
import torch

import moekit.torch as mt
from moekit.errors import DeclarationError, MoekitError, ShapeError, UnavailableError
from moekit.fusions import FUSIONS
from moekit.lang import In, InOut, cast, f32, fusion
from moekit.torch import ops
from tests.sizes import sizes_of
from tests.torch.conftest import ROUNDED

LAYOUTS = ("dense", "padded", "transposed")


def as_tuple(x) -> tuple:
    return x if isinstance(x, tuple) else () if x is None else (x,)


def variants(name: str):
    """The overloads of a fusion: (overload, whether in place, outputs it writes to)."""
    known = ops.registered(FUSIONS[name])
    yield known.plain, False, ()
    yield known.plain_out, False, known.outputs
    if known.in_place is not None:
        yield known.in_place, True, ()
    if known.in_place_out is not None:
        yield known.in_place_out, True, known.fresh


def buffers(name: str, given, operands, params) -> dict:
    """Given outputs, each the right half of a wider tensor."""
    known = ops.registered(FUSIONS[name])
    likes = dict(zip(known.outputs, as_tuple(known.plain(*operands, *params.values())), strict=True))
    wide = {n: torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype) for n, x in likes.items()}
    return {ops.out_name(FUSIONS[name], n): wide[n][..., likes[n].shape[-1] :] for n in given}


def test_schemas_say_what_is_mutated():
    known = ops.registered(FUSIONS["add_rms_norm"])
    eps = "float eps=9.9999999999999995e-07, float offset=1."
    assert str(known.plain._schema) == (
        f"moekit::add_rms_norm(Tensor x, Tensor residual, Tensor weight, {eps}) -> (Tensor, Tensor)"
    )
    assert str(known.in_place._schema) == (
        f"moekit::add_rms_norm_(Tensor x, Tensor(a!) residual, Tensor weight, {eps}) -> Tensor"
    )
    assert str(known.plain_out._schema) == (
        f"moekit::add_rms_norm.out(Tensor x, Tensor residual, Tensor weight, {eps}, *, "
        "Tensor(a!) out, Tensor(b!) residual_out) -> ()"
    )
    assert str(ops.registered(FUSIONS["shared_expert_combine"]).in_place._schema) == (
        "moekit::shared_expert_combine_(Tensor(a!) hidden, Tensor shared, Tensor gate) -> ()"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(fused, params, tensors, layout):
    for overload, _, given in variants(fused):
        if given and layout != "transposed":
            continue
        operands = tensors(fused, layout=layout)
        utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")[: 2 if given else 3]
        outs = buffers(fused, given, operands, params)
        if any(x.dtype == torch.float8_e4m3fn for x in outs.values()):
            continue  # which opcheck cannot compare (torch 2.11)
        torch.library.opcheck(overload, (*operands, *params.values()), outs, test_utils=utils)


def test_opcheck_with_gradients(fused, params, tensors):
    if fused in ROUNDED:
        pytest.skip("what is rounded to float8 has no derivative")
    operands = [x.requires_grad_(x.is_floating_point()) for x in tensors(fused)]
    torch.library.opcheck(ops.registered(FUSIONS[fused]).plain, (*operands, *params.values()))


def test_operators_and_functions_agree(fused, params, tensors):
    face = mt.op(FUSIONS[fused])
    wanted = as_tuple(face(*tensors(fused), **params))
    for overload, in_place, given in variants(fused):
        operands = tensors(fused)
        outs = buffers(fused, given, operands, params)
        before = [x.clone() for x in operands]
        returned = as_tuple(overload(*operands, *params.values(), **outs))
        known = ops.registered(FUSIONS[fused])
        named = dict(zip(FUSIONS[fused].tensors, operands, strict=True))
        fresh = iter(returned)
        for n, x in zip(known.outputs, wanted, strict=True):
            got = outs[ops.out_name(FUSIONS[fused], n)] if n in given else named[n] if in_place and n in named else next(fresh)
            torch.testing.assert_close(got, x, rtol=0, atol=0)
        if not in_place:
            assert all(torch.equal(x, y) for x, y in zip(operands, before, strict=True))


def test_plain_forms_own_their_memory(fused, params, tensors):
    operands = tensors(fused)
    held = {x.untyped_storage().data_ptr() for x in operands}
    for x in as_tuple(mt.op(FUSIONS[fused])(*operands, **params)):
        assert x.untyped_storage().data_ptr() not in held
        assert x.is_contiguous()


def test_meta_tensors(fused, params, tensors):
    wanted = as_tuple(mt.op(FUSIONS[fused])(*tensors(fused), **params))
    for call in (mt.op(FUSIONS[fused]), lambda *xs, **kw: ops.registered(FUSIONS[fused]).plain(*xs, *kw.values())):
        got = as_tuple(call(*(x.to("meta") for x in tensors(fused)), **params))
        assert [(x.shape, x.dtype, x.stride()) for x in got] == [(x.shape, x.dtype, x.stride()) for x in wanted]
        assert all(x.is_meta for x in got)


def test_inference_mode(fused, params, tensors):
    wanted = as_tuple(mt.op(FUSIONS[fused])(*tensors(fused), **params))
    with torch.inference_mode():
        for overload, in_place, given in variants(fused):
            operands = tensors(fused)
            got = as_tuple(overload(*operands, *params.values(), **buffers(fused, given, operands, params)))
            if not in_place and not given:
                torch.testing.assert_close(got, wanted, rtol=0, atol=0)


SMALL = {"T": 2, "D": 4, "P": 3, "I": 2, "E": 6, "H": 4, "H?": 1, "V": 2, "K": 2, "Dk": 3, "Dv": 2, "G": 2, "Q": 4, "L": 4,
         "C": 3, "S": 2, "R": 1, "N": 2, "J": 3, "M": 1, "Cq": 2, "Ck": 2, "Cv": 2, "Lr": 3, "Lc": 3}  # fmt: skip
FINITE = {"eps": 3e-3, "atol": 2e-2, "rtol": 2e-2}
pytestmark = pytest.mark.filterwarnings("ignore:Input #.*not a double precision:UserWarning")


def differentiable(x) -> bool:
    return x.is_floating_point()


@pytest.mark.parametrize("name", ROUNDED)
def test_what_is_rounded_to_float8_has_no_derivative(name, tensors):
    """Backwards, forwards and by a transform: one sentence, and no gradient of zeros."""
    operands, face = tensors(name), mt.op(FUSIONS[name])
    recorded = [x.requires_grad_(x.is_floating_point()) for x in tensors(name)]
    with pytest.raises(UnavailableError, match="what is rounded to float8 has no derivative; detach its operands, or take"):
        sum(x.float().sum() for x in as_tuple(face(*recorded))).backward()
    some = next(i for i, x in enumerate(operands) if x.dtype == torch.float32)

    def call(x):
        return sum(y.float().sum() for y in as_tuple(face(*operands[:some], x, *operands[some + 1 :], implementation="eager")))

    with pytest.raises(UnavailableError, match="what is rounded to float8 has no derivative"):
        torch.func.grad(call)(operands[some])
    with pytest.raises(UnavailableError, match="what is rounded to float8 has no derivative"):
        torch.func.jvp(call, (operands[some],), (torch.ones_like(operands[some]),))
    assert all(torch.equal(a, b) for a, b in zip(as_tuple(face(*operands)), as_tuple(face(*recorded)), strict=True))


@pytest.mark.usefixtures("smooth")
def test_gradcheck(fused, params, tensors):
    """Against finite differences, in float32: so a wide step and a wide tolerance; by function and operator in turns."""
    operands = tuple(x.requires_grad_(x.is_floating_point()) for x in tensors(fused, sizes=sizes_of(FUSIONS[fused], SMALL)))
    face, known = mt.op(FUSIONS[fused]), ops.registered(FUSIONS[fused])

    def call(*xs):
        outs = known.plain(*xs, *params.values()) if crc32(fused.encode()) % 2 else face(*xs, **params)
        return tuple(x for x in as_tuple(outs) if differentiable(x))

    assert torch.autograd.gradcheck(call, operands, **FINITE)


def test_second_derivatives(tensors):
    operands = tuple(x.requires_grad_() for x in tensors("silu_and_mul", sizes={"T": 2, "I": 3}))
    assert torch.autograd.gradgradcheck(mt.silu_and_mul, operands, **FINITE)


def test_vmap(fused, params, tensors):
    operands, others = tensors(fused), tensors(fused, seed=1)
    stacked = tuple(torch.stack(pair) for pair in zip(operands, others, strict=True))
    face, known = mt.op(FUSIONS[fused]), ops.registered(FUSIONS[fused])
    wanted = [as_tuple(face(*xs, **params)) for xs in (operands, others)]
    for call in (lambda *xs: face(*xs, **params), lambda *xs: known.plain(*xs, *params.values())):
        for got, first, second in zip(as_tuple(torch.vmap(call)(*stacked)), *wanted, strict=True):
            torch.testing.assert_close(got, torch.stack((first, second)))


def test_vmap_refuses_what_writes(tensors):
    x, residual, weight = tensors("add_rms_norm")
    for call in (mt.add_rms_norm_, torch.ops.moekit.add_rms_norm_):
        with pytest.raises(UnavailableError, match="use the plain form"):
            torch.vmap(call, (0, 0, None))(x[:, None], residual[:, None], weight)
    with pytest.raises(UnavailableError, match="implementation='eager'"):
        torch.vmap(lambda y: mt.silu_and_mul(y, implementation="triton"))(x[:, None])


def test_functional_gradient_of_operator(tensors):
    x, residual, weight = tensors("add_rms_norm")
    by_function = torch.func.grad(lambda y: mt.add_rms_norm(y, residual, weight)[0].sum())(x)
    by_operator = torch.func.grad(lambda y: torch.ops.moekit.add_rms_norm(y, residual, weight)[0].sum())(x)
    x.requires_grad_()
    mt.add_rms_norm(x, residual, weight)[0].sum().backward()
    torch.testing.assert_close(by_function, x.grad)
    torch.testing.assert_close(by_operator, x.grad)


def test_in_place_bumps_the_version(tensors):
    x, residual, weight = tensors("add_rms_norm")
    doubled = residual.clone().requires_grad_()
    state = doubled * 1
    kept = (state * state).sum()
    with torch.no_grad():
        mt.add_rms_norm_(x, state.detach(), weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@fusion(x=In("T H"), total=InOut("T H"))
def running_total(x, total, scale: float = 2.0):
    """total becomes total + scale·x, and out is its square."""
    new = f32(total) + f32(x) * scale
    return {"out": cast(new * new, x.dtype), "total": cast(new, total.dtype)}


def test_a_fusion_of_ones_own():
    face, in_place = mt.op(running_total), mt.op(running_total, in_place=True)
    x, total = torch.randn(3, 8), torch.randn(3, 8)
    wanted = face(x, total, scale=3.0)
    with pytest.raises(Exception, match=r"moekit\.torch\.register"):
        torch.compile(lambda a, b: face(a, b), fullgraph=True, backend="eager")(x, total)
    known = mt.register(running_total)
    assert mt.register(running_total) is known
    torch.library.opcheck(torch.ops.moekit.running_total.default, (x, total, 3.0))
    torch._dynamo.reset()
    got = torch.compile(lambda a, b: face(a, b, scale=3.0), fullgraph=True, backend="eager")(x, total)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(in_place(x, total, scale=3.0), wanted)
    assert torch.equal(total, wanted[1])


def test_a_name_is_given_once():
    @fusion(x=In("T H"))
    def silu_and_mul(x):
        """Another one."""
        return cast(f32(x) * 2.0, x.dtype)

    with pytest.raises(DeclarationError, match="rename yours"):
        mt.register(silu_and_mul)


def test_operators_refuse_in_one_sentence(tensors):
    x, residual, weight = tensors("add_rms_norm")
    with pytest.raises(ShapeError, match=r"residual has shape \[2, 24\]"):
        torch.ops.moekit.add_rms_norm(x, residual[:2], weight)
    with pytest.raises(MoekitError, match="requires grad"):
        torch.ops.moekit.add_rms_norm_(x.requires_grad_(), residual, weight)


@fusion(lambda x, y: {"out": abs(x.astype("float64")), "same": x}, x=In("T N"), y=In("T N"))
def magnitude_and_itself(x, y):
    """|x|, and x as it is."""
    return {"out": cast(abs(f32(x)), x.dtype), "same": cast(f32(x), x.dtype)}


def test_an_output_that_is_an_operand_is_taken_before_another_goes_over_it():
    """|x| written over x, and x itself elsewhere: eagerly, one is copied after the other."""
    x = torch.randn(3, 5)
    wanted, elsewhere = x.clone(), torch.empty(3, 5)
    magnitude, same = mt.op(magnitude_and_itself)(x, torch.ones(3, 5), out=(x, elsewhere), implementation="eager")
    assert torch.equal(same, wanted)
    assert torch.equal(magnitude, wanted.abs())
    assert magnitude is x
