"""Modules of every kind that gets masks, against plain torch: values, gradients, mixed-task batches, packing, merge, state."""

from __future__ import annotations

import copy
import pickle
import sys
import types

import pytest
import torch
from support.masked_kinds import CASES, MIXED, SAMPLES, Conv1D, by_torch
from support.models import assert_same_gradients, gradients, masks_on, randomize_masks
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import metamask_ext as mm
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedLayer
from metamask_ext.optim import FusedMaskedSGD

every = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _attention_with_second_derivatives():
    with sdpa_kernel(SDPBackend.MATH):
        yield


def masked_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, MaskedLayer)]


@every
def test_a_converted_module_is_the_plain_one_where_the_gates_are_1(name):
    case = CASES[name]
    plain, model = case.plain(), case.mask(case.plain())
    x = case.input()
    assert [key for key, _ in model.named_parameters() if "masks." not in key] == [key for key, _ in plain.named_parameters()]
    assert mm.conversion_report(model).left == () or case.parameters
    torch.testing.assert_close(case.call(masks_on(model), x), case.call(plain, x))


@every
def test_values_and_gradients_of_one_task_are_those_of_plain_torch(name):
    case = CASES[name]
    model, x = case.model(), case.input()
    inputs = [x] if not x.is_floating_point() else [x.requires_grad_()]
    found = []
    for compute in (lambda: case.call(model, x), lambda: by_torch(case, model, "b", x)):
        with mm.using_task(model, "b"):
            y = compute()
        (y.square().sum() + y.sum()).backward()
        found.append((y, gradients(model), [one.grad for one in inputs]))
        inputs[0].grad = None
    torch.testing.assert_close(found[0][0], found[1][0])
    assert_same_gradients(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2])


@every
def test_second_derivatives(name):
    case = CASES[name]
    model, x = case.model(), case.input(2)
    layer = masked_layers(model)[0]
    groups = [(parameter, masks["b"]) for parameter, masks in layer._groups()]
    tensors = [tensor for group in groups for tensor in group]
    found = []
    for compute in (lambda: case.call(model, x), lambda: by_torch(case, model, "b", x)):
        with mm.using_task(model, "b"):
            y = compute()
        first = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        total = sum(
            (gradient * torch.linspace(0.5, 1.5, gradient.numel(), dtype=gradient.dtype).view_as(gradient)).sum()
            for gradient in first
        )
        found.append(torch.autograd.grad(total, tensors))
    torch.testing.assert_close(*found)


@every
def test_each_sample_of_a_mixed_task_batch_is_that_of_its_task_alone(name):
    case = CASES[name]
    model, x = case.model(), case.input()
    with mm.using_task(model, MIXED):
        together = case.call(model, x)
    together.square().sum().backward()
    of_batch = gradients(model)
    alone = []
    for task, one in zip(MIXED, x):
        with mm.using_task(model, task):
            alone.append(case.call(model, one[None]))
    torch.cat(alone).square().sum().backward()
    torch.testing.assert_close(together, torch.cat(alone))
    if "padding" not in name:  # a frequency is that of the batch
        assert_same_gradients(of_batch, gradients(model))
    with mm.using_task(model, ["b"] * (SAMPLES + 1)), pytest.raises(RuntimeError, match=f"{SAMPLES + 1}"):
        case.call(model, x)
    with pytest.raises(RuntimeError, match="none is active"):
        case.call(model, x)


@every
def test_packed_tasks_are_those_of_the_hard_gate(name):
    case = CASES[name]
    model, x = case.model(gate="hard", threshold=0.2), case.input()
    wanted = {}
    for task in ("b", MIXED):
        with mm.using_task(model, task):
            wanted[str(task)] = case.call(model, x)
    bank = mm.MaskBank(model)
    for packed in (["b"], ["c", "default"]):
        for task in packed:
            bank.pack(task)
        for task in ("b", MIXED):
            with mm.using_task(model, task):
                torch.testing.assert_close(case.call(model, x), wanted[str(task)])


@every
def test_merged_it_is_the_plain_module_again(name):
    case = CASES[name]
    model, plain, x = case.model(), case.plain(), case.input()
    mm.MaskBank(model).pack("c")
    for task in ("b", "c"):
        merged = mm.merge(model, task)
        assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]
        assert [key for key, _ in merged.named_parameters()] == [key for key, _ in plain.named_parameters()]
        assert {*vars(merged)} == {*vars(plain)}
        with mm.using_task(model, task):
            torch.testing.assert_close(case.call(merged, x), case.call(model, x))


@every
def test_copies_pickles_and_state_dicts_keep_all_tasks(name, monkeypatch):
    for module in ("transformers", "transformers.pytorch_utils"):  # where pickle looks for Conv1D
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(Conv1D=Conv1D))
    case = CASES[name]
    model, x = case.model(temperature=2.0), case.input()
    mm.MaskBank(model).pack("c")
    loaded = case.mask(case.plain())
    loaded.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert mm.tasks(other) == ["default", "b", "c"]
        for task in ("b", "c", MIXED):
            with mm.using_task(model, task), mm.using_task(other, task):
                assert torch.equal(case.call(other, x), case.call(model, x))
    plain = case.plain()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1)
    loaded.load_state_dict(plain.state_dict(), strict=False)
    assert all(torch.equal(dict(loaded.named_parameters())[key], value) for key, value in plain.named_parameters())


