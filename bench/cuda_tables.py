"""The table of the suite ``cuda``: times, ratios and shares of the copy bandwidth, all of one card."""

from __future__ import annotations

import re

from . import targets
from .cuda_timing import GRAPH
from .problem import METAMASK
from .results_json import Results, Row
from .targets import NOT_MEASURED

BASE = ["measure", "shape", "metamask, us", "share of copy bandwidth", "metamask/dense", "eager/metamask", "compiled/metamask"]
LAST = ["other contenders", "copy, GB/s", "without a graph"]


def card(results: Results) -> str | None:
    """Returns the name of the card that measured the results; None where nothing was measured.

    Raises:
        ValueError: several cards did, whose results share no table.
    """
    names = sorted({row["gpu"] for row in results["rows"] if "gpu" in row})
    if len(names) > 1:
        raise ValueError(f"results must be of one card, got those of {', '.join(names)}: a table for each")
    return names[0] if names else None


def mark(results: Results) -> str:
    """Returns the name of the results' table in a Markdown file: that of the suite, and of the card if one measured it."""
    name = card(results)
    return results["suite"] if name is None else f"{results['suite']}:{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}"


def table(results: Results) -> list[list[str]]:
    """Returns a head, then a line for each case."""
    card(results)
    return [[*BASE, *LAST], *map(_line, results["rows"])]


def _line(row: Row) -> list[str]:
    what = [row["measure"], row["shape"]]
    if row["status"] != "measured":
        return [*what, *(row["status"] for _ in range(len(BASE) - 2)), "", row["status"], ""]
    times = {name: spread["median"] for name, spread in row["contenders"].items()}
    ratios = {name: targets.number(ratio["of_medians"]) for name, ratio in row["ratios"].items()}
    known = ["copy/metamask", *BASE[4:]]
    others = ", ".join(f"{name} {value}" for name, value in ratios.items() if name not in known)
    return [
        *what,
        targets.number(times[METAMASK] / 1000),
        *(ratios.get(name, NOT_MEASURED) for name in known),
        others,
        targets.number(row["moved"] / times["copy"]) if "copy" in times else NOT_MEASURED,
        ", ".join(name for name, how in row["timed_by"].items() if how != GRAPH),
    ]
