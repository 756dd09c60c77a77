"""The file results.json of a run: its types, and how it is read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict, TypeVar

from metamask_ext.files.atomic import write_atomic
from metamask_ext.files.read import read_json

from .problem import METAMASK

FORMAT = 2


class Spread(TypedDict):
    """A contender's times in nanoseconds, with their interquartile range."""

    median: float
    iqr: float
    times: list[int]


class Ratio(TypedDict):
    """The ratio of the medians, and median and interquartile range of the rounds' ratios."""

    of_medians: float
    per_round: float
    iqr: float


class Summary(TypedDict):
    """The times by contender, and the ratios by name, such as ``metamask/dense``."""

    contenders: dict[str, Spread]
    ratios: dict[str, Ratio]


class Timed(Summary):
    """The times of a case, with the checks of its contenders and the reasons for those that are missing."""

    rounds: int
    cpu_share_of_others: float | None
    error_over_tolerance: dict[str, float]
    not_measured: dict[str, str]


class TimedOnGpu(Timed):
    """Times of a GPU's events: the card's name, the copies of the inputs, the bytes that the case must move.

    ``timed_by``: by contender, ``"graph"``, or ``"events: "`` and why no graph can hold it.
    """

    gpu: str
    copies: int
    moved: int
    timed_by: dict[str, str]


class _Case(TypedDict):
    case: str
    measure: str
    shape: str
    allocator: str
    status: str


class Row(_Case, total=False):
    """One case under one allocator. A ``status`` other than ``measured`` has a ``reason``; the grid's have a ``dtype``."""

    reason: str
    dtype: str
    rounds: int
    cpu_share_of_others: float | None
    error_over_tolerance: dict[str, float]
    not_measured: dict[str, str]
    contenders: dict[str, Spread]
    ratios: dict[str, Ratio]
    quantities: dict[str, float]
    gpu: str
    copies: int
    moved: int
    timed_by: dict[str, str]


class Machine(TypedDict):
    """The machine and the software. ``processor`` names files; those written before it was there lack it."""

    cpu: str
    processor: str
    cores: int | None
    threads: int
    instruction_set: str | None
    memory_gib: float
    gpu: str | None
    gpu_state: dict[str, str] | None
    python: str
    torch: str
    metamask_ext: str
    backend: str
    commit: str | None


class Results(TypedDict):
    """All rows of a suite."""

    format: int
    suite: str
    quick: bool
    date: str
    seconds: float
    machine: Machine
    rows: list[Row]


Value = TypeVar("Value")


def read(path: Path) -> Results:
    """Reads results.json, of any format, under the names of today."""
    results: Results = read_json(path)
    if results["format"] == 1:
        results["rows"] = [_renamed_row(row) for row in results["rows"]]
    return results


def _renamed_row(row: Row) -> Row:
    """Gives a row of format 1 the names of format 2: `ours` is ``metamask``, and `by-task` is ``mixed-task``."""
    row = {**row, "case": _renamed_measure(row["case"]), "measure": _renamed_measure(row["measure"])}
    if "error_over_tolerance" in row:
        row["error_over_tolerance"] = _renamed_contenders(row["error_over_tolerance"])
    if "contenders" in row:
        row["contenders"] = _renamed_contenders(row["contenders"])
    if "ratios" in row:
        row["ratios"] = _renamed_contenders(row["ratios"])
    return row


def _renamed_measure(name: str) -> str:
    return name.replace("by-task-", "mixed-task-")


def _renamed_contenders(values: dict[str, Value]) -> dict[str, Value]:
    return {"/".join(METAMASK if part == "ours" else part for part in name.split("/")): value for name, value in values.items()}


def save(results: Results, path: Path) -> None:
    """Writes ``results`` as JSON, one line for each row: the times are long lists."""
    head = json.dumps({**results, "rows": []}, indent=1)
    lines = ",\n".join("  " + json.dumps(row) for row in results["rows"])
    start, end = head.rsplit("[]", 1)
    write_atomic(path, f"{start}[\n{lines}\n ]{end}\n".encode())
