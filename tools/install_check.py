"""Installs this checkout as users do, from its source distribution in a fresh environment: run by `make install-check`.

The front ends are pip, with and without build isolation, and uv. A missing torch and a wrong backend are refused, and nothing
brings another torch. The sources are compiled once: each later build finds the objects of the first.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tarfile
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

TYPED = """\
import torch
from metamask_ext import MaskBank, masked_linear, nn

model = nn.MaskedLinear(5, 3)
reveal_type(model.mask_logits)
reveal_type(MaskBank(model).tasks)
masked_linear("no tensor", model.weight, model.mask_logits)
"""
TYPES = {5: 'Revealed type is "torch._tensor.Tensor"', 6: 'Revealed type is "list[str]"', 7: 'incompatible type "str"'}
"""Give mypy's findings by line of :data:`TYPED`."""


class Environment:
    def __init__(self, folder: Path):
        venv.create(folder, with_pip=True)
        self.python = folder / "bin" / "python"

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        given = {**os.environ, **environment}
        return subprocess.run([str(self.python), *arguments], env=given, cwd=self.python.parent, capture_output=True, text=True)

    def pip(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "pip", "install", "-q", *arguments, **environment)

    def uv(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "uv", *arguments, VIRTUAL_ENV=str(self.python.parent.parent), **environment)

    def works(self, backend: str) -> None:
        ran = self.run("-c", SMOKE)
        expect(ran.returncode == 0, f"the installed package does not work:\n{ran.stderr}")
        torch_version, got = ran.stdout.split()
        expect(torch_version.split("+")[0] in TORCH, f"torch is now {torch_version}, it was installed as {TORCH}")
        expect(got == backend, f"backend is {got}, expected {backend}")

    def sees_types(self, folder: Path) -> None:
        script = folder / "typed.py"
        script.write_text(TYPED)
        ran = self.run("-m", "mypy", "--cache-dir", str(folder / "mypy"), str(script))
        for line, text in TYPES.items():
            found = any(f"typed.py:{line}:" in said and text in said for said in ran.stdout.splitlines())
            expect(found, f"mypy does not say {text} of line {line} of a user's script:\n{ran.stdout}{ran.stderr}")


def expect(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(f"install-check: {message}")


def expect_success(ran: subprocess.CompletedProcess[str]) -> None:
    expect(ran.returncode == 0, f"{' '.join(map(str, ran.args))} failed:\n{ran.stdout}\n{ran.stderr}")


def processor_seconds() -> float:
    """Returns the processor time of all the processes that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def unpacked_sdist(environment: Environment, folder: Path) -> Path:
    """Makes the source distribution of a clean copy, without torch, and checks that it is complete."""
    clean = folder / "clean"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clean)], check=True)
    expect_success(environment.pip("build"))
    expect_success(environment.run("-m", "build", "--sdist", "--outdir", str(folder / "sdist"), str(clean)))
    (archive,) = (folder / "sdist").iterdir()
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz")
    wanted = ["csrc", "metamask_ext", "bench/*.py", "CMakeLists.txt", "pyproject.toml", "setup.py", "README.md"]
    tracked = subprocess.run(["git", "ls-files", *wanted], cwd=clean, capture_output=True, text=True, check=True).stdout.split()
    missing = [name for name in tracked if not (source / name).is_file()]
    expect(not missing, f"the source distribution lacks {', '.join(missing)}")
    print(f"source distribution: complete, {archive.stat().st_size / 1e3:.0f} kB")
    return source


def refuses(environment: Environment, source: Path) -> None:
    """Checks what is said without torch, then installs it and checks the refused backends."""
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


def installs(environment: Environment, source: Path, folder: Path) -> None:
    """Installs with each front end and backend, and runs a layer after each."""
    # Of the processors: what else runs on the machine makes the build wait, and costs it little of that.
    before = processor_seconds()
    expect_success(environment.pip(str(source), METAMASK_BACKEND="cpu"))
    seconds = processor_seconds() - before
    environment.works("cpu")
    print(f"with build isolation: works, {seconds:.0f} s of processor time")
    expect(seconds < 480, f"the build took {seconds:.0f} s of processor time, more than 4 minutes on two processors")

    expect_success(environment.pip("mypy"))
    environment.sees_types(folder)
    print("types: mypy sees them")

    again = ("--force-reinstall", "--no-deps", str(source))
    expect_success(environment.pip(*again, METAMASK_BACKEND="reference"))
    environment.works("reference")
    print("reference backend: works")

    expect_success(environment.pip("setuptools>=77", "cmake", "ninja", "uv"))
    expect_success(environment.pip("--no-build-isolation", *again, METAMASK_BACKEND="cpu"))
    environment.works("cpu")
    print("without build isolation: works")

    expect_success(environment.run("-m", "pip", "uninstall", "-q", "-y", "metamask-ext"))
    expect_success(environment.uv("pip", "install", "--no-build-isolation", str(source), METAMASK_BACKEND="cpu"))
    environment.works("cpu")
    print("uv without build isolation: works")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = Environment(folder / "venv")
        source = unpacked_sdist(environment, folder)
        refuses(environment, source)
        installs(environment, source, folder)


if __name__ == "__main__":
    main()
