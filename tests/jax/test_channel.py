"""Channels between devices: who can have one, what a link says and refuses, and the program that XLA makes with one."""

import ctypes
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moekit.errors import ArgumentError, RankError, ShapeError, UnavailableError
from moekit.jax import Channel, Link, all_reduce_add_rms_norm, exchange
from moekit.jax.channel import addresses, proof, refusal
from moekit.peers import unreachable

DATA = Path(__file__).parents[1] / "data" / "h200.textproto"


def meshed(*shape: int, names=("tp", "dp")) -> Mesh:
    """A mesh of virtual CPU devices."""
    return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), names[: len(shape)])


@pytest.mark.parametrize(
    ("mesh", "why"),
    [
        (lambda: meshed(2), "is no GPU"),
        (lambda: meshed(1), "1 ranks; packets go between 2 to 64"),
        (lambda: meshed(2, 2), "the mesh has the axis 'dp' besides; a channel serves a mesh of one"),
        (lambda: meshed(2, names=("x",)), r"the mesh has axes \('x',\), and none called 'tp'"),
    ],
)
def test_meshes_without_a_channel(mesh, why):
    """Each in one sentence that says what to do."""
    with pytest.raises(UnavailableError, match=f"channel: .*{why}; implementation='xla' and 'psum' go without"):
        Channel(mesh())
    assert refusal(mesh())


class Driver:
    """A CUDA driver of two GPUs, of which `far` cannot be reached."""

    def __init__(self, far: int | None = None):
        self.far = far

    def cuDeviceGet(self, device, ordinal):
        ctypes.cast(device, ctypes.POINTER(ctypes.c_int))[0] = ordinal
        return 0 if ordinal < 2 else 101

    def cuDeviceCanAccessPeer(self, can, one, other):
        ctypes.cast(can, ctypes.POINTER(ctypes.c_int))[0] = other.value != self.far
        return 0


def test_what_the_driver_says():
    """All pairs are asked, in both directions."""
    assert unreachable([0, 1], Driver()) is None
    assert unreachable([0, 1], Driver(far=0)) == "GPU 1 cannot reach the memory of GPU 0"
    assert unreachable([0, 2], Driver()) == "the driver knows no GPU 2"
    assert unreachable([0], Driver()) == "1 GPU here; packets go between two or more"


def test_table_of_addresses():
    """Where each rank sends, at every peer its own region, nowhere for itself; where packets arrive; the word of errors; the
    looks."""
    at, region = [0x7F_1234_5678_00, 0x7F_FFFF_0000_00, 0x10_0000_0000], 0x2_0000
    table = addresses(at, region, 77).view(np.int64).reshape(3, 8)
    for me in range(3):
        assert [*table[me, :3]] == [base + me * region if other != me else 0 for other, base in enumerate(at)]
        assert [*table[me, 3:6]] == [at[me] + other * region if other != me else 0 for other in range(3)]
        assert [*table[me, 6:]] == [at[me] + 3 * region, 77]
    places = [(peer, int(table[me, peer])) for me in range(3) for peer in range(3)]
    arrive = [(me, int(table[me, 3 + sender])) for sender in range(3) for me in range(3)]
    assert places == arrive  # what one sends is where the other looks


def linked(ranks: int, rows: int = 16, width: int = 64, resident: int = 132) -> Link:
    """A link that leads nowhere."""
    table, epochs = (jnp.zeros(ranks * n, jnp.int32) for n in (4 * ranks + 4, rows))
    return Link(table, epochs, "tp", ranks, rows, width, resident)


def called(link: Link, rows: int, width: int, implementation=None, said: int = 2):
    """A call of a link's ranks on CPU devices."""
    mesh = meshed(link.ranks)
    x = jnp.arange(link.ranks * rows * width, dtype=jnp.float32).reshape(-1, rows, width)

    def body(partial, residual, weight, link):
        given = {"tp": said, "implementation": implementation}
        (out, residual), link = exchange(all_reduce_add_rms_norm, link, partial[0], residual, weight, **given)
        return out[None], residual[None], link

    specs = (P("tp"), P(), P(), link.specs)
    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=(P("tp"), P("tp"), link.specs), check_vma=False))
    return x, run(x, jnp.ones((rows, width)), jnp.ones(width), link)


