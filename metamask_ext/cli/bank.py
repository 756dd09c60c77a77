"""``metamask bank``: a bank's folder from the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..bank.export import task_state
from ..bank.index import BankError
from ..bank.page import ViewError, page
from ..bank.statistics import Masks, described
from ..bank.store import Store
from ..bank.writer import TaskSource, save, serialise
from ..files.atomic import write_atomic, write_new
from ..files.errors import OutputError
from ..nn.names import escape
from .terminal import fail, show

app = typer.Typer(help="Banks of tasks on disk.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The bank's folder.", show_default=False)]


@contextmanager
def _errors() -> Iterator[None]:
    """Turn an error of a bank or of the file system into one line."""
    try:
        yield
    except (BankError, OSError) as error:
        fail(error)


def _check_known(store: Store, names: Sequence[str]) -> None:
    for name in names:
        if name not in store.tasks:
            fail(f"{store.directory} has no task {name!r}; 'metamask bank ls' lists its tasks", 2)


def _references(store: Store, names: Sequence[str | None]) -> list[tuple[str, TaskSource] | None]:
    return [None if name is None else (name, (store, name)) for name in names]


def _printable(name: str) -> str:
    """Escape a name that would break its line, or that no terminal can show."""
    return name if name.isprintable() else escape(name)


@app.command()
def ls(directory: Folder) -> None:
    """List the tasks: a table on a terminal, else one name a line."""
    with _errors():
        store = Store.open(directory)
    rows = []
    for slot, name in enumerate(store.tasks):
        if name is not None:
            entry = store.entry(name)
            rows.append((_printable(name), str(slot), "bits" if entry.get("packed") else "logits", str(entry["bytes"])))
    show(("task", "slot", "masks", "bytes"), rows)


@app.command()
def rm(directory: Folder, names: Annotated[list[str], typer.Argument(metavar="NAME", show_default=False)]) -> None:
    """Remove tasks. Their slots stay empty."""
    with _errors():
        store = Store.open(directory)
        _check_known(store, names)
        kept = [None if name in names else name for name in store.tasks]
        save(directory, store.meta, store.shared(), _references(store, kept), seen={store.state})


@app.command()
def add(
    directory: Folder,
    source: Annotated[Path, typer.Argument(metavar="FROM", help="Another bank of the same shared weights.", show_default=False)],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Its tasks to copy; all if none is named.", show_default=False)
    ] = None,
) -> None:
    """Copy tasks from another bank with the same shared weights and settings."""
    with _errors():
        store, other = Store.open(directory), Store.open(source)
        chosen = list(dict.fromkeys(names or (name for name in other.tasks if name is not None)))
        _check_known(other, chosen)
        if store.shared_sha256 != other.shared_sha256:
            fail(f"{other.directory} has other shared weights than {store.directory}: its masks do not fit them")
        if differing := sorted(key for key in {*store.meta, *other.meta} if store.meta.get(key) != other.meta.get(key)):
            fail(f"{other.directory} has other settings than {store.directory}: {', '.join(differing)}")
        if present := [name for name in chosen if name in store.tasks]:
            fail(f"{store.directory} has a task {present[0]!r} already")
        tasks = [*_references(store, store.tasks), *_references(other, chosen)]
        save(directory, store.meta, store.shared(), tasks, seen={store.state})


@app.command()
def verify(directory: Folder) -> None:
    """Check every byte of every file, and name each that is damaged or missing."""
    with _errors():
        store = Store.open(directory)
        store.verify()
    typer.echo(f"{sum(name is not None for name in store.tasks)} tasks, every file whole")


@app.command()
def inspect(
    directory: Folder,
    name: Annotated[str, typer.Argument(metavar="TASK", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """Describe a task: what was recorded of it, the density of each layer, and the tasks that share most weights with it."""
    with _errors():
        store = Store.open(directory)
        _check_known(store, [name])
        found = described(Masks(store), name)
    if as_json:
        typer.echo(json.dumps(found, allow_nan=False))
        return
    typer.echo(f"{_printable(name)}: slot {found['slot']}, {found['masks']}, {found['bytes']:,} bytes in {found['file']}")
    for title, metrics in (("recorded", found["metrics"]), ("before packing", found["metrics_before_packing"])):
        if metrics:
            typer.echo(f"{title}: " + ", ".join(f"{_printable(key)} {value:.6g}" for key, value in metrics.items()))
    for layer in found["layers"]:
        shape = "x".join(map(str, layer["shape"]))
        typer.echo(
            f"layer {layer['layer'] or 'the model'}: {shape}, {100 * layer['density']:.1f} % of {layer['weights']:,} weights on"
        )
    for other in found["nearest"]:
        typer.echo(f"overlap {100 * other['overlap']:.1f} % with {_printable(other['task'])}")


@app.command()
def view(
    directory: Folder,
    out: Annotated[Path, typer.Option(help="The HTML file; one that is there is replaced.", show_default=False)],
) -> None:
    """Draw the bank as one page for a browser, which needs no network: layers, densities, overlaps, masks, accuracies."""
    try:
        with _errors():
            text = page(directory)
            write_atomic(out, text.encode())
    except (ViewError, OutputError) as error:
        fail(error)
    typer.echo(f"{out}: {len(text) / 1e6:.1f} MB")


@app.command()
def export(
    directory: Folder,
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new safetensors file.", show_default=False)],
) -> None:
    """Write one task as the state of a plain torch model: every masked weight is W * g(M)."""
    with _errors():
        store = Store.open(directory)
        _check_known(store, [name])
        data = serialise(f"task {name!r}", task_state(store, name), None)
        write_new(file, data)
