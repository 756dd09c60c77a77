"""The command without any optional package: it starts, lists, describes, and says what a run needs."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

from packaging.requirements import Requirement
from support.paths import ROOT

from metamask_ext.experiments.catalogue import EXPERIMENTS
from metamask_ext.experiments.engine.settings import read_toml

PROJECT = read_toml(ROOT / "pyproject.toml")["project"]
EXTRAS = {"experiments", "bench", "test", "ray", "dask", "lightning", "view", "docs", "lint"}
PROGRAM = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refusing())
from metamask_ext.cli.app import app

for arguments in (["--help"], ["list"], ["run", "--help"], ["bank", "--help"], ["info"], ["run", "linear", "--out", "out"]):
    try:
        app(arguments, prog_name="metamask")
    except SystemExit as end:
        print("exit code", end.code)
"""


def _name(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _needed(packages: list[str]) -> set[str]:
    """The packages with all that they need, extras aside."""
    found: set[str] = set()
    todo = [Requirement(package) for package in packages]
    while todo:
        package = todo.pop()
        if _name(package.name) not in found and (package.marker is None or package.marker.evaluate({"extra": ""})):
            found.add(_name(package.name))
            try:
                todo += map(Requirement, requires(package.name) or [])
            except PackageNotFoundError:
                continue
    return found


def test_command_without_extras(tmp_path):
    kept = _needed(PROJECT["dependencies"]) | {"metamask-ext"}
    refused = {module for module, packages in packages_distributions().items() if not kept & {*map(_name, packages)}}
    assert {"matplotlib", "gymnasium", "sklearn", "scipy", "tensorboard", "mlxtend", "pytest"} <= refused
    assert not {"torch", "numpy", "typer", "rich", "safetensors"} & refused
    command = [sys.executable, "-c", PROGRAM.format(refused=refused)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.count("exit code 0") == 5 and done.stdout.rstrip().endswith("exit code 1"), done.stdout + done.stderr
    assert set(EXPERIMENTS) <= set(done.stdout.split())
    assert done.stderr == 'error: matplotlib is not installed: pip install "metamask_ext[experiments]"\n'
    assert not (tmp_path / "out").exists()


def test_extras():
    extras = PROJECT["optional-dependencies"]
    assert not EXTRAS - set(extras)
    # What a message tells people to install is there.
    for path in [*(ROOT / "metamask_ext").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        for named in re.findall(r"metamask_ext\[([a-z]+)\]", path.read_text()):
            assert named in extras, f"{path.name}: {named}"
