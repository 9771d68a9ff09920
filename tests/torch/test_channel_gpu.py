"""On two GPUs, `python -m pytest -m gpu tests/torch/test_channel_gpu.py`: packets, in processes that a hang cannot outlive."""

import time

import pytest
import torch
from torch import distributed as dist

from bench.all_reduce import drawn, in_order, joined, on_ranks
from moekit.cli.platform import gpu_count
from moekit.errors import RankError
from moekit.torch import Channel, all_reduce_add_rms_norm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpu_count() < 2, reason="needs two GPUs")]
RANKS, WIDTH, PATIENCE = 2, 2048, 240
CLOSE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def laid(x: torch.Tensor, way: str) -> torch.Tensor:
    """The same numbers: as they are, in every second column of wider rows, or with the rows' axis innermost."""
    if way == "transposed":
        return x.T.contiguous().T
    if way == "dense":
        return x
    wide = torch.full((x.shape[0], 2 * x.shape[1]), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, ::2] = x
    return wide[:, ::2]


def sums(me: int, tp: int, rows: int, dtype: str, way: str = "dense", width: int = WIDTH) -> bool:
    """Whether the residual is the float32 sum in the order of ranks, and what is normalised near float64's."""
    rank = drawn(me, tp, rows, width, getattr(torch, dtype))
    given = laid(rank.parts[me], way), laid(rank.residual, way), rank.weight
    out, total = all_reduce_add_rms_norm(*given, tp=tp, implementation="triton")
    wanted = in_order(rank.parts, rank.residual)
    near = torch.nn.functional.rms_norm(wanted.double(), (width,), eps=1e-6) * (1 + rank.weight.double())
    return torch.equal(total, wanted) and torch.allclose(out.double(), near, rtol=CLOSE[dtype], atol=CLOSE[dtype])


def right(me: int, tp: int, at: str, dtype: str) -> list[dict]:
    """Calls of several numbers of rows and strides on one rank; none of them counts for no row."""
    joined(me, tp, at)
    channel, found = Channel(), []
    for rows in (1, 3, 128, 0, 2, 64, 1):
        for way in ("dense", "strided", "transposed"):
            found.append({"side": dtype, "rows": rows, "way": way, "right": sums(me, tp, rows, dtype, way)})
    channel.check()
    channel.close()
    dist.destroy_process_group()
    return found


def uneven(me: int, tp: int, at: str) -> list[dict]:
    """Rows that no access divides, each rank's with other strides, and rows too short for one of several elements."""
    joined(me, tp, at)
    channel, found = Channel(), []
    ways = ("dense", "strided", "transposed")
    for dtype in CLOSE:
        for width in (257, 3):
            for turn in range(3):
                fine = sums(me, tp, 5, dtype, ways[(turn + me) % 3], width)
                found.append({"side": dtype, "rows": 5, "width": width, "right": fine})
    channel.check()
    channel.close()
    dist.destroy_process_group()
    return found


def missed(me: int, tp: int, at: str) -> list[dict]:
    """The last rank leaves a call out: who is named on the first, how soon, and whether a new channel works on all."""
    joined(me, tp, at)
    channel, said, begin = Channel(), "", time.perf_counter()
    if me < tp - 1:
        sums(me, tp, 2, "float32")
        try:
            channel.check()
        except RankError as error:
            said = str(error)
    seconds = time.perf_counter() - begin
    dist.barrier()
    channel.close()
    again = Channel()
    fine = sums(me, tp, 2, "float32")
    again.check()
    dist.destroy_process_group()
    return [{"side": said, "seconds": seconds, "right": fine}]


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_sums_are_right_to_the_bit(dtype):
    """A channel opens, and every call by it is the sum in the order of ranks."""
    found = on_ranks(right, RANKS, PATIENCE, dtype)
    assert len(found) == 21, found
    assert all(row["right"] for row in found), found


def test_widths():
    """Rows of 257 and of 3 elements, which lie differently on each rank."""
    found = on_ranks(uneven, RANKS, PATIENCE)
    assert len(found) == 18, found
    assert all(row["right"] for row in found), found


def test_a_rank_that_does_not_come():
    """It is named in time, and a new channel works."""
    (found,) = on_ranks(missed, RANKS, PATIENCE)
    assert f"rank {RANKS - 1} did not come: rank 0 waited for packet" in found["side"], found
    assert found["seconds"] < 60
    assert found["right"]
