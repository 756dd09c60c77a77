"""torch.compile over masked modules: one graph with one task, the right task with several."""

from __future__ import annotations

import pytest
import torch
from support.gpu import DEVICES
from support.models import assert_same_gradients, gradients, mlp, randomize_masks
from torch import nn
from torch.utils.checkpoint import checkpoint

from metamask_ext import add_task, convert, remove_task, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLinear

BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager"])


def _single():
    return nn.Sequential(
        MaskedConv2d(2, 3, 3, padding=1, padding_mode="reflect"),
        nn.Tanh(),
        MaskedConv2d(3, 2, 3, padding="same", gate="hard"),
        nn.Flatten(),
        MaskedLinear(50, 4, temperature=0.5),
    ).double()


def _loss_and_gradients(model, call, x, task=None):
    if task is None:
        loss = call(x).square().sum()
    else:
        with using_task(model, task):
            loss = call(x).square().sum()
    loss.backward()
    return loss.detach(), gradients(model)


def _assert_same(model, compiled, x, task=None):
    got, got_gradients = _loss_and_gradients(model, compiled, x, task)
    wanted, wanted_gradients = _loss_and_gradients(model, model, x, task)
    torch.testing.assert_close(got, wanted)
    assert_same_gradients(got_gradients, wanted_gradients)


@BACKENDS
def test_a_model_with_one_task_compiles_to_one_graph_with_eagers_gradients(backend):
    model = _single()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    _assert_same(model, compiled, torch.randn(2, 2, 5, 5).double())


@BACKENDS
def test_a_converted_model_whose_weights_are_read_compiles_to_one_graph(backend):
    model = randomize_masks(convert(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))).double()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    _assert_same(model, compiled, torch.randn(2, 4, 8).double())


@pytest.mark.parametrize("device", DEVICES)
def test_inductor_gives_eagers_output_and_gradients(device):
    model = nn.Sequential(MaskedLinear(4, 6), nn.Tanh(), MaskedLinear(6, 2)).double().to(device)
    compiled = torch.compile(model, fullgraph=True)
    _assert_same(model, compiled, torch.randn(3, 4).double().to(device))


@BACKENDS
@pytest.mark.parametrize("device", DEVICES)
def test_with_several_tasks_each_call_gives_its_own_tasks_output_and_gradients(backend, device):
    model = mlp().to(device)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(3, 4).double().to(device)
    for task in "abbab":
        _assert_same(model, compiled, x, task)
    with pytest.raises(RuntimeError, match="none is active"):
        compiled(x)


def test_more_tasks_than_the_recompile_limit_stay_right_and_do_not_recompile():
    model = mlp()
    names = [f"task{i}" for i in range(torch._dynamo.config.recompile_limit + 2)]
    for name in names:
        add_task(model, name)
    frames = []

    def count(graph, _):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count)
    x = torch.randn(3, 4).double()
    with using_task(model, names[0]):
        compiled(x)
    before = len(frames)
    for name in names:
        with using_task(model, name):
            torch.testing.assert_close(compiled(x), model(x))
    assert len(frames) == before  # the masks are inputs of the graphs


@BACKENDS
def test_a_block_inside_the_compiled_function_is_obeyed(backend):
    model = mlp()
    x = torch.randn(3, 4).double()

    def run(x, task):
        with using_task(model, task):
            return model(x)

    compiled = torch.compile(run, backend=backend)
    for task in "abab":
        torch.testing.assert_close(compiled(x, task), run(x, task))
    with using_task(model, "a"):
        torch.testing.assert_close(compiled(x, "b"), run(x, "b"))
        torch.testing.assert_close(compiled(x, "a"), model(x))


def test_adding_and_removing_tasks_is_seen_by_a_compiled_model():
    model = nn.Sequential(MaskedLinear(4, 3)).double()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 4).double()
    torch.testing.assert_close(compiled(x), model(x))
    add_task(model, "b")
    with pytest.raises(RuntimeError, match="none is active"):
        compiled(x)
    for task in ("b", "default"):
        with using_task(model, task):
            torch.testing.assert_close(compiled(x), model(x))
    remove_task(model, "default")
    torch.testing.assert_close(compiled(x), model(x))  # now that of b


def test_a_changed_temperature_is_seen_by_a_compiled_model():
    model = nn.Sequential(MaskedLinear(4, 3)).double()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 4).double()
    for temperature in (1.0, 0.5, 0.25):
        model[0].temperature = temperature
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("compile_inside", [True, False], ids=["compiled-inside-checkpoint", "checkpoint-inside-compiled"])
@BACKENDS
def test_a_compiled_checkpoint_never_gives_another_tasks_gradient(backend, compile_inside):
    model = mlp()
    x = torch.randn(3, 4).double().requires_grad_()
    if compile_inside:
        compiled = torch.compile(model, backend=backend)

        def run(given):
            return checkpoint(compiled, given, use_reentrant=False)

    else:

        @torch.compile(backend=backend)
        def run(given):
            return checkpoint(model, given, use_reentrant=False)

    for task in "aba":
        with using_task(model, task):
            loss = run(x).square().sum()
        with using_task(model, "b" if task == "a" else "a"):
            loss.backward()
        got = gradients(model)
        _, wanted = _loss_and_gradients(model, model, x, task)
        assert_same_gradients(got, wanted)


def test_the_compile_method_of_a_module_works_in_place():
    model = mlp()
    x = torch.randn(3, 4).double()
    with using_task(model, "a"):
        wanted = model(x)
    model.compile(backend="eager")
    with using_task(model, "a"):
        torch.testing.assert_close(model(x), wanted)
