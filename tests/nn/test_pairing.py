"""Parameters of two models paired by their order: the same tasks, or an error before anything wrong is mixed."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from metamask_ext import MaskBank, add_task, remove_task, using_task
from metamask_ext.nn import MaskedLinear

REFUSED = pytest.raises(RuntimeError, match="two models with different tasks are paired by their order")


def net(bias=False):
    """Without biases, every other tensor of a layer has the shape of its neighbour: a wrong pair fits."""
    torch.manual_seed(0)
    return nn.Sequential(MaskedLinear(4, 4, bias=bias), nn.Tanh(), nn.Sequential(MaskedLinear(4, 4, bias=bias)), nn.Linear(4, 4))


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_untouched(model, before):
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class Subclass(AveragedModel):
    """As torchvision's references have one."""


AVERAGES = {
    "swa": lambda model: AveragedModel(model),
    "ema": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "ema, one by one": lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(0.9)),
    "with buffers": lambda model: AveragedModel(model, use_buffers=True),
    "a subclass": lambda model: Subclass(model),
    "of a wrapper": lambda model: AveragedModel(nn.Sequential(model)),
}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("updates", [0, 1])
@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)
def test_an_averaged_model_made_before_add_task(make, updates, bias):
    model = net(bias)
    averaged = make(model)
    for _ in range(updates):
        averaged.update_parameters(model)
    before = values(averaged)
    add_task(model, "b")
    with REFUSED:
        averaged.update_parameters(model)
    assert_untouched(averaged, before)
    # As the message says
    add_task(averaged, "b")
    averaged.update_parameters(model)
    if not updates:
        assert all(torch.equal(a, b) for a, b in zip(averaged.parameters(), model.parameters()))


@pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)
def test_an_averaged_model_with_the_same_tasks(make):
    model = net()
    add_task(model, "b")
    averaged = make(model)
    for step in range(1, 4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(step)
        averaged.update_parameters(model)
    if averaged.avg_fn is None and averaged.multi_avg_fn is None:
        for p, mean in zip(model.parameters(), averaged.parameters()):
            torch.testing.assert_close(mean, p - 8 / 3)  # of 1, 3 and 6


CHANGES = {
    "added": lambda model: add_task(model, "b"),
    "removed": lambda model: remove_task(model, "second"),
    "renamed": lambda model: (remove_task(model, "second"), add_task(model, "b")),
    "packed": lambda model: MaskBank(model).pack("second"),
}


@pytest.mark.parametrize("swapped", [False, True], ids=["target first", "target second"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_target_network_updated_by_hand(change, swapped):
    model = net()
    add_task(model, "second")
    target = copy.deepcopy(model)
    before = values(target)
    change(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    first, second = (model, target) if swapped else (target, model)
    with REFUSED, torch.no_grad():
        for a, b in zip(first.parameters(), second.parameters()):
            source, to = (a, b) if swapped else (b, a)
            to.lerp_(source, 0.5)
    # What was paired was paired rightly
    moved = [name for name, p in target.named_parameters() if not torch.equal(p, before[name])]
    assert moved == ["0.weight"]
    torch.testing.assert_close(target[0].weight, before["0.weight"] + 0.5)


@pytest.mark.parametrize(
    "pair",
    [
        lambda a, b: list(zip(a.parameters(), b.parameters())),
        lambda a, b: dict(zip(a.parameters(), b.parameters(), strict=True)),
        lambda a, b: list(zip(a.named_parameters(), b.named_parameters())),
        lambda a, b: list(zip(a.parameters(), b.parameters(), a.named_parameters())),
        lambda a, b: [torch.equal(p, q) for p, q in map(lambda p, q: (p, q), a.parameters(), b.parameters())],
    ],
)
def test_every_way_to_zip(pair):
    model, other = net(), net()
    pair(model, other)
    add_task(other, "b")
    for models in ((model, other), (other, model)):
        with REFUSED:
            pair(*models)
    add_task(model, "b")
    pair(model, other)


@pytest.mark.parametrize(
    "read",
    [
        lambda a, b: [len(dict(b.named_parameters())) for _ in a.named_parameters()],
        lambda a, b: [next(b.parameters()) for _ in a.parameters()],
        lambda a, b: [sum(p.numel() for p in b.parameters()) for _ in a.parameters() for _ in a.parameters()],
        lambda a, b: list(zip(a.modules(), b.modules(), strict=True)),
        lambda a, b: list(zip(a.named_modules(), b.named_modules(), strict=True)),
        lambda a, b: (list(a.parameters()), list(b.parameters())),
        lambda a, b: [a.get_parameter(n) for n, _ in b.named_parameters() if n in dict(a.named_parameters())],
    ],
)
def test_what_does_not_pair_by_order_is_free(read):
    model, other = net(), net()
    add_task(other, "b")
    read(model, other)
    read(other, model)
    suspended = [iter(model.parameters()) for _ in range(3)]
    for count, iterator in enumerate(suspended):
        for _ in range(count + 1):
            next(iterator)
    read(model, other)
    read(other, model)
    assert [len(list(iterator)) for iterator in suspended] == [5, 4, 3]


def test_two_threads_walk_two_models():
    models = [net(), net()]
    add_task(models[1], "b")
    turn = threading.Barrier(2, timeout=10)
    counts = []

    def walk(model):
        iterator = model.parameters()
        for _ in range(6):
            turn.wait()
            next(iterator)
        counts.append(1 + 5)

    threads = [threading.Thread(target=walk, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [6, 6]


def test_an_optimiser_built_before_add_task_loads_no_state_of_another_order():
    """torch refuses another number of parameters; FusedMaskedSGD compares names."""
    model = net()
    before = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(2, 4)).sum().backward()
    before.step()
    add_task(model, "b")
    after = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with pytest.raises(ValueError, match="doesn't match the size"):
        after.load_state_dict(before.state_dict())
    # The optimiser of before goes on with what it has
    with using_task(model, "default"):
        model(torch.randn(2, 4)).sum().backward()
    before.step()
    assert len(before.state) == len(list(model.parameters())) - 2


@pytest.mark.once
def test_a_compiled_walk():
    model = net()

    @torch.compile(backend="eager")
    def norm(x):
        return sum(p.square().sum() for p in model.parameters()) + model(x).sum()

    x = torch.randn(2, 4)
    torch.testing.assert_close(norm(x), sum(p.square().sum() for p in model.parameters()) + model(x).sum())
