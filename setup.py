"""Build of the extension module: finds the torch that is installed, then drives CMake and Ninja.

The compiled module works with the torch it was compiled against and no other, so the build never brings one of its own. Under
pip's build isolation the interpreter is still that of the environment installed into: a child process without pip's search path
sees its torch.

METAMASK_BACKEND=cpu|cuda|reference   what to build; by default cuda where torch and a toolkit have it, else cpu
TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"    CUDA architectures; no GPU is needed to build
METAMASK_SANITIZE=1                   with checks of memory and of undefined behaviour; see tools/sanitize.py, which runs it
MAX_JOBS=2                            how many compilers run at a time
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "metamask_ext"
MINIMUM_TORCH = (2, 11)
DEFAULT_CUDA_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

PROBE = """
import json, os, torch
home = os.path.dirname(torch.__file__)
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda,
    "includes": [os.path.join(home, "include"), os.path.join(home, "include/torch/csrc/api/include")],
    "libraries": [os.path.join(home, "lib")],
    "cxx11_abi": int(torch._C._GLIBCXX_USE_CXX11_ABI),
}))
"""


def fail(message):
    sys.exit(f"\nmetamask_ext: {message}\n")


def find_torch():
    """Returns the installed torch's version, CUDA version, folders and ABI."""
    # Build isolation acts through these variables; without them the child sees the environment that is installed into.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    probe = subprocess.run([sys.executable, "-c", PROBE], env=environment, cwd=os.sep, capture_output=True, text=True)
    if probe.returncode != 0:
        if "No module named 'torch'" not in probe.stderr:
            fail(f"torch is installed for {sys.executable} but cannot be imported:\n{probe.stderr}")
        fail(
            f"no torch is installed for {sys.executable}, and the extension is compiled against the one you use. Install torch "
            "2.11 or newer first (https://pytorch.org/get-started), then metamask_ext again. If torch is installed and this came "
            "from a front end other than pip, which builds in an environment of its own, add --no-build-isolation to its command, "
            "as in 'uv pip install --no-build-isolation .'"
        )
    found = json.loads(probe.stdout.splitlines()[-1])
    if tuple(int(part) for part in re.findall(r"\d+", found["version"])[:2]) < MINIMUM_TORCH:
        fail(f"torch 2.11 or newer is needed, {found['version']} is installed for {sys.executable}: upgrade it first")
    return found


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_build_tool(name):
    """Finds a tool of the environment beside its interpreter, whose folder PATH may lack, or else on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        fail(f"{name} was not found: 'pip install {name}', or install without --no-build-isolation")
    return found


def choose_backend(torch):
    """Returns the backend that METAMASK_BACKEND asks for, or else the best one that can be built."""
    asked = os.environ.get("METAMASK_BACKEND", "")
    if asked not in ("", "cpu", "cuda", "reference"):
        fail(f"METAMASK_BACKEND must be cpu, cuda or reference, got {asked!r}")
    if asked in ("cpu", "reference"):
        return asked
    missing = []
    if torch["cuda"] is None:
        missing.append(f"the installed torch, {torch['version']}, has no CUDA")
    if find_nvcc() is None:
        missing.append("no CUDA toolkit was found: set CUDA_HOME, or put nvcc on PATH")
    if missing and asked == "cuda":
        fail("METAMASK_BACKEND=cuda cannot be built: " + "; ".join(missing))
    return "cpu" if missing else "cuda"


def cuda_architectures(nvcc):
    """Returns CMake's names of the architectures in TORCH_CUDA_ARCH_LIST, or of the default ones that the toolkit knows."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    wanted = [arch for arch in listed.split(";") if arch]
    if not wanted:
        wanted = [arch for arch in DEFAULT_CUDA_ARCHS if f"compute_{arch.replace('.', '')}" in known.split()]
        wanted[-1] += "+PTX"
    names = []
    for arch in wanted:
        match = re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", arch)
        if match is None or f"compute_{match[1]}{match[2]}" not in known.split():
            fail(f"TORCH_CUDA_ARCH_LIST has {arch!r}; this toolkit knows {' '.join(known.split())}, written as in '8.0;9.0+PTX'")
        number = match[1] + match[2] + match[3]
        names.append(f"{number}-real")
        if match[4]:
            names.append(f"{number}-virtual")
    return names


class BuildPython(build_py):
    """Adds ``_build.py``, which says what was built: without it the package refuses to be imported."""

    def run(self):
        if BACKEND is None:
            fail(f"{' '.join(sys.argv)} looks for no torch, and cannot build: 'pip install .' does")
        super().run()
        target = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
        target.mkdir(parents=True, exist_ok=True)
        (target / "_build.py").write_text(
            '"""Written by setup.py."""\n\n'
            f"BACKEND = {BACKEND!r}\nTORCH = {TORCH['version']!r}\nVERSION = {self.distribution.get_version()!r}\n"
        )

    def get_outputs(self, include_bytecode=1):
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / PACKAGE / "_build.py")]


class BuildExtension(build_ext):
    """Builds the one extension module with CMake and Ninja."""

    def build_extension(self, extension):
        cmake, ninja = find_build_tool("cmake"), find_build_tool("ninja")
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # A place that stays, so that a second build compiles only what changed.
        sanitize = os.environ.get("METAMASK_SANITIZE") == "1"
        kind = f"{BACKEND}-sanitize" if sanitize else BACKEND
        build = ROOT / "build" / f"{kind}-torch-{TORCH['version']}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        definitions = {
            "CMAKE_MAKE_PROGRAM": ninja,
            "METAMASK_BACKEND": BACKEND,
            "TORCH_INCLUDE_DIRS": ";".join(TORCH["includes"]),
            "TORCH_LIBRARY_DIRS": ";".join(TORCH["libraries"]),
            "TORCH_CXX11_ABI": TORCH["cxx11_abi"],
            "PYTHON_INCLUDE_DIR": sysconfig.get_path("include"),
            "PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output.parent,
            "METAMASK_SANITIZE": "ON" if sanitize else "OFF",
        }
        if BACKEND == "cuda":
            nvcc = find_nvcc()
            definitions["CMAKE_CUDA_COMPILER"] = nvcc
            definitions["METAMASK_CUDA_ARCHITECTURES"] = ";".join(cuda_architectures(nvcc))
        # Under build isolation another run may have left a cache that names a CMake or Ninja which is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        arguments = [f"-D{key}={value}" for key, value in definitions.items()]
        subprocess.run([cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *arguments], check=True)
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([cmake, "--build", str(build), *(["-j", jobs] if jobs else [])], check=True)


if platform.system() not in ("Linux", "Darwin"):
    fail(f"only Linux and macOS are supported, this is {platform.system()}")

if set(sys.argv[1:]) & {"sdist", "egg_info", "clean", "--help", "--version"}:
    # A source distribution is made without torch.
    TORCH = BACKEND = None
else:
    # Already for the metadata: pip would otherwise fetch the newest torch as a dependency before the build could stop it.
    TORCH = find_torch()
    BACKEND = choose_backend(TORCH)

setup(
    packages=[*find_packages(include=[PACKAGE, f"{PACKAGE}.*"], exclude=[f"{PACKAGE}.bench"]), f"{PACKAGE}.bench"],
    package_dir={f"{PACKAGE}.bench": "bench"},
    package_data={PACKAGE: ["py.typed", "products.json"], f"{PACKAGE}.bank": ["page.html"]},
    ext_modules=[Extension(f"{PACKAGE}._C", [])] if BACKEND in ("cpu", "cuda") else [],
    cmdclass={"build_py": BuildPython, "build_ext": BuildExtension},
)
