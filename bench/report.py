"""Turns ``results.json`` into tables (terminal and Markdown) and a plot."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from metamask_ext.files.atomic import write_atomic

from . import cuda_tables, grid_tables, heat_map, results_json, targets
from .plot import plot
from .results_json import Results
from .tables import as_markdown, columns, details, lines, markdown, notes, quantities

GRID = "grid"


def file_name(results: Results) -> str:
    """Names the file of the results: that of the grid by its processor."""
    return f"{mark(results).replace(':', '-')}.json" if results["suite"] == GRID else "results.json"


def mark(results: Results) -> str:
    """Names the markers of the results in a page: by the suite, and by the processor of a grid or the card of a GPU's results."""
    return f"{GRID}:{results['machine']['processor']}" if results["suite"] == GRID else cuda_tables.mark(results)


def show(results: Results, console: Console) -> None:
    """Prints the table in the terminal; what metamask loses is red and says so."""
    if results["suite"] == GRID:
        for found in grid_tables.tables(results):
            head, *cells = found.cells
            _print(console, head, cells, found.title)
    elif results["suite"] == "cuda":
        head, *cells = cuda_tables.table(results)
        _print(console, head, cells, f"suite cuda, {cuda_tables.card(results) or targets.NOT_MEASURED}")
    else:
        _show_ratios(results, console)
    if results["suite"] != GRID and (numbers := quantities(results)):
        _print(console, numbers[0], numbers[1:])
    if results["suite"] in targets.TARGETS and not _quick_grid(results):
        head, *rows = targets.table(results)
        _print(console, head, rows, "targets", lambda row: "red" if "**no**" in row[-1] else None)
    for note in notes(results):
        console.print(note, markup=False, highlight=False)


def _quick_grid(results: Results) -> bool:
    """Tells whether there is too little for any of the targets."""
    return results["suite"] == GRID and results["quick"]


def _print(
    console: Console,
    head: list[str],
    rows: list[list[str]],
    title: str | None = None,
    style: Callable[[list[str]], str | None] = lambda row: None,
) -> None:
    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*row, style=style(row))
    console.print(table)


def _show_ratios(results: Results, console: Console) -> None:
    table = Table(title=f"suite {results['suite']}")
    table.add_column("measure", overflow="fold")
    table.add_column("shape", overflow="fold")
    for ratio, allocator in columns(results):
        table.add_column(f"{ratio}\n{allocator}", justify="right", overflow="fold")
    for line in lines(results):
        cells = [f"[red]{cell} slower[/red]" if lost else cell for cell, lost in zip(line.cells, line.loses)]
        mean = line.shape == "geometric mean"
        table.add_row(line.measure, line.shape, *cells, style="bold" if mean else None, end_section=mean)
    console.print(table)


def write(results: Results, out: Path, console: Console) -> None:
    """Prints the table, and writes ``table.md`` and ``ratios.png``, or the grid's two heat maps, into ``out``."""
    show(results, console)
    _write_files(results, out)


def _write_files(results: Results, out: Path) -> None:
    if results["suite"] == GRID:
        write_atomic(out / "table.md", _grid_markdown(results, out).encode())
        return
    plot(results, out / "ratios.png")
    write_atomic(out / "table.md", markdown(results).encode())
    if results["suite"] in targets.TARGETS:
        write_atomic(out / "details.md", details(results).encode())


def update(path: Path, results: Results) -> None:
    """Replaces what stands between ``<!-- bench:SUITE -->`` and ``<!-- /bench:SUITE -->`` in a Markdown file by the table.

    Between ``<!-- bench:SUITE:details -->`` and its end, if the file has these, all ratios are put. ``SUITE`` of a GPU's results
    is the suite with the card, as in ``cuda:nvidia-h200``: each card has a table of its own. That of the grid is the suite with
    the processor, as in ``grid:zen4``; its heat maps are written beside the file. Between ``<!-- bench:grid:zen4:short -->`` and
    its end a table of six points is put.

    Raises:
        ValueError: the file has neither pair of markers, or not each once and in this order.
    """
    text = path.read_text()
    found = False
    name = f"bench:{mark(results)}"
    contents: dict[str, Callable[[Results], str]] = {name: markdown, f"{name}:details": details}
    if results["suite"] == GRID:
        contents = {name: lambda results: _grid_markdown(results, path.parent), f"{name}:short": _short_grid}
    for name, table in contents.items():
        if f"<!-- {name} -->" in text or f"<!-- /{name} -->" in text:
            text = between_marks(text, name, table(results), path.name)
            found = True
    if not found:
        raise ValueError(f"{path.name} must have a line <!-- bench:{mark(results)} --> and, after it, its end")
    write_atomic(path, text.encode())


def _grid_markdown(results: Results, folder: Path) -> str:
    """Writes the grid's heat maps into ``folder``, and returns the text that shows them, its tables and notes."""
    images = {what: f"{mark(results).replace(':', '-')}-{what}.png" for what in ("dense", "plain")}
    heat_map.draw(results, folder / images["dense"], folder / images["plain"])
    titles = {"dense": grid_tables.OURS_TO_DENSE, "plain": grid_tables.PLAIN_TO_OURS}
    parts = [f"![{titles[what]}, {results['machine']['processor']}]({name})\n" for what, name in images.items()]
    parts += [] if _quick_grid(results) else [as_markdown(targets.table(results))]
    parts += [f"{table.title[0].upper()}{table.title[1:]}:\n\n{as_markdown(table.cells)}" for table in grid_tables.tables(results)]
    parts.append("\n".join(notes(results)) + "\n")
    return "\n".join(parts)


def _short_grid(results: Results) -> str:
    """Writes the table of a few points, with the machine and the commit."""
    return f"{as_markdown(grid_tables.summary(results))}\n{notes(results)[0]}\n"


def between_marks(text: str, name: str, new: str, file: str) -> str:
    """Returns ``text`` with ``new`` between its lines ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        ValueError: it has not each of these lines once, and in this order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{file} must have one line {begin} and, after it, one line {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m metamask_ext.bench.report", description=__doc__)
    parser.add_argument("results", type=Path, help="a results.json")
    parser.add_argument("--update", type=Path, metavar="FILE", help="Markdown file whose marked table is replaced")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for table.md and ratios.png")
    given = parser.parse_args()
    results = results_json.read(given.results)
    show(results, Console())
    if given.update:
        update(given.update, results)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        _write_files(results, given.out)


if __name__ == "__main__":
    main()
