"""tools/cuda_report.py: what it reads in the words of ptxas and of nvdisasm, and what it calls a fault."""

from __future__ import annotations

import cuda_report
import pytest
import sass
from support.paths import ROOT

NAME = "_ZN8metamask4cuda29masked_linear_backward_kernelE"
PTXAS = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{NAME}' for 'sm_90'
ptxas info    : Function properties for {NAME}
    128 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 167 registers, used 1 barriers, 128 bytes cumulative stack size, 2049 bytes smem
"""
# A gate, a loop around it, and a shorter loop without one
SASS = f"""\
	.section	.text.{NAME},"ax",@progbits
.text.{NAME}:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDG.E.U16.CONSTANT R8, desc[UR4][R2.64+0x10] ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/                   LDG.E R9, desc[UR4][R2.64+0x20] ;
        /*0050*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0060*/                   STG.E desc[UR4][R2.64+0x10], R8 ;
        /*0070*/               @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*0080*/                   STG.E.U16 desc[UR4][R2.64], R8 ;
        /*0090*/              @!P1 BRA `(.L_x_3) ;
        /*00a0*/               @P0 BRA `(.L_x_4) ;
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4);
"""
ALIGNED = "masked_linear_backward_kernel<0, true, float, float, PlainBackward<float, 8"


def instance():
    (usage,) = cuda_report.parse(PTXAS)
    (kernel,) = sass.parse(SASS)
    assert usage.kernel == kernel.name == NAME
    return cuda_report.instance(usage, ALIGNED, kernel)


def test_what_ptxas_says():
    assert cuda_report.parse(PTXAS) == [cuda_report.Usage(NAME, registers=167, shared=2049, stack=128, spilled=20)]


def test_loops_and_accesses_of_the_machine_code():
    (kernel,) = sass.parse(SASS)
    assert [len(loop) for loop in kernel.loops()] == [2, 7]
    loop = kernel.main_loop()
    assert [one.address for one in loop] == list(range(0x10, 0x80, 0x10))
    assert sass.weights_of(loop) == 32
    assert (sass.loaded_ahead(loop), sass.bytes_of(loop, "LDG"), sass.bytes_of(loop, "STG")) == (18, 22, 20)


def test_an_instance_and_its_faults():
    one = instance()
    assert one[2:] == (1, 1, 7 * 512 // 32, 18 * 256)
    assert [fault.split(",")[0] for fault in cuda_report.faults(one)] == [
        "a stack frame of 128 bytes",
        "1 loads through the cache for constants",
        "1 stores of less than 8 bytes in the main loop",
    ]


def test_a_limit():
    name, most = next(iter(cuda_report.LIMITS.items()))
    good = instance()._replace(name=name, usage=instance().usage._replace(stack=0), narrow_stores=0, instructions=most)
    assert cuda_report.faults(good) == []
    assert cuda_report.faults(good._replace(instructions=most + 1)) == [
        f"{most + 1} instructions for 512 weights, at most {most} are wanted"
    ]
    assert cuda_report.faults(good._replace(instructions=0)), "its main loop was not found"


@pytest.mark.parametrize(("registers", "threads"), [(64, 1024), (80, 768), (128, 512), (129, 256), (255, 256)])
def test_threads_of_a_multiprocessor(registers, threads):
    assert cuda_report.threads_of_multiprocessor(registers) == threads


def test_names_are_as_they_are_shown():
    name = "masked_linear_kernel<(metamask::GateKind)0, true, float, float, metamask::cuda::PlainForward<float, 8> >"
    assert cuda_report.short(f"void metamask::cuda::{name}(float, float const*)") in cuda_report.LIMITS


def test_the_kernels_that_it_knows_are_there():
    source = "".join(path.read_text() for path in (ROOT / "csrc/cuda/kernels").glob("*.cuh"))
    for name in (*cuda_report.IN_PLACE, *map(cuda_report.base, cuda_report.LIMITS)):
        assert f"{name}(" in source
