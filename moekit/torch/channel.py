"""The mailboxes by which ranks, a process each, send each other packets: memory that `torch.distributed` makes symmetric."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed as dist

from moekit.backends import packet
from moekit.compile import tile as t
from moekit.compile.rules.rows import BY_PACKETS
from moekit.compile.schedule.room import Room
from moekit.compile.tile.layouts import epochs_name, mail_name
from moekit.compile.tile.ranks import SLOTS
from moekit.errors import ArgumentError, MoekitError, RankError, UnavailableError
from moekit.fusions.added import added
from moekit.lang.graph import Graph
from moekit.lang.mesh import MOST_RANKS

AXIS = "tp"  # what moekit's fusions add up over
ROWS, WIDTH = BY_PACKETS, 2048  # of a mailbox, if nothing is said
LOOKS = 2**24  # of a wait before it gives up, at about half a microsecond each

_open: dict[torch.device, Channel] = {}


class Channel:
    """Mailboxes of every rank of a process group (the default one), with room for `rows` rows of `width` floats.

    All ranks make one at the same time, and it sends a row through every slot. Calls with `tp` ranks on this device go by it
    from then on, all ranks' alike and one after the other, in CUDA graphs too; `close` ends that. `check` says if a rank did
    not come. Raises UnavailableError where there is no group or no symmetric memory, ArgumentError for no room.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, device: torch.device | str | None = None, rows: int = ROWS,
        width: int = WIDTH, looks: int = LOOKS,
    ):  # fmt: skip
        if rows < 1 or width < 1 or not 1 <= looks < 2**31:
            raise ArgumentError(f"Channel: {rows} rows of {width} elements and {looks} looks; each must be 1 or more")
        if why := refusal(group):
            raise UnavailableError(f"Channel: {why}; implementation='eager' gathers by torch.distributed")
        self.device = torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)
        self.group: Any = dist.group.WORLD if group is None else group
        self.ranks, self.me, self.looks = dist.get_world_size(self.group), dist.get_rank(self.group), looks
        resident = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.room = Room(AXIS, self.ranks, rows, width, resident)
        self._begin()
        _open[self.device] = self
        try:
            self._agree(self._wrong())
        except BaseException:
            self.close()
            raise

    @property
    def region(self) -> int:
        """Bytes of a mailbox for what one rank sends."""
        return packet.region(self.room.rows, self.room.width)

    def _begin(self) -> None:
        """New mailboxes, zero on all ranks before anyone sends."""
        from torch.distributed import _symmetric_memory as symmetric

        words = (self.ranks * self.region + 2 * packet.BYTES) // 8
        try:
            self.mail = symmetric.empty(words, dtype=torch.int64, device=self.device)
            self.mail.zero_()
            self.held = symmetric.rendezvous(self.mail, self.group.group_name)
        except RuntimeError as error:
            raise UnavailableError(f"Channel: no symmetric memory: {error}; implementation='eager' gathers") from error
        self._reach(list(self.held.buffer_ptrs))
        torch.cuda.synchronize(self.device)
        dist.barrier(self.group)

    def _reach(self, at: list[int]) -> None:
        """The table of addresses, and the numbers of the last packets: none."""
        table = packet.addresses(at, self.me, self.region, self.looks)
        self.table = torch.tensor(table, dtype=torch.int64, device=self.device)
        self.epochs = torch.zeros(self.room.rows, dtype=torch.int32, device=self.device)

    def _prove(self) -> None:
        """Send a row of numbers through both slots and the first again, and see that it comes."""
        from moekit.torch.face import op

        numbers = torch.arange(min(self.room.width, 64), dtype=torch.float32, device=self.device)[None]
        wanted = numbers * (self.ranks * (self.ranks + 1) / 2)
        for _ in range(SLOTS + 1):
            got = op(added)(numbers * (self.me + 1), tp=self.ranks, implementation="triton")
            self.check()
            if not torch.equal(got, wanted):
                raise UnavailableError("Channel: packets came with other numbers than were sent; choose eager")

    def _wrong(self) -> Exception | None:
        """What the proof found."""
        try:
            self._prove()
        except (MoekitError, RuntimeError) as error:
            return error
        return None

    def _agree(self, wrong: Exception | None) -> None:
        """Raise UnavailableError on all ranks for what went wrong on one, which would gather while the others wait for it."""
        said: list[str | None] = [None] * self.ranks
        dist.all_gather_object(said, None if wrong is None else str(wrong), self.group)
        if found := [(rank, why) for rank, why in enumerate(said) if why is not None]:
            raise UnavailableError(f"Channel: rank {found[0][0]} says: {found[0][1]}; choose eager") from wrong

    def reaches(self, graph: Graph) -> tuple[dict[str, torch.Tensor], dict[str, t.Strided | t.Mailbox]]:
        """What a kernel takes besides its operands, and how it lies."""
        (axis,) = graph.ranks
        mail, epochs = mail_name(axis), epochs_name(axis)
        layouts = {mail: t.Mailbox(mail, self.ranks, self.room.width), epochs: t.Strided(("unit",))}
        return {mail: self.table, epochs: self.epochs}, layouts

    def check(self) -> None:
        """Wait for the device, and raise RankError for a rank that did not come: close the channel then, on all ranks."""
        word = int(self.mail[-2].item())
        if word:
            sender, epoch = (word >> 32) - 1, word & 0xFFFFFFFF
            late = f"rank {sender} did not come: rank {self.me} waited for packet {epoch} of a row in vain"
            raise RankError(f"Channel: {late}; nothing made since is a result: close it on all ranks, and make another")

    def close(self) -> None:
        """Let later calls go without. The mailboxes stay as long as the channel."""
        if _open.get(self.device) is self:
            del _open[self.device]


def channel_of(device: torch.device) -> Channel | None:
    """The channel that calls on a device go by."""
    return _open.get(device)


def refusal(group: dist.ProcessGroup | None = None) -> str | None:
    """Why the ranks of a group cannot send each other packets, in a sentence; None if nothing is known to be in the way."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip:
        return "packets are written for NVIDIA GPUs, and this torch is for AMD's"
    if not (dist.is_available() and dist.is_initialized()):
        return "there is no process group; call torch.distributed.init_process_group"
    if not 2 <= dist.get_world_size(group) <= MOST_RANKS:
        return f"{dist.get_world_size(group)} ranks; packets go between 2 to {MOST_RANKS}"
    return None
