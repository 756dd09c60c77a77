"""What a user's pip does with this checkout, in environments of its own: run by `make install-check`.

With build isolation and without; without torch; the reference backend; a wrong backend. Nothing may bring another torch.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = os.environ.get("TORCH", "torch==2.13.0")

SMOKE = """
import metamask_ext, torch
info = metamask_ext.build_info()
layer = metamask_ext.nn.MaskedLinear(5, 3)
loss = layer(torch.randn(2, 5)).square().sum()
loss.backward()
assert layer.masks["default"].grad.abs().sum() > 0
import metamask_ext.bench, metamask_ext.experiments, metamask_ext.continual
print(torch.__version__, info["backend"])
"""


class Environment:
    def __init__(self, folder: Path):
        venv.create(folder, with_pip=True)
        self.python = folder / "bin" / "python"

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        given = {**os.environ, **environment}
        return subprocess.run([str(self.python), *arguments], env=given, cwd=self.python.parent, capture_output=True, text=True)

    def pip(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "pip", "install", "-q", *arguments, **environment)

    def works(self, backend: str) -> None:
        ran = self.run("-c", SMOKE)
        expect(ran.returncode == 0, f"the installed package does not work:\n{ran.stderr}")
        torch_version, got = ran.stdout.split()
        expect(torch_version.split("+")[0] in TORCH, f"torch is now {torch_version}, it was installed as {TORCH}")
        expect(got == backend, f"backend is {got}, expected {backend}")


def expect(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(f"install-check: {message}")


def expect_success(ran: subprocess.CompletedProcess[str]) -> None:
    expect(ran.returncode == 0, f"{' '.join(map(str, ran.args))} failed:\n{ran.stdout}\n{ran.stderr}")


def processor_seconds() -> float:
    """Of all the processes that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # A clean copy: no build folder of an earlier run helps
        source = Path(folder) / "source"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)

        environment = Environment(Path(folder) / "venv")
        ran = environment.pip(str(source))
        said = ran.stdout + ran.stderr
        expect(
            ran.returncode != 0 and "no torch is installed" in said and "2.11 or newer first" in said,
            f"without torch: {said}",
        )
        print("without torch: says what to install")

        expect_success(environment.pip(TORCH))
        ran = environment.pip(str(source), METAMASK_BACKEND="gpu")
        expect(
            "METAMASK_BACKEND must be cpu, cuda or reference, got 'gpu'" in ran.stdout + ran.stderr,
            "a wrong backend was not refused",
        )
        ran = environment.pip(str(source), METAMASK_BACKEND="cuda")
        expect("METAMASK_BACKEND=cuda cannot be built" in ran.stdout + ran.stderr, "cuda was not refused for a CPU torch")

        # Of the processors: what else runs on the machine makes the build wait, and costs it little of that.
        before = processor_seconds()
        expect_success(environment.pip(str(source), METAMASK_BACKEND="cpu"))
        seconds = processor_seconds() - before
        environment.works("cpu")
        print(f"with build isolation: works, {seconds:.0f} s of processor time")
        expect(seconds < 480, f"the build took {seconds:.0f} s of processor time, more than 4 minutes on two processors")

        expect_success(environment.pip("--force-reinstall", "--no-deps", str(source), METAMASK_BACKEND="reference"))
        environment.works("reference")
        print("reference backend: works")

        expect_success(environment.pip("setuptools>=77", "cmake", "ninja"))
        path = f"{environment.python.parent}{os.pathsep}{os.environ['PATH']}"
        ran = environment.pip(
            "--force-reinstall", "--no-deps", "--no-build-isolation", str(source), METAMASK_BACKEND="cpu", PATH=path
        )
        expect_success(ran)
        environment.works("cpu")
        print("without build isolation: works")


if __name__ == "__main__":
    main()
