"""Output of the commands: one-line errors, and tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


def fail(message: object, code: int = 1) -> NoReturn:
    """Print ``error: `` and each line of the message on stderr, not wrapped, so that it can be searched for; exit with ``code``."""
    for line in str(message).splitlines():
        typer.echo(f"error: {line}", err=True)
    raise typer.Exit(code)


def show(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on a terminal, else the first column, one bare line a row."""
    console = Console()
    if not console.is_terminal:
        for row in rows:
            typer.echo(row[0])
        return
    print_table([columns, *rows])


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a table, on a terminal or not; the first row is its head."""
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    Console().print(table)
