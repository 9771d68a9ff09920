"""How the commands speak: results on stdout, progress on stderr, JSON when asked."""

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from moekit.errors import FileError
from moekit.files import check_writable


class OutputFile(click.Path):
    """An option that names a file to write: refused at once, before any work, where it could not be written in the end."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, if a file can be written there."""
        path = Path(str(super().convert(value, param, ctx)))
        try:
            check_writable(path)
        except FileError as error:
            self.fail(str(error), param, ctx)
        return path


def spell_out() -> None:
    """Have characters that a terminal's encoding lacks spelt out (\\u2192), as stderr does, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def console() -> Console:
    """Where results go. Made at each call, so that a redirected stdout is seen."""
    return _console(stderr=False)


def notes() -> Console:
    """Where progress and remarks go."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    made = Console(stderr=stderr, highlight=False)
    if made.width < 1:  # COLUMNS=0: rich would print nothing
        made.width = 80
    return made


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2))


def print_source(text: str, lexer: str) -> None:
    """Source text: coloured on a terminal, else byte for byte, in UTF-8 as Python reads it."""
    out = console()
    if out.is_terminal:
        out.print(Syntax(text, lexer, background_color="default"))
    else:
        click.echo((text.rstrip("\n") + "\n").encode(), nl=False)


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the house style; without a header where every column is unnamed."""
    made = Table(
        title=title,
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        show_header=any(columns),
    )
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def in_bytes(count: int) -> str:
    """A number of bytes in GB, or in MB where it is small."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
