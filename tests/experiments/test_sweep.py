"""Sweeps: every combination of some settings' values, typed, in one table; and ``--set``, one value at a time."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import toy_experiment
from typer.testing import CliRunner

from metamask_ext.cli import app
from metamask_ext.experiments.catalogue import EXPERIMENTS, Entry, JobError, OptionError, run
from metamask_ext.experiments.engine.assignments import assigned, text_of
from metamask_ext.experiments.sweep import planned, sweep


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "toy", Entry("support.toy_experiment", "for tests"))


def _metamask(*arguments: str):
    return CliRunner().invoke(app.app, ["run", "toy", *arguments])


@dataclass(frozen=True)
class Pair:
    x: int
    y: float


@dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    rates: tuple[float, ...] = (1.0, 0.5)
    name: str = "a"


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    on: bool = True
    inner: Inner = Inner()
    pairs: tuple[Pair, ...] = (Pair(1, 2.0),)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("seeds=1,2", [1, 2]),
        ("inner.lr=1e-3, .5,2", [0.001, 0.5, 2.0]),
        ("on=false", [False]),
        ("inner.name=adam,s g d", ["adam", "s g d"]),
        ('inner.name="a,b","c"', ["a,b", "c"]),
        ('inner.name="a\\",b"', ['a",b']),
        ("inner.name=", [""]),
        ("inner.rates=[1,2],[]", [[1.0, 2.0], []]),
        ('pairs=[{"x":1,"y":2},{"x":3,"y":4.5}]', [[{"x": 1, "y": 2.0}, {"x": 3, "y": 4.5}]]),
    ],
)
def test_values_have_the_type_of_their_setting(text, values):
    name = text.partition("=")[0]
    found = assigned("toy", Settings(), [text])
    assert found == {name: values} and [type(value) for value in found[name]] == [type(value) for value in values]
    # As text they are the same values again.
    assert assigned("toy", Settings(), [f"{name}={','.join(map(text_of, values))}"]) == found


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["sedes=1"], "unknown setting 'sedes', did you mean 'seeds'?"),
        (["inner.lrr=1"], "unknown setting 'inner.lrr', did you mean 'inner.lr'?"),
        (["iner.lr=1"], "unknown setting 'iner.lr', did you mean 'inner.lr'?"),
        (["inner=1"], "'inner' is a table, set one of its entries: inner.lr, inner.rates, inner.name"),
        (["seeds.x=1"], "'seeds' must be an integer, got a table"),
        (["seeds=1.5"], "'seeds' must be an integer, got '1.5'"),
        (["seeds=true"], "'seeds' must be an integer, got 'true'"),
        (["on=1"], "'on' must be true or false, got '1'"),
        (["inner.lr=fast"], "'inner.lr' must be a float, got 'fast'"),
        (["inner.lr=0.1,"], "'inner.lr' must be a float, got ''"),
        (["inner.lr=nan"], "'inner.lr' must be finite, got nan"),
        (["inner.rates=1"], "'inner.rates' must be a list, got an integer: 1"),
        (["inner.rates=[1"], r"'inner.rates' must be a list as JSON, such as \[1, 2\], got '\[1'"),
        (["pairs=[{}]"], r"'pairs\[0\]' must have 'x'"),
        (["seeds"], "a setting must be given as name=value, got 'seeds'"),
        (["=1"], "a setting must be given as name=value, got '=1'"),
        (["seeds=1", "seeds=2"], "'seeds' is set twice"),
        (["inner.lr=1,1.0"], "'inner.lr' has the value 1.0 twice"),
    ],
)
def test_refused_assignments(texts, message):
    with pytest.raises(OptionError, match=f"experiment 'toy': {message}"):
        assigned("toy", Settings(), texts)


SETS = ["study.lr=0.01,0.03", "tasks=5,20"]
FOLDERS = ["study.lr=0.01,tasks=5", "study.lr=0.01,tasks=20", "study.lr=0.03,tasks=5", "study.lr=0.03,tasks=20"]


def _table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "sweep.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_sweep(tmp_path, capsys):
    rows = sweep("toy", tmp_path / "all", SETS, workers=1, steps=3)
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted([*FOLDERS, "sweep.csv"])
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line] == [f"{count} of 4 runs: {one}" for count, one in enumerate(FOLDERS, 1)]
    assert rows[0] == ["study.lr", "tasks", "method", "score (%)"] and len(rows) == 9
    found = _table(tmp_path / "all")
    assert [(row["study.lr"], row["tasks"], row["method"]) for row in found] == [tuple(row[:3]) for row in rows[1:]]
    one = run("toy", tmp_path / "one", workers=1, study={"lr": 0.03}, tasks=5, steps=3)
    in_sweep = json.loads((tmp_path / "all" / FOLDERS[2] / "metrics.json").read_text())
    assert all(in_sweep[part] == one[part] for part in ("settings", "results", "baselines", "curves"))
    assert in_sweep["command"] == "metamask run toy --seed 0 --steps 3 --set study.lr=0.03 --tasks 5"
    numbers = one["results"]["masked"]["score (%)"]
    row = found[4]
    assert (row["folder"], row["method"]) == (FOLDERS[2], "masked")
    assert (float(row["score (%)"]), float(row["score (%), interval"])) == (numbers["mean"], numbers["interval"])


def test_sweep_resumes_side_by_side(tmp_path):
    """Killed within one run and before another: the same table; what was there stays as it was."""
    rows = sweep("toy", tmp_path, ["steps=2,3,4"], quick=True, workers=1)
    table = (tmp_path / "sweep.csv").read_bytes()
    (tmp_path / "steps=3" / "metrics.json").unlink()
    (tmp_path / "steps=3" / "seed-0" / "shared.json").unlink()
    for path in sorted((tmp_path / "steps=4").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "sweep.csv").unlink()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("seed-0/*.json")}
    assert len(kept) == 5
    assert sweep("toy", tmp_path, ["steps=2,3,4"], quick=True, workers=2) == rows
    assert (tmp_path / "sweep.csv").read_bytes() == table
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(sweep("toy", tmp_path, ["steps=3,5"], quick=True, workers=1)) == 5  # another value, beside those that exist


def test_run_that_fails_is_named(tmp_path):
    with pytest.raises(
        JobError, match="job 'fault=shared_raises-[0-9a-f]{8}' of seed 1 failed: JobError: job 'shared' of seed 1 failed"
    ):
        sweep("toy", tmp_path, ["fault=nobody:raises,shared:raises"], seed=1, quick=True, workers=1)
    assert {row["fault"] for row in _table(tmp_path)} == {"nobody:raises"}
    assert (tmp_path / _table(tmp_path)[0]["folder"] / "metrics.json").exists()


def test_folders_of_odd_values():
    values = ['fault="/","..","",a b,ä,"x,y"', "study.rates=[1,2]"]
    folders = [one.folder for one in planned("toy", values)]
    assert len({*folders}) == 6 and not [name for name in folders if "/" in name or name.startswith(".") or len(name) > 120]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "study.lrr=1,2", "--multirun"], "unknown setting 'study.lrr', did you mean 'study.lr'?"),
        (["--set", "tasks=5", "--set", "study.lr=0.1,x", "--multirun"], "'study.lr' must be a float, got 'x'"),
        (["--set", "tasks=5,6"], "--set gives 2 combinations of values: --multirun runs them all"),
        (["--set", "tasks=5", "--tasks", "6"], "'tasks' is set twice, by an option of its own and by --set"),
        (["--set", "tasks=5", "--multirun", "--print-config"], "--print-config shows the settings of one run"),
        (["--set", "tasks=5,6", "--multirun", "--executor", "ray"], "address must be given for a sweep on ray"),
        (
            ["--set", "tasks=5,6", "--multirun", "--executor", "rya"],
            "executor must be local, ray, dask or module:factory, got 'rya'",
        ),
        (["--set", "tasks=5,6", "--multirun", "--track", "paper"], "tracking must be one of csv, tensorboard, wandb"),
    ],
)
def test_refused_options(tmp_path, arguments, message):
    result = _metamask("--out", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "out").exists()


def test_all_takes_no_settings(tmp_path):
    for arguments in (["--set", "tasks=5"], ["--multirun"]):
        result = CliRunner().invoke(app.app, ["run", "all", "--out", str(tmp_path / "out"), *arguments])
        assert result.exit_code == 2 and "'all' takes no settings" in result.stderr


def test_command(tmp_path, monkeypatch):
    """One value changes one run; several make a sweep, whose table is shown."""
    monkeypatch.setenv("COLUMNS", "200")
    printed = _metamask("--set", "study.rates=[2]", "--set", "wide=true", "--steps", "3", "--print-config")
    assert printed.exit_code == 0 and "wide = true" in printed.stdout and "steps = 3" in printed.stdout and "2.0," in printed.stdout
    one = _metamask("--out", str(tmp_path / "one"), "--quick", "--workers", "1", "--set", "study.lr=0.5", "--set", "fault=no one:x")
    assert one.exit_code == 0, one.output
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert metrics["settings"]["study"]["lr"] == 0.5
    assert metrics["command"] == "metamask run toy --seed 0 --quick --set study.lr=0.5 --set 'fault=no one:x'"
    some = _metamask("--out", str(tmp_path / "all"), "--quick", "--workers", "1", "--set", "tasks=3,4", "--multirun")
    assert some.exit_code == 0, some.output
    assert "tasks" in some.stdout and "masked" in some.stdout and len(_table(tmp_path / "all")) == 4
    assert toy_experiment.Settings().tasks == 2
