"""metamask_ext.compile: one graph for all tasks; in threads, coroutines and mixed-task batches what eager mode gives."""

from __future__ import annotations

import asyncio
import copy
import threading

import pytest
import torch
from support.compiled import metamask_nodes
from support.models import assert_same_gradients, gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

import metamask_ext as mm
from metamask_ext import MaskBank, add_task, convert, remove_task, using_task
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d
from metamask_ext.nn.per_task import keep_per_task
from metamask_ext.nn.selection import Superposition

pytestmark = pytest.mark.once


class Graphs(list):
    """A backend that keeps the graphs."""

    def __call__(self, graph, _):
        self.append(graph)
        return graph.forward


def layers():
    return nn.Sequential(MaskedLinear(4, 6), nn.Tanh(), MaskedLinear(6, 3, gate="hard"))


def images():
    return nn.Sequential(
        MaskedConv2d(2, 3, 3, padding=1), TaskBatchNorm2d(3), nn.ReLU(), nn.Flatten(), MaskedLinear(48, 4), nn.Linear(4, 2)
    )


def converted():
    return convert(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), mask_init="normal")


def with_head():
    model = images()
    keep_per_task(model[5], ["weight", "bias"])
    return model


MODELS = {"layers": (layers, (4,)), "images": (images, (2, 4, 4)), "converted": (converted, (3, 4)), "head": (with_head, (2, 4, 4))}


def made(name="layers", tasks=("a", "b", "c"), samples=5):
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    for task in tasks:
        add_task(model, task)
    return model, torch.randn(samples, *shape).double()


def compiled(model, **options):
    """The same model beside one that is compiled."""
    plain = copy.deepcopy(model)
    return plain, mm.compile(model, **{"backend": "eager", "fullgraph": True} | options)


def assert_same(plain, model, x, task):
    results = []
    for each in (plain, model):
        with using_task(each, task):
            loss = each(x).square().sum()
        loss.backward()
        results.append((loss.detach(), gradients(each)))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_same_gradients(results[1][1], results[0][1])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", MODELS)
def test_every_task_is_the_same_graph(name, backend):
    model, x = made(name)
    graphs = Graphs()
    plain, model = compiled(model, backend=graphs if backend == "eager" else backend)
    for task in ("a", "b", "default", "a", "c"):
        assert_same(plain, model, x, task)
    for (key, one), other in zip(plain.state_dict().items(), model.state_dict().values()):
        torch.testing.assert_close(one, other, msg=key)  # batch norms have counted in the same tasks
    assert len(graphs) == (backend == "eager")


def test_inductor():
    plain, model = compiled(made()[0], backend="inductor")
    for task in "ab":
        assert_same(plain, model, torch.ones(5, 4).double(), task)


def test_twelve_tasks_are_added_without_a_graph():
    model, x = made("images", tasks=())
    graphs = Graphs()
    mm.compile(model, backend=graphs, fullgraph=True)
    wanted = model(x)
    for number in range(12):
        add_task(model, f"task{number}")
        with using_task(model, f"task{number}"):
            assert not torch.equal(model(x), wanted)
    remove_task(model, "default")
    with using_task(model, "task3"):
        model(x)
    assert len(graphs) == 1


def test_mixed_task_batches_are_arguments_too():
    model, x = made(samples=6)
    graphs = Graphs()
    plain, model = compiled(model, backend=graphs)
    for tasks in (list("abcabc"), list("aacccb"), list("bbbacc"), ["default", *"abcab"]):
        assert_same(plain, model, x, tasks)
    assert len(graphs) == 1
    assert list(metamask_nodes(*graphs)) == ["compiled_task_linear"] * 2
    for tasks in (["a"] * 6, ["b"] * 6):
        assert_same(plain, model, x, tasks)
    assert len(graphs) == 2


def test_a_batch_along_the_second_dimension():
    model, x = made()
    plain, model = compiled(model)
    x = x[:, None].expand(5, 4, 4)
    with using_task(plain, list("abca"), batch_dim=1), using_task(model, list("abca"), batch_dim=1):
        torch.testing.assert_close(model(x), plain(x))


def test_bits():
    model, x = made()
    bank = MaskBank(model)
    for task in "ab":
        bank.pack(task)
    graphs = Graphs()
    plain, model = compiled(model, backend=graphs)
    for tasks, count in (("a", 1), ("b", 1), (list("abaab"), 2), (list("bbaab"), 2), ("c", 3)):
        assert_same(plain, model, x, tasks)
        assert len(graphs) == count
    assert_same(plain, model, x, list("abcab"))  # bits and logits: not in one graph


@pytest.mark.parametrize("name", ["images", "head"])
def test_mixed_task_batches_where_they_are_not_one_graph(name):
    plain, model = compiled(made(name)[0].eval())
    for tasks in (list("abcab"), list("ccccc")):
        with torch.no_grad(), using_task(plain, tasks), using_task(model, tasks):
            torch.testing.assert_close(model(made(name)[1]), plain(made(name)[1]))