def test_a_call_that_packets_do_not_serve_goes_without():
    """On a CPU the ranks gather, and nothing is counted."""
    x, (_, residual, link) = called(linked(2), 3, 8)
    np.testing.assert_array_equal(residual, np.broadcast_to(np.asarray(x).sum(0) + 1, (2, 3, 8)))
    assert not np.asarray(link.epochs).any()


@pytest.mark.parametrize(
    ("link", "rows", "width", "why"),
    [
        (linked(2, rows=16), 17, 8, "the mailboxes have room for 16 rows, the call has 17"),
        (linked(2, width=64), 3, 65, "the mailboxes have room for rows of 64 elements, the call's have 65"),
        (linked(2, width=4096, resident=4), 5, 4096, "5 programs wait for each other, of which a device has 4 at once"),
        (linked(4), 3, 8, "it adds up over 2 ranks over tp, the mailboxes are those of 4 ranks over tp"),
        (linked(2), 3, 8, "in interpret mode no rank reaches another's memory; choose xla or psum"),
    ],
)
def test_named_kernels_say_why_not(link, rows, width, why):
    """Before anything is sent."""
    with pytest.raises(UnavailableError, match=f"all_reduce_add_rms_norm: {why}"):
        called(link, rows, width, "pallas")


def test_a_forgotten_number_of_ranks_is_refused():
    """tp is 1 if nothing is said, and a rank's part would be taken for the sum."""
    with pytest.raises(ShapeError, match=r"the link reaches 2 ranks over tp, the call says tp=1; pass tp=2"):
        called(linked(2), 3, 8, said=1)


@pytest.mark.parametrize("implementation", [None, "pallas"])
def test_a_link_of_all_ranks_is_refused(implementation):
    """Outside of shard_map, or replicated in it, every rank would send by rank 0's addresses."""
    x = jnp.ones((2, 8))
    with pytest.raises(ShapeError, match=r"the link is not one rank's: .* inside jax\.shard_map, .* link\.specs"):
        exchange(all_reduce_add_rms_norm, linked(2), x, x, jnp.ones(8), tp=2, implementation=implementation)


def test_a_link_is_used_once(opened):
    """A step to which it is donated leaves nothing to send the same numbers with; a channel is made anew all the same."""
    jax.jit(lambda link: link, donate_argnums=0)(opened.link)
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        jax.jit(lambda link: link)(opened.link)
    opened.reset()
    assert not np.asarray(opened.link.epochs).any()


def test_kernels_need_a_link():
    """The plain function has none."""
    x = jnp.ones((2, 8))
    with pytest.raises(UnavailableError, match=r"kernels reach the ranks of tp by a link; call moekit\.jax\.exchange"):
        all_reduce_add_rms_norm(x, x, jnp.ones(8), tp=2, implementation="pallas")


def test_room_is_asked_for(monkeypatch):
    """No mailbox of nothing."""
    monkeypatch.setattr("moekit.jax.channel.refusal", lambda mesh: None)
    with pytest.raises(ArgumentError, match="0 rows of 2048 elements"):
        Channel(meshed(2), rows=0)


@pytest.fixture
def opened(monkeypatch):
    """A channel of two CPU devices that was not proved, as no kernel runs there."""
    monkeypatch.setattr("moekit.jax.channel.refusal", lambda mesh: None)
    monkeypatch.setattr(Channel, "_prove", lambda self: None)
    return Channel(meshed(2), rows=4, width=8, looks=9)


