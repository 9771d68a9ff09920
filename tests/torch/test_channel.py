"""Sums over ranks in PyTorch: gathered by processes that are threads here, and what a kernel would be launched on."""

import threading
from copy import copy

import numpy as np
import pytest
import torch
from torch import distributed as dist

from moekit.compile.schedule import Schedule
from moekit.compile.schedule.room import Room
from moekit.errors import ArgumentError, RankError, ShapeError, UnavailableError
from moekit.torch import Channel, all_reduce_add_rms_norm, all_reduce_add_rms_norm_
from moekit.torch import channel as channels
from moekit.torch.call import Call


def operands(rank: int, rows: int = 3, width: int = 40) -> tuple[torch.Tensor, ...]:
    """One rank's part of a sum; the rest is the same on all."""
    rng = np.random.default_rng(5)
    parts = rng.standard_normal((8, rows, width))
    found = parts[rank], rng.standard_normal((rows, width)), rng.standard_normal(width)
    return tuple(torch.tensor(x, dtype=torch.bfloat16) for x in found)


def on_ranks(ranks: int, run) -> list:
    """What every rank of a process group returns, each a thread; a failure of one is raised."""
    from torch.testing._internal.distributed.multi_threaded_pg import (
        ProcessLocalGroup,
        _install_threaded_pg,
        _uninstall_threaded_pg,
    )

    apart = getattr(torch._C._distributed_c10d, "_set_thread_isolation_mode", lambda on: None)
    apart(True)
    world, store, found, wrong = _install_threaded_pg(), dist.HashStore(), {}, []

    def one(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
            found[rank] = run(rank)
        except BaseException as error:
            wrong.append(error)
            ProcessLocalGroup.exception_handle(error)

    try:
        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        ProcessLocalGroup.reset()
        _uninstall_threaded_pg()
        apart(False)
    del world
    if wrong:
        raise wrong[0]
    return [found[rank] for rank in range(ranks)]


def test_ranks_gather_and_add_up_in_order():
    """The residual is the sum in rank order to the bit, on all ranks."""
    every = on_ranks(3, lambda rank: all_reduce_add_rms_norm(*operands(rank), tp=3))
    total = sum((operands(r)[0].float() for r in range(1, 3)), operands(0)[0].float()) + operands(0)[1].float()
    for out, residual in every:
        assert torch.equal(residual, total.to(torch.bfloat16))
        assert torch.equal(out, every[0][0])


def test_in_place_and_another_number_of_ranks():
    """The residual is updated on every rank; a wrong number is refused."""

    def run(rank):
        partial, residual, weight = operands(rank)
        with pytest.raises(ShapeError, match="the process group has 2 ranks, the call says tp=4; pass tp=2"):
            all_reduce_add_rms_norm(partial, residual, weight, tp=4)
        _, updated = all_reduce_add_rms_norm_(partial, residual, weight, tp=2)
        assert updated is residual
        return residual

    first, second = on_ranks(2, run)
    assert torch.equal(first, second)
    assert not torch.equal(first, operands(0)[1])


def test_without_a_group():
    """Said in one sentence; a gradient, which nothing would add up, too."""
    with pytest.raises(UnavailableError, match="tp=2, but no process group"):
        all_reduce_add_rms_norm(*operands(0), tp=2)
    with pytest.raises(UnavailableError, match=r"torch sees no CUDA device|there is no process group"):
        Channel()
    with pytest.raises(ArgumentError, match="0 rows of 2048 elements"):
        Channel(rows=0)


def test_ranks_agree_on_a_channel(opened):
    """What one rank's proof found is raised on all: the others would send where it gathers, and both wait."""

    def run(rank):
        mine = copy(opened)
        mine.group, mine.ranks, mine.me = dist.group.WORLD, 2, rank
        mine._agree(None)
        with pytest.raises(UnavailableError, match="Channel: rank 0 says: it came to nothing"):
            mine._agree(RankError("it came to nothing") if rank == 0 else None)

    on_ranks(2, run)
    assert channels.channel_of(opened.device) is opened


def test_no_gradient_is_lost():
    """What requires grad is refused."""

    def run(rank):
        partial, residual, weight = operands(rank)
        with pytest.raises(UnavailableError, match="has no gradient in PyTorch"):
            all_reduce_add_rms_norm(partial.requires_grad_(), residual, weight, tp=2)

    on_ranks(2, run)


@pytest.fixture
def opened(monkeypatch):
    """A channel of two ranks on the CPU, whose addresses lead nowhere."""
    made = Channel.__new__(Channel)
    made.device, made.ranks, made.me, made.looks = torch.device("cpu"), 2, 1, 7
    made.room = Room("tp", 2, 16, 64, 132)
    made.mail = torch.zeros(8, dtype=torch.int64)
    made._reach([1 << 40, 1 << 41])
    monkeypatch.setitem(channels._open, made.device, made)
    return made


def call(rows: int, width: int = 40, ranks: int = 2) -> Call:
    """A call of one of some ranks."""
    given = dict(zip(("partial", "residual", "weight"), operands(0, rows, width), strict=True))
    return Call(all_reduce_add_rms_norm.fusion, given, {"tp": ranks, "eps": 1e-6, "offset": 1.0}, False, None, None)


def test_a_launch_takes_the_table_and_the_epochs(opened):
    """Pointers to both, as they are: nothing about addresses is part of a kernel."""
    made = call(5).prepare()
    (one,) = made.launches
    assert made.memory["tp_mail"] is opened.table
    assert made.memory["tp_epochs"] is opened.epochs
    assert one.pointers[-2:] == ("tp_mail", "tp_epochs")
    region = 16 * 2 * 64 * 8
    other, mine = 1 << 40, 1 << 41
    assert opened.table.tolist() == [other + region, 0, mine, 0, mine + 2 * region, 7]


def test_calls_without_room(opened):
    """Why packets do not serve them."""
    assert call(5).unlinked() is None
    assert "room for 16 rows, the call has 17" in str(call(17).unlinked())
    assert "rows of 64 elements, the call's have 65" in str(call(3, 65).unlinked())
    assert "the mailboxes are those of 2 ranks over tp" in str(call(3, ranks=3).unlinked())
    opened.close()
    assert "no channel reaches the other ranks of tp" in str(call(5).unlinked())


def test_programs_are_counted_of_the_schedule_that_is_taken(opened, monkeypatch):
    """A table's, where it has one."""
    opened.room = Room("tp", 2, 16, 64, 3)
    assert call(5).unlinked() is None
    monkeypatch.setattr("moekit.torch.call.scheduled", lambda *_: Schedule.parse("tile:T:1 whole:H:64 warps:8"))
    assert "5 programs wait for each other, of which a device has 3 at once" in str(call(5).unlinked())


def test_a_rank_that_did_not_come(opened):
    """The word of errors says which, and for what."""
    opened.check()
    opened.mail[-2] = (1 << 32) | 17
    with pytest.raises(RankError, match="rank 0 did not come: rank 1 waited for packet 17 of a row in vain"):
        opened.check()
