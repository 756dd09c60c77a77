"""Every op as a GPU runs it: the same bits each time, on the current stream, without a wait, in a graph, on any device.

On a CPU the same calls run one after another, and in the emulator the warps of a kernel in another order each time.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support.emulator import RANDOM_WARPS
from support.gpu import DEVICES, SECOND, behind_a_sleep, captured, no_waiting
from support.paths import ROOT, TESTS
from support.slots_out_of_range import OPS, call
from support.strides import PUBLIC, RAW, SIZES, Make
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

# The CPU has the only im2col.
EVERYWHERE = [op for op in RAW if op not in ("im2col", "col2im")]
each_device = pytest.mark.parametrize("device", DEVICES)
each_op = pytest.mark.parametrize("op", EVERYWHERE)
each_function = pytest.mark.parametrize("name", PUBLIC)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
each_sizes = pytest.mark.parametrize("sizes", ["ragged", "many"])
REPEATS = {"cuda": 200, "cpu": 5}


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def clone(tree):
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def change(arguments, tasks):
    """Other values in the same memory: other tasks, other bits, other numbers."""
    with torch.no_grad():
        for leaf in tensors(arguments):
            if leaf.dtype == torch.int64:
                leaf.add_(1).remainder_(tasks)
            elif leaf.dtype == torch.uint8:
                leaf.copy_(leaf.flip(0))
            else:
                leaf.mul_(-0.5).add_(0.125)


def same_bits(got, wanted):
    got, wanted = tensors(got), tensors(wanted)
    return len(got) == len(wanted) and all(torch.equal(one, other) for one, other in zip(got, wanted))


def with_gradients(run, arguments):
    """The results, and the gradients of half the sum of their squares, in a function without arguments."""

    def work():
        given = tree_map(
            lambda leaf: leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf,
            arguments,
        )
        outputs = tensors(run(**given))
        if not any(output.requires_grad for output in outputs):
            return outputs
        leaves = [leaf for leaf in tensors(given) if leaf.requires_grad]
        grads = torch.autograd.grad(outputs, leaves, [output.detach() for output in outputs])
        return [output.detach() for output in outputs], grads

    return work


def emulated(op, sizes="ragged", dtype=torch.float32, **_):
    return sizes == "ragged" and dtype == torch.float32


@pytest.mark.every_device(emulated_if=emulated)
@each_device
@each_dtype
@each_sizes
@each_op
def test_repeats_give_the_same_bits(op, sizes, dtype, device, request):
    run, arguments = RAW[op](Make(SIZES[sizes], dtype, device=device))
    in_emulator = request.node.callspec.params["_device"] == "emulated"
    first = clone(run(**arguments))
    different = []
    for repeat in range(2 if in_emulator else REPEATS[device]):
        if in_emulator:
            request.getfixturevalue("emulator").set(RANDOM_WARPS, repeat + 2)
        if not same_bits(run(**arguments), first):
            different.append(repeat)
    assert not different


@pytest.mark.every_device(emulated_if=emulated)
@each_device
@each_dtype
@each_op
def test_a_graph_computes_with_the_values_of_its_replay(op, dtype, device):
    sizes = SIZES["ragged"]
    run, arguments = RAW[op](Make(sizes, dtype, device=device))
    replay, results = captured(lambda: run(**arguments), device)
    for _ in range(3):
        before = clone(results)
        change(arguments, sizes.tasks)
        replay()
        assert same_bits(results, run(**arguments)) and not same_bits(results, before)


@each_device
@each_function
def test_a_graph_of_a_function_and_its_gradients(name, device):
    sizes = SIZES["ragged"]
    run, arguments = PUBLIC[name](Make(sizes, torch.float64, device=device))
    work = with_gradients(run, arguments)
    replay, results = captured(work, device)
    for _ in range(3):
        before = clone(results)
        change(arguments, sizes.tasks)
        replay()
        # Not bit for bit: some of it is torch's own.
        for got, wanted in zip(tensors(results), tensors(work()), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        assert not same_bits(results, before)


@each_device
@each_dtype
@each_op
def test_an_op_runs_on_the_current_stream(op, dtype, device):
    sizes = SIZES["ragged"]
    run, arguments = RAW[op](Make(sizes, dtype, device=device))
    new = clone(arguments)
    change(new, sizes.tasks)
    wanted = run(**new)
    with behind_a_sleep(device):
        for old, value in zip(tensors(arguments), tensors(new)):
            old.copy_(value)
        got = run(**arguments)
    assert same_bits(got, wanted)


@each_device
@each_function
def test_a_function_and_its_gradients_do_not_wait_for_the_device(name, device):
    work = with_gradients(*PUBLIC[name](Make(SIZES["ragged"], torch.float32, device=device)))
    work()
    with no_waiting(device):
        work()


@pytest.mark.parametrize("device", [*DEVICES, SECOND])
@each_op
def test_results_are_on_the_device_of_the_arguments(op, device):
    here, there = (RAW[op](Make(SIZES["ragged"], torch.float64, device=one)) for one in ("cpu", device))
    got = tensors(there[0](**there[1]))
    for one, other in zip(got, tensors(here[0](**here[1])), strict=True):
        assert str(one.device).startswith(device)
        torch.testing.assert_close(one.cpu(), other, rtol=1e-12, atol=1e-12)


@each_device
@pytest.mark.parametrize("slot", [-1, SIZES["whole"].tasks])
@pytest.mark.parametrize("op", OPS)
def test_a_slot_that_is_no_tasks(op, slot, device):
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"slots must be in \[0, {SIZES['whole'].tasks}\), got {slot} at position 2"):
            call(op, slot, device)
        return
    # It ends all use of the device in its process.
    command = [sys.executable, "-m", "support.slots_out_of_range", op, str(slot), device]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    ran = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode != 0 and "device-side assert" in ran.stderr, ran.stderr
