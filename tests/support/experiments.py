"""Checks of every experiment's quick run and its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from metamask_ext import build_info
from metamask_ext.data import characters, digits
from metamask_ext.experiments import report
from metamask_ext.experiments.catalogue import module_of, run


@contextmanager
def no_downloads(folder: Path) -> Iterator[None]:
    """Without a network: the data are the same everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "_download", lambda mnist, root: "not tried in tests")
        patch.setattr(characters, "try_download", lambda url, download: "not tried in tests")
        patch.setenv("METAMASK_DATA", str(folder))
        yield


def quick_run(name: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """In this process: the tests have the other cores."""
    threads = torch.get_num_threads()
    with no_downloads(folder / "data"):
        metrics = run(name, folder / name, 0, quick=True, workers=1, **changes)
    assert torch.get_num_threads() == threads
    return metrics


def check_claims(metrics: dict[str, Any]) -> None:
    """Every claim that is about this run holds."""
    answers = report.answers(module_of(metrics["experiment"]), metrics)
    assert answers
    for text, holds in answers:
        assert holds, text
        # A number that a format left out, or could not show, would be one of these.
        assert "{" not in text and "nan" not in text.split(), text


def check_written(folder: Path, metrics: dict[str, Any], figures: list[str]) -> None:
    """``metrics.json`` as returned, complete; the figures; no remains of interrupted writes; and pages of the report."""
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["seed"] == 0 and metrics["quick"] is True and metrics["seeds"][0] == 0
    assert metrics["build_info"] == json.loads(json.dumps(build_info())) and metrics["versions"]["torch"] == torch.__version__
    assert metrics["duration_s"] > 0 and metrics["resumed"] is False
    assert "steps" in metrics["budget"] and metrics["data"] and metrics["settings"]["seeds"] == len(metrics["seeds"])
    assert metrics["command"].startswith(f"metamask run {metrics['experiment']} --seed 0 --quick") and metrics["machine"]["cpu"]
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(figures)
    for figure in figures:
        image = (folder / figure).read_bytes()
        assert image.startswith(b"\x89PNG") and len(image) > 20_000
    assert not list(folder.rglob("*.tmp"))
    module = module_of(metrics["experiment"])
    pages = report._pages(metrics["experiment"], module, metrics, [*figures, "metrics.json"])
    page, text = pages[report.PAGE], "".join(pages.values())
    assert module.QUESTION in page and "holds: " in page and all(f"]({name})" in page for name in figures)
    for title, rows in report.tables(module, metrics):
        assert title in text and len(rows) > 1 and len({len(row) for row in rows}) == 1


def check_resumes(folder: Path, metrics: dict[str, Any], lost: str) -> None:
    """A run that was killed before ``lost`` was written comes to the same results, and keeps what was there."""
    kept = {path: path.stat().st_mtime_ns for path in (folder / "seed-0").iterdir() if path.name != lost}
    content = (folder / "seed-0" / lost).read_bytes()
    (folder / "metrics.json").unlink()
    (folder / "seed-0" / lost).unlink()
    again = run(metrics["experiment"], folder, 0, quick=True, workers=1)
    assert again["resumed"] is True
    assert (again["results"], again["baselines"]) == (metrics["results"], metrics["baselines"])
    assert (folder / "seed-0" / lost).read_bytes() == content
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
