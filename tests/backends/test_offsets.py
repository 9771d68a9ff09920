"""How far Pallas's kernels reach into an array: the type of the offsets that are lowered, and what is refused."""

import jax
import pytest
from jax._src.lib.mlir import ir
from jax.sharding import AbstractDevice, AbstractMesh
from jaxlib.triton import dialect

from moekit.errors import ShapeError
from moekit.jax import op, view
from moekit.lang import In, f32, fusion

H200 = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(device_kind="NVIDIA H200", platform="cuda", num_cores=132))
ROWS, COLUMNS, FLOAT8 = 2**16, 2**10, "float8_e4m3fn"


@fusion(None, w=In("T N", dtype=(FLOAT8, "int8", "int16", "float32")))
def widened(w):
    return {"out": f32(w)}


def lowered(layers: int, dtype: str):
    """`widened` of the last of several layers in one array, lowered for an H200; nothing is allocated."""
    base = jax.ShapeDtypeStruct((layers, ROWS, COLUMNS), dtype)
    with jax.sharding.use_abstract_mesh(H200):
        traced = jax.jit(lambda w: op(widened)(view(w)[layers - 1], implementation="pallas")).trace(base)
        return traced.lower(lowering_platforms=("cuda",)).compiler_ir()


def kernels(operation):
    """The modules of Triton IR in a lowered program."""
    for block in (b for region in operation.regions for b in region.blocks):
        for inner in block.operations:
            if "mhlo.backend_config" in inner.attributes and "ir" in inner.attributes["mhlo.backend_config"]:
                context = ir.Context()
                dialect.register_dialect(context)
                yield str(ir.Module.parse(inner.attributes["mhlo.backend_config"]["ir"].value_bytes, context))
            yield from kernels(inner.operation)


@pytest.mark.parametrize(
    ("layers", "dtype", "offsets"),
    [(32, FLOAT8, "i32"), (65, FLOAT8, "i64"), (32, "int16", "i32"), (33, "int16", "i64"), (17, "float32", "i64")],
)
def test_offsets_are_as_wide_as_the_base_needs(layers, dtype, offsets):
    """2³¹ elements are told apart in 32 bits, which is what bases of at most 2³² bytes have."""
    (text,) = kernels(lowered(layers, dtype).operation)
    load = next(line for line in text.splitlines() if "tt.addptr" in line)
    assert load.endswith(f"x{offsets}>")


@pytest.mark.parametrize("dtype", [FLOAT8, "int8"])
@pytest.mark.parametrize("layers", [33, 64])
def test_bytes_whose_offsets_would_wrap_are_refused(layers, dtype):
    said = rf"w: the base has {layers * ROWS * COLUMNS} elements of one byte, .*; cut it into arrays of at most 2147483648"
    with pytest.raises(ShapeError, match=said):
        lowered(layers, dtype)
