"""How the commands speak: results on stdout, progress on stderr, JSON when asked."""

import json
from typing import Any

import click
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table


def console() -> Console:
    """Where results go. Made at each call, so that a redirected stdout is seen."""
    return Console(highlight=False)


def notes() -> Console:
    """Where progress and remarks go."""
    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2))


def print_source(text: str, lexer: str) -> None:
    """Source text: coloured on a terminal, else byte for byte."""
    out = console()
    if out.is_terminal:
        out.print(Syntax(text, lexer, background_color="default"))
    else:
        click.echo(text)


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
