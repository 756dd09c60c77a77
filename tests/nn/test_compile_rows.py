"""metamask_ext.compile: a mixed-task batch of any number of tasks is one graph, with heads and norms of tasks in it."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import assert_same_gradients, gradients
from torch import nn

import metamask_ext as mm
from metamask_ext import MaskBank, add_task, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d
from metamask_ext.nn.per_task import keep_per_task

pytestmark = pytest.mark.once
TASKS = list("abcdefghi")


class Graphs(list):
    """A backend that keeps the graphs."""

    def __call__(self, graph, _):
        self.append(graph)
        return graph.forward


def own(module, *names):
    keep_per_task(module, list(names))
    return module


def linear():
    return nn.Sequential(MaskedLinear(4, 6), nn.Tanh(), MaskedLinear(6, 3, bias=False))


def heads():
    return nn.Sequential(
        MaskedLinear(4, 6),
        own(nn.LayerNorm(6), "weight"),
        own(nn.LayerNorm((6,)), "weight", "bias"),
        own(nn.Linear(6, 5), "bias"),
        own(nn.Linear(5, 4), "weight"),
        own(nn.Linear(4, 3), "weight", "bias"),
    )


def rows_of_samples():
    return nn.Sequential(MaskedLinear(4, 6), own(nn.LayerNorm((2, 6)), "weight", "bias"), own(nn.Linear(6, 3), "weight", "bias"))


def norms():
    return nn.Sequential(
        MaskedConv2d(2, 3, 3, padding=1),
        TaskBatchNorm2d(3),
        TaskBatchNorm2d(3, per_task_affine=False),
        own(nn.BatchNorm2d(3), "weight", "bias"),
        nn.Flatten(),
        own(nn.BatchNorm1d(48), "running_mean", "running_var"),
        MaskedLinear(48, 4),
    ).eval()


MODELS = {"linear": (linear, (4,)), "heads": (heads, (4,)), "rows": (rows_of_samples, (2, 4)), "norms": (norms, (2, 4, 4))}


def made(name):
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    for task in TASKS:
        add_task(model, task)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model, torch.randn(12, *shape).double()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_tasks_is_one_graph(name, backend):
    model, x = made(name)
    graphs = Graphs()
    plain = copy.deepcopy(model)
    mm.compile(model, backend=graphs if backend == "eager" else backend, fullgraph=True)
    for number in (2, 3, 5, 9, 4):
        tasks = (TASKS[::-1][:number] * 6)[:12]
        results = []
        for each in (plain, model):
            with using_task(each, tasks):
                y = each(x)
            y.square().sum().backward()
            results.append((y.detach(), gradients(each)))
        torch.testing.assert_close(results[1][0], results[0][0])
        assert_same_gradients(results[1][1], results[0][1])
    assert len(graphs) == (backend == "eager")


def test_packed_tasks_and_large_weights():
    model, x = made("linear")
    bank = MaskBank(model)
    for task in TASKS:
        bank.pack(task)
    graphs = Graphs()
    plain = copy.deepcopy(model)
    mm.compile(model, backend=graphs, fullgraph=True)
    for number in (2, 5, 9):
        tasks = (TASKS[:number] * 6)[:12]
        with using_task(plain, tasks), using_task(model, tasks):
            torch.testing.assert_close(model(x), plain(x))
    assert len(graphs) == 1
    large = nn.Sequential(MaskedLinear(300, 300))
    for task in TASKS:
        add_task(large, task)
    graphs.clear()
    mm.compile(large, backend=graphs, fullgraph=True)
    plain = copy.deepcopy(large)
    x = torch.randn(12, 300)
    for number in (2, 5, 7, 9):  # filled up to 2, 8, 8 and 16
        tasks = (TASKS[:number] * 6)[:12]
        with torch.no_grad(), using_task(plain, tasks), using_task(large, tasks):
            assert torch.equal(large(x), plain(x))
    assert len(graphs) == 3


@pytest.mark.parametrize("name", ["heads", "norms"])
def test_errors_are_those_of_eager_mode(name):
    model, x = made(name)
    plain = copy.deepcopy(model)
    mm.compile(model, backend="eager", fullgraph=True)
    messages = []
    for each in (plain, model):
        with using_task(each, ["a", "b"] * 3), pytest.raises(RuntimeError) as error:
            each(x)
        messages.append(str(error.value).splitlines()[0])
    assert messages[0] == messages[1]


def test_norms_that_train_are_not_in_one_graph():
    torch.manual_seed(0)
    plain = nn.Sequential(MaskedConv2d(2, 3, 3, padding=1), TaskBatchNorm2d(3), nn.Flatten(), MaskedLinear(48, 4)).double()
    for task in "ab":
        add_task(plain, task)
    model = mm.compile(copy.deepcopy(plain), backend="eager", fullgraph=True)
    x, results = torch.randn(12, 2, 4, 4).double(), []
    for each in (plain, model):
        with using_task(each, ["a", "b"] * 6):
            results.append(each(x).detach())
    torch.testing.assert_close(*results)
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))
