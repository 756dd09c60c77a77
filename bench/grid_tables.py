"""The tables of the suite ``grid``: a line for each measure and weight, a column for each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from . import floors, grid
from .grid import measure_name, name_of, shape_name, sizes_of
from .problem import METAMASK
from .results_json import Results, Row

OURS_TO_DENSE, PLAIN_TO_OURS = "metamask / dense", "best of eager and compiled / metamask"
_PLAIN = ("eager", "compiled")


class Table(NamedTuple):
    """Its title, and its cells: the first row is the head."""

    title: str
    cells: list[list[str]]


class Point(NamedTuple):
    measure: str
    allocator: str
    weight: grid.Weight
    batch: int


Value = Callable[[Point], "float | str | None"]


class Points:
    """The results by measure, allocator, weight and batch."""

    def __init__(self, results: Results) -> None:
        self._rows = {(row["measure"], row["shape"], row["allocator"]): row for row in results["rows"]}
        self._floors = floors.ratios(results)

    def row(self, point: Point) -> Row | None:
        return self._rows.get(_key(point))

    def dense(self, point: Point) -> float | None:
        """Returns metamask's time as a multiple of a dense layer's."""
        row = self.row(point)
        found = row.get("ratios", {}).get(f"{METAMASK}/dense") if row else None
        return found and found["of_medians"]

    def plain(self, point: Point) -> float | None:
        """Returns the time of the fastest of plain torch's ways as a multiple of metamask's."""
        row = self.row(point)
        ratios = row.get("ratios", {}) if row else {}
        found = [ratios[key]["of_medians"] for name in _PLAIN if (key := f"{name}/{METAMASK}") in ratios]
        return min(found) if found else None

    def floor(self, point: Point) -> float | None:
        """Returns the ratio of the floors."""
        return self._floors.get(_key(point))

    def batches(self, measure: str, allocator: str) -> list[int]:
        """Lists the batches of which there are results, measured or not."""
        return sorted({sizes[0] for sizes in self._sizes(measure, allocator)})

    def weights(self, measure: str, allocator: str) -> list[grid.Weight]:
        """Lists the weights of which there are results, in the grid's order."""
        its = {sizes[1:] for sizes in self._sizes(measure, allocator)}
        return [weight for weight in grid.WEIGHTS if weight in its]

    def _sizes(self, measure: str, allocator: str) -> list[tuple[int, int, int]]:
        return [sizes_of(shape) for name, shape, setting in self._rows if (name, setting) == (measure, allocator)]


def tables(results: Results) -> Iterator[Table]:
    """Makes the two tables of each dtype and allocator: both ratios, the floors' beside that to dense."""
    points = Points(results)
    for dtype in grid.DTYPES:
        for allocator in ("tuned", "default"):
            measures = [measure_name(mode, dtype) for mode in grid.MODES]
            if points.batches(measures[0], allocator):
                where = f"{name_of(dtype)}, {allocator} allocator"
                ours = f"{OURS_TO_DENSE} (the ratio of the floors), {where}"
                yield Table(ours, _cells(points, measures, allocator, _beside_floor(points)))
                yield Table(f"{PLAIN_TO_OURS}, {where}", _cells(points, measures, allocator, points.plain))


SUMMARY: tuple[tuple[int, grid.Weight], ...] = (
    (1, (1024, 1024)),
    (8, (4096, 4096)),
    (32, (1024, 1024)),
    (256, (768, 3072)),
    (4096, (1024, 1024)),
    (16384, (768, 768)),
)
"""Batches and weights of the short table: from one row to a transformer's batch."""


def summary(results: Results) -> list[list[str]]:
    """Makes a table of a line for each point of :data:`SUMMARY`, in float32 with the tuned allocator."""
    points = Points(results)
    rows = [["batch x inputs -> outputs", *(f"{mode} / dense" for mode in _LONG), *(f"plain / metamask, {mode}" for mode in _LONG)]]
    for batch, weight in SUMMARY:
        its = [Point(measure, "tuned", weight, batch) for measure in grid.MODES]
        values = [*map(points.dense, its), *map(points.plain, its)]
        cells = ["not measured" if value is None else f"{value:.2f}" for value in values]
        rows.append([f"{batch:,} x {weight[0]} -> {weight[1]}", *cells])
    return rows


_LONG = ("forward", "forward and backward", "fused step")


def _key(point: Point) -> floors.Key:
    return point.measure, shape_name(point.batch, *point.weight), point.allocator


def _beside_floor(points: Points) -> Value:
    def text(point: Point) -> str | None:
        value, floor = points.dense(point), points.floor(point)
        return None if value is None else f"{value:.2f}" if floor is None else f"{value:.2f} ({floor:.2f})"

    return text


def _cells(points: Points, measures: list[str], allocator: str, value: Value) -> list[list[str]]:
    batches = points.batches(measures[0], allocator)
    rows = [["measure", "inputs x outputs", *(f"batch {batch:,}" for batch in batches)]]
    for measure in measures:
        for weight in points.weights(measure, allocator):
            cells = []
            for batch in batches:
                point = Point(measure, allocator, weight, batch)
                found, row = value(point), points.row(point)
                absent = "" if row is None else "failed" if row["status"] == "failed" else "not measured"
                cells.append(found if isinstance(found, str) else absent if found is None else f"{found:.2f}")
            rows.append([measure, " x ".join(map(str, weight)), *cells])
    return rows