def test_a_superposition_and_what_a_meta_learner_adapts():
    model, x = made()
    plain, model = compiled(model)
    for mixture in ({"a": 0.3, "b": 0.7}, {"c": 0.5}):
        with using_task(plain, Superposition(mixture)), using_task(model, Superposition(mixture)):
            torch.testing.assert_close(model(x), plain(x))
    support = torch.randn(2, 5, 4).double(), torch.randn(2, 5, 3).double()
    predictions = []
    for each in (plain, model):
        maml = MAML(each, 0.1, start="a")
        predictions.append(maml.predict(maml.adapt(nn.functional.mse_loss, support), support[0]))
    torch.testing.assert_close(*predictions)


def errors_of(model, x):
    """Calls that are refused, by name."""
    yield "no task", lambda: model(x)
    for tasks in (["a"] * 3, ["a", "b", "c"]):
        with using_task(model, tasks):
            yield f"{tasks}", lambda: model(x)
    with using_task(model, "a"):
        yield "features", lambda: model(x[:, :3])
        yield "dtype", lambda: model(x.float())
        yield "no tensor", lambda: model([1.0])
        yield "arguments", lambda: model(x, 1)


@pytest.mark.parametrize("full", [True, False])
def test_errors_are_those_of_eager_mode(full):
    model, x = made()
    plain, model = compiled(model, fullgraph=full)
    with using_task(model, "a"):
        model(x)
    for (name, call), (_, wanted_of) in zip(errors_of(model, x), errors_of(plain, x)):
        with pytest.raises(Exception) as wanted:
            wanted_of()
        with pytest.raises(type(wanted.value)) as got:
            call()
        assert str(got.value).splitlines()[0] == str(wanted.value).splitlines()[0], name


def test_threads_under_different_tasks():
    model, x = made(samples=6)
    plain, model = compiled(model, backend="aot_eager")
    tasks = ["a", "b", "c", list("abcabc"), list("ccbbaa"), "default"]
    wanted, got, start = {}, {}, threading.Barrier(len(tasks))
    for index, task in enumerate(tasks):
        with using_task(plain, task):
            wanted[index] = plain(x).detach()

    def run(index, task):
        start.wait(60)
        with using_task(model, task):
            got[index] = [model(x).detach() for _ in range(5)]

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, values in wanted.items():
        for value in got[index]:
            torch.testing.assert_close(value, values)


def test_coroutines_under_different_tasks():
    plain, model = compiled(made()[0])
    x = made()[1]

    async def run(task):
        with using_task(model, task):
            first = model(x)
            await asyncio.sleep(0)
            return torch.stack([first, model(x)])

    async def all_of_them():
        return await asyncio.gather(*map(run, "abcab"))

    for task, values in zip("abcab", asyncio.run(all_of_them())):
        with using_task(plain, task):
            torch.testing.assert_close(values, torch.stack([plain(x)] * 2))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_it(reentrant):
    model, x = made()
    plain, model = compiled(model, backend="aot_eager")
    x.requires_grad_()
    with using_task(model, "a"):
        loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
    if reentrant:
        with pytest.raises(RuntimeError, match="none is active"):
            loss.backward()
        return
    with using_task(model, "b"):
        loss.backward()
    got = gradients(model)
    with using_task(plain, "a"):
        plain(x).square().sum().backward()
    assert_same_gradients(got, gradients(plain))


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = MaskedLinear(4, 4), MaskedLinear(4, 3)

    def forward(self, x):
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y)


def test_a_graph_break_in_the_model():
    torch.manual_seed(0)
    model = Broken().double()
    graphs = Graphs()
    plain, model = compiled(model, backend=graphs, fullgraph=False)
    for task in ("default", "a", "b", "c", "d"):
        if task != "default":
            add_task(model, task, init="copy:default")
            add_task(plain, task, init="copy:default")
        assert_same(plain, model, torch.ones(2, 4).double(), task)
    tasks = ["a", "b"]
    assert_same(plain, model, torch.ones(2, 4).double(), tasks)
    assert len(graphs) <= 4


def test_layers_that_are_not_called_need_no_task():
    model, x = made()
    model.spare = MaskedLinear(2, 2).double()
    for task in "abc":
        add_task(model.spare, task)
    parts = model[:3]
    both = nn.ModuleDict({"used": parts, "spare": model.spare})
    both.forward = lambda x: both["used"](x)
    mm.compile(both, backend="eager", fullgraph=True)
    with using_task(parts, "a"):
        torch.testing.assert_close(both(x), parts(x))


def test_it_is_in_place_with_the_options_of_torch_and_copies_are_not_compiled():
    model, x = made(tasks=())
    graphs = Graphs()
    assert mm.compile(model, backend=graphs, dynamic=True) is model
    copied = copy.deepcopy(model)
    copied(x)
    assert not graphs
    model(x), model(x[:3])
    assert len(graphs) == 1
    with pytest.raises(ValueError, match="has no masked layer"):
        mm.compile(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        mm.compile(lambda x: x)


def test_temperatures():
    model, x = made()
    graphs = Graphs()
    plain, model = compiled(model, backend=graphs)
    for step in range(10):
        for each in (plain, model):
            each[0].temperature = 1 / (1 + step)
        assert_same(plain, model, x, "a")
    assert len(graphs) <= 2
