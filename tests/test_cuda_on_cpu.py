"""The CUDA kernels' own source, run on the CPU through their launchers and compared with the float64 reference.

The host side of csrc/cuda/device.cuh runs a launch thread after thread. It needs the CUDA toolkit's headers, not a GPU.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch
from samples import ALL, DTYPES, GATE_IDS, GATES, SMALL, assert_close, ids
from toolkit import find_nvcc, toolkit_includes

from metamask_ext import reference

TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
SOURCE = Path(__file__).parent / "cuda_on_cpu" / "launchers.cpp"
nvcc = find_nvcc()

if nvcc is None:
    pytest.skip("no CUDA toolkit: its headers are needed to compile the kernels", allow_module_level=True)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    target = tmp_path_factory.mktemp("cuda_on_cpu") / "launchers.so"
    # a misaligned access stops the process; one past the end of an output shows in its guard
    flags = [
        "-std=c++20",
        "-O1",
        "-Wall",
        "-Wextra",
        "-shared",
        "-fPIC",
        "-fsanitize=alignment",
        "-fsanitize-undefined-trap-on-error",
    ]
    includes = [flag for path in toolkit_includes(nvcc) for flag in ("-isystem", path)]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, *includes, str(SOURCE), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def call(function, gate, types, tensors, count):
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    arguments = [ctypes.c_int64(gate[0]), ctypes.c_double(gate[1]), *(ctypes.c_int(TYPES[dtype]) for dtype in types)]
    function(*arguments, *pointers, ctypes.c_int64(count))


GUARD = 64  # elements after each output that a kernel must not touch


def output(like, dtype):
    buffer = torch.full((like.numel() + GUARD,), 7.0, dtype=dtype)
    return buffer, buffer[: like.numel()]


def unharmed(*buffers):
    return all(bool((buffer[-GUARD:] == 7).all()) for buffer in buffers)


def flat(tensors):
    return [tensor.contiguous().flatten() for tensor in tensors]


PAIRS = [(dtype, dtype) for dtype in DTYPES] + [
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
]
SHAPES = tuple(
    sample for sample in ALL if sample.name in ("1x1", "2x3", "17x3", "empty", "129x1134", "logits-to-100", "logits-to-1e4")
)


@pytest.mark.parametrize("gate", GATES, ids=GATE_IDS)
@pytest.mark.parametrize("types", PAIRS, ids=lambda types: "-".join(str(dtype)[6:] for dtype in types))
@pytest.mark.parametrize("sample", SHAPES, ids=ids(SHAPES))
def test_kernels_equal_the_reference(library, sample, types, gate):
    dtype, other = types
    w, m, g, a, b = flat(sample.tensors(5, dtype))
    g = g.to(other)
    n = w.numel()
    double = [tensor.double() for tensor in (a, b, g, w, m)]

    theta, theta_view = output(w, other)
    call(library.run_forward, gate, types, (w, m, theta), n)
    assert_close(theta_view, reference.masked_weight(*double[3:], *gate), "theta")

    (dw, dw_view), (dm, dm_view) = output(w, dtype), output(w, dtype)
    call(library.run_backward, gate, types, (g, w, m, dw, dm), n)
    for name, got, expected in zip(("dW", "dM"), (dw_view, dm_view), reference.masked_weight_backward(*double[2:], *gate)):
        assert_close(got, expected, name)

    (dg, dg_view), (dw2, dw2_view), (dm2, dm2_view) = output(w, other), output(w, dtype), output(w, dtype)
    call(library.run_double_backward, gate, types, (a, b, g, w, m, dg, dw2, dm2), n)
    expected = reference.masked_weight_double_backward(*double, *gate)
    terms = [
        double[0].abs() + (double[1] * double[3]).abs(),
        0.0,
        ((double[0].abs() + (double[1] * double[3]).abs()) * double[2].abs()),
    ]
    for name, got, one, scale in zip(("dG", "dW", "dM"), (dg_view, dw2_view, dm2_view), expected, terms):
        # The sums' error is relative to their terms, of which s and d are at most 1 and 1 / (4 t)
        assert_close(got, one, name, scale)
    assert unharmed(theta, dw, dm, dg, dw2, dm2)


@pytest.mark.parametrize("momentum", [False, True], ids=["no momentum", "momentum"])
@pytest.mark.parametrize("types", PAIRS, ids=lambda types: "-".join(str(dtype)[6:] for dtype in types))
@pytest.mark.parametrize("sample", SHAPES[:5], ids=ids(SHAPES[:5]))
def test_a_step_of_sgd_inside_the_backward(library, sample, types, momentum):
    """With the settings that launchers.cpp gives."""
    dtype, other = types
    w, m, g, v_w, v_m = flat(sample.tensors(5, dtype))
    g = g.to(other)
    (w_out, w_view), (m_out, m_view) = output(w, dtype), output(m, dtype)
    w_view.copy_(w), m_view.copy_(m)
    velocities = [output(v, dtype) for v in (v_w, v_m)]
    for (_, view), v in zip(velocities, (v_w, v_m)):
        view.copy_(v)
    given = [buffer if momentum else None for buffer, _ in velocities]
    call(library.run_backward_sgd, GATES[1], types, (g, w_out, m_out, *given), w.numel())
    grads = reference.masked_weight_backward(g.double(), w.double(), m.double(), *GATES[1])
    settings = ((0.1, 0.01, 0.9), (0.2, 0.02, 0.8))
    for p, got, grad, v, (_, v_got), its in zip((w, m), (w_view, m_view), grads, (v_w, v_m), velocities, settings):
        lr, weight_decay, factor = its
        velocity = (factor * v.double() if momentum else 0.0) + grad + weight_decay * p.double()
        terms = p.double().abs() + grad.abs() + v.double().abs()
        assert_close(got, p.double() - lr * velocity, "parameter", terms)
        assert_close(v_got, velocity if momentum else v.double(), "momentum", terms)
    assert unharmed(w_out, m_out, *(buffer for buffer, _ in velocities))


@pytest.mark.parametrize("gate", GATES[::2], ids=GATE_IDS[::2])
def test_absent_cotangents_and_unwanted_outputs(library, gate):
    w, m, g, _, b = flat(SMALL[2].tensors(5, torch.float32))
    types = (torch.float32, torch.float32)
    double = [tensor.double() for tensor in (g, w, m)]
    dm, view = output(w, torch.float32)
    call(library.run_backward, gate, types, (g, w, m, None, dm), w.numel())
    assert_close(view, reference.masked_weight_backward(*double, *gate)[1], "dM")
    dw, view = output(w, torch.float32)
    call(library.run_double_backward, gate, types, (None, b, g, w, m, None, dw, None), w.numel())
    assert_close(view, reference.masked_weight_double_backward(None, b.double(), *double, *gate)[1], "dW")
    assert unharmed(dm, dw)


def test_arrays_that_are_not_aligned_for_packs(library):
    buffers = [torch.randn(1 + 1003) for _ in range(2)]
    w, m = (buffer[1:] for buffer in buffers)
    theta, view = output(w, torch.float32)
    call(library.run_forward, GATES[0], (torch.float32, torch.float32), (w, m, theta), w.numel())
    assert_close(view, reference.masked_weight(w.double(), m.double(), *GATES[0]), "theta")
    assert unharmed(theta)
