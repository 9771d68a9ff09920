"""What only a GPU can show: offsets past 2³¹ elements in real memory, more than 65,535 rows, strides that stay strides."""

import numpy as np
import pytest

pytestmark = pytest.mark.gpu

FAR = 2**31


def _row_pairs(torch):
    """Rows more than 2³¹ elements apart, in one bfloat16 allocation of 4.3 GB."""
    base = torch.empty(FAR + 70_000, device="cuda", dtype=torch.bfloat16)
    return base, base.as_strided((2, 4096), (FAR + 64, 1)), base.as_strided((2, 4096), (FAR + 64, 1), 8192)


def test_triton_rows_past_two_to_the_31():
    """The row offset of a strided operand and of a strided output is computed in 64 bits."""
    import torch

    from moekit.torch import add_rms_norm, silu_and_mul

    base, x, out = _row_pairs(torch)
    base[:16384].normal_()
    base[FAR:].normal_()
    got = silu_and_mul(x, out=out[:, :2048])
    assert got.data_ptr() == out.data_ptr()
    wanted = silu_and_mul(x.contiguous(), implementation="eager")
    torch.testing.assert_close(got.contiguous(), wanted, rtol=1e-2, atol=1e-2)
    weight = torch.randn(4096, device="cuda", dtype=torch.bfloat16)
    for mine, theirs in zip(add_rms_norm(x, out, weight), add_rms_norm(x, out, weight, implementation="eager"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


def test_triton_columns_past_two_to_the_31():
    """So is the offset along an axis of static size whose stride is huge."""
    import torch

    from moekit.torch import silu_and_mul

    base = torch.empty(FAR + 70_000, device="cuda", dtype=torch.bfloat16)
    x = base.as_strided((3, 4), (16, FAR // 3))
    x.copy_(torch.randn(3, 4, device="cuda"))
    torch.testing.assert_close(silu_and_mul(x), silu_and_mul(x.contiguous(), implementation="eager"), rtol=1e-2, atol=1e-2)


def test_triton_rows_have_the_same_bits_in_every_class():
    """From 2^20 elements on tiles are larger; a row is what it is alone, strided or not, on both sides of that."""
    import torch

    from moekit.torch import shared_expert_combine, silu_and_mul

    gate_up = torch.randn(1030, 2568, device="cuda").bfloat16()[:, :2048]
    hidden, shared = (torch.randn(530, 2048, device="cuda").bfloat16() for _ in range(2))
    gate = torch.randn(530, 648, device="cuda").bfloat16()[:, 640:641]
    for face, tensors in ((silu_and_mul, (gate_up,)), (shared_expert_combine, (hidden, shared, gate))):
        every, rows = face(*tensors), len(tensors[0])
        torch.testing.assert_close(every.float(), face(*tensors, implementation="eager").float(), rtol=1e-2, atol=1e-2)
        for some in (slice(0, 1), slice(rows - 8, rows), slice(3, 3 + rows // 2)):
            assert torch.equal(face(*(x[some] for x in tensors)), every[some])


def test_triton_gather_past_two_to_the_31():
    """And that of a row chosen by an id."""
    import torch

    from moekit.lang import In, Out, cast, fusion, gather
    from moekit.torch import op

    @fusion(None, table=In("S H"), ids=In("T", dtype="int32"), out=Out("T H"), dynamic="T S")
    def pick(table, ids):
        return cast(gather(table, ids, over="S"), table.dtype)

    table = torch.zeros(FAR // 2048 + 3, 2048, device="cuda", dtype=torch.bfloat16)
    table[-1].normal_()
    ids = torch.tensor([table.shape[0] - 1, 0, -1, table.shape[0]], device="cuda", dtype=torch.int32)
    got = op(pick)(table, ids)
    assert torch.equal(got[0], table[-1])
    assert not got[1:].any()


@pytest.mark.parametrize("door", ["pallas", "triton"])
def test_views_past_two_to_the_31(door):
    """A View whose elements lie past 2³¹ in its base is indexed per axis, or from a pointer in 64 bits."""
    import jax
    import jax.numpy as jnp

    from moekit.jax import silu_and_mul, view

    rows = FAR // 2048 + 4
    tail = jax.random.normal(jax.random.key(0), (4, 2048), jnp.bfloat16)
    base = jax.jit(lambda t: jnp.zeros((rows, 2048), jnp.bfloat16).at[-4:].set(t))(tail)
    got = jax.jit(lambda b: silu_and_mul(view(b)[rows - 4 :, 1024:], implementation=door))(base)
    wanted = silu_and_mul(tail[:, 1024:], implementation="xla")
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(wanted, np.float32), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("tokens", [65_535, 65_536, 200_003])
def test_more_rows_than_a_second_grid_axis_has(tokens):
    """Tokens ride on the first grid axis, which is the only one."""
    import torch

    from moekit.torch import add_rms_norm, topk_softmax

    x, residual = torch.randn(2, tokens, 32, device="cuda")
    weight = torch.randn(32, device="cuda")
    for mine, theirs in zip(
        add_rms_norm(x, residual, weight), add_rms_norm(x, residual, weight, implementation="eager"), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    _, ids = topk_softmax(x, 4)
    assert torch.equal(ids, topk_softmax(x, 4, implementation="eager")[1])


def test_a_row_does_not_depend_on_its_neighbours():
    """Bitwise: any slice of the batch gives the rows of the whole batch, for every fusion that has rows, by every door.

    What adds up over ranks has no sample for one of them, and what sorts pairs has no rows.
    """
    import jax
    import torch

    from moekit.fusions import FUSIONS
    from moekit.jax import op as jax_op
    from moekit.jax.doors import DOORS
    from moekit.testing import operands
    from moekit.torch import op as torch_op

    from .samples import SAMPLES

    samples = {n: s for n, s in sorted(SAMPLES.items()) if s.fusion in FUSIONS and s.fusion != "moe_align"}
    for name, sample in samples.items():
        fusion = FUSIONS[sample.fusion]
        sizes = dict(sample.bound()[1].sizes) | {"T": 37}
        if "ids" in fusion.tensors:
            sizes["E"] = 48  # stacks of matrices: drawing 512 takes a minute
        values = operands(fusion, sizes, "bfloat16", "normal", 3)
        tokens = [n for n, s in fusion.tensors.items() if s.shape.startswith("T")]
        for rows in (slice(0, 1), slice(5, 6), slice(30, 37), slice(3, 20)):
            part = {n: x[rows] if n in tokens else x for n, x in values.items()}
            as_torch = lambda x: torch.from_numpy(x.astype(np.float32)).cuda().to(getattr(torch, x.dtype.name))  # noqa: E731
            whole, few = (_tuple(torch_op(fusion)(*map(as_torch, v.values()), **sample.params)) for v in (values, part))
            assert all(torch.equal(w[rows], f) for w, f in zip(whole, few, strict=True)), f"triton {name} {rows}"
            for door in DOORS:
                face = jax.jit(lambda *xs, f=fusion, p=sample.params, d=door: jax_op(f)(*xs, **p, implementation=d))
                whole, few = (_tuple(face(*v.values())) for v in (values, part))
                same = (np.array_equal(np.asarray(w[rows]), np.asarray(f)) for w, f in zip(whole, few, strict=True))
                assert all(same), f"{door} {name} {rows}"


def _tuple(outs) -> tuple:
    return outs if isinstance(outs, tuple) else (outs,)


@pytest.mark.parametrize("width", [2048, 1024])
@pytest.mark.parametrize("name", ["gate_gemm", "gate_projections", "gate_block", "down_combine"])
def test_a_row_has_the_same_bits_in_every_class_of_rows(name, width):
    """Bitwise, at sizes of a model: the first rows of many, and few rows alone, by every tile that the heuristic has."""
    import torch

    from moekit.compile.rules import row_classes
    from moekit.torch import op
    from tests.declarations import DECLARATIONS

    fusion = DECLARATIONS[name]
    classes = row_classes(fusion.trace(_bound(fusion, width, 1)))
    most = 2 * max(classes) + 5
    bound = _bound(fusion, width, most)
    shapes, dtypes = dict(bound.sizes), dict(bound.dtypes)
    torch.manual_seed(0)
    every = {
        n: torch.randn([shapes[d.text] for d in s.dims], device="cuda").to(getattr(torch, dtypes[n]))
        for n, s in fusion.tensors.items()
    }
    by_row = [n for n, s in fusion.tensors.items() if s.shape.startswith("T")]
    whole = _tuple(op(fusion)(*every.values()))
    for rows in sorted({1, 3, 300, 1024, *(r for least in classes if least for r in (least - 1, least))}):
        few = _tuple(op(fusion)(*(x[:rows] if n in by_row else x for n, x in every.items())))
        for n, (w, f) in enumerate(zip(whole, few, strict=True)):
            other = (w[:rows] != f).nonzero()
            assert len(other) == 0, f"{rows} rows: {len(other)} of output {n}, first at {other[0].tolist()}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("width", [2048, 600])
def test_products_have_the_same_bits_in_tiles_of_any_number_of_rows(width, dtype):
    """All float32 sums of a product, unrounded: tiles of 16 rows are made by another instruction than larger ones."""
    import torch

    from moekit.compile.rules import row_classes
    from moekit.lang import In, contract, fusion
    from moekit.torch import op

    @fusion(None, x=In("T D"), w=In("P D"))
    def products(x, w):
        return contract(x, w, over="D")

    sizes = {"x": (1, width), "w": (320, width)}
    classes = row_classes(products.trace(products.bind(sizes, dict.fromkeys(sizes, dtype), products.bind_params({}))))
    torch.manual_seed(0)
    x, w = (torch.randn(n, width, device="cuda").to(getattr(torch, dtype)) for n in (2 * max(classes), 320))
    whole = op(products)(x, w)
    for least in classes:
        rows = max(least, 16)
        for first in range(0, min(len(x), 40 * rows), rows):
            other = (op(products)(x[first : first + rows], w) != whole[first : first + rows]).sum().item()
            assert other == 0, f"{rows} rows from {first} on: {other} of {320 * rows} sums"


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("shape", [(4, 128), (32, 128), (5, 96)], ids=str)
def test_a_short_row_has_the_same_bits_in_larger_programs(shape, start):
    """Bitwise, whether its elements can be loaded together or one by one."""
    import torch

    from moekit.compile.rules import row_classes
    from moekit.fusions import FUSIONS
    from moekit.torch import gated_rms_norm

    fusion, sizes = FUSIONS["gated_rms_norm"], {"V": shape[0], "D": shape[1]}
    shapes = {n: tuple(d.size({"T": 3, **sizes}) for d in s.dims) for n, s in fusion.tensors.items()}
    bound = fusion.bind(shapes, dict.fromkeys(shapes, "bfloat16"), fusion.bind_params({}))
    few, many = row_classes(fusion.trace(bound))
    torch.manual_seed(0)
    heads, length = shape
    make = lambda *shape: torch.randn(*shape, device="cuda").to(torch.bfloat16)  # noqa: E731
    x, z = (make(many + 5, heads, length + 8)[..., start : start + length] for _ in range(2))
    whole, weight = None, make(length)
    for rows in (many + 5, many, many - 1, 300, 64, 17, 3, 1):
        out = gated_rms_norm(x[:rows], z[:rows], weight)
        whole = out if whole is None else whole
        assert torch.equal(whole[:rows], out), f"{rows} rows"
    assert few == 0


def _bound(fusion, width: int, rows: int):
    """A call at the widths of a model of so many hidden columns."""
    sizes = {"T": rows, "D": width, "H": width, "P": 648, "I": 512 if fusion.name == "down_combine" else 64, "E": 512, "G": 1}
    shapes = {n: tuple(d.size(sizes) for d in s.dims) for n, s in fusion.tensors.items()}
    dtypes = {n: s.dtypes[0] if len(s.dtypes) == 1 else "bfloat16" for n, s in fusion.tensors.items()}
    return fusion.bind(shapes, dtypes, fusion.bind_params({}))
