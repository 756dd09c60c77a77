"""Nothing that stays of a call under ``inference_mode`` is an inference tensor: a later call may train."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from support.fused_steps import each_kind
from torch import nn

import metamask_ext
from metamask_ext import MaskBank, add_task, merge, remove_task, using_task
from metamask_ext.bank.export import task_state
from metamask_ext.bank.store import Store
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d


def _net():
    return nn.Sequential(MaskedConv2d(2, 3, 1), TaskBatchNorm2d(3), nn.Flatten(), MaskedLinear(12, 3))


def _plain():
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3))


def _inference_tensors(model):
    return [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_inference()]


def _add(init):
    def act(model):
        add_task(model, "b", init)
        return model

    return act


def _packed(model):
    add_task(model, "b")
    MaskBank(model).pack("b")
    add_task(model, "c", {"b": 1.0})
    return model


def _loaded(model):
    with torch.inference_mode(False):
        saved = _packed(_net())
    model.load_state_dict(saved.state_dict())
    return model


def _given(model):
    for layer in (model[0], model[3]):
        layer.masks["b"] = nn.Parameter(torch.zeros_like(layer.masks["default"]), requires_grad=False)
        layer.bias_masks["b"] = torch.zeros_like(layer.bias_masks["default"])
    for tensors in model[1].per_task.values():
        tensors["b"] = tensors["default"].detach().clone()
    assert not model[0].masks["b"].requires_grad and model[0].bias_masks["b"].requires_grad
    return model


def _per_task(model):
    model = nn.Sequential(model, head)
    MaskBank(model, per_task="1.*")
    add_task(model, "b")
    return model


head = nn.Linear(3, 2)

ACTS = {
    "add": _add("random"),
    "add mean": _add("mean"),
    "add copy": _add("copy:default"),
    "add combination": _add({"default": 1.0}),
    "pack": _packed,
    "load": _loaded,
    "masks of a user": _given,
    "per task": _per_task,
    "merge": lambda model: merge(model, "default"),
    "train batch norm": lambda model: (model(torch.ones(3, 2, 2, 2)), model)[1],
}


@pytest.mark.parametrize("act", ACTS)
def test_nothing_that_stays_is_an_inference_tensor(act):
    model = _net()
    with torch.inference_mode():
        model = ACTS[act](model)
    assert _inference_tensors(model) == []
    for name in ["default"] if act == "merge" else metamask_ext.tasks(model):
        with nullcontext() if act == "merge" else using_task(model, name):
            model(torch.randn(3, 2, 2, 2)).sum().backward()
    shared = model[0][0] if act == "per task" else model[0]
    assert shared._parameters["weight"].grad is not None


def test_masks_that_are_converted_or_made_by_convert_can_be_trained():
    model = _plain()
    with torch.inference_mode():
        metamask_ext.convert(model, batch_norm="task")
    assert _inference_tensors(model) == []
    masks = model[3].masks
    with torch.inference_mode():
        masks.to(torch.float64).to(torch.float32)
    assert _inference_tensors(masks) == []


@pytest.mark.parametrize("packed", [False, True], ids=["logits", "bits"])
@pytest.mark.parametrize("method", ["one_shot", "binary"])
def test_tasks_are_inferred_of_samples_made_inside_and_afterwards_outside(method, packed):
    model = nn.Sequential(MaskedConv2d(2, 3, 1), nn.Flatten(), MaskedLinear(12, 3))
    add_task(model, "b")
    bank = MaskBank(model)
    if packed:
        for name in bank.tasks:
            bank.pack(name)
    x = torch.randn(4, 2, 2, 2)
    wanted = MaskBank(model).infer_task(x, method)
    with torch.inference_mode():
        assert bank.infer_task(x.clone(), method) == wanted
    assert bank.infer_task(x, method) == wanted


def test_a_bank_is_loaded_and_exported(tmp_path):
    bank = MaskBank(_net())
    bank.add_task("b")
    bank.pack("b")
    bank.save(tmp_path)
    model = _net()
    with torch.inference_mode():
        MaskBank.load(tmp_path, model)
        add_task(model, "c")
        state = task_state(Store.open(tmp_path), "b")
        with using_task(model, ["b", "c", "default"]):
            model.eval()(torch.randn(3, 2, 2, 2))
    assert _inference_tensors(model) == [] and not any(tensor.is_inference() for tensor in state.values())
    with using_task(model, ["b", "c", "default"]):
        model(torch.randn(3, 2, 2, 2)).sum().backward()
    with torch.inference_mode():
        remove_task(model, "b")


@pytest.mark.parametrize("adapt", ["masks", "weights"])
def test_a_meta_learner_adapts_inside_as_without_gradients(adapt):
    model = nn.Sequential(MaskedLinear(4, 3))
    maml = MAML(model, 0.1, adapt=adapt)
    loss, x, y = nn.functional.mse_loss, torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    with torch.no_grad():
        wanted = maml.adapt(loss, (x, y))
        wanted_loss = maml(loss, (x, y), (x, y))
    with torch.inference_mode():
        for inputs in ((x, y), (x.clone(), y.clone()), (x.clone(), y.clone(), torch.ones(2, 5))):
            adapted = maml.adapt(loss, inputs)
            assert all(torch.allclose(adapted[name], wanted[name]) and not adapted[name].is_inference() for name in wanted)
        assert torch.allclose(maml(loss, (x, y), (x, y)), wanted_loss)
        more = maml.adapt(loss, (x, y), parameters=adapted)
        learners = [maml.clone()]
        rates = MAML(model, 0.1, adapt=adapt, learn_inner_lr=True).inner_lr
    with torch.no_grad():
        learners.append(maml.clone())
    for learner in learners:
        learner.adapt(loss(learner(x[0]), y[0]))
        assert all(torch.allclose(learner.parameters[name], wanted[name][0]) for name in wanted)
    assert not rates.is_inference()
    maml.predict(more, x).sum().backward()
    maml(loss, (x, y), (x, y)).backward()


@each_kind
def test_the_state_of_a_step_inside_is_used_outside(kind):
    def run(inside):
        torch.manual_seed(0)
        model = nn.Sequential(MaskedLinear(4, 3))
        optimizer = kind.ours(model, **kind.settings)
        x = torch.ones(2, 4)
        model(x).sum().backward()
        with torch.inference_mode(inside):
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        optimizer.backward(model(x).sum())
        return list(model.parameters())

    for got, wanted in zip(run(True), run(False), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_state_that_was_made_inside_is_taken_over(assign):
    saved, model = nn.Sequential(MaskedLinear(4, 3)), nn.Sequential(MaskedLinear(4, 3))
    add_task(saved, "b")
    MaskBank(saved).pack("b")
    with torch.inference_mode():
        state = {key: value.clone() if "masks" in key else value for key, value in saved.state_dict().items()}
        model.load_state_dict(state, assign=assign)
    assert _inference_tensors(model) == []
    for name in ("default", "b"):
        with using_task(model, name):
            model(torch.ones(2, 4)).sum().backward()
