"""Turns ``results.json`` into a table (terminal and Markdown) and a plot."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from . import bounds

NOT_MEASURED = "not measured"
QUIET = 0.05
"""The share of the CPU time that other processes may take before a measurement counts as disturbed."""

# Okabe and Ito's palette, apart also in grey; the marker says the same again.
STYLES = {"eager": ("#D55E00", "s"), "compiled": ("#0072B2", "o"), "dense": ("#000000", "^")}
OTHER_STYLES = (("#009E73", "D"), ("#CC79A7", "v"), ("#E69F00", "P"), ("#56B4E9", "X"))


class Line(NamedTuple):
    """One line of the table: its ratios, in the order of the columns, as text; which of them ours loses."""

    measure: str
    shape: str
    cells: list[str]
    loses: list[bool]


def two_digits(value: float) -> str:
    """``value`` with 2 significant digits, never in scientific notation: 0.98, 1.0, 12, 120."""
    rounded = float(f"{value:.1e}")
    return f"{rounded:.{max(0, 1 - math.floor(math.log10(rounded)))}f}"


def loses(ratio: str, value: float) -> bool:
    """Whether ours is the slower one, as far as the two digits show."""
    shown = float(two_digits(value))
    return shown > 1.0 if ratio.startswith("ours/") else shown < 1.0


def columns(results: dict[str, Any]) -> list[tuple[str, str]]:
    """``(ratio, allocator)`` of each column; the ratio to the floor comes first."""
    ratios = {name: None for row in results["rows"] for name in row.get("ratios", {})}
    allocators = {row["allocator"]: None for row in results["rows"]}
    ordered = sorted(ratios, key=lambda name: not name.startswith("ours/"))
    return [(ratio, allocator) for ratio in ordered for allocator in allocators]


def lines(results: dict[str, Any]) -> Iterator[Line]:
    """The table: for each measure its shapes, then their geometric mean."""
    rows = {(row["measure"], row["shape"], row["allocator"]): row for row in results["rows"]}
    shapes: dict[str, dict[str, None]] = {}
    for (measure, shape, _), row in rows.items():
        if "quantities" not in row:
            shapes.setdefault(measure, {})[shape] = None

    def value(measure: str, shape: str, ratio: str, allocator: str) -> float | None:
        row = rows.get((measure, shape, allocator), {})
        return row["ratios"][ratio]["of_medians"] if ratio in row.get("ratios", {}) else None

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


def _why_not(rows: dict[Any, dict[str, Any]], measure: str, shape: str, ratio: str, allocator: str) -> str:
    """What stands in the place of a ratio: nothing where the case has no such contender."""
    row = rows.get((measure, shape, allocator))
    if row is None or row["status"] == "failed":
        return NOT_MEASURED if row is None else "failed"
    return NOT_MEASURED if _is_missing(row, ratio) else ""


def _is_missing(row: dict[str, Any], ratio: str) -> bool:
    return row["status"] != "measured" or not row["not_measured"].keys().isdisjoint(ratio.split("/"))


def quantities(results: dict[str, Any]) -> list[list[str]]:
    """What is no ratio: a head, then measure, shape, name and value."""
    rows = [row for row in results["rows"] if "quantities" in row]
    found = [
        [row["measure"], row["shape"], name, bounds.number(value)] for row in rows for name, value in row["quantities"].items()
    ]
    return [["measure", "tasks", "quantity", "value"], *found] if found else []


def notes(results: dict[str, Any]) -> list[str]:
    """What the reader of the table must know: the machine, what is missing and why, what was disturbed."""
    m = results["machine"]
    machine = f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['instruction_set']}, {m['memory_gib']} GiB"
    software = f"torch {m['torch']}, metamask_ext {m['metamask_ext']}" + (f", commit {m['commit']}" if m["commit"] else "")
    gpu = f", {m['gpu']}" if m["gpu"] else ""
    found = [
        'Ratios of medians of interleaved rounds; "slower": there ours loses. '
        f"Machine: {machine}{gpu}; {software}; {results['date']}."
    ]
    reasons: dict[str, dict[str, None]] = {}
    for row in results["rows"]:
        if row["status"] != "measured":
            what = f"{row['measure']} {row['shape']}, {row['allocator']} allocator"
            reasons.setdefault(f"{row['status']}: {row['reason']}", {})[what] = None
        for contender, reason in row.get("not_measured", {}).items():
            reasons.setdefault(f"{NOT_MEASURED}: {reason}", {})[f"{row['measure']}, {contender}"] = None
    for reason, where in reasons.items():
        status, text = reason.split(": ", 1)
        found.append(f"{status.capitalize()} ({'; '.join(where)}): {text}.")
    shares = [row["cpu_share_of_others"] for row in results["rows"] if row.get("cpu_share_of_others") is not None]
    if disturbed := sum(share > QUIET for share in shares):
        found.append(
            f"In {disturbed} of {len(shares)} measurements other processes took more than {QUIET:.0%} of the CPU time "
            f"(at most {max(shares):.0%}): those are less certain."
        )
    return found


def markdown(results: dict[str, Any]) -> str:
    """The table with its notes, as Markdown: of a suite with bounds, theirs."""
    if results["suite"] not in bounds.BOUNDS:
        return details(results)
    return "\n".join([*_table(bounds.table(results)), "", *notes(results)]) + "\n"


def _table(cells: list[list[str]]) -> list[str]:
    """As Markdown; the first row is the head."""
    head, *rows = ["| " + " | ".join(row) + " |" for row in cells]
    return [head, "|" + "---|" * len(cells[0]), *rows]


def details(results: dict[str, Any]) -> str:
    """All ratios with the notes, as Markdown."""
    head = ["measure", "shape", *(f"{ratio}, {allocator}" for ratio, allocator in columns(results))]
    text = [head]
    for line in lines(results):
        cells = [f"{cell} slower" if lost else cell for cell, lost in zip(line.cells, line.loses)]
        if line.shape == "geometric mean":
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        text.append([line.measure, line.shape, *cells])
    more = quantities(results)
    return "\n".join([*_table(text), "", *([*_table(more), ""] if more else []), *notes(results)]) + "\n"


def show(results: dict[str, Any], console: Console) -> None:
    """The table in the terminal; what ours loses is red and says so."""
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
    if found := quantities(results):
        numbers = Table(*found[0])
        for row in found[1:]:
            numbers.add_row(*row)
        console.print(numbers)
    if results["suite"] in bounds.BOUNDS:
        head, *rows = bounds.table(results)
        limits = Table(*head, title="bounds")
        for row in rows:
            limits.add_row(*row, style="red" if "**no**" in row[-1] else None)
        console.print(limits)
    for note in notes(results):
        console.print(note, markup=False, highlight=False)


def plot(results: dict[str, Any], path: Path) -> None:
    """For each measure, how many times as long as ours each contender takes, by shape, on a logarithmic axis."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    measures: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        if "quantities" not in row:
            measures.setdefault(row["measure"], []).append(row)
    if not measures:
        return  # quantities alone
    contenders = {name: None for row in results["rows"] for name in row.get("contenders", {}) if name != "ours"}
    unstyled = iter(OTHER_STYLES * len(contenders))
    styles = {name: STYLES.get(name) or next(unstyled) for name in contenders}
    wide = min(3, len(measures))
    high = math.ceil(len(measures) / wide)
    figure = Figure(figsize=(4.2 * wide, 3.4 * high + 0.6), layout="constrained", dpi=150)
    axes = figure.subplots(high, wide, squeeze=False, sharey=True).flat
    for axis, (measure, rows) in zip(axes, measures.items()):
        shapes = list({row["shape"]: None for row in rows})
        for row in rows:
            for name in row.get("contenders", {}).keys() - {"ours"}:
                color, marker = styles[name]
                times = row["contenders"]
                tuned = row["allocator"] != "default"
                axis.plot(
                    shapes.index(row["shape"]) + (0.12 if tuned else -0.12),
                    times[name]["median"] / times["ours"]["median"],
                    marker,
                    color=color,
                    fillstyle="none" if tuned else "full",
                    markersize=6,
                )
        axis.axhline(1.0, color="black", linewidth=1)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="y", color="0.85", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_xticks(range(len(shapes)), shapes, rotation=45, ha="right")
        axis.set_xlim(-0.5, len(shapes) - 0.5)
        axis.set_title(measure, fontsize=11)
        axis.set_xlabel("batch x width" if measure.startswith(("masked_linear", "bfloat16")) else "shape")
        axis.set_ylabel("time / time of ours")
    for axis in axes:
        axis.set_visible(False)
    allocators = list({row["allocator"]: None for row in results["rows"]})
    handles = []
    for name, (color, marker) in styles.items():
        for allocator in allocators:
            fill = "full" if allocator == "default" else "none"
            handles += figure.axes[0].plot([], [], marker, color=color, fillstyle=fill, label=f"{name}, {allocator} allocator")
    figure.legend(handles=handles, loc="outside lower center", ncols=max(1, len(styles)), frameon=False)
    figure.suptitle("Above the line ours is faster", fontsize=11)
    figure.savefig(path)


