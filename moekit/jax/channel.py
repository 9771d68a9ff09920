"""The mailboxes by which ranks of one process send each other packets: one channel for a mesh, proved before it is used."""

from __future__ import annotations

import threading
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moekit.backends import packet
from moekit.backends.packet import BYTES
from moekit.compile.rules.rows import BY_PACKETS
from moekit.compile.schedule.targets import TARGETS
from moekit.compile.tile.ranks import SLOTS
from moekit.errors import ArgumentError, RankError, UnavailableError
from moekit.fusions.added import added
from moekit.jax.doors import best
from moekit.jax.face import exchange, op
from moekit.jax.link import Link
from moekit.lang.mesh import MOST_RANKS
from moekit.peers import unreachable

AXIS = "tp"  # what moekit's fusions add up over
ROWS, WIDTH = BY_PACKETS, 2048  # of a mailbox, if nothing is said
LOOKS = 2**24  # of a wait before it gives up, at about half a microsecond each
PROBED = 2**22  # of those of the probe, whose program is only just being loaded
WORD = 4  # bytes of the arrays that mailboxes lie in

_LOCK = threading.RLock()  # of all channels: two of them may have a device in common


class Channel:
    """Mailboxes on every device of a mesh with the axis `tp`, with room for `rows` rows of `width` floats.

    `link` is what a jitted step takes along, cut as `link.specs` says, and gives back: `keep` the new one, or the next step
    would send numbers that have been sent, and take old packets for new ones. With a step to which the link is donated it
    cannot: JAX refuses a link that was used. `lock`: hold it while a step is dispatched; two threads that dispatch steps on the
    same devices in different orders would make them wait for each other. `check` says if a rank did not come.
    Raises UnavailableError in one sentence where the devices cannot reach each other's memory, ArgumentError for no room.
    """

    def __init__(self, mesh: Mesh, *, rows: int = ROWS, width: int = WIDTH, looks: int = LOOKS):
        if why := refusal(mesh):
            raise UnavailableError(f"channel: {why}; implementation='xla' and 'psum' go without")
        if rows < 1 or width < 1 or not 1 <= looks < 2**31:
            raise ArgumentError(f"channel: {rows} rows of {width} elements and {looks} looks; each must be 1 or more")
        self.mesh, self.rows, self.width, self.looks = mesh, rows, width, looks
        self.devices = list(mesh.devices.flat)
        self.ranks = len(self.devices)
        self.left: list[jax.Array] = []  # mailboxes that a late packet may still go to
        self.lock = _LOCK
        self._open(PROBED)
        self._prove()
        self.reset()

    def _open(self, looks: int) -> None:
        """New mailboxes, zero, which are kept as long as the channel and given to nobody."""
        self.spread = NamedSharding(self.mesh, PartitionSpec(AXIS))
        region = packet.region(self.rows, self.width)
        words = (self.ranks * region + 2 * BYTES) // WORD
        self.mail = jax.jit(lambda: jnp.zeros(self.ranks * words, jnp.int32), out_shardings=self.spread)()
        jax.block_until_ready(self.mail)
        at = {s.device: s.data.unsafe_buffer_pointer() for s in self.mail.addressable_shards}
        resident = min(getattr(d, "core_count", None) or TARGETS["pallas"].sms for d in self.devices)
        table, epochs = addresses([at[d] for d in self.devices], region, looks), np.zeros(self.ranks * self.rows, np.int32)
        self.link = Link(jax.device_put(table, self.spread), jax.device_put(epochs, self.spread),
                         AXIS, self.ranks, self.rows, self.width, resident)  # fmt: skip

    def keep(self, link: Link) -> None:
        """What a step gave back, for the next one."""
        self.link = link

    def check(self, mail: jax.Array | None = None) -> None:
        """Wait for the devices, and raise RankError for a rank that did not come. The channel is new then, and also where a
        step that failed took the link along.

        `mail`: the mailboxes when what is asked about began. If there are others now, a rank did not come in another's steps.
        """
        self.hold(self.words())
        if mail is not None and mail is not self.mail:
            raise RankError("channel: it was made anew meanwhile, as a rank did not come in other steps that go by it; what "
                            "came by the mailboxes of before is no result")  # fmt: skip
        with self.lock:
            if any(x.is_deleted() for x in jax.tree.leaves(self.link)):
                self.reset()

    def words(self) -> jax.Array:
        """Every rank's word of errors behind what has been dispatched, for `hold`: nothing is waited for."""
        return _last(self.mail, self.ranks)

    def hold(self, words: Any) -> None:
        """Raise RankError for a rank that did not come by the time that `words` were asked for; the channel is new then."""
        words = np.asarray(words)
        late = [(rank, int(epoch), int(sender) - 1) for rank, (epoch, sender) in enumerate(words) if sender]
        if late:
            rank, epoch, sender = late[0]
            self.reset()
            raise RankError(f"channel: rank {sender} did not come: rank {rank} waited for packet {epoch} of a row in vain; "
                            "what the step made is no result, and the channel was made anew")  # fmt: skip

    def reset(self) -> None:
        """Wait for the devices, then begin anew with empty mailboxes, at other addresses: links of before are of no use.

        The old mailboxes stay where they are, for what may still be on its way to them.
        """
        with self.lock:  # another thread may stand between taking the link and keeping the next
            for x in (x for x in jax.tree.leaves((self.mail, self.link)) if not x.is_deleted()):
                with suppress(jax.errors.JaxRuntimeError):  # a link that a step which failed was to make
                    x.block_until_ready()
            self.left.append(self.mail)
            self._open(self.looks)

    def _prove(self) -> None:
        """Send a row of numbers, through both slots and the first again, and see that it comes."""
        width = min(self.width, 64)
        run = proof(self.mesh, self.link, width)
        for _ in range(SLOTS + 1):
            with self.lock:
                got, link = run(self.link)
            self.keep(link)
            self.check()
            wanted = np.arange(width) * self.ranks * (self.ranks + 1) / 2
            if not (np.asarray(got) == wanted).all():
                raise UnavailableError("channel: packets came with other numbers than were sent; choose xla or psum")


