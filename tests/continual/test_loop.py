"""The training loop: what it trains, and that it can be repeated."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
import torch.nn.functional as F
from support.loops import new_data, new_model
from torch import nn

from metamask_ext import add_task
from metamask_ext import tasks as model_tasks
from metamask_ext.continual import CheckpointError, LoopConfig, TaskLoop


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_round_by_hand():
    """One task, plain gradient descent: ``W -= lr * (dL/dW + decay * W)`` and likewise for the mask, twice."""
    x, y = new_data("a")["a"]
    model = new_model()
    options = {"steps": 1, "lr": 0.05, "mask_lr": 0.3, "weight_decay": 0.1, "mask_weight_decay": 0.2, "seed": 4}
    loop = TaskLoop(model, {"a": (x, y)}, F.mse_loss, **options)
    loop._mask_of("a")  # makes the mask, so that its start can be read
    w, b = model.weight.detach().clone(), model.bias.detach().clone()
    m, mb = model.masks["a"].detach().clone(), model.bias_masks["a"].detach().clone()
    for _ in range(2):
        leaves = [tensor.requires_grad_() for tensor in (w, b, m, mb)]
        loss = F.mse_loss(x @ (w * torch.sigmoid(m)).T + b * torch.sigmoid(mb), y)
        grads = torch.autograd.grad(loss, leaves)
        rates, decays = (0.05, 0.05, 0.3, 0.3), (0.1, 0.1, 0.2, 0.2)
        w, b, m, mb = (
            (leaf - rate * (grad + decay * leaf)).detach() for leaf, grad, rate, decay in zip(leaves, grads, rates, decays)
        )
    loop.run(2)
    for got, wanted in zip((model.weight, model.bias, model.masks["a"], model.bias_masks["a"]), (w, b, m, mb)):
        # float32, two steps of numbers near 1: a few units in the last place
        torch.testing.assert_close(got.detach(), wanted, rtol=1e-5, atol=1e-6)


def test_a_config_and_its_fields_by_name():
    """Both forms train the same; a field given by name is put in the place of the config's."""
    config = LoopConfig(steps=2, lr=0.01, seed=4)
    models = [new_model() for _ in range(3)]
    forms = [((config,), {}), ((), {"steps": 2, "lr": 0.01, "seed": 4}), ((LoopConfig(steps=9, lr=0.01),), {"steps": 2, "seed": 4})]
    loops = [
        TaskLoop(model, new_data("ab"), F.mse_loss, *given, **changes).run(3) for model, (given, changes) in zip(models, forms)
    ]
    assert all(loop.config == config for loop in loops)
    first, *others = (parameters(model) for model in models)
    for other in others:
        assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)
    with pytest.raises(FrozenInstanceError):
        config.steps = 3
    with pytest.raises(TypeError, match="unexpected keyword argument 'stepz'"):
        TaskLoop(new_model(), new_data("a"), F.mse_loss, stepz=1)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        LoopConfig(steps=0)


def test_default_gives_way_to_the_first_task():
    model = new_model()
    loop = TaskLoop(model, new_data("abc"), F.mse_loss, steps=1, lr=0.01)
    loop.run(1)
    assert model_tasks(model) == list(loop.steps_of) and "default" not in loop.steps_of
    loop.run(40)
    assert model_tasks(model) == list(loop.steps_of) and set(loop.steps_of) == set("abc")
    assert sum(loop.steps_of.values()) == loop.step == 40


def test_existing_masks_of_named_tasks_are_kept():
    model = new_model()
    add_task(model, "finished")
    before = parameters(model)
    TaskLoop(model, {"default": new_data("a")["a"]}, F.mse_loss, steps=2, lr=0.01, mask_weight_decay=0.5).run(3)
    assert model_tasks(model) == ["default", "finished"]
    after = parameters(model)
    assert torch.equal(before["masks.finished"], after["masks.finished"])
    assert not torch.equal(before["masks.default"], after["masks.default"])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_only_the_drawn_task_moves(optimizer):
    """Neither decay nor momentum moves the masks of another task, and they never have a gradient."""
    model = new_model()
    momentum = 0.9 if optimizer == "sgd" else 0.0
    loop = TaskLoop(
        model, new_data("abcd"), F.mse_loss, steps=2, lr=0.01, mask_weight_decay=0.1, optimizer=optimizer, momentum=momentum
    )
    moved = set()
    for number in range(1, 31):
        before, counts = parameters(model), dict(loop.steps_of)
        loop.run(number)
        (drawn,) = [name for name in loop.steps_of if loop.steps_of[name] != counts.get(name, 0)]
        moved.add(drawn)
        assert set(loop._mask_optimizers) == set(loop.steps_of), "a task that was not drawn has no optimiser state"
        for name, value in parameters(model).items():
            if name in before and name not in ("weight", "bias"):
                assert torch.equal(value, before[name]) != name.endswith(f".{drawn}"), name
        assert not torch.equal(model.weight, before["weight"])
        assert all(parameter.grad is None for parameter in model.parameters())
    assert moved == set("abcd")


def test_tasks_are_drawn_uniformly():
    names = "abcde"
    loop = TaskLoop(new_model(), new_data(names, rows=1), F.mse_loss, steps=1, lr=1e-4, seed=1).run(1000)
    # Binomial(1000, 1/5): standard deviation 12.6; five of them
    assert all(abs(loop.steps_of[name] - 200) < 64 for name in names), loop.steps_of


