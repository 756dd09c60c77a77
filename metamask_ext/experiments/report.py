"""The page of results: made from the metrics files of all experiments, with nothing typed by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from ..files.atomic import output_errors, prepare_folder, write_atomic
from ..files.errors import OutputError
from ..files.read import read_file
from .catalogue import module_of, settings_of
from .engine.claims import Metrics
from .engine.figures import write_figures
from .engine.jobs import flat
from .engine.settings import as_json
from .engine.tables import Rows, Tables, duration_text, seeds_text, table_of
from .suite import finished, runs

PAGE = "README.md"
SECTIONS = {
    "linear": "3.1 Proof of concept: linear regression",
    "sine-of-linear": "3.2 Simple generalization: linear regression with sinusoidal output",
    "sinusoid": "3.3 Sinusoidal regression without linear assumption",
    "sine-cosine": "3.4 Sinusoidal regression with occasional cosine replacement",
    "logistic": "3.5 Logistic regression",
    "mnist": "3.6 Image classification: MNIST",
    "colored-mnist": "3.7 Image classification: colored MNIST",
    "saturation": "2.1 Details: the gradient of the sigmoid, and the regularizer",
}
"""Sections of the proposal (Blum and Law, EE5239, 2020), by the experiment that answers them."""
Runs = Mapping[str, tuple[ModuleType, Metrics]]
"""Finished runs by name: the experiment's module and the metrics."""


def report(folder: str | Path, out: str | Path = "docs/results") -> tuple[Path, list[str]]:
    """Write ``out/README.md``; to ``out/<run>`` copy ``metrics.json`` and draw the figures anew from it.

    Args:
        folder: where :func:`metamask_ext.experiments.suite.run_all` put the runs, each in a folder of its name. It may be
            ``out`` itself.
        out: the folder of the page.

    Returns:
        The page, and a line for each run that is missing or not finished; the page has these too.

    Raises:
        OutputError: there is no finished run at all, a metrics file cannot be read or lacks something, or ``out``
            cannot be written.
    """
    folder, out = Path(folder), Path(out)
    found = {run: (module_of(name), finished(folder / run)) for run, (name, _) in runs().items()}
    done = {run: (module, metrics) for run, (module, metrics) in found.items() if metrics is not None}
    if not done:
        raise OutputError(f"folder must hold a folder for each finished experiment, with metrics.json in it, got {str(folder)!r}")
    missing = []
    for run in found:
        if run not in done:
            state = "is not finished" if (folder / run / "run.json").exists() else "was not run"
            missing.append(f"`{run}` {state}")
    sections = []
    for run, (module, metrics) in done.items():
        try:
            prepare_folder(out / run)
            files = _files(module, metrics, folder / run, out / run)
            sections.append(_section(run, module, metrics, files))
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:  # what it says is used as it comes
            raise OutputError(f"{str(folder / run / 'metrics.json')!r} is not of this version: {_fault(error)}") from error
    page = [_head(done, missing), *_questions(found), *sections]
    write_atomic(out / PAGE, ("\n\n".join(page) + "\n").encode())
    return out / PAGE, missing


def answers(module: ModuleType, metrics: Metrics) -> list[tuple[str, bool]]:
    """The claims about a run, each with whether it holds."""
    return [claim.answer(metrics) for claim in module.CLAIMS if claim.applies(metrics)]


def _head(done: Runs, missing: Sequence[str]) -> str:
    claims = [holds for module, metrics in done.values() for _, holds in answers(module, metrics)]
    duration = duration_text(sum(metrics["duration_s"] for _, metrics in done.values()))
    lines = [
        "# Results of the experiments",
        "`metamask run all --out DIR` and `metamask report DIR` make this page, its tables, figures and every number in a "
        "sentence, from the metrics files in [this folder](.). Numbers are means over seeds ± half the width of their 95 % "
        "interval (Student's t), where there are several seeds.",
        f"{len(done)} runs, {duration} in all; {sum(claims)} of {len(claims)} claims hold.",
    ]
    machines = {_machine(metrics) for _, metrics in done.values()}
    if len(machines) == 1:
        lines.append(f"Machine: {machines.pop()}.")
    if missing:
        lines.append("**Missing:** " + "; ".join(missing) + ".")
    return "\n\n".join(lines)