def proof(mesh: Mesh, link: Link, width: int) -> Any:
    """A function of a link, which is donated: every rank's sum of `width` numbers times the rank, counted from 1, and the link
    after it."""

    def sent(link: Link) -> tuple[jax.Array, Link]:
        x = jnp.arange(width, dtype=jnp.float32)[None] * (lax.axis_index(AXIS) + 1).astype(jnp.float32)
        return exchange(op(added), link, x, implementation=best(), tp=link.ranks)

    outs = PartitionSpec(AXIS), link.specs
    run = jax.shard_map(sent, mesh=mesh, in_specs=(link.specs,), out_specs=outs, check_vma=False)
    return jax.jit(run, donate_argnums=0)


@partial(jax.jit, static_argnums=1)
def _last(mail: jax.Array, ranks: int) -> jax.Array:
    """Every rank's word of errors: the number of a packet and, from 1 on, whose it should have been."""
    return mail.reshape(ranks, -1)[:, -4:-2]


def addresses(at: list[int], region: int, looks: int) -> np.ndarray:
    """The table of every rank, one after the other, from the addresses of the mailboxes: `tile.Ways`, in halves of 32 bits."""
    every = [packet.addresses(at, me, region, looks) for me in range(len(at))]
    return np.array(every, "<i8").view("<i4").reshape(-1)


def refusal(mesh: Mesh) -> str | None:
    """Why devices of a mesh cannot send each other packets, in a sentence; None if nothing is known to be in the way."""
    if AXIS not in mesh.shape:
        return f"the mesh has axes {tuple(mesh.shape)}, and none called {AXIS!r}"
    if others := [a for a, n in mesh.shape.items() if a != AXIS and n > 1]:
        return f"the mesh has the axis {others[0]!r} besides; a channel serves a mesh of one"
    devices = list(mesh.devices.flat)
    if not 2 <= len(devices) <= MOST_RANKS:
        return f"{len(devices)} ranks; packets go between 2 to {MOST_RANKS}"
    if other := [d for d in devices if d.platform != "gpu"]:
        return f"{other[0]} is no GPU"
    if away := [d for d in devices if d.process_index != devices[0].process_index]:
        return f"{away[0]} belongs to another process, whose memory has no address here"
    return unreachable([d.local_hardware_id for d in devices])
