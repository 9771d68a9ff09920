"""By what a kernel on one device reaches the mailboxes on the others: a pytree that a jitted step takes and gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax.sharding import PartitionSpec

from moekit.compile import tile as t
from moekit.compile.schedule.room import Room
from moekit.compile.tile.layouts import epochs_name, mail_name
from moekit.lang.graph import Graph

META = ("axis", "ranks", "rows", "width", "resident")


@partial(jax.tree_util.register_dataclass, data_fields=("table", "epochs"), meta_fields=META)
@dataclass(frozen=True)
class Link:
    """One rank's addresses and the numbers of its last packets; outside `shard_map` all ranks', one after the other.

    table int32: addresses of mailboxes, the lower half of each first, as `tile.Ways` has them. They are arguments of a compiled
    step, never constants in it. epochs int32 [rows]: how often each row has been sent. `rows` of `width` elements have room;
    `resident` programs of any kernel are on a device at once.
    """

    table: Any
    epochs: Any
    axis: str
    ranks: int
    rows: int
    width: int
    resident: int

    @property
    def specs(self) -> Link:
        """How a link is cut: what `shard_map` takes for it."""
        return replace(self, table=PartitionSpec(self.axis), epochs=PartitionSpec(self.axis))

    @property
    def shapes(self) -> tuple[tuple[int], tuple[int]]:
        """The shapes of one rank's table, in halves of addresses, and epochs."""
        return (2 * (2 * self.ranks + 2),), (self.rows,)

    @property
    def room(self) -> Room:
        """What there is room for."""
        return Room(self.axis, self.ranks, self.rows, self.width, self.resident)

    def buffers(self, graph: Graph) -> tuple[dict[str, Any], dict[str, t.Viewed | t.Mailbox]]:
        """The arrays that a kernel takes besides its operands, and how they lie."""
        mail, epochs = mail_name(self.axis), epochs_name(self.axis)
        if not graph.ranks:
            return {}, {}
        lying = {mail: t.Mailbox(mail, self.ranks, self.width), epochs: t.Viewed.whole(epochs, (self.rows,))}
        return {mail: self.table, epochs: self.epochs}, lying

    def after(self, results: Mapping[str, Any]) -> Link:
        """The link for the next call, from the buffers that a launch wrote."""
        return replace(self, epochs=results.get(epochs_name(self.axis), self.epochs))
