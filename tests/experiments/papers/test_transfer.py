"""transfer: what each way trains and leaves as it is, and the quick run."""

from __future__ import annotations

import pytest
import torch
from support.experiments import check_claims, check_resumes, check_written, no_downloads, quick_run

from metamask_ext.experiments.catalogue import OptionError, run
from metamask_ext.experiments.papers.transfer import training
from metamask_ext.experiments.papers.transfer.settings import Settings, SourceSettings

# The quick run is made once, so by one worker.
pytestmark = pytest.mark.xdist_group("transfer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("transfer")


@pytest.fixture(scope="module")
def metrics(folder):
    return quick_run("transfer", folder)


def test_only_what_is_chosen_moves(tmp_path, monkeypatch):
    """Also the statistics of batch norms stay where a layer is frozen."""
    settings = Settings(filters=4, source=SourceSettings(steps=2, batch=8), steps=3, batch=8)
    moved = {}

    def moved_by(method: str) -> set[str]:
        kept = {}
        load = training._load

        def loading(*arguments):
            model = load(*arguments)
            kept["model"], kept["before"] = model, {name: tensor.clone() for name, tensor in model.state_dict().items()}
            return model

        with monkeypatch.context() as patch:
            patch.setattr(training, "_load", loading)
            training.transfer(tmp_path, 0, method, 100, [1e-2], settings)
        after = kept["model"].state_dict()
        return {name for name, tensor in kept["before"].items() if not torch.equal(after[name], tensor)}

    with no_downloads(tmp_path):
        training.pretrain(tmp_path, 0, settings)
        for method in ("classifier", "last block", "all", "masks"):
            moved[method] = moved_by(method)
    assert moved["classifier"] == moved["masks"] == set()
    assert moved["last block"] and all(name.startswith(("9.", "10.")) for name in moved["last block"])
    assert {name.split(".")[0] for name in moved["all"]} == {"0", "1", "3", "4", "6", "7", "9", "10"}


def test_bytes(metrics):
    sizes, filters = metrics["bytes"], metrics["settings"]["filters"]
    weights = 9 * filters + 27 * filters**2
    assert sizes["weights under masks"] == 4 * weights
    rows = 9 + 27 * filters  # of each filter, a bit each, in whole bytes
    assert filters * rows / 8 <= sizes["masks"] <= filters * rows / 8 + 4 * filters
    head = 4 * (40 * filters + 10)
    assert sizes["classifier, all told"] == head and sizes["masks, all told"] == sizes["masks"] + head


def test_claims(metrics):
    check_claims(metrics)


def test_written(metrics, folder):
    check_written(folder / "transfer", metrics, ["transfer.png"])


def test_killed_run_continues(metrics, folder):
    check_resumes(folder / "transfer", metrics, "all-100.json")


def test_refused(tmp_path):
    with pytest.raises(OptionError, match=r"'counts' must ascend and have 100 among them, got \[10, 30\]"):
        run("transfer", tmp_path / "out", quick=True, counts=[10, 30])
