"""results.jsonl: one JSON object a line, on the disk as soon as it is known; its summary; where a card's results are kept."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "results.jsonl"
REASON_LENGTH = 600
WHOLE = "whole stage"
"""The case of the line that says how a stage ended."""

MACHINE = "machine"
"""The case of the line that names the card, at the begin of a run."""

Line = dict[str, Any]


class Results:
    """Writes the lines of one stage.

    Every line has ``stage``, ``case``, ``ok`` and ``seconds``; ``reason`` if it is not ok; the numbers of its case; and ``dry``,
    true, in a dry run.
    """

    def __init__(self, folder: Path, stage: str, dry: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._stage, self._dry = folder / FILE, stage, dry

    def write(self, case: str, ok: bool, seconds: float, reason: str | None = None, **numbers: object) -> None:
        line: Line = {"stage": self._stage, "case": case, "ok": ok, "seconds": round(seconds, 3)}
        if reason is not None:
            line["reason"] = reason[:REASON_LENGTH]
        line |= {name: _plain(value) for name, value in numbers.items()}
        if self._dry:
            line["dry"] = True
        text = json.dumps(line, allow_nan=False) + "\n"
        # One write a line: stages and what they start append to the same file.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, text.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[dict[str, Any]]:
        """Writes the line of what runs inside, which fills in its numbers.

        An exception makes the line one that is not ok, and ends there: the stage goes on. ``ok`` False among the numbers does too.
        """
        start, numbers = time.perf_counter(), dict[str, Any]()
        try:
            yield numbers
        except Exception as error:
            traceback.print_exc()
            numbers |= {"ok": False, "reason": f"{type(error).__name__}: {str(error).strip() or repr(error)}"}
        self.write(name, numbers.pop("ok", True), time.perf_counter() - start, **numbers)


def _plain(value: object) -> object:
    """JSON has no NaN and no infinity: they are written as text."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def read(folder: Path) -> list[Line]:
    """Reads all lines; a last one that was cut off is left out."""
    path = folder / FILE
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def card_of(lines: list[Line]) -> str | None:
    """Returns the card that the lines are of."""
    cards = {line["card"] for line in lines if line["case"] == MACHINE and "card" in line}
    if len(cards) > 1:
        raise SystemExit(f"gpu_stages: the results are of several cards: {', '.join(sorted(cards))}; they must not share a file")
    return next(iter(cards), None)


def table(lines: list[Line]) -> str:
    """The summary: one row a stage, then every line that is not ok."""
    rows = [f"{'stage':<8}{'lines':>7}{'failed':>8}{'seconds':>10}"]
    for stage in dict.fromkeys(line["stage"] for line in lines):
        its = [line for line in lines if line["stage"] == stage]
        seconds = next((line["seconds"] for line in its if line["case"] == WHOLE), sum(line["seconds"] for line in its))
        rows.append(f"{stage:<8}{len(its):>7}{sum(not line['ok'] for line in its):>8}{seconds:>10.1f}")
    return "\n".join([*rows, *(failure(line) for line in lines if not line["ok"])])


def failure(line: Line) -> str:
    said = line.get("reason", "not ok").splitlines()[0][:120]
    return f"not ok: {line['stage']} {line['case']}: {said}"


def slug(card: str) -> str:
    return re.sub("[^a-z0-9]+", "-", card.lower()).strip("-")


def keep(folder: Path, into: Path) -> list[Path]:
    """Copies a run's results into ``into``, under the name of its card; returns the copies.

    Raises:
        SystemExit: there is nothing to keep, or the benchmarks are of another card.
    """
    card = card_of(read(folder))
    if card is None:
        raise SystemExit(f"gpu_stages: {folder / FILE} names no card: a dry run's results, or none, are not kept")
    copies = [into / f"{slug(card)}.stages.jsonl"]
    shutil.copyfile(folder / FILE, copies[0])
    bench = folder / "bench" / "results.json"
    if bench.exists():
        measured_on = json.loads(bench.read_text())["machine"]["gpu"]
        if measured_on != card:
            raise SystemExit(f"gpu_stages: {bench} is of {measured_on}, {folder / FILE} of {card}: neither was kept with the other")
        copies.append(into / f"{slug(card)}.json")
        shutil.copyfile(bench, copies[1])
    return copies