def write(results: dict[str, Any], out: Path, console: Console) -> None:
    """Print the table, and write ``table.md`` and ``ratios.png`` into ``out``."""
    show(results, console)
    _write_tables(results, out)
    plot(results, out / "ratios.png")


def _write_tables(results: dict[str, Any], out: Path) -> None:
    (out / "table.md").write_text(markdown(results))
    if results["suite"] in bounds.BOUNDS:
        (out / "details.md").write_text(details(results))


def update(path: Path, results: dict[str, Any]) -> None:
    """Replace what stands between ``<!-- bench:SUITE -->`` and ``<!-- /bench:SUITE -->`` in a Markdown file by the table.

    Between ``<!-- bench:SUITE:details -->`` and its end, if the file has these, all ratios are put.

    Raises:
        ValueError: the file has neither pair of markers, or not each once and in this order.
    """
    text = path.read_text()
    found = False
    for name, table in ((f"bench:{results['suite']}", markdown), (f"bench:{results['suite']}:details", details)):
        if f"<!-- {name} -->" in text or f"<!-- /{name} -->" in text:
            text = between_marks(text, name, table(results), path.name)
            found = True
    if not found:
        raise ValueError(f"{path.name} must have a line <!-- bench:{results['suite']} --> and, after it, its end")
    path.write_text(text)


def between_marks(text: str, name: str, new: str, file: str) -> str:
    """``text`` with ``new`` between its lines ``<!-- name -->`` and ``<!-- /name -->``. ValueError if it has not each once."""
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
    results = json.loads(given.results.read_text())
    show(results, Console())
    if given.update:
        update(given.update, results)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        _write_tables(results, given.out)
        plot(results, given.out / "ratios.png")


if __name__ == "__main__":
    main()
