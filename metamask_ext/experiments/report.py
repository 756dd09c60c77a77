"""The pages of results: made from the metrics files of all experiments, with nothing typed by hand.

``README.md`` is one screen: what does not hold, and a row for each question. Each run has a page in its folder, and tables of more
than :data:`MOST_ROWS` rows have a page of their own.
"""

from __future__ import annotations

import json
import re
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

PAGE, APPENDIX = "README.md", "tables.md"
MOST_ROWS = 20
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
    """Write ``out/README.md``; to ``out/<run>`` its page, a copy of ``metrics.json``, and the figures, drawn anew from it.

    Args:
        folder: where :func:`metamask_ext.experiments.suite.run_all` put the runs, each in a folder of its name. It may be
            ``out`` itself.
        out: the folder of the pages.

    Returns:
        The first page, and a line for each run that is missing or not finished; the page has these too.

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
    rows = {}
    for run, (module, metrics) in done.items():
        try:
            prepare_folder(out / run)
            files = _files(module, metrics, folder / run, out / run)
            rows[run] = _row(run, module, metrics)
            for name, text in _pages(run, module, metrics, files).items():
                write_atomic(out / run / name, text.encode())
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:  # what it says is used as it comes
            raise OutputError(f"{str(folder / run / 'metrics.json')!r} is not of this version: {_fault(error)}") from error
    page = [_head(done, missing), _failing(done), *_questions(rows)]
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
        f"{len(done)} runs, {duration} in all; **{sum(claims)} of {len(claims)} claims hold.**",
        "`metamask run all --out DIR` and `metamask report DIR` make these pages, their tables, figures and every number in a "
        "sentence, from the metrics files in [this folder](.). Numbers are means over seeds ± half the width of their 95 % "
        "interval (Student's t), where there are several seeds.",
    ]
    machines = {_machine(metrics) for _, metrics in done.values()}
    if len(machines) == 1:
        lines.append(f"Machine: {machines.pop()}.")
    if missing:
        lines.append("**Missing:** " + "; ".join(missing) + ".")
    return "\n\n".join(lines)


def _failing(done: Runs) -> str:
    found = [
        f"- {_link(run)}: {text}"
        for run, (module, metrics) in done.items()
        for text, holds in answers(module, metrics)
        if not holds
    ]
    return f"## What does not hold: {len(found)}\n\n" + ("\n".join(found) if found else "Every claim holds.")


def _questions(rows: Mapping[str, list[str]]) -> Iterator[str]:
    """The tables of the first page: what the proposal asks, section by section, and what other papers do."""
    head = ["question", "answer", "claims that hold", "run"]
    proposal = {run: row for run, row in rows.items() if run in SECTIONS}
    for title, its in (
        ("What the proposal asks", [proposal[run] for run in SECTIONS if run in proposal]),
        ("What papers around it ask", [row for run, row in rows.items() if run not in SECTIONS]),
    ):
        if its:
            yield f"## {title}\n\n" + "\n".join(_table([head, *its]))


def _row(run: str, module: ModuleType, metrics: Metrics) -> list[str]:
    """The run's line in the first page: its question and the first of its claims, with their numbers."""
    found = answers(module, metrics)
    text, holds = found[0]
    section = f"**{SECTIONS[run]}.** " if run in SECTIONS else ""
    count = f"{sum(each for _, each in found)} of {len(found)}"
    return [section + _question(module.QUESTION), text if holds else f"**Does not hold:** {text}", count, _link(run)]


def _question(text: str) -> str:
    """The first sentence of ``text`` that asks."""
    asked = " ".join(text.split()).partition("?")[0]
    return re.sub(r"^Section [\d.]+: ", "", asked[max(asked.rfind(". "), asked.rfind(".) ")) + 1 :].lstrip(") ")) + "?"


def _link(run: str) -> str:
    return f"[{run}]({run}/{PAGE})"


def _pages(run: str, module: ModuleType, metrics: Metrics, files: Sequence[str]) -> dict[str, str]:
    """The run's page by file name, and the page of its long tables if it has any."""
    short: list[str] = []
    long: list[str] = []
    for title, rows in tables(module, metrics):
        text = "\n\n".join([*([f"{title}:"] if title else []), "\n".join(_table(rows))])
        (long if len(rows) - 1 > MOST_ROWS else short).append(text)
    title = f"{run}: {SECTIONS[run]}" if run in SECTIONS else run
    parts = [f"# {title}", module.QUESTION, "\n".join(_claims(module, metrics))]
    parts += [f"![{run}: {Path(file).stem}]({file})" for file in files if file.endswith(".png")]
    parts += short
    note = f" ({metrics['data_note']})" if metrics["data_note"] else ""
    facts = {
        "data": metrics["data"] + note,
        "budget": metrics["budget"],
        "command": f"`{metrics['command']} --out DIR`",
        "seeds": seeds_text(metrics),
        "settings": _changed(module, metrics),
        "machine": _machine(metrics),
        "duration": duration_text(metrics["duration_s"]) + (", in several parts" if metrics["resumed"] else ""),
        "files": ", ".join(f"[{file}]({file})" for file in files if not file.endswith(".png")),
        "long tables": f"[{APPENDIX}]({APPENDIX})" if long else "",
    }
    parts += ["\n".join(f"- {name}: {text}" for name, text in facts.items() if text), f"[All results](../{PAGE})"]
    pages = {PAGE: "\n\n".join(parts) + "\n"}
    if long:
        pages[APPENDIX] = "\n\n".join([f"# {run}: long tables", *long, f"[{run}]({PAGE})"]) + "\n"
    return pages


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
    machine, workers = metrics["machine"], metrics["workers"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['capability']}, {workers} process{'es' if workers > 1 else ''} of "
        f"{machine['threads per process']} thread; torch {machine['torch']}"
    )
