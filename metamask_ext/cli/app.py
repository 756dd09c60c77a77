"""The command ``metamask``: experiments, benchmarks, banks, and the description of what is installed."""

from __future__ import annotations

import json
import os
import platform
from importlib import import_module
from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import products
from .._info import build_info
from ..experiments.catalogue import EXPERIMENTS, JobError, OptionError, settings_of
from ..experiments.catalogue import run as run_experiment
from ..experiments.engine.settings import as_json, to_toml
from ..experiments.report import report as write_report
from ..experiments.suite import run_all
from ..files.atomic import prepare_folder, write_atomic
from ..files.errors import OutputError
from ..tuning import tune
from .bank import app as bank
from .terminal import fail, show

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(bank, name="bank")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"metamask_ext {build_info()['version']}")
        raise typer.Exit


@app.callback()
def metamask(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Masked weights for PyTorch: experiments, benchmarks and what is installed."""


def _completed(incomplete: str) -> list[tuple[str, str]]:
    """List the experiments whose names begin so, for shell completion."""
    known = {name: entry.summary for name, entry in EXPERIMENTS.items()} | {"all": "every experiment"}
    return [(name, summary) for name, summary in known.items() if name.startswith(incomplete)]


@app.command(name="list")
def list_experiments() -> None:
    """List the experiments: a table on a terminal, else one name a line."""
    show(("name", "what it does"), [(name, entry.summary) for name, entry in EXPERIMENTS.items()])


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="One of 'metamask list', or 'all'.", show_default=False, autocompletion=_completed)],
    out: Annotated[
        Path | None, typer.Option(help="Folder for metrics.json, the figure and unfinished work.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="First seed.", min=0, max=2**62)] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, and less of everything: seconds, not minutes.")] = False,
    tasks: Annotated[int | None, typer.Option(help="The number of tasks.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="The number of steps.", show_default=False)] = None,
    seeds: Annotated[int | None, typer.Option(help="The number of seeds.", show_default=False)] = None,
    rotated: Annotated[bool, typer.Option("--rotated", help="supsup: rotations, not permutations.")] = False,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings.", show_default=False)] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all settings as TOML, and run nothing.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes that compute; by default as many as cores.", show_default=False, min=1)
    ] = None,
    tracking: Annotated[str | None, typer.Option(help="Also record the training: csv or tensorboard.", show_default=False)] = None,
) -> None:
    """Run an experiment, or all. A killed run in OUT resumes; a finished one is shown; one with other settings is refused."""
    if name not in (*EXPERIMENTS, "all"):
        fail(f"unknown experiment {name!r}, known are: {', '.join(EXPERIMENTS)}, all", 2)
    # Only what was given: an experiment that lacks a setting refuses it.
    given = {"tasks": tasks, "steps": steps, "seeds": seeds, "rotated": rotated or None}
    changes = {key: value for key, value in given.items() if value is not None}
    if name == "all" and (changes or config or print_config):
        fail("'all' takes no settings: it runs every experiment with its own", 2)
    try:
        if print_config:
            typer.echo(to_toml(as_json(settings_of(name, quick, config, changes))), nl=False)
        elif out is None:
            fail("--out must be given: the folder of the run", 2)
        elif name == "all":
            run_all(out, seed, quick, workers=workers, tracking=tracking)
        else:
            run_experiment(name, out, seed, quick, config=config, workers=workers, tracking=tracking, **changes)
    except OptionError as error:
        fail(error, 2)
    except (OutputError, ImportError, JobError) as error:
        fail(error)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder given to 'metamask run all'.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for README.md and a folder for each run.")] = Path("docs/results"),
) -> None:
    """Write the page of results from the metrics files of finished experiments."""
    try:
        page, missing = write_report(folder, out)
    except (OutputError, ImportError) as error:
        fail(error)
    for line in missing:
        typer.echo(f"missing: {line}")
    typer.echo(f"wrote {page}")


@app.command()
def info() -> None:
    """Show versions, backend, instruction set, threads and devices."""
    build = build_info()
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    rows = {
        "metamask_ext": build["version"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "backend": build["backend"],
        "compiled for torch": build["torch"],
        "compiler": build["compiler"],
        "CPU capability": build["cpu_capability"],
        "CPU capabilities": ", ".join(build["cpu_capabilities"] or []),
        "threads": torch.get_num_threads(),
        "products": f"{products.current().source} ({products.current().digest})",
        "CUDA of torch": torch.version.cuda,
        "CUDA archs": build["cuda_archs"],
        "CUDA devices": ", ".join(devices),
    }
    for key, value in rows.items():
        typer.echo(f"{key:<20}{'none' if value is None or value == '' else value}")


@app.command()
def bench(
    suite: Annotated[str, typer.Option(help="The benchmarks to run.")] = "core",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, few repetitions.")] = False,
    full: Annotated[bool, typer.Option("--full", help="grid: all batches, dtypes and allocators; 90 minutes.")] = False,
) -> None:
    """Time masked layers against plain PyTorch's and layers without a mask. The same OUT resumes a stopped run of the grid."""
    try:
        benchmarks = import_module("metamask_ext.bench.run")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("metamask_ext"):
            fail(f"the benchmarks are not in this installation ({error})")
        fail(f'{error.name} is not installed: pip install "metamask_ext[bench]"')
    raise typer.Exit(benchmarks.run(suite, out, quick, full=full))


@app.command(name="tune")
def tune_products(
    out: Annotated[
        Path | None, typer.Option(help="The file to write; by default the one that is used from then on.", show_default=False)
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(help="Numbers of threads; by default 1 and torch's.", show_default=False, min=1)
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Types of products; by default all. Others keep the package's lines.", show_default=False),
    ] = None,
) -> None:
    """Measure from which batch on BLAS beats the kernels' own products here, and write the table. About ten minutes, alone."""
    if build_info()["backend"] == "reference":
        fail("the reference backend has no products to choose from")
    known = [name for name in products.DTYPES if name != "bfloat16" or build_info()["cpu_capability"] == "avx512_bf16"]
    if unknown := [name for name in dtype or () if name not in known]:
        fail(f"--dtype must be one of {', '.join(known)} on this processor, got {unknown[0]!r}", 2)
    counts = sorted(set(threads or (1, torch.get_num_threads())))
    if threads and max(threads) > (cores := os.cpu_count() or 1):
        fail(f"--threads must be at most {cores}, the processors here, got {max(threads)}", 2)
    try:
        path = out or products.machine_file()
        prepare_folder(path.parent)
    except RuntimeError as error:
        fail(error)
    if path.is_dir():
        fail(f"cannot write {str(path)!r}: it is a folder")

    def report(line: products.Line, ratio: float) -> None:
        never = line.rows == products.LARGEST
        typer.echo(
            f"{line.pass_:<9}{line.dtype:<9}{line.threads:>3} threads, {line.in_features:>5} -> {line.out_features:<5}: "
            + ("panels" if never else f"BLAS from {line.rows} rows (time / panels: {ratio:.2f})")
        )

    measured = dtype or known
    table = tune(counts, measured, report)
    left = [line for line in products.known_table().lines if line.dtype not in measured]
    try:
        write_atomic(path, json.dumps(products.as_json(table._replace(lines=(*table.lines, *left))), indent=1).encode() + b"\n")
    except OutputError as error:
        fail(error)
    typer.echo(f"wrote {path}" + ("" if out is None else f"; METAMASK_PRODUCTS={path} uses it"))


def main() -> None:
    """Run the console script."""
    app(prog_name="metamask")