def test_mailboxes_and_links(opened):
    """Each device has its own, with room for all ranks; the table leads there; links change, mailboxes do not."""
    region = 4 * 2 * 8 * 8
    at = {s.device: s.data.unsafe_buffer_pointer() for s in opened.mail.addressable_shards}
    assert {s.data.nbytes for s in opened.mail.addressable_shards} == {2 * region + 16}
    table = np.asarray(opened.link.table).view(np.int64).reshape(2, 6)
    other, mine = (at[device] for device in opened.devices)
    assert [*table[1]] == [other + region, 0, mine, 0, mine + 2 * region, 9]
    assert opened.link.epochs.shape == (8,)
    other = Channel(Mesh(np.array(jax.devices()[1:3]), ("tp",)))
    assert opened.lock is other.lock  # a device of both would have steps of both, in another order than the others
    opened.check()


def test_a_rank_that_did_not_come(opened):
    """It is named, and the channel has other mailboxes then; the old ones stay."""
    word = np.zeros((2, opened.mail.size // 2), np.int32)
    word[1, -4:-2] = 17, 1
    opened.mail = jax.device_put(word.reshape(-1), opened.spread)
    old = opened.mail
    with pytest.raises(RankError, match="rank 0 did not come: rank 1 waited for packet 17 of a row in vain"):
        opened.check()
    assert any(x is old for x in opened.left)
    assert opened.mail is not old
    opened.check()


def test_the_proof_compiles():
    """What a channel sends before it is used."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=DATA.read_text(), topology="1x1x2")
    mesh, link = Mesh(np.array(topology.devices).reshape(-1), ("tp",)), linked(2, width=64)
    given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P("tp"))), link)
    with jax.set_mesh(mesh):
        lowered = proof(mesh, link, 64).lower(given)
        text = lowered.compile().as_text()
    assert lowered.out_info[0].shape == (2, 64), "what one of the ranks received is not looked at"
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 1


def test_doors_that_reach_no_rank():
    """A name that is none is not taken for XLA's gather."""
    x = jnp.ones((2, 64))
    for how, said in (
        ({"door": "tritn"}, "all_reduce_add_rms_norm: there is no door 'tritn'; choose pallas, triton, pallas-triton or xla"),
        ({"implementation": "mosaic"}, "mosaic's kernels reach no other rank; choose pallas, triton, xla or psum"),
    ):
        with pytest.raises(UnavailableError, match=said):
            exchange(all_reduce_add_rms_norm, linked(2, width=64), x, x, x[0], tp=2, **how)


@pytest.mark.parametrize(("rows", "door"), [(1, "pallas"), (4, "pallas"), (4, "triton")])
def test_a_chain_compiles_to_kernels_alone(rows, door):
    """Three calls in a row on two H200s that are not there: three kernels, no collective, no copy of rows; addresses are
    arguments of the program."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=DATA.read_text(), topology="1x1x2")
    mesh = Mesh(np.array(topology.devices).reshape(-1), ("tp",))
    link, width = linked(2, width=2048), 2048

    def body(x, residual, weight, link):
        for _ in range(3):
            (x, residual), link = exchange(all_reduce_add_rms_norm, link, x, residual, weight, tp=2, implementation=door)
        return residual, x, link  # a donated array becomes the first output that it fits

    def struct(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    given = [struct((rows, width), jnp.bfloat16, P())] * 2 + [struct((width,), jnp.bfloat16, P())]
    given.append(jax.tree.map(lambda a: struct(a.shape, a.dtype, P("tp")), link))
    specs = (P(), P(), P(), link.specs)
    run = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=(P(), P(), link.specs), check_vma=False)
    with jax.set_mesh(mesh):
        text = jax.jit(run, donate_argnums=(1,)).lower(*given).compile().as_text()
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') == 3
    assert not re.findall(r"(?:all-reduce|all-gather|collective|send|recv)[-\w]*\(", text)
    assert len(re.findall(r"bf16\S* copy\(", text)) == 0
    assert re.search(r"s32\[12\]\S* parameter\(", text)
