"""tasks, add_task and remove_task over a whole model."""

from __future__ import annotations

import pkgutil
import threading
from types import ModuleType

import pytest
import torch
from support.models import gradients, mlp, two_task_model
from torch import nn

import metamask_ext
from metamask_ext import add_task, remove_task, tasks, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLinear


def _snapshot(model):
    """Every parameter's name, identity, address and values."""
    return {name: (id(parameter), parameter.data_ptr(), parameter.detach().clone()) for name, parameter in model.named_parameters()}


def _unchanged(model, before):
    after = _snapshot(model)
    return after.keys() == before.keys() and all(
        after[name][:2] == before[name][:2] and torch.equal(after[name][2], before[name][2]) for name in before
    )


class _FailsAfter:
    """A mask_init that fails at the n-th tensor it is given."""

    def __init__(self, good):
        self.good = good

    def __call__(self, logits):
        self.good -= 1
        if self.good < 0:
            raise MemoryError("no room")


def test_no_module_has_the_name_of_a_public_function():
    # Imported first by a user, the module would take the function's place.
    modules = {module.name for module in pkgutil.iter_modules(metamask_ext.__path__)}
    functions = {name for name in metamask_ext.__all__ if not isinstance(getattr(metamask_ext, name), ModuleType)}
    assert {"nn", "ops", "data"} <= modules and not functions & modules


def test_a_new_layer_has_the_task_default_and_it_is_active():
    layer = MaskedLinear(3, 2)
    assert tasks(layer) == ["default"]
    assert layer.mask_logits is layer.masks["default"]
    assert layer.bias_mask_logits is layer.bias_masks["default"]


def test_the_only_task_is_active_whatever_its_name():
    layer = two_task_model(MaskedLinear(3, 2))
    remove_task(layer, "a")
    assert layer[0].mask_logits is layer[0].masks["b"]
    assert layer(torch.zeros(1, 3)).shape == (1, 2)


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda layer: layer(torch.zeros(1, 3)), id="call"),
        pytest.param(lambda layer: layer.mask_logits, id="mask_logits"),
        pytest.param(lambda layer: layer.bias_mask_logits, id="bias_mask_logits"),
    ],
)
def test_with_several_tasks_and_none_active_reading_raises_and_names_them(read):
    layer = MaskedLinear(3, 2)
    add_task(layer, "b")
    with pytest.raises(RuntimeError, match=r"2 tasks, 'default', 'b', and none is active"):
        read(layer)


def test_tasks_are_listed_oldest_first_through_nested_modules():
    model = nn.ModuleDict({"body": nn.Sequential(MaskedConv2d(1, 2, 3), nn.ReLU()), "head": MaskedLinear(2, 2, bias=False)})
    for name in ("z", "a", "m"):
        add_task(model, name)
    remove_task(model, "default")
    add_task(model, "default")
    assert tasks(model) == ["z", "a", "m", "default"]
    assert tasks(model["body"]) == tasks(model["head"]) == tasks(model)


def test_adding_moves_no_existing_parameter_and_keeps_gradients():
    model = mlp()
    with using_task(model, "a"):
        model(torch.randn(2, 4).double()).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    before = _snapshot(model)
    add_task(model, "c")
    after = _snapshot(model)
    for name in before:
        assert after[name][:2] == before[name][:2]
        assert torch.equal(after[name][2], before[name][2])
        assert dict(model.named_parameters())[name].grad is grads[name]
    assert {name.rpartition(".")[2] for name in after.keys() - before.keys()} == {"c"}


def test_removing_leaves_the_other_parameters_where_they_are():
    model = mlp()
    before = _snapshot(model)
    remove_task(model, "a")
    after = _snapshot(model)
    assert after.keys() == {name for name in before if not name.endswith("masks.a")}
    assert all(after[name][:2] == before[name][:2] for name in after)


