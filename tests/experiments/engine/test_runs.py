"""The engine of the experiments on one that takes no time: settings, jobs over processes, killed runs, tracking, the report."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support import toy_experiment
from support.paths import TESTS
from typer.testing import CliRunner

from metamask_ext.cli import app
from metamask_ext.continual import CheckpointError, OutputError
from metamask_ext.experiments import report, suite
from metamask_ext.experiments.catalogue import EXPERIMENTS, Entry, JobError, OptionError, run, settings_of
from metamask_ext.experiments.engine.jobs import checked_bytes
from metamask_ext.experiments.engine.settings import as_json, of_run, read_toml, resolve, to_toml
from metamask_ext.experiments.engine.statistics import half_width
from metamask_ext.experiments.engine.tables import estimate_text

TOY = Entry("support.toy_experiment", "for tests")


@pytest.fixture(autouse=True)
def toy():
    """The toy is the only experiment there is."""
    kept = dict(EXPERIMENTS)
    EXPERIMENTS.clear()
    EXPERIMENTS["toy"] = TOY
    yield
    # As they were, in their order.
    EXPERIMENTS.clear()
    EXPERIMENTS.update(kept)


def _metamask(*arguments: str):
    return CliRunner().invoke(app.app, list(arguments))


@dataclass(frozen=True)
class Study:
    lr: float = 0.1
    rates: tuple[float, ...] = (1, 0.5)


@dataclass(frozen=True)
class Config:
    a: int = 1


@dataclass(frozen=True)
class Pair:
    x: int
    y: float


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    study: Study = Study()
    on: bool = True
    name: str = "a"
    grid: tuple[Config, ...] = (Config(),)
    pairs: tuple[Pair, ...] = (Pair(1, 2.0),)


def _settings(*changes):
    return resolve("toy", Settings(), *changes)


def test_settings_are_merged():
    merged = _settings({"study": {"lr": 1}}, {"study": {"rates": [2, 3]}, "seeds": 2}, {"on": False, "grid": [{"a": 2}, {"a": 3}]})
    assert merged == Settings(2, Study(1.0, (2.0, 3.0)), False, "a", (Config(2), Config(3)))
    # An int that became a float is one: 1 and 1.0 are the same run.
    assert isinstance(merged.study.lr, float) and all(isinstance(rate, float) for rate in merged.study.rates)
    assert as_json(merged) == {
        "seeds": 2,
        "study": {"lr": 1.0, "rates": [2.0, 3.0]},
        "on": False,
        "name": "a",
        "grid": [{"a": 2}, {"a": 3}],
        "pairs": [{"x": 1, "y": 2.0}],
    }


def test_settings_of_a_run():
    """A run's metrics give its settings back; one that they lack is not made up."""
    settings = _settings({"study": {"rates": [3, 4]}, "pairs": [{"x": 2, "y": 3}]})
    metrics = json.loads(json.dumps({"experiment": "toy", "settings": as_json(settings)}))
    assert of_run(Settings(), metrics) == settings
    del metrics["settings"]["study"]["lr"]
    with pytest.raises(KeyError, match=r"study\.lr"):
        of_run(Settings(), metrics)


def test_emptied_list_takes_items_again():
    assert _settings({"study": {"rates": []}}, {"study": {"rates": [2.0]}}).study.rates == (2.0,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"studdy": {"lr": 1.0}}, "unknown setting 'studdy.lr', did you mean 'study.lr'?"),
        ({"study": {"lrr": 1.0}}, "unknown setting 'study.lrr', did you mean 'study.lr'?"),
        ({"sedes": 1}, "unknown setting 'sedes', did you mean 'seeds'?"),
        ({"seeds": 1.5}, "'seeds' must be an integer, got a float: 1.5"),
        ({"seeds": True}, "'seeds' must be an integer, got a boolean: True"),
        ({"on": 1}, "'on' must be a boolean, got an integer: 1"),
        ({"study": 3}, "'study' must be a table, got an integer: 3"),
        ({"study": {"lr": "fast"}}, "'study.lr' must be a float, got a string: 'fast'"),
        ({"study": {"lr": float("nan")}}, "'study.lr' must be finite, got nan"),
        ({"study": {"rates": [0.1, "x"]}}, r"'study.rates\[1\]' must be a float, got a string: 'x'"),
        ({"study": {"rates": 0.1}}, "'study.rates' must be a list, got a float: 0.1"),
        ({"name": None}, "'name' must be a string, got a NoneType: None"),
        ({"grid": [{"b": 1}]}, r"unknown setting 'grid\[0\].b', known are: a"),
        ({"grid": [3]}, r"'grid\[0\]' must be a table, got an integer: 3"),
        ({"pairs": [{"x": 1}]}, r"'pairs\[0\]' must have 'y', got \{'x': 1\}"),
    ],
)
def test_refused_settings(changes, message):
    with pytest.raises(OptionError, match=f"experiment 'toy': {message}"):
        _settings(changes)


