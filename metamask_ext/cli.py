"""The command ``metamask``: run experiments and benchmarks, and say what is installed."""

from __future__ import annotations

import platform
from importlib import import_module
from pathlib import Path
from typing import Annotated

import torch
import typer

from ._info import build_info
from ._terminal import fail, show
from .bank.commands import app as bank
from .continual.files import OutputError
from .experiments import EXPERIMENTS, OptionError
from .experiments import run as run_experiment

app = typer.Typer(
    help="Masked weights for PyTorch: experiments, benchmarks and what is installed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bank, name="bank")


@app.command(name="list")
def list_experiments() -> None:
    """The experiments: a table on a terminal, else one name a line."""
    show(("name", "what it does"), EXPERIMENTS.items())


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="One of 'metamask list'.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for metrics.json, the figure and the checkpoints.", show_default=False)],
    seed: Annotated[int, typer.Option(help="First seed.", min=0, max=2**62)] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="One seed instead of five; supsup: 5 tasks.")] = False,
    tasks: Annotated[int | None, typer.Option(help="supsup: the number of tasks.", show_default=False)] = None,
    rotated: Annotated[bool, typer.Option("--rotated", help="supsup: rotations, not permutations.")] = False,
) -> None:
    """Run an experiment. A killed run in OUT continues; a finished one is shown; one with other settings is refused."""
    if name not in EXPERIMENTS:
        fail(f"unknown experiment {name!r}, known are: {', '.join(EXPERIMENTS)}", 2)
    # Only what was given: an experiment that lacks an option refuses it.
    options = {key: value for key, value in {"tasks": tasks, "rotated": rotated or None}.items() if value is not None}
    try:
        run_experiment(name, out, seed, quick, **options)
    except OptionError as error:
        fail(error, 2)
    except (OutputError, ImportError) as error:
        fail(error)


@app.command()
def info() -> None:
    """Versions, backend, instruction set, threads and devices."""
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
        "CUDA of torch": torch.version.cuda,
        "CUDA archs": build["cuda_archs"],
        "CUDA devices": ", ".join(devices),
    }
    for key, value in rows.items():
        typer.echo(f"{key:<20}{'none' if value is None or value == '' else value}")


@app.command()
def bench(
    suite: Annotated[str, typer.Option(help="Which benchmarks.")] = "core",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, few repetitions.")] = False,
) -> None:
    """Time masked layers against plain and dense ones."""
    try:
        benchmarks = import_module("metamask_ext.bench.run")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("metamask_ext"):
            fail(f"the benchmarks are not in this installation ({error})")
        fail(f'{error.name} is not installed: pip install "metamask_ext[bench]"')
    raise typer.Exit(benchmarks.run(suite, out, quick))


def main() -> None:
    """The console script."""
    app()