def test_inits_worked_out_by_hand():
    layer = two_task_model(MaskedLinear(2, 1, mask_init=7.0))
    with torch.no_grad():
        layer[0].masks["a"].copy_(torch.tensor([[1.0, -2.0]]))
        layer[0].masks["b"].copy_(torch.tensor([[5.0, 2.0]]))
        layer[0].bias_masks["a"].fill_(-1.0)
        layer[0].bias_masks["b"].fill_(4.0)
    add_task(layer, "mean", init="mean")
    add_task(layer, "copy", init="copy:b")
    add_task(layer, "own", init="random")
    masks, bias_masks = layer[0].masks, layer[0].bias_masks
    assert (masks["mean"].tolist(), bias_masks["mean"].tolist()) == ([[3.0, 0.0]], [1.5])
    assert (masks["copy"].tolist(), bias_masks["copy"].tolist()) == ([[5.0, 2.0]], [4.0])
    assert (masks["own"].tolist(), bias_masks["own"].tolist()) == ([[7.0, 7.0]], [7.0])
    with torch.no_grad():
        masks["copy"].zero_()
    assert masks["b"].tolist() == [[5.0, 2.0]]


def test_random_draws_another_mask_for_each_task_and_layer():
    model = nn.Sequential(MaskedLinear(4, 4), MaskedLinear(4, 4))
    add_task(model, "b")
    masks = [layer.masks[task] for layer in model for task in ("default", "b")]
    assert not any(torch.equal(one, other) for i, one in enumerate(masks) for other in masks[:i])


def test_copies_from_a_task_whose_name_looks_like_an_init():
    model = nn.Sequential(MaskedLinear(2, 1))
    for name in ("mean", "random", "copy:mean"):
        add_task(model, name)
    add_task(model, "x", init="copy:copy:mean")
    assert torch.equal(model[0].masks["x"], model[0].masks["copy:mean"])


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        pytest.param(lambda m: add_task(m, "a"), ValueError, "that of a new task, got 'a'", id="add-existing"),
        pytest.param(lambda m: add_task(m, "c", init="copy:x"), ValueError, "copy:x", id="copy-of-unknown"),
        pytest.param(lambda m: add_task(m, "c", init="copy:"), ValueError, "copy:", id="copy-of-nothing"),
        pytest.param(lambda m: add_task(m, "c", init="zeros"), ValueError, "zeros", id="unknown-init"),
        pytest.param(lambda m: add_task(m, "c", init=0.0), TypeError, "init", id="init-no-string"),
        pytest.param(lambda m: remove_task(m, "c"), ValueError, "one of 'a', 'b', got 'c'", id="remove-unknown"),
        pytest.param(lambda m: using_task(m, "c"), ValueError, "one of 'a', 'b', got 'c'", id="use-unknown"),
        pytest.param(lambda m: metamask_ext.merge(m, "c"), ValueError, "one of 'a', 'b', got 'c'", id="merge-unknown"),
    ],
)
def test_a_refused_change_changes_nothing(act, error, words):
    model = mlp()
    before = _snapshot(model)
    with pytest.raises(error, match=words):
        act(model)
    assert _unchanged(model, before)
    assert tasks(model) == ["a", "b"]


@pytest.mark.parametrize("good", range(6))
def test_a_failure_while_masks_are_made_leaves_every_layer_as_it_was(good):
    model = mlp()  # three layers with bias: six masks to make
    failing = _FailsAfter(good)
    for layer in (model[0], model[2], model[4]):
        layer.mask_init = failing
    before = _snapshot(model)
    with pytest.raises(MemoryError):
        add_task(model, "c")
    assert _unchanged(model, before)
    assert tasks(model) == ["a", "b"]
    failing.good = 6
    add_task(model, "c")
    assert tasks(model) == ["a", "b", "c"]


def test_the_last_task_cannot_be_removed():
    layer = MaskedLinear(3, 2)
    with pytest.raises(ValueError, match="last one"):
        remove_task(layer, "default")
    assert tasks(layer) == ["default"]


