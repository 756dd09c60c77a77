"""No output is a view: what comes next may write to it in place, as activations do, with the numbers of a copy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metamask_ext import (
    MaskBank,
    add_task,
    convert,
    masked_conv2d,
    masked_linear,
    merge,
    pack_mask,
    packed_masked_conv2d,
    packed_masked_linear,
    task_masked_conv2d,
    task_masked_linear,
    using_task,
)
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d

WRITES = {
    "relu_": torch.relu_,
    "ReLU": nn.ReLU(inplace=True),
    "Hardswish": nn.Hardswish(inplace=True),
    "add_": lambda y: y.add_(1.5),
    "mul_": lambda y: y.mul_(y.detach().clone()),
    "setitem": lambda y: y.__setitem__(..., y * 2) or y,
    "dropout": lambda y: F.dropout(y, 0.0, True, inplace=True),
}

LAYERS = {
    "linear": (lambda: MaskedLinear(3, 4), (3,)),
    "linear-one": (lambda: MaskedLinear(3, 1), (3,)),
    "linear-rows": (lambda: MaskedLinear(3, 4, bias=False), (1, 3)),
    "conv-1x1-of-1x1": (lambda: MaskedConv2d(32, 8, 1), (32, 1, 1)),
    "conv-1x1": (lambda: MaskedConv2d(2, 3, 1), (2, 4, 5)),
    "conv-one-place": (lambda: MaskedConv2d(2, 16, 3), (2, 3, 3)),
    "conv-one-channel": (lambda: MaskedConv2d(2, 1, 3, padding=1), (2, 4, 4)),
    "conv-groups": (lambda: MaskedConv2d(4, 8, 1, groups=4, bias=False), (4, 1, 1)),
    "conv-reflect": (lambda: MaskedConv2d(2, 8, 3, stride=2, padding=1, padding_mode="reflect"), (2, 2, 2)),
}
SELECTED = {
    "one task": lambda samples: "a",
    "packed": lambda samples: "p",
    "mixed": lambda samples: (["a", "b"] * samples)[:samples],
    "mixed packed": lambda samples: (["p", "q"] * samples)[:samples],
    "both": lambda samples: (["p", "a", "b", "q"] * samples)[:samples],
}


def _model(make) -> nn.Sequential:
    model = nn.Sequential(make()).double()
    bank = MaskBank(model)
    for task in ("a", "b", "p", "q"):
        add_task(model, task)
    bank.pack("p")
    bank.pack("q")
    return model


def _run(model, x, selected, write):
    model.zero_grad()
    x = x.clone().requires_grad_()
    with using_task(model, selected):
        y = model(x)
    assert not y._is_view()
    write(y).square().sum().backward()
    return [y.detach().clone(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("selected", SELECTED)
@pytest.mark.parametrize("layer", LAYERS)
def test_what_writes_to_a_layers_output_gives_the_numbers_and_gradients_of_a_copy(layer, selected):
    make, shape = LAYERS[layer]
    model = _model(make)
    for samples in (1, 2, 5):
        x, names = torch.randn(samples, *shape, dtype=torch.float64), SELECTED[selected](samples)
        for write in WRITES.values():
            got = _run(model, x, names, write)
            model.append(_Copy())
            wanted = _run(model, x, names, write)
            del model[1]
            assert len(got) == len(wanted) > 2
            for one, other in zip(got, wanted):
                torch.testing.assert_close(one, other, rtol=0, atol=0)


class _Copy(nn.Module):
    def forward(self, x):
        return x * 1


@pytest.mark.parametrize("selected", ["one task", "packed"])
@pytest.mark.parametrize("layer", ["linear", "conv-1x1-of-1x1", "conv-1x1"])
def test_an_output_without_a_dimension_of_samples(layer, selected):
    make, shape = LAYERS[layer]
    model = _model(make)
    x = torch.randn(shape, dtype=torch.float64)
    with using_task(model, SELECTED[selected](1)):
        wanted = model(x).relu()
        torch.testing.assert_close(torch.relu_(model(x)), wanted, rtol=0, atol=0)
        torch.relu_(model(x)).sum().backward()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 2])
def test_sequences_first(length, batch):
    model = _model(lambda: MaskedLinear(3, 4))
    names = ["a", "b", "p"][:batch]
    with using_task(model, names, batch_dim=1):
        y = model(torch.randn(length, batch, 3, dtype=torch.float64))
        assert not y._is_view() and y.is_contiguous()
        torch.relu_(y).sum().backward()


@pytest.mark.parametrize("layer", LAYERS)
def test_features_made_without_a_graph_may_be_added_to_by_a_trained_part(layer):
    make, shape = LAYERS[layer]
    model, trained = _model(make), torch.ones((), dtype=torch.float64, requires_grad=True)
    for selected in SELECTED.values():
        for samples in (1, 2):
            with torch.no_grad(), using_task(model, selected(samples)):
                features = model(torch.randn(samples, *shape, dtype=torch.float64))
            features.add_(trained).sum().backward()  # of a view made under no_grad torch refuses this
    assert trained.grad is not None


def test_batch_norm_of_tasks_and_mixtures():
    model = nn.Sequential(MaskedConv2d(2, 8, 1), TaskBatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten()).eval()
    bank = MaskBank(model)
    add_task(model, "b")
    x = torch.randn(2, 2, 1, 1)
    for selected in ("b", ["b", "default"]):
        with using_task(model, selected):
            model(x).sum().backward()
    with bank.superpose({"b": 0.5, "default": 0.5}):
        model(x).sum().backward()
    assert len(bank.infer_task(x)) == 2


def test_merged_and_converted_models():
    model = convert(nn.Sequential(nn.Conv2d(32, 8, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 2), nn.ReLU(inplace=True)))
    x = torch.randn(1, 32, 1, 1)
    merged = merge(model, "default")
    torch.testing.assert_close(model(x), merged(x))
    for each in (model, merged):
        each(x).sum().backward()
    for frozen in model.parameters():
        frozen.requires_grad_(False)
    model(x.requires_grad_()).sum().backward()


def _functions(shape, out):
    """Each function of these sizes with logits of gradients, and one with bits; by name."""
    weight, bias = torch.randn(out, *shape[1:], requires_grad=True), torch.randn(out, requires_grad=True)
    logits, bias_logits = torch.randn(2, *weight.shape, requires_grad=True), torch.randn(2, out, requires_grad=True)
    bits, bias_bits = [pack_mask(one) for one in logits], [pack_mask(one) for one in bias_logits]
    slots = torch.arange(shape[0]) % 2
    return {
        "one": (masked_linear, masked_conv2d, (weight, logits[0], bias, bias_logits[0])),
        "tasks": (task_masked_linear, task_masked_conv2d, (slots, weight, logits, bias, bias_logits)),
        "bits": (packed_masked_linear, packed_masked_conv2d, (slots, weight, bits, bias, bias_bits)),
    }


@pytest.mark.parametrize("out", [1, 16])
@pytest.mark.parametrize("name", ["one", "tasks", "bits"])
@pytest.mark.parametrize("shape", [(1, 3), (3, 3), (1, 2, 1, 1), (2, 2, 1, 1), (1, 2, 3, 3)])
def test_outputs_of_the_functions(shape, name, out):
    x = torch.randn(shape, requires_grad=True)
    linear, conv2d, arguments = _functions(shape, out)[name]
    y = (linear if len(shape) == 2 else conv2d)(x, *arguments)
    assert not y._is_view()
    torch.relu_(y).sum().backward()


def test_gradients_may_be_unscaled_and_clipped_in_place():
    model = nn.Sequential(MaskedConv2d(32, 8, 1), nn.ReLU(inplace=True), nn.Flatten(), MaskedLinear(8, 2), nn.ReLU(inplace=True))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x = torch.randn(1, 32, 1, 1)
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    scaler.scale(model(x).square().sum()).backward()
    scaler.unscale_(optimizer)
    for parameter, grad in zip(model.parameters(), wanted):
        torch.testing.assert_close(parameter.grad, grad)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    scaler.step(optimizer)