def test_order_of_settings(tmp_path):
    """The module's, then --quick, then the file, then options."""
    (tmp_path / "file.toml").write_text("tasks = 7\nseeds = 4\n[study]\nlr = 3\n")
    assert settings_of("toy", quick=True).study == toy_experiment.StudySettings(0.2, (0.1, 1.0))
    settings = settings_of("toy", quick=True, config=tmp_path / "file.toml", changes={"tasks": 9})
    assert (settings.seeds, settings.tasks, settings.study.lr, settings.steps) == (4, 9, 3.0, 4)


def test_printed_config_is_the_same_run(tmp_path):
    printed = _metamask("run", "toy", "--quick", "--steps", "3", "--print-config")
    assert printed.exit_code == 0
    (tmp_path / "file.toml").write_text(printed.stdout)
    assert read_toml(tmp_path / "file.toml") == as_json(settings_of("toy", True, changes={"steps": 3}))
    first = run("toy", tmp_path / "out", quick=True, workers=1, steps=3)
    # In the same folder: what is finished there is this run.
    assert run("toy", tmp_path / "out", config=tmp_path / "file.toml", workers=1) == first


def test_every_setting_survives_toml(tmp_path):
    settings = {
        "a": 1e-3,
        "b": [0.1, 1.0],
        "c": {"5, 6-way": {"x": True}},
        "d": "ä\n\"'",
        "e": [[1, 2], [3]],
        "f": [{"x": 1}],
        "g": [],
    }
    (tmp_path / "file.toml").write_text(to_toml(settings), encoding="utf-8")
    assert read_toml(tmp_path / "file.toml") == settings


