"""Progress bars on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from moekit.cli.output import notes

Advance = Callable[[int, int], None]


def bar(title: str):
    """A bar that counts; what it yields is called with how much is done and of how much."""
    return _bar(title, MofNCompleteColumn())


def loading(title: str):
    """A bar of bytes: GB done and to do, and GB/s."""
    return _bar(title, DownloadColumn(), TransferSpeedColumn())


@contextmanager
def _bar(title: str, *counts: ProgressColumn) -> Iterator[Advance]:
    columns = TextColumn("{task.description:<24}"), BarColumn(), *counts, TimeElapsedColumn()
    with Progress(*columns, console=notes()) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
