"""The tables of a suite's results: its targets, all ratios, quantities, and the notes under them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import NamedTuple

from . import cuda_tables, targets
from .cuda_timing import GRAPH
from .problem import METAMASK
from .results_json import Results, Row
from .targets import NOT_MEASURED

QUIET = 0.05
"""The share of the CPU time that other processes may take before a measurement counts as disturbed."""


class Line(NamedTuple):
    """One line of the table: its ratios, in the order of the columns, as text; and which of them metamask loses."""

    measure: str
    shape: str
    cells: list[str]
    loses: list[bool]


def two_digits(value: float) -> str:
    """Writes 2 significant digits, never in scientific notation: 0.98, 1.0, 12, 120."""
    rounded = float(f"{value:.1e}")
    return f"{rounded:.{max(0, 1 - math.floor(math.log10(rounded)))}f}"


def loses(ratio: str, value: float) -> bool:
    """Tells whether metamask is the slower one, as far as the two digits show."""
    shown = float(two_digits(value))
    return shown > 1.0 if ratio.startswith(f"{METAMASK}/") else shown < 1.0


def columns(results: Results) -> list[tuple[str, str]]:
    """Returns ``(ratio, allocator)`` of each column; the ratio to the floor comes first."""
    ratios = {name: None for row in results["rows"] for name in row.get("ratios", {})}
    allocators = {row["allocator"]: None for row in results["rows"]}
    ordered = sorted(ratios, key=lambda name: not name.startswith(f"{METAMASK}/"))
    return [(ratio, allocator) for ratio in ordered for allocator in allocators]


def lines(results: Results) -> Iterator[Line]:
    """Makes the table: for each measure its shapes, then their geometric mean."""
    rows = {(row["measure"], row["shape"], row["allocator"]): row for row in results["rows"]}
    shapes: dict[str, dict[str, None]] = {}
    for (measure, shape, _), row in rows.items():
        if "quantities" not in row:
            shapes.setdefault(measure, {})[shape] = None

    def value(measure: str, shape: str, ratio: str, allocator: str) -> float | None:
        row = rows.get((measure, shape, allocator))
        return row["ratios"][ratio]["of_medians"] if row is not None and ratio in row.get("ratios", {}) else None

    wanted = columns(results)
    for measure, its_shapes in shapes.items():
        for shape in its_shapes:
            cells, lost = [], []
            for ratio, allocator in wanted:
                number = value(measure, shape, ratio, allocator)
                cells.append(_why_not(rows, measure, shape, ratio, allocator) if number is None else two_digits(number))
                lost.append(number is not None and loses(ratio, number))
            yield Line(measure, shape, cells, lost)
        if len(its_shapes) == 1:
            continue
        cells, lost = [], []
        for ratio, allocator in wanted:
            numbers = [n for shape in its_shapes if (n := value(measure, shape, ratio, allocator)) is not None]
            mean = statistics.geometric_mean(numbers) if numbers else None
            some = "" if len(numbers) == len(its_shapes) else f" ({len(numbers)} of {len(its_shapes)})"
            none = NOT_MEASURED if any(_is_missing(row, ratio) for (name, *_), row in rows.items() if name == measure) else ""
            cells.append(none if mean is None else two_digits(mean) + some)
            lost.append(mean is not None and loses(ratio, mean))
        yield Line(measure, "geometric mean", cells, lost)


def _why_not(rows: dict[tuple[str, str, str], Row], measure: str, shape: str, ratio: str, allocator: str) -> str:
    """Returns what stands in the place of a ratio: nothing where the case has no such contender."""
    row = rows.get((measure, shape, allocator))
    if row is None or row["status"] == "failed":
        return NOT_MEASURED if row is None else "failed"
    return NOT_MEASURED if _is_missing(row, ratio) else ""


def _is_missing(row: Row, ratio: str) -> bool:
    return row["status"] != "measured" or not row["not_measured"].keys().isdisjoint(ratio.split("/"))


def quantities(results: Results) -> list[list[str]]:
    """Lists what is no ratio: a head, then measure, shape, name and value."""
    rows = [row for row in results["rows"] if "quantities" in row]
    found = [
        [row["measure"], row["shape"], name, targets.number(value)] for row in rows for name, value in row["quantities"].items()
    ]
    return [["measure", "tasks", "quantity", "value"], *found] if found else []


def notes(results: Results) -> list[str]:
    """Lists what the reader of the table must know: the machine, what is missing and why, what was disturbed."""
    m = results["machine"]
    machine = f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['instruction_set']}, {m['memory_gib']} GiB"
    software = f"torch {m['torch']}, metamask_ext {m['metamask_ext']}" + (f", commit {m['commit']}" if m["commit"] else "")
    card = cuda_tables.card(results) or m["gpu"]
    gpu = f", {card}" if card else ""
    loses = "" if results["suite"] == "grid" else '; "slower": there metamask loses'
    found = [f"Ratios of medians of interleaved rounds{loses}. Machine: {machine}{gpu}; {software}; {results['date']}."]
    reasons: dict[str, dict[str, None]] = {}
    for row in results["rows"]:
        if row["status"] != "measured":
            what = f"{row['measure']} {row['shape']}, {row['allocator']} allocator"
            reasons.setdefault(f"{row['status']}: {row['reason']}", {})[what] = None
        for contender, how in row.get("timed_by", {}).items():
            if how != GRAPH:
                reasons.setdefault(f"Timed by {how}", {})[f"{row['measure']}, {contender}"] = None
        for contender, reason in row.get("not_measured", {}).items():
            reasons.setdefault(f"{NOT_MEASURED}: {reason}", {})[f"{row['measure']}, {contender}"] = None
    for reason, where in reasons.items():
        status, text = reason.split(": ", 1)
        found.append(f"{status.capitalize()} ({'; '.join(where)}): {text}.")
    shares = [share for row in results["rows"] if (share := row.get("cpu_share_of_others")) is not None]
    if disturbed := sum(share > QUIET for share in shares):
        found.append(
            f"In {disturbed} of {len(shares)} measurements other processes took more than {QUIET:.0%} of the CPU time "
            f"(at most {max(shares):.0%}): those are less certain."
        )
    return found


def markdown(results: Results) -> str:
    """Writes the table with its notes, as Markdown: the targets', or that of all ratios where the suite has none."""
    if results["suite"] not in targets.TARGETS:
        return details(results)
    return "\n".join([*_table(targets.table(results)), "", *notes(results)]) + "\n"


def as_markdown(cells: list[list[str]]) -> str:
    """Writes a table as Markdown; the first row is the head."""
    return "\n".join(_table(cells)) + "\n"


def _table(cells: list[list[str]]) -> list[str]:
    """Writes a table as Markdown; the first row is the head."""
    head, *rows = ["| " + " | ".join(row) + " |" for row in cells]
    return [head, "|" + "---|" * len(cells[0]), *rows]


def details(results: Results) -> str:
    """Writes all ratios with the notes, as Markdown; of the suite ``cuda``, its times too."""
    if results["suite"] == "cuda":
        return "\n".join([*_table(cuda_tables.table(results)), "", *notes(results)]) + "\n"
    head = ["measure", "shape", *(f"{ratio}, {allocator}" for ratio, allocator in columns(results))]
    text = [head]
    for line in lines(results):
        cells = [f"{cell} slower" if lost else cell for cell, lost in zip(line.cells, line.loses)]
        if line.shape == "geometric mean":
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        text.append([line.measure, line.shape, *cells])
    more = quantities(results)
    return "\n".join([*_table(text), "", *([*_table(more), ""] if more else []), *notes(results)]) + "\n"