def test_seed_decides_and_the_global_generator_does_not():
    def train(seed: int, global_seed: int) -> dict[str, torch.Tensor]:
        model = new_model()
        torch.manual_seed(global_seed)
        TaskLoop(model, new_data("abc"), F.mse_loss, steps=2, lr=0.01, batch_size=4, seed=seed).run(10)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(global_seed))), "given back"
        return parameters(model)

    first, again, other = train(0, 1), train(0, 2), train(1, 1)
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["weight"], other["weight"])


def test_one_network_for_all_tasks():
    """The baseline: no masks, or one task's masks for everything; both see the draws of the masked loop."""
    plain, single, masked = nn.Linear(3, 1), new_model(), new_model()
    loops = [
        TaskLoop(plain, new_data("abc"), F.mse_loss, steps=1, lr=0.01, per_task_masks=False),
        TaskLoop(single, new_data("abc"), F.mse_loss, steps=1, lr=0.01, per_task_masks=False),
        TaskLoop(masked, new_data("abc"), F.mse_loss, steps=1, lr=0.01),
    ]
    before = parameters(single)
    for loop in loops:
        loop.run(12)
    assert loops[0].steps_of == loops[1].steps_of == loops[2].steps_of
    assert model_tasks(single) == ["default"]
    assert all(not torch.equal(value, before[name]) for name, value in parameters(single).items())
    with loops[0].using("a"):
        assert plain(torch.ones(3)).shape == (1,)


def test_data_from_a_function():
    seen = []

    def draw(generator):
        x = torch.randn(4, 3, generator=generator)
        seen.append(x)
        return x, x.sum(1, keepdim=True)

    TaskLoop(new_model(), {"sum": draw}, F.mse_loss, steps=3, lr=0.01, seed=8).run(2)
    assert len(seen) == 6 and not torch.equal(seen[0], seen[1])


def test_tasks_in_order(tmp_path):
    seen = []
    data = {name: lambda generator, name=name: seen.append(name) or (torch.ones(1, 3), torch.ones(1, 1)) for name in "abc"}
    loop = TaskLoop(new_model(), data, F.mse_loss, steps=2, lr=0.01, order=["c", "a", "c"], out=tmp_path).run(2)
    assert seen == ["c", "c", "a", "a"] and loop.steps_of == {"c": 2, "a": 2}
    with pytest.raises(ValueError, match="rounds must be at most the 3 of order, got 4"):
        loop.run(4)
    with pytest.raises(CheckpointError, match="order was"):
        TaskLoop(new_model(), data, F.mse_loss, steps=2, lr=0.01, order=["c", "a", "b"], out=tmp_path).run(3)


def test_using_refuses_a_task_that_was_not_seen():
    loop = TaskLoop(new_model(), new_data("ab"), F.mse_loss, steps=1, lr=0.01, seed=0).run(1)
    (unseen,) = set("ab") - set(loop.steps_of)
    with pytest.raises(ValueError, match=f"got '{unseen}'"), loop.using(unseen):
        pass
    with pytest.raises(ValueError, match="one of the loop's.*got 'z'"):
        loop.using("z")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": ["a", "z"]}, "order must name tasks of the loop, 'a', got 'z'"),
        ({"optimizer": "lion"}, "optimizer must be 'sgd' or 'adam', got 'lion'"),
        ({"optimizer": "adam", "momentum": 0.9}, "momentum must be 0 with optimizer='adam', got 0.9"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"tensorboard": True}, "tensorboard=True needs out"),
        ({"tasks": {}}, "tasks must name at least one task"),
        ({"tasks": {"a": (torch.ones(2, 3), torch.ones(3, 1))}}, r"tasks\['a'\] must have as many x as y"),
        ({"tasks": {"a": lambda generator: None}, "batch_size": 2}, "batch_size must be None for task 'a'"),
        ({"model": nn.Linear(3, 1)}, "has no masked layer"),
    ],
)
def test_wrong_arguments(options, message):
    arguments = {"model": new_model(), "tasks": new_data("a"), "loss": F.mse_loss, **options}
    with pytest.raises(ValueError, match=message):
        TaskLoop(**arguments)


def test_wrong_types():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        TaskLoop("model", new_data("a"), F.mse_loss)
    with pytest.raises(TypeError, match="batch_size must be an integer, got 2.5"):
        TaskLoop(new_model(), new_data("a"), F.mse_loss, batch_size=2.5)
    with pytest.raises(TypeError, match="evaluate must return numbers, got 'score': Tensor"):
        TaskLoop(new_model(), new_data("a"), F.mse_loss, evaluate=lambda loop: {"score": torch.ones(())}).run(1)
    with pytest.raises(TypeError, match=r"tasks\['a'\] must be a pair of tensors or a function of a generator, got list"):
        TaskLoop(new_model(), {"a": [1, 2]}, F.mse_loss)


def test_per_task_masks_off_refuses_several_tasks():
    model = new_model()
    add_task(model, "second")
    with pytest.raises(ValueError, match="takes a model with one task at most, got one with 2"):
        TaskLoop(model, new_data("a"), F.mse_loss, per_task_masks=False)


def test_divergence_is_an_error():
    with pytest.raises(FloatingPointError, match=r"task 'a', is (inf|nan).*lr=1e\+20"):
        TaskLoop(new_model(), new_data("a"), F.mse_loss, steps=5, lr=1e20).run(20)