def _questions(found: Mapping[str, tuple[ModuleType, Metrics | None]]) -> Iterator[str]:
    yield "## What the proposal asks"
    for run, title in SECTIONS.items():
        if run not in found:
            continue
        module, metrics = found[run]
        yield f"### {title}"
        if metrics is None:
            yield f"`{run}` is missing."
        else:
            yield "\n".join([*_claims(module, metrics), f"\nMore: [{run}](#{run})."])


def _section(run: str, module: ModuleType, metrics: Metrics, files: Sequence[str]) -> str:
    parts = [f"## {run}", module.QUESTION]
    for title, rows in tables(module, metrics):
        parts.append("\n\n".join([*([f"{title}:"] if title else []), "\n".join(_table(rows))]))
    parts.append("\n".join(_claims(module, metrics)))
    parts += [f"![{run}: {Path(file).stem}]({run}/{file})" for file in files if file.endswith(".png")]
    note = f" ({metrics['data_note']})" if metrics["data_note"] else ""
    facts = {
        "data": metrics["data"] + note,
        "budget": metrics["budget"],
        "command": f"`{metrics['command']} --out DIR`",
        "seeds": seeds_text(metrics),
        "settings": _changed(module, metrics),
        "machine": _machine(metrics),
        "duration": duration_text(metrics["duration_s"]) + (", in several parts" if metrics["resumed"] else ""),
        "files": ", ".join(f"[{file}]({run}/{file})" for file in files if not file.endswith(".png")),
    }
    parts.append("\n".join(f"- {name}: {text}" for name, text in facts.items() if text))
    return "\n\n".join(parts)


def tables(module: ModuleType, metrics: Metrics) -> Tables:
    """The module's own tables, or the common one with a row for each method."""
    if hasattr(module, "tables"):
        return module.tables(metrics)
    head, rows = table_of(metrics)
    labels = getattr(module, "LABELS", {})
    return [("", [head, *([labels.get(method, method), *cells] for method, *cells in rows)])]


def _fault(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def _files(module: ModuleType, metrics: Metrics, run: Path, out: Path) -> list[str]:
    """Copy or make the files of a run; their names."""
    with output_errors(run / "metrics.json", "read"):
        data = read_file(run / "metrics.json")
    write_atomic(out / "metrics.json", data)
    figures = write_figures(out, metrics["experiment"], module.figures(metrics))
    documents = module.documents(metrics) if hasattr(module, "documents") else {}
    for name, text in documents.items():
        write_atomic(out / name, text.encode())
    return [*figures, "metrics.json", *documents]


def _claims(module: ModuleType, metrics: Metrics) -> list[str]:
    return [f"- {'holds' if holds else '**does not hold**'}: {text}" for text, holds in answers(module, metrics)]


def _table(rows: Rows) -> Iterator[str]:
    for number, row in enumerate(rows):
        yield "| " + " | ".join(str(cell).replace("|", r"\|") for cell in row) + " |"
        if number == 0:
            yield "|" + "---|" * len(row)


def _changed(module: ModuleType, metrics: Metrics) -> str:
    """The settings that are not those of a full run."""
    name, settings = metrics["experiment"], metrics["settings"]
    full = flat(as_json(settings_of(name, changes={"rotated": True} if settings.get("rotated") else {})))
    other = {key: value for key, value in flat(settings).items() if key not in full or full[key] != value}
    quick = "**a quick run**" if metrics["quick"] else ""
    return ", ".join([*([quick] if quick else []), *(f"{key} = {json.dumps(value)}" for key, value in other.items())])


def _machine(metrics: Metrics) -> str:
    machine, workers, executor = metrics["machine"], metrics["workers"], metrics.get("executor", "local")
    processes = "processes" if workers is None else f"{workers} process{'es' if workers > 1 else ''}"
    where = "" if executor == "local" else f" by {executor}"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['capability']}, {processes} of "
        f"{machine['threads per process']} thread{where}; torch {machine['torch']}"
    )
