"""torch.compile and selections: a compiled model of one task obeys the mixture, batch or block around it, as in eager mode."""

from __future__ import annotations

import contextvars
import threading

import pytest
import torch
from torch import nn

from metamask_ext import MaskBank, add_task, convert, remove_task, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d
from metamask_ext.nn.selection import Superposition

pytestmark = pytest.mark.once
BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])

MODELS = {
    "linear": (lambda: nn.Sequential(MaskedLinear(4, 6), nn.Tanh(), MaskedLinear(6, 3)), (4,)),
    "hard": (lambda: nn.Sequential(MaskedLinear(4, 3, gate="hard")), (4,)),
    "convolution": (
        lambda: nn.Sequential(MaskedConv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), MaskedLinear(48, 2)),
        (2, 4, 4),
    ),
    "batch norm": (lambda: nn.Sequential(MaskedConv2d(2, 3, 3), TaskBatchNorm2d(3), nn.ReLU()).eval(), (2, 4, 4)),
    "weights are read": (lambda: convert(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), mask_init="normal"), (3, 4)),
}
EACH_MODEL = pytest.mark.parametrize("name", MODELS)


def make(name, samples=5):
    build, shape = MODELS[name]
    torch.manual_seed(0)
    return build().double(), torch.randn(samples, *shape).double()


def compiled(model, backend):
    torch.compiler.reset()
    return torch.compile(model, backend=backend)


@EACH_MODEL
@BACKENDS
def test_a_superposition_is_obeyed_before_and_after_a_plain_call(name, backend):
    model, x = make(name)
    run = compiled(model, backend)
    plain = model(x).detach()
    with using_task(model, Superposition({"default": 0.25})):
        wanted = model(x).detach()
        torch.testing.assert_close(run(x), wanted)
    assert not torch.allclose(plain, wanted)
    torch.testing.assert_close(run(x), plain)
    with using_task(model, Superposition({"default": 0.25})):
        torch.testing.assert_close(run(x), wanted)


@BACKENDS
def test_the_coefficient_of_a_superposition_gets_its_gradient(backend):
    model, x = make("linear")
    run = compiled(model, backend)
    run(x)
    grads = []
    for call in (model, run):
        alpha = torch.tensor(0.5, dtype=torch.double, requires_grad=True)
        with using_task(model, Superposition({"default": alpha})):
            call(x).sum().backward()
        grads.append(alpha.grad)
    torch.testing.assert_close(*grads)
    assert grads[0] != 0


@pytest.mark.parametrize("name", [name for name in MODELS if name != "weights are read"])
@BACKENDS
def test_a_task_for_each_sample_is_obeyed_and_its_number_of_samples_checked(name, backend):
    model, x = make(name)
    run = compiled(model, backend)
    plain = run(x)
    with using_task(model, ["default"] * 5):
        torch.testing.assert_close(run(x), plain)
    with using_task(model, ["default"] * 3), pytest.raises(RuntimeError, match="called with 5 samples"):
        run(x)


def test_a_block_of_another_thread_changes_nothing_here():
    model, x = make("linear")
    run = compiled(model, "eager")
    wanted = run(x)
    opened, done = threading.Event(), threading.Event()

    def other():
        with using_task(model, Superposition({"default": 0.0})):
            opened.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert opened.wait(60)
    torch.testing.assert_close(run(x), wanted)
    done.set()
    thread.join()
    torch.testing.assert_close(run(x), wanted)


def test_a_context_that_outlives_its_block_is_obeyed():
    """As a coroutine does that was started inside the block."""
    model, x = make("linear")
    run = compiled(model, "eager")
    plain = run(x)
    with using_task(model, Superposition({"default": 0.5})):
        wanted = model(x)
        inside = contextvars.copy_context()
    torch.testing.assert_close(inside.run(run, x), wanted)
    torch.testing.assert_close(run(x), plain)


def test_a_task_that_another_thread_removes_is_refused_by_the_compiled_model_too():
    model, x = make("linear")
    add_task(model, "b")
    run = compiled(model, "eager")
    with using_task(model, "b"):
        run(x)
        thread = threading.Thread(target=remove_task, args=(model, "b"))
        thread.start()
        thread.join()
        for call in (model, run):
            with pytest.raises(RuntimeError, match="the active task was removed"):
                call(x)


def test_tasks_that_are_added_one_by_one_compile_the_model_twice_not_a_task():
    model, x = make("linear")
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    run = torch.compile(model, backend=count)
    run(x)
    with_one = len(graphs)
    number = torch._dynamo.config.recompile_limit + 4
    for index in range(number):
        add_task(model, f"task{index}")
        with using_task(model, f"task{index}"):
            torch.testing.assert_close(run(x), model(x))
    # Once for one task, once for several: a graph a masked layer at most, and one for what lies between.
    assert len(graphs) <= with_one + 2 * len(model) < with_one + number


def test_the_last_of_several_tasks_is_one_graph_again():
    model, x = make("linear")
    add_task(model, "b")
    remove_task(model, "default")
    torch.compiler.reset()
    run = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(x), model(x))


@BACKENDS
def test_inferring_a_task_with_a_compiled_model(backend):
    model, x = make("linear")
    run = compiled(model, backend)
    run(x)
    bank = MaskBank(model)
    bank.add_task("b")
    wanted = bank.infer_task(x)
    model.compile(backend=backend)
    assert bank.infer_task(x) == wanted
