"""Every block of docs/guide/sweeps.md: the Python runs here, the commands are read here, and run by ``make test-executors``."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import shlex
from pathlib import Path

import pytest
from support.pages import blocks_of, commands_of, run_blocks
from typer.testing import CliRunner

from metamask_ext.cli import app
from metamask_ext.experiments.catalogue import settings_of
from metamask_ext.experiments.engine.clusters import workers_of
from metamask_ext.experiments.engine.tracking import Tracking
from metamask_ext.experiments.sweep import planned

PAGE = "docs/guide/sweeps.md"
COMMANDS = commands_of(PAGE)
CLUSTERS = ("ray", "dask")
# Less of everything: the page's own commands take seconds each.
LESS = 'tasks=3 steps=2000 new_tasks=2 study.cost_rounds=1 study.new.steps=2 "study.new.samples=[1,10]"'


def _less(command: str) -> list[str]:
    words = shlex.split(command)
    given = {word.partition("=")[0] for word in words}
    return [
        *words[1:],
        *(part for change in shlex.split(LESS) if change.partition("=")[0] not in given for part in ("--set", change)),
    ]


def _run(command: str) -> str:
    done = CliRunner().invoke(app.app, _less(command))
    assert done.exit_code == 0, command + done.output
    return done.stdout


def _of_cluster(command: str) -> str | None:
    return next((name for name in CLUSTERS if f"--executor {name}" in command), None)


def test_commands_are_understood(monkeypatch):
    """Options and settings, of all of them; nothing is computed."""
    called: list[tuple[str, str]] = []

    def instead(
        name,
        out,
        *arguments,
        sets=(),
        config=None,
        workers=None,
        executor="local",
        address=None,
        gpus=0.0,
        tracking=None,
        **changes,
    ):
        called.append((executor, str(out)))
        workers_of("local" if executor in CLUSTERS else executor, workers), Tracking(Path(out), tracking)
        settings_of(name, True, config, changes)

    def swept(name, out, sets, *arguments, **options):
        assert [one.values for one in planned(name, sets, True)] == [
            {"study.batch": batch, "tasks": tasks} for batch in (16, 64) for tasks in (5, 20)
        ]
        called.append(("local", str(out)))
        return [["study.batch"]]

    monkeypatch.setattr(app, "run_experiment", instead)
    monkeypatch.setattr(app, "sweep", swept)
    for command in COMMANDS:
        done = CliRunner().invoke(app.app, shlex.split(command)[1:])
        assert done.exit_code == 0, command + done.output
    assert len(COMMANDS) == 8 and len(called) == 7 and {executor for executor, _ in called} >= {"local", "ray", "dask"}


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="make test-executors runs them")
def test_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    local = [command for command in COMMANDS if _of_cluster(command) is None]
    assert len(local) == 6 and len(COMMANDS) == 8
    shown = [_run(command) for command in local]
    results = [json.loads(Path("out", name, "metrics.json").read_text())["results"] for name in ("one", "two", "threads")]
    assert results[0] == results[1] == results[2]
    assert "batch = 16" in shown[3] and "study.batch" in shown[4]
    with open("out/sweep/sweep.csv", newline="") as file:
        assert {(row["study.batch"], row["tasks"]) for row in csv.DictReader(file)} == set(
            itertools.product(("16", "64"), ("5", "20"))
        )
    assert Path("out/tracked/seed-0/masked.csv").read_text().startswith("step,name,value")


@pytest.mark.parametrize("name", CLUSTERS)
def test_commands_of_clusters(tmp_path, monkeypatch, name):
    if importlib.util.find_spec(name) is None:
        pytest.skip("make test-executors installs it")
    monkeypatch.chdir(tmp_path)
    (command,) = [command for command in COMMANDS if _of_cluster(command) == name]
    words = shlex.split(command)
    place = words.index("--address")  # a machine of its own
    _run(shlex.join([*words[:place], *words[place + 2 :], "--workers", "2"]))
    assert json.loads(Path("out", name, "metrics.json").read_text())["executor"] == name


def test_python():
    blocks = blocks_of(PAGE, "python")
    assert len(blocks) == 2
    left = run_blocks(PAGE, blocks)
    assert (left["out"] / "sweep" / "sweep.csv").exists() and len(left["rows"]) == 14
