"""The objects compiled for each instruction set hold nothing that the linker could use on a processor without that set."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys

import pytest
from support.paths import ROOT, TESTS

from metamask_ext import build_info

SETS = ["default", "avx2", "avx512", "avx512_bf16"] if platform.machine() in ("x86_64", "AMD64") else ["default"]


def needs(*programs):
    missing = [program for program in programs if shutil.which(program) is None]
    reason = f"{', '.join(missing)} not installed: Debian's qemu-user and g++-aarch64-linux-gnu, which CI installs"
    return pytest.mark.skipif(bool(missing) and not os.environ.get("CI"), reason=reason)


def objects(isa):
    """The kernel objects of the newest build in this checkout."""
    builds = sorted(ROOT.glob(f"build/*/CMakeFiles/kernels_{isa}.dir"), key=os.path.getmtime)
    assert builds, "build the package in this checkout first: make test does"
    # An incremental build keeps the objects of sources that have moved.
    found = sorted(path for path in builds[-1].rglob("*.o") if (ROOT / path.relative_to(builds[-1]).with_suffix("")).exists())
    assert found
    return found


def symbols(path):
    lines = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.match(r"[0-9a-f ]* (\S) (.*)", line).groups() for line in lines]


@pytest.mark.parametrize("isa", SETS)
def test_an_object_gives_the_linker_only_its_table(isa):
    for path in objects(isa):
        given = [name for kind, name in symbols(path) if (kind.isupper() and kind != "U") or kind in "vw"]
        assert given, path
        # Weak symbols (inline functions, templates) have the same name in every object: the linker keeps one of them for all
        assert all(re.fullmatch(rf"metamask::cpu::k\w+_{isa}", name) for name in given), given


def disassembled(path):
    return subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True).stdout


def registers(path):
    text = disassembled(path)
    return {kind for kind in ("xmm", "ymm", "zmm") if f"%{kind}" in text}


@pytest.mark.skipif(len(SETS) == 1, reason="vector registers have these names on x86-64 only")
def test_each_object_uses_the_registers_of_its_set():
    sets = (("default", "xmm", {"ymm", "zmm"}), ("avx2", "ymm", {"zmm"}), ("avx512", "zmm", set()), ("avx512_bf16", "zmm", set()))
    for isa, widest, absent in sets:
        for path in objects(isa):
            used = registers(path)
            assert widest in used, f"{path} is not vectorised: {used}"
            assert not used & absent, path


@pytest.mark.skipif(len(SETS) == 1, reason="an instruction of x86-64")
def test_only_its_own_set_multiplies_bfloat16():
    for isa in SETS:
        texts = [disassembled(path) for path in objects(isa)]
        assert any("vdpbf16ps" in text for text in texts) == (isa == "avx512_bf16"), isa


@pytest.fixture(scope="module")
def default_path(tmp_path_factory):
    program = tmp_path_factory.mktemp("default") / "default_path"
    sources = [str(ROOT / "tests/ops/default_path.cpp"), *map(str, objects("default"))]
    # static: an emulator needs no libraries of another machine
    subprocess.run(
        [os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-static", f"-I{ROOT}/csrc", *sources, "-o", str(program)], check=True
    )
    return program


def test_the_default_path_computes_right_without_torch(default_path):
    ran = subprocess.run([str(default_path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


@needs("qemu-x86_64")
def test_the_default_path_runs_on_a_processor_without_avx(default_path):
    ran = subprocess.run(["qemu-x86_64", "-cpu", "Nehalem", str(default_path)], capture_output=True, text=True)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"


@needs("qemu-x86_64")
def test_the_emulated_processor_would_catch_avx(tmp_path):
    """The check itself: an AVX-512 object stops there."""
    program = tmp_path / "avx512_path"
    source = (ROOT / "tests/ops/default_path.cpp").read_text().replace("_default", "_avx512")
    (tmp_path / "path.cpp").write_text(source)
    paths = [str(tmp_path / "path.cpp"), *map(str, objects("avx512"))]
    subprocess.run(
        [os.environ.get("CXX", "g++"), "-std=c++20", "-DMETAMASK_X86", "-static", f"-I{ROOT}/csrc", *paths, "-o", str(program)],
        check=True,
    )
    ran = subprocess.run(["qemu-x86_64", "-cpu", "Nehalem", str(program)], capture_output=True, text=True)
    assert ran.returncode != 0


@needs("aarch64-linux-gnu-g++", "qemu-aarch64")
def test_the_default_path_computes_right_on_arm64(tmp_path):
    program = tmp_path / "default_path"
    kernels = sorted(path for path in (ROOT / "csrc/cpu/kernels").glob("*.cpp") if "avx512" not in path.name)
    sources = [str(ROOT / "tests/ops/default_path.cpp"), *map(str, kernels)]
    flags = ["-std=gnu++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-DMETAMASK_ISA=default", "-static", f"-I{ROOT}/csrc"]
    subprocess.run(["aarch64-linux-gnu-g++", *flags, *sources, "-o", str(program)], check=True)
    ran = subprocess.run(["qemu-aarch64", str(program)], capture_output=True, text=True)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"


def test_build_info_says_which_sets_this_machine_has():
    info = build_info()
    assert info["cpu_capabilities"][0] == "default"
    assert info["cpu_capability"] in info["cpu_capabilities"]
    assert set(info["cpu_capabilities"]) <= set(SETS)


CHILD = """
import sys; sys.path.insert(0, sys.argv[1])
import torch
from metamask_ext import build_info
from support import linear_checks, mixed_task, packed_checks, step_checks, weight_checks
from support.samples import ALL, DTYPES, GATES
assert build_info()["cpu_capability"] == sys.argv[2]
torch.set_num_threads(2)
for dtype in DTYPES:
    for sample in ALL:
        for gate in (GATES[1], GATES[3]):
            weight_checks.check(sample, gate, dtype)
    for shape in linear_checks.SHAPES.values():
        linear_checks.check(*shape, GATES[1], dtype)
    for shape in step_checks.SHAPES.values():
        for rule in step_checks.SETTINGS:
            step_checks.check(*shape, GATES[1], dtype, rule)
    for case in ("3-d", "129 rows", "groups over panels"):
        mixed_task.check(case, GATES[1], dtype, True)
        mixed_task.check_double_backward(case, GATES[1], dtype, False)
    for shape in packed_checks.SHAPES.values():
        packed_checks.check(shape, dtype)
print("all equal")
"""


@pytest.mark.parametrize("capability", build_info()["cpu_capabilities"])
def test_every_instruction_set_equals_the_reference(capability):
    """In every run of the suite, on the shapes that tell most; ``make test-instruction-sets`` runs all core tests so."""
    environment = {**os.environ, "METAMASK_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", CHILD, str(TESTS), capability]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.stdout.strip() == "all equal", child.stderr
