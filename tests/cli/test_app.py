"""The command ``metamask``: what it prints, and its exit codes."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from metamask_ext import build_info
from metamask_ext.cli import app
from metamask_ext.experiments.catalogue import EXPERIMENTS


def _metamask(*arguments: str):
    return CliRunner().invoke(app.app, list(arguments))


def _assert_one_error(result, code: int, *texts: str) -> None:
    assert result.exit_code == code and isinstance(result.exception, SystemExit), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(text in result.stderr for text in texts), result.stderr


def test_list_is_bare_names():
    result = _metamask("list")
    assert result.exit_code == 0 and result.stdout.splitlines() == list(EXPERIMENTS)
    assert {"linear", "logistic", "mnist", "supsup"} <= set(EXPERIMENTS)


def test_list_is_a_table_on_a_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    result = _metamask("list")
    assert result.exit_code == 0 and all(
        name in result.stdout and entry.summary in result.stdout for name, entry in EXPERIMENTS.items()
    )


def test_info():
    result = _metamask("info")
    assert result.exit_code == 0
    lines = dict((line[:20].strip(), line[20:]) for line in result.stdout.splitlines())
    build = build_info()
    assert lines["metamask_ext"] == build["version"] and lines["backend"] == build["backend"]
    assert lines["torch"] == torch.__version__ and lines["python"] == platform.python_version()
    assert lines["CPU capability"] == str(build["cpu_capability"] or "none") and lines["threads"] == str(torch.get_num_threads())
    assert lines["CUDA archs"] == (build["cuda_archs"] or "none")
    assert (lines["CUDA devices"] == "none") == (torch.cuda.device_count() == 0)


def test_version():
    result = _metamask("--version")
    assert result.exit_code == 0 and result.stdout == f"metamask_ext {build_info()['version']}\n"


def test_completion_of_commands_and_experiments():
    def completed(*words: str) -> list[str]:
        environment = {"_METAMASK_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
        return CliRunner().invoke(app.app, [], prog_name="metamask", env=environment).stdout.split()

    assert completed("metamask", "re") == ["report"]
    assert completed("metamask", "run", "sin") == [name for name in EXPERIMENTS if name.startswith("sin")]
    assert completed("metamask", "run", "al") == ["all"]


def test_unknown_experiment(tmp_path):
    result = _metamask("run", "nope", "--out", str(tmp_path / "out"))
    _assert_one_error(result, 2, "'nope'", ", ".join([*EXPERIMENTS, "all"]))
    assert not (tmp_path / "out").exists()


def test_run_needs_out():
    result = _metamask("run", "linear")
    assert result.exit_code == 2 and "--out" in result.stderr


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        _assert_one_error(_metamask("run", "linear", "--out", str(out), "--quick"), 1, str(out))


def test_run_passes_its_options(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(app, "run_experiment", lambda *arguments, **options: calls.append((*arguments, options)))
    monkeypatch.setattr(app, "run_all", lambda *arguments, **options: calls.append(("all", *arguments, options)))
    how = {"workers": None, "executor": "local", "address": None, "gpus": 0.0, "tracking": None}
    none = {"config": None, **how}
    assert _metamask("run", "mnist", "--out", str(tmp_path), "--seed", "7", "--quick").exit_code == 0
    assert _metamask("run", "linear", "--out", str(tmp_path), "--tracking", "csv", "--workers", "3").exit_code == 0
    ray = ("--executor", "ray", "--address", "a:1", "--gpus", "0.25", "--track", "wandb")
    assert _metamask("run", "linear", "--out", str(tmp_path), *ray).exit_code == 0
    assert _metamask("run", "supsup", "--out", str(tmp_path), "--tasks", "9", "--rotated", "--config", "a.toml").exit_code == 0
    assert _metamask("run", "linear", "--out", str(tmp_path), "--steps", "5", "--seeds", "2").exit_code == 0
    assert _metamask("run", "all", "--out", str(tmp_path), "--quick", "--workers", "2").exit_code == 0
    assert calls == [
        ("mnist", tmp_path, 7, True, none),
        ("linear", tmp_path, 0, False, {**none, "tracking": "csv", "workers": 3}),
        ("linear", tmp_path, 0, False, {**none, "tracking": "wandb", "executor": "ray", "address": "a:1", "gpus": 0.25}),
        ("supsup", tmp_path, 0, False, {**none, "config": Path("a.toml"), "tasks": 9, "rotated": True}),
        ("linear", tmp_path, 0, False, {**none, "steps": 5, "seeds": 2}),
        ("all", tmp_path, 0, True, {**how, "workers": 2}),
    ]


def test_settings_of_another_experiment(tmp_path):
    result = _metamask("run", "mnist", "--out", str(tmp_path / "out"), "--rotated")
    _assert_one_error(result, 2, "experiment 'mnist': unknown setting 'rotated'")
    result = _metamask("run", "supsup", "--out", str(tmp_path / "out"), "--tasks", "37", "--rotated")
    _assert_one_error(result, 2, "tasks must be at least 1 and at most 36 if rotated, got 37")
    assert not (tmp_path / "out").exists()


def test_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = _metamask("run", "linear", "--out", str(tmp_path), "--quick")
    _assert_one_error(result, 1, "matplotlib", 'pip install "metamask_ext[experiments]"')


@pytest.mark.parametrize("code", [0, 3])
def test_bench_hands_over(tmp_path, monkeypatch, code):
    calls = []

    def run(suite: str, out: Path, quick: bool, full: bool) -> int:
        calls.append((suite, out, quick, full))
        return code

    monkeypatch.setattr(app, "import_module", lambda name: SimpleNamespace(run=run) if name == "metamask_ext.bench.run" else None)
    result = _metamask("bench", "--suite", "cpu", "--out", str(tmp_path), "--quick")
    assert result.exit_code == code and calls == [("cpu", tmp_path, True, False)]
    _metamask("bench", "--suite", "grid", "--out", str(tmp_path), "--full")
    assert calls[1:] == [("grid", tmp_path, False, True)]


def test_bench_without_its_packages(monkeypatch):
    def missing(package: str):
        def load(name: str):
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)

        return load

    monkeypatch.setattr(app, "import_module", missing("pytest_benchmark"))
    _assert_one_error(_metamask("bench"), 1, "pytest_benchmark", 'pip install "metamask_ext[bench]"')
    monkeypatch.setattr(app, "import_module", missing("metamask_ext.bench"))
    _assert_one_error(_metamask("bench"), 1, "not in this installation")


def test_module_and_lazy_imports():
    """``python -m metamask_ext`` is the same command; importing it loads nothing heavy besides torch."""
    done = subprocess.run([sys.executable, "-m", "metamask_ext", "list"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == list(EXPERIMENTS), done.stderr
    heavy = ("matplotlib", "mlxtend", "torchvision", "tensorboard")
    program = f"import sys, metamask_ext.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_no_traceback_in_the_real_command(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "metamask_ext", "run", "linear", "--out", str(tmp_path / "file"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: out must be a folder") and "Traceback" not in done.stderr
