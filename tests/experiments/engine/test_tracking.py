"""Tracking by Lightning's loggers: W&B offline, CSV, TensorBoard; ``make test-engines`` has them."""

from __future__ import annotations

import csv
import json

import pytest

pytest.importorskip("metamask_ext.integrations.lightning", reason="make test-engines has Lightning", exc_type=ImportError)
pytest.importorskip("wandb", reason="make test-engines installs it")
from support.toy_experiment import Settings

from metamask_ext.experiments.catalogue import EXPERIMENTS, Entry, run


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "toy", Entry("support.toy_experiment", "for tests"))


def _curve(folder):
    return json.loads((folder / "seed-0" / "masked.json").read_text())["curve"]


def test_wandb_offline(tmp_path):
    """A run for each job, which another try of the job replaces; nothing is sent."""
    for _ in range(2):
        run("toy", tmp_path, quick=True, workers=1, tracking="wandb")
        found = [*tmp_path.glob("wandb/seed-0/*/wandb/offline-run-*/run-*.wandb")]
        assert sorted(path.parents[2].name for path in found) == ["last-one", "masked", "shared"]
        (tmp_path / "metrics.json").unlink()
        for path in (tmp_path / "seed-0").glob("*.json"):
            path.unlink()


def test_logger_of_tables(tmp_path):
    run("toy", tmp_path, quick=True, workers=1, tracking="support.executors:lightning_csv")
    with open(tmp_path / "lightning" / "seed-0" / "masked" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == _curve(tmp_path) and len(rows) == Settings().steps
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]


def test_logger_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("toy", tmp_path, quick=True, workers=1, tracking="support.executors:lightning_tensorboard")
    events = EventAccumulator(str(tmp_path / "lightning" / "seed-0" / "masked"))
    events.Reload()
    assert [event.value for event in events.Scalars("value")] == pytest.approx(_curve(tmp_path), rel=1e-6)