@every
def test_a_bank_brings_the_tasks_to_another_model(name, tmp_path):
    case = CASES[name]
    model, x = case.model(), case.input()
    bank = mm.MaskBank(model)
    bank.pack("c")
    bank.save(tmp_path)
    other = case.mask(case.plain())
    loaded = mm.MaskBank.load(tmp_path, other)
    loaded.verify()
    for task in ("b", MIXED):
        with mm.using_task(model, task), mm.using_task(other, task):
            assert torch.equal(case.call(other, x), case.call(model, x))
    with bank.superpose({"b": 0.75, "c": 0.25}):
        mixed = case.call(model, x)
    with loaded.superpose({"b": 0.75, "c": 0.25}):
        torch.testing.assert_close(case.call(other, x), mixed)


@every
def test_a_superposition_is_that_of_the_gates(name):
    case = CASES[name]
    model, x = case.model(), case.input()
    with mm.MaskBank(model).superpose({"b": 1.0, "c": 0.0}), torch.no_grad():
        got = case.call(model, x)
    torch.testing.assert_close(got, by_torch(case, model, "b", x))


@every
def test_training_fused_or_not(name):
    case = CASES[name]
    models = [case.model(), case.model()]
    x = case.input()
    fused = FusedMaskedSGD(models[0], lr=0.05)
    plain = torch.optim.SGD(models[1].parameters(), lr=0.05)
    for _ in range(2):
        with mm.using_task(models[0], "b"), mm.using_task(models[1], "b"):
            fused.backward(case.call(models[0], x).square().mean())
            plain.zero_grad()
            case.call(models[1], x).square().mean().backward()
            plain.step()
    torch.testing.assert_close(dict(models[0].named_parameters()), dict(models[1].named_parameters()))


@every
def test_weights_of_16_bits_with_masks_of_32(name):
    case = CASES[name]
    model = case.mask(case.plain().bfloat16())
    mm.add_task(model, "b")
    randomize_masks(model)
    masks = [parameter for key, parameter in model.named_parameters() if "masks." in key]
    assert {mask.dtype for mask in masks} == {torch.float32}
    x = case.input(dtype=torch.bfloat16)
    with mm.using_task(model, "b"):
        y = case.call(model, x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(mask.grad is None or mask.grad.dtype == torch.float32 for mask in masks)
    wide = copy.deepcopy(model).double()
    with mm.using_task(wide, "b"):
        torch.testing.assert_close(y.double(), case.call(wide, x.double() if x.is_floating_point() else x), rtol=0.05, atol=0.3)


# What experts do depends on their values, which vmap hides.
@pytest.mark.parametrize("name", [name for name in CASES if name != "experts"])
def test_torch_func_calls_it_with_other_parameters_and_many_masks(name):
    case = CASES[name]
    model, x = case.model(), case.input()
    of_masks = {key: parameter.detach() for key, parameter in model.named_parameters() if key.endswith(".b")}
    stacked = {key: torch.stack([mask, mask + 1, -mask]) for key, mask in of_masks.items()}

    def run(masks):
        with mm.using_task(model, "b"):
            return torch.func.functional_call(model, masks, (x,), case.options)

    together = torch.vmap(run)(stacked)
    alone = torch.stack([run({key: masks[index] for key, masks in stacked.items()}) for index in range(3)])
    torch.testing.assert_close(together, alone)
    grads = torch.func.grad(lambda masks: run(masks).square().sum())(of_masks)
    with mm.using_task(model, "b"):
        case.call(model, x).square().sum().backward()
    for key, gradient in grads.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[key].grad)


@pytest.mark.parametrize("name", ["conv1d", "transposed2d-size", "embedding", "attention", "experts", "positions"])
def test_compiled_it_runs_the_task_that_is_active(name):
    case = CASES[name]
    model, x = case.model(), case.input()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    for task in ("b", "c", MIXED, "b"):
        with mm.using_task(model, task):
            torch.testing.assert_close(case.call(compiled, x), case.call(model, x))


@pytest.mark.parametrize("name", ["conv1d", "conv3d", "attention"])
def test_one_graph_runs_all_tasks(name):
    case = CASES[name]
    model, x = case.model(), case.input()
    torch.compiler.reset()
    one_graph = mm.compile(copy.deepcopy(model), backend="eager")
    for task in ("b", MIXED, "c"):
        with mm.using_task(model, task), mm.using_task(one_graph, task):
            torch.testing.assert_close(case.call(one_graph, x), case.call(model, x))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if name != "experts" and not case.options])
def test_a_meta_learner_adapts_its_masks(name):
    case = CASES[name]
    model = nn.Sequential(case.mask(case.plain(), mask_init="normal"), nn.Flatten())
    x = torch.stack([case.input(2), case.input(4)[2:]])
    y = torch.randn(2, 2, *model(x[0]).shape[1:], dtype=torch.float64)
    loss = nn.functional.mse_loss
    maml = MAML(model, 0.1)
    together = maml(loss, (x, y), (x, y))
    together.backward()
    of_batch = gradients(model)
    alone = torch.stack([maml(loss, (a[None], b[None]), (a[None], b[None])) for a, b in zip(x, y)]).mean()
    alone.backward()
    torch.testing.assert_close(together, alone)
    assert_same_gradients(of_batch, gradients(model))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.options])
def test_tasks_are_inferred(name):
    case = CASES[name]
    model = nn.Sequential(case.model(), nn.Flatten())
    x = case.input()
    bank = mm.MaskBank(model)
    bank.pack("c")
    # By the derivative of the entropy by the amounts.
    amounts = {task: torch.tensor(1 / 3, dtype=torch.float64, requires_grad=True) for task in bank.tasks}
    names = list(amounts)
    found = bank.infer_task(x)
    for row in range(SAMPLES):
        with bank.superpose(amounts):
            log_p = model(x[row : row + 1]).log_softmax(1)
        gradient = torch.autograd.grad(-(log_p.exp() * log_p).sum(), list(amounts.values()))
        assert found[row] == names[int(torch.stack(gradient).argmin())]
