"""Ids that a caller hands to a gather or a put: right in every integer dtype, beyond int32 too, or refused."""

import numpy as np
import pytest
import torch

import moekit.torch as mt
from moekit.errors import DtypeError
from moekit.lang import In, InOut, cast, f32, fusion, gather, put

INTEGERS = ("int8", "int16", "int32", "int64")
ROWS = 300
WAYS = ["eager", "triton", pytest.param("cuda", marks=pytest.mark.gpu)]


@fusion(None, table=In("S H"), ids=In("T", dtype=INTEGERS))
def rows_at_ids(table, ids):
    """out[:, t] = table[ids[t]], and 0 for ids that are none."""
    return cast(f32(gather(table, ids, over="S")), table.dtype)


@fusion(None, x=In("T H"), ids=In("T", dtype=INTEGERS), table=InOut("S H"))
def rows_to_ids(x, ids, table):
    """table[ids[t]] = x[t], for ids that are some."""
    return {"table": put(x, ids, over="S")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_ids_of_every_width(request, dtype, way):
    """The least and the largest of the dtype, those around 0 and ROWS, and those that narrowing to int32 would make valid."""
    if way == "triton":
        request.getfixturevalue("emulated")
    device = "cuda" if way == "cuda" else "cpu"
    implementation = None if way == "cuda" else way
    info = np.iinfo(dtype)
    around = [0, 5, 99, ROWS - 1, ROWS, -1, -ROWS, info.min, info.max, 2**32 + 7, 2**32, -(2**32) + 3, 2**31, 2**31 - 1]
    ids = np.array([i for i in around if info.min <= i <= info.max], dtype)
    rng = np.random.default_rng(0)
    table, x = (rng.standard_normal((n, 8)).astype("float32") for n in (ROWS, len(ids)))
    rows, updated = np.zeros_like(x), table.copy()
    for t, i in enumerate(ids.tolist()):
        if 0 <= i < ROWS:
            rows[t], updated[i] = table[i], x[t]
    given = [torch.from_numpy(a).to(device) for a in (table, ids, x)]
    found = mt.op(rows_at_ids)(*given[:2], implementation=implementation)
    np.testing.assert_array_equal(found.cpu().numpy(), rows.T)
    found = mt.op(rows_to_ids)(given[2], given[1], given[0], implementation=implementation)
    np.testing.assert_array_equal(found.cpu().numpy(), updated)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "bool", "float32"])
def test_other_ids_are_refused(dtype):
    ids = torch.zeros(3).to(getattr(torch, dtype))
    with pytest.raises(DtypeError, match=f"^rows_at_ids: ids is (torch.)?{dtype}; it must be"):
        mt.op(rows_at_ids)(torch.zeros(4, 8), ids)