def test_an_active_task_cannot_be_removed():
    model = mlp()
    before = _snapshot(model)
    with using_task(model, "a"):
        with using_task(model[2], "b"), pytest.raises(RuntimeError, match="active"):
            remove_task(model, "a")
        with pytest.raises(RuntimeError, match="active"):
            remove_task(model, "a")
        remove_task(model, "b")
    assert tasks(model) == ["a"]
    assert _snapshot(model).keys() < before.keys()


def test_a_task_removed_by_another_thread_is_not_replaced_by_the_one_left():
    model = mlp()
    x = torch.randn(2, 4).double()
    with using_task(model, "a"):
        other = threading.Thread(target=remove_task, args=(model, "a"))
        other.start()
        other.join()
        assert tasks(model) == ["b"]
        with pytest.raises(RuntimeError, match="the active task was removed"):
            model(x)
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize("act", [tasks, lambda m: add_task(m, "b"), lambda m: remove_task(m, "b"), lambda m: using_task(m, "b")])
def test_a_model_without_masked_layers_and_what_is_no_model_are_refused(act):
    with pytest.raises(ValueError, match="no masked layer"):
        act(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(TypeError, match="Module"):
        act("model")


@pytest.mark.parametrize("group", ["masks", "bias_masks"])
def test_layers_with_different_tasks_are_refused_and_left_alone(group):
    model = mlp()
    del getattr(model[2], group)["b"]
    before = _snapshot(model)
    for act in (
        lambda: tasks(model),
        lambda: add_task(model, "c"),
        lambda: remove_task(model, "b"),
        lambda: remove_task(model, "a"),
    ):
        with pytest.raises(ValueError, match="different tasks"):
            act()
    assert _unchanged(model, before)


def test_one_layer_used_twice_gets_one_mask_per_task():
    shared = MaskedLinear(3, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    add_task(model, "b")
    assert len(list(model.parameters())) == 6
    x = torch.randn(2, 3)
    with using_task(model, "b"):
        assert torch.equal(model(x), shared(torch.tanh(shared(x))))
    remove_task(model, "b")
    assert tasks(model) == ["default"]


def test_layers_that_share_their_masks_are_added_to_and_removed_from_once():
    model = nn.Sequential(MaskedLinear(3, 3), MaskedLinear(3, 3))
    model[1].masks, model[1].bias_masks = model[0].masks, model[0].bias_masks
    add_task(model, "b", init="mean")
    assert model[0].masks["b"] is model[1].masks["b"]
    remove_task(model, "default")
    assert tasks(model) == ["b"]


class TestOptimisers:
    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1), id="sgd"),
            pytest.param(lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1), id="adam"),
        ],
    )
    def test_an_unused_tasks_mask_has_no_gradient_no_state_and_does_not_move(self, make):
        model = mlp()
        optimiser = make(model.parameters())
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for _ in range(2):
            with using_task(model, "a"):
                model(torch.randn(5, 4).double()).square().sum().backward()
            optimiser.step()
            grads = gradients(model)
        for name, parameter in model.named_parameters():
            unused = name.endswith(".b")
            assert (grads[name] is None) == unused, name
            assert torch.equal(parameter, before[name]) == unused, name
            assert (parameter in optimiser.state) != unused, name

    def test_a_step_of_plain_sgd_is_the_step_of_the_formula(self):
        # One weight W = 2, M = 0 (s = 1/2), x = 3, loss = y: dW = 3/2, dM = 3*2/4; step 0.1.
        layer = MaskedLinear(1, 1, bias=False, mask_init=0.0)
        with torch.no_grad():
            layer.weight.fill_(2.0)
        optimiser = torch.optim.SGD(layer.parameters(), 0.1)
        layer(torch.tensor([3.0])).sum().backward()
        optimiser.step()
        assert layer.weight.item() == pytest.approx(1.85)
        assert layer.masks["default"].item() == pytest.approx(-0.15)