@pytest.mark.parametrize(
    ("text", "message"), [("a = ", "TOML file, got"), (None, "No such file"), ("sede = 1", "did you mean 'seeds'")]
)
def test_refused_files(tmp_path, text, message):
    if text is not None:
        (tmp_path / "file.toml").write_text(text)
    result = _metamask("run", "toy", "--out", str(tmp_path / "out"), "--config", str(tmp_path / "file.toml"))
    assert result.exit_code == 2 and message in result.stderr and result.stderr.startswith("error: "), result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toy", "--rotated"], "unknown setting 'rotated'"),
        (["toy", "--seeds", "0"], "'seeds' must be at least 1, got 0"),
        (["toy", "--tracking", "paper"], "tracking must be one of csv, tensorboard, got 'paper'"),
        (["all", "--tasks", "3"], "'all' takes no settings"),
        (["all", "--print-config"], "'all' takes no settings"),
    ],
)
def test_refused_options(tmp_path, arguments, message):
    result = _metamask("run", *arguments, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    """The folder of a run in this process, tracked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXPERIMENTS, "toy", TOY)
        folder = tmp_path_factory.mktemp("toy")
        run("toy", folder, workers=1, tracking="csv")
    return folder


def _jobs(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("seed-*/*.json")}


def test_results_do_not_depend_on_the_workers(once, tmp_path, capsys):
    metrics = run("toy", tmp_path, workers=2)
    one = json.loads((once / "metrics.json").read_text())
    assert metrics["results"] == one["results"] and metrics["workers"] == 2 and one["workers"] == 1
    assert len(_jobs(once)) == 9 and _jobs(tmp_path) == _jobs(once)
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if " jobs" in line]
    assert [line.split(",")[0] for line in lines] == [f"{number} of 9 jobs" for number in range(1, 10)]
    assert all(line.endswith("left") for line in lines[:-1]) and lines[-1] == "9 of 9 jobs"


def test_metrics(once):
    metrics = json.loads((once / "metrics.json").read_text())
    numbers = metrics["results"]["masked"]["score (%)"]
    mean, half = sum(numbers["values"]) / 3, half_width(numbers["values"])
    assert numbers["mean"] == pytest.approx(mean) and numbers["interval"] == half
    assert metrics["seeds"] == [0, 1, 2] and metrics["command"] == "metamask run toy --seed 0"
    assert metrics["machine"]["cores"] == os.cpu_count() and metrics["machine"]["torch"] == torch.__version__
    assert metrics["duration_s"] > 0 and not (once / "elapsed.json.tmp").exists()


def test_interval_is_students():
    # Of 1 to 5: mean 3, deviation sqrt(2.5); t with 4 degrees of freedom 2.776445
    assert half_width([1, 2, 3, 4, 5]) == pytest.approx(2.776445 * (2.5 / 5) ** 0.5, rel=1e-6)


def test_times_are_readable():
    assert [estimate_text(s) for s in (0.2, 40, 400, 8000)] == ["about 1 s", "about 40 s", "about 7 min", "about 2.2 h"]


@pytest.mark.parametrize("workers", [1, 2])
def test_job_that_raises(tmp_path, workers):
    with pytest.raises(JobError, match="job 'shared' of seed 1 failed: FloatingPointError: the loss is nan"):
        run("toy", tmp_path, workers=workers, fault="shared:raises")
    assert not (tmp_path / "metrics.json").exists()
    assert "seed-1/shared.json" not in _jobs(tmp_path)
    result = _metamask("run", "toy", "--out", str(tmp_path), "--workers", "1")
    assert result.exit_code == 1 and "settings.fault was 'shared:raises', now ''" in result.stderr


@pytest.mark.parametrize(
    ("fault", "message"), [("killed", "its process was killed by SIGKILL"), ("exits", "its process ended with exit code 3")]
)
def test_job_whose_process_dies(tmp_path, fault, message):
    with pytest.raises(JobError, match=f"job 'last one' of seed 1 failed: {message}"):
        run("toy", tmp_path, workers=2, fault=f"last one:{fault}")
    # What was done before is kept.
    assert len([path for path in _jobs(tmp_path) if "last" not in path]) == 6


def test_job_that_cannot_be_sent(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_experiment, "partial", lambda function, *arguments: lambda: function(*arguments))
    with pytest.raises(JobError, match="job 'masked' of seed 0 cannot be sent to another process"):
        run("toy", tmp_path, workers=2)


COMMAND = """
import os, signal, sys
# As a terminal starts it: what a shell starts in the background, these tests perhaps, ignores Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {here!r})
from metamask_ext.experiments.catalogue import EXPERIMENTS, Entry
EXPERIMENTS["toy"] = Entry("support.toy_experiment", "for tests")

replace, left = os.replace, int(sys.argv.pop(1))

def deadly(source, target):
    global left
    replace(source, target)
    left -= "seed-" in str(target)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = deadly
from metamask_ext.cli import main
main()
"""


def _command(kill_after: int, *arguments: str) -> list[str]:
    return [sys.executable, "-c", COMMAND.format(here=str(TESTS)), str(kill_after), "run", "toy", *arguments]


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_run_continues(once, tmp_path, capsys, workers):
    """SIGKILL to the command after four jobs, then the same again: the same results, those that were there as they were."""
    out = ["--out", str(tmp_path / "out"), "--workers", str(workers)]
    killed = subprocess.run(_command(4, *out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100)
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("seed-*/*.json")}
    assert len(before) == 4
    elapsed = json.loads((tmp_path / "out" / "elapsed.json").read_text())["seconds"]
    metrics = run("toy", tmp_path / "out", workers=workers)
    assert metrics["resumed"] and metrics["duration_s"] > elapsed > 0
    assert "resuming the run" in capsys.readouterr().out
    assert _jobs(tmp_path / "out") == _jobs(once)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def _wait_for_the_end_of_group(group: int) -> None:
    """Until no process of the group is left; its leader was waited for. An error after 20 s."""
    deadline = time.monotonic() + 20
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.1)


def test_interrupted_run_leaves_no_process(tmp_path):
    """Ctrl-C, which the terminal sends to every process of the group: they all end, soon."""
    (tmp_path / "file.toml").write_text('fault = "shared:waits"')
    command = _command(-1, "--out", str(tmp_path / "out"), "--workers", "2", "--config", str(tmp_path / "file.toml"))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        # All jobs of the first call but the one that waits
        while len(_jobs(tmp_path / "out")) < 5 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(_jobs(tmp_path / "out")) == 5
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode != 0
        _wait_for_the_end_of_group(process.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_workers_end_with_a_killed_parent(tmp_path):
    (tmp_path / "file.toml").write_text('fault = "shared:waits"')
    command = _command(5, "--out", str(tmp_path / "out"), "--workers", "2", "--config", str(tmp_path / "file.toml"))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        assert process.wait(timeout=60) == -signal.SIGKILL
        _wait_for_the_end_of_group(process.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_finished_run_is_shown_not_repeated(once, capsys):
    before = {path: path.stat().st_mtime_ns for path in once.rglob("*")}
    metrics = run("toy", once, workers=1)
    assert metrics == json.loads((once / "metrics.json").read_text())
    shown = capsys.readouterr().out
    assert "finished: nothing is computed again" in shown and "masked" in shown and "±" in shown
    assert {path: path.stat().st_mtime_ns for path in once.rglob("*")} == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"quick": True}, r"settings\.seeds was 3, now 1"),
        ({"tasks": 3}, r"settings\.tasks was 2, now 3"),
    ],
)
def test_folder_of_another_run(once, given, message):
    before = (once / "metrics.json").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        run("toy", once, workers=1, **given)
    assert (once / "metrics.json").read_bytes() == before


def test_folder_with_foreign_results(tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(OutputError, match=r"metrics\.json' exists without run\.json"):
        run("toy", tmp_path, workers=1)
    assert (tmp_path / "metrics.json").read_text() == "{}"
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(OutputError, match=r"cannot read .*run\.json"):
        run("toy", tmp_path, workers=1)


def test_missing_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib is not installed: pip install \"metamask_ext\[experiments\]\""):
        run("toy", tmp_path / "out", quick=True)
    assert not (tmp_path / "out").exists()


def test_unknown_experiment(tmp_path):
    with pytest.raises(ValueError, match="experiment must be one of toy, got 'nope'"):
        run("nope", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _of_job(folder: Path) -> list[float]:
    return json.loads((folder / "seed-1" / "masked.json").read_text())["curve"]


def test_tracking_csv(once):
    with open(once / "seed-1" / "masked.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    values = [float(row["value"]) for row in rows if row["name"] == "value"]
    assert values == _of_job(once) and [row["step"] for row in rows] == ["0", "0", "1", "1", "2", "2", "3", "3"]
    assert {row["name"] for row in rows} == {"value", "twice"}


def test_tracking_tensorboard(once, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("toy", tmp_path, workers=2, tracking="tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard" / "seed-1" / "masked"))
    events.Reload()
    assert [event.value for event in events.Scalars("value")] == pytest.approx(_of_job(once), rel=1e-6)
    assert _jobs(tmp_path) == _jobs(once)


def test_run_all_and_report(tmp_path, monkeypatch, capsys):
    """Everything in turn, what is finished not again; the page names what is missing and has the claims with their numbers."""
    monkeypatch.setitem(EXPERIMENTS, "second", TOY)
    monkeypatch.setitem(report.SECTIONS, "toy", "3.1 Proof of concept")
    monkeypatch.setattr(toy_experiment, "ROTATED", {"tasks": 2}, raising=False)
    monkeypatch.setattr(toy_experiment, "Settings", toy_experiment.RotatedSettings)
    suite.run_all(tmp_path / "runs", quick=True, workers=1)
    shown = capsys.readouterr().out
    assert list(suite.runs()) == ["toy", "toy-rotated", "second", "second-rotated"]
    assert "1 of 4 experiments, about" in shown and shown.rstrip().endswith("4 of 4 experiments")

    (tmp_path / "runs" / "second" / "metrics.json").unlink()
    kept = (tmp_path / "runs" / "toy" / "metrics.json").stat().st_mtime_ns
    result = _metamask("report", str(tmp_path / "runs"), "--out", str(tmp_path / "docs"))
    assert result.exit_code == 0 and "missing: `second` is not finished" in result.stdout
    page = (tmp_path / "docs" / "README.md").read_text()
    metrics = json.loads((tmp_path / "runs" / "toy" / "metrics.json").read_text())
    masked, shared = (metrics[kind][name]["score (%)"]["mean"] for kind, name in (("results", "masked"), ("baselines", "shared")))
    of_toy = (tmp_path / "docs" / "toy" / "README.md").read_text()
    said = f"masked has {masked:.3g}, shared {shared:.3g}"
    assert f"holds: {said}" in of_toy and "**does not hold**: shared has more than 1000000" in of_toy
    assert said in page and "What does not hold: 3" in page and "[toy](toy/README.md): shared has more than 1000000" in page
    assert "3.1 Proof of concept" in page and "`second` is not finished" in page and "3 of 6 claims hold" in page
    rotated = (tmp_path / "docs" / "toy-rotated" / "README.md").read_text()
    assert "`metamask run toy --seed 0 --quick --rotated --out DIR`" in rotated and "**a quick run**" in rotated
    for text, part in ((of_toy, "toy/metrics.json"), (of_toy, "toy/toy.png"), (rotated, "toy-rotated/toy.png")):
        assert f"({part.split('/')[1]})" in text and (tmp_path / "docs" / part).stat().st_size > 1000
    assert json.loads((tmp_path / "docs" / "toy" / "metrics.json").read_text()) == metrics
    # Once more from what was written: the same page.
    report.report(tmp_path / "docs", tmp_path / "docs")
    assert (tmp_path / "docs" / "README.md").read_text() == page.replace("is not finished", "was not run")

    suite.run_all(tmp_path / "runs", quick=True, workers=1)
    assert (tmp_path / "runs" / "toy" / "metrics.json").stat().st_mtime_ns == kept
    with pytest.raises(OutputError, match="folder must hold a folder for each finished experiment"):
        report.report(tmp_path, tmp_path / "docs")
    del metrics["results"]["masked"], metrics["sha256"]
    (tmp_path / "runs" / "toy" / "metrics.json").write_bytes(checked_bytes(metrics))
    with pytest.raises(OutputError, match=r"toy/metrics\.json' is not of this version: it lacks 'masked'"):
        report.report(tmp_path / "runs", tmp_path / "docs")
