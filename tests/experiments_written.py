"""What every experiment's folder holds after a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from metamask_ext import build_info
from metamask_ext.experiments import run


def check_written(folder: Path, metrics: dict[str, Any], figures: list[str]) -> None:
    """``metrics.json`` as returned, complete; the figures; no remains of interrupted writes."""
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["seed"] == 0 and metrics["quick"] is True
    assert metrics["build_info"] == json.loads(json.dumps(build_info())) and metrics["versions"]["torch"] == torch.__version__
    assert metrics["duration_s"] > 0 and metrics["resumed"] is False
    assert "steps" in metrics["budget"] and metrics["data"] and metrics["settings"]["lr"] > 0
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(figures)
    for figure in figures:
        image = (folder / figure).read_bytes()
        assert image.startswith(b"\x89PNG") and len(image) > 20_000
    assert not list(folder.rglob("*.tmp"))


def check_resumes(folder: Path, metrics: dict[str, Any], lost: str) -> None:
    """A run that was killed before ``lost`` was written comes to the same results, and keeps what was there."""
    kept = {path: path.stat().st_mtime_ns for path in (folder / "seed-0").iterdir() if path.name != lost}
    content = (folder / "seed-0" / lost).read_bytes()
    (folder / "metrics.json").unlink()
    (folder / "seed-0" / lost).unlink()
    again = run(metrics["experiment"], folder, 0, quick=True)
    assert again["resumed"] is True
    assert (again["results"], again["baselines"]) == (metrics["results"], metrics["baselines"])
    assert (folder / "seed-0" / lost).read_bytes() == content
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
