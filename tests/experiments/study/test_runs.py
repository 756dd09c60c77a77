"""Runs of the common study: its jobs, what it chooses, its tables, what ends it."""

from __future__ import annotations

import math

import pytest

from metamask_ext.experiments.catalogue import JobError, OptionError, run
from metamask_ext.experiments.study import findings, report
from metamask_ext.experiments.study.methods import METHODS
from metamask_ext.experiments.study.report import LABELS

TINY = """
tasks = 2
steps = 80
train_samples = 20
test_samples = 50
new_tasks = 2
seeds = 2
[study]
tuning = true
cost_rounds = 1
[study.maml]
inner_steps = 1
[study.new]
steps = 3
samples = [1, 20]
[study.grid]
masked = [{lr = 0.01, mask_lr = 0.1}, {lr = 0.01, mask_lr = 1.0}]
hard = [{lr = 0.01, mask_lr = 0.1}, {lr = 0.01, mask_lr = 1.0}]
lottery = [{mask_lr = 0.1, scale = 1.0}, {mask_lr = 0.1, scale = 9.0}]
shared = [{lr = 1e30}, {lr = 0.01}]
independent = [{lr = 0.01}, {lr = 0.1}]
maml = [{lr = 0.01, inner_lr = 0.01}, {lr = 0.01, inner_lr = 0.1}]
sequence = [{lr = 0.01}, {lr = 0.1}]
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run of ``linear`` with tuning, made so small that its numbers mean nothing."""
    folder = tmp_path_factory.mktemp("study")
    config = folder / "tiny.toml"
    config.write_text(TINY)
    return folder, run("linear", folder / "out", 0, quick=True, config=config, workers=1)


def test_workers_do_not_change_results(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(TINY.replace("tuning = true", "tuning = false").replace("seeds = 2", "seeds = 1").replace("1e30", "0.1"))
    two, one = (run("linear", tmp_path / str(workers), 0, quick=True, config=config, workers=workers) for workers in (2, 1))
    assert (two["results"], two["baselines"]) == (one["results"], one["baselines"])
    assert two["study"].pop("cost").keys() == one["study"].pop("cost").keys() and two["study"] == one["study"]


def test_choices(tiny):
    """Each method has its best configuration on the tuning seed; one that diverged is kept as such and not chosen."""
    folder, metrics = tiny
    found = metrics["study"]
    grid = metrics["settings"]["study"]["grid"]
    assert len(found["tuned"]["sequence, at the end"]) == 2 and found["tuned"]["sequence, at the end"] != found["tuned"]["sequence"]
    assert found["tuned"]["shared"][0] is None and found["chosen"]["shared"] == {"lr": 0.01}
    assert "diverged" in (folder / "out" / "seed-2" / "tuning-shared-0.json").read_text()
    for name in METHODS:
        tried = [math.inf if value is None else value for value in found["tuned"][name]]
        assert found["chosen"][name] == grid[name][tried.index(min(tried))]
    assert not (folder / "out" / "seed-3").exists() and metrics["seeds"] == [0, 1]
    rates = metrics["settings"]["study"]["new"]["rates"]
    for name, ways in found["rates"].items():
        assert set(ways) == set(found["new"][name]) - {"look-up"}
        assert all(len(chosen) == 2 and set(chosen) <= set(rates[way]) for way, chosen in ways.items())


def test_tables_and_numbers(tiny):
    _, metrics = tiny
    (_, by_method), (_, new) = report.tables(metrics)
    assert [row[0] for row in by_method[1:]] == list(LABELS.values())
    assert len(new) == 17 and ["masks on frozen W", "everything"] not in [row[:2] for row in new]
    assert {len(row) for row in by_method} == {6} and {len(row) for row in new} == {5}
    assert by_method[0][4] == "support recovered (%)" and [row[4] == "-" for row in by_method[1:]] == [False] * 2 + [True] * 5
    masked = metrics["study"]["order"]["masked"]
    assert findings.after_learning(metrics, "masked") == pytest.approx(sum(map(sum, masked["after"])) / 4)
    assert findings.at_the_end(metrics, "masked") == pytest.approx(sum(map(sum, masked["end"])) / 4)
    for seed in range(2):
        assert len(masked["earlier"][seed]) == 1 and masked["after"][seed][1] == masked["end"][seed][1]
    assert findings.trained(metrics, "hard") == metrics["results"]["hard"]["test MSE"]["mean"]
    ways = metrics["study"]["new"]
    first = [seed[0] for seed in ways["maml"]["everything"]]
    assert findings.new_tasks(metrics, "maml", "everything", 1) == pytest.approx(sum(first) / 2)
    assert findings.needed(metrics, "independent", "from scratch") in (1, 20)
    assert findings.cost_ratio(metrics, "shared") == 1 and findings.cost_ratio(metrics, "maml") > 1


def test_samples_needed(tiny):
    _, metrics = tiny
    found = {**metrics, "study": {**metrics["study"], "samples": [1, 10, 100]}}
    found["study"]["new"] = {"independent": {"from scratch": [[3.0, 2.0, 1.0]]}, "masked": {"mask only": [[3.0, 1.005, 0.5]]}}
    assert findings.needed(found, "masked", "mask only") == 10
    found["study"]["new"]["masked"]["mask only"] = [[3.0, 1.02, 1.02]]
    assert findings.needed(found, "masked", "mask only") == math.inf


def test_one_method_that_diverges_ends_the_run(tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(TINY.replace("tuning = true", "tuning = false").replace("seeds = 2", "seeds = 1"))
    with pytest.raises(JobError, match="job 'shared' of seed 0 failed: FloatingPointError: the mean loss of round"):
        run("linear", tmp_path / "out", 0, quick=True, config=config, workers=1)


def test_mnist_has_one_task(tmp_path):
    with pytest.raises(OptionError, match="experiment 'mnist': 'tasks' must be 1, got 2"):
        run("mnist", tmp_path / "out", 0, quick=True, tasks=2)
    assert not (tmp_path / "out").exists()
