"""Convolutions of several tasks at once: as groups of channels they compute what each task computes alone. And losses of tasks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.models import randomize_masks
from torch import nn
from torch.profiler import ProfilerActivity, profile

from metamask_ext._build import BACKEND
from metamask_ext.meta import MAML
from metamask_ext.meta.samples import mapped
from metamask_ext.nn import MaskedConv2d

TASKS, SAMPLES = 3, 4
OPTIONS = [
    {},
    {"bias": False, "stride": 2, "padding": 1},
    {"groups": 2, "dilation": (1, 2), "padding": (0, 2)},
    {"padding": "same", "padding_mode": "reflect"},
    {"gate": "hard", "threshold": 0.1, "padding_mode": "circular", "padding": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
def test_tasks_as_groups_of_channels(options):
    layer = randomize_masks(MaskedConv2d(4, 6, 3, **options).double())
    masks = torch.randn(TASKS, *layer.weight.shape, dtype=torch.float64, requires_grad=True)
    bias_masks = None if layer.bias is None else torch.randn(TASKS, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(SAMPLES * TASKS, 4, 7, 8, dtype=torch.float64, requires_grad=True)
    slots = torch.arange(TASKS).repeat(SAMPLES)
    got = layer._stacked_tasks(x, slots, masks, bias_masks)
    wanted = torch.stack(
        [
            layer._masked(sample[None], masks[slot], None if bias_masks is None else bias_masks[slot])[0]
            for sample, slot in zip(x, slots.tolist())
        ]
    )
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    tensors = [t for t in (x, layer.weight, layer.bias, masks, bias_masks) if t is not None]
    cotangent = torch.randn_like(wanted)
    ours, theirs = (torch.autograd.grad(y, tensors, cotangent) for y in (got, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_bias_without_an_adapted_mask():
    layer = randomize_masks(MaskedConv2d(2, 3, 3).double())
    maml = MAML(nn.Sequential(layer, nn.Flatten()), 0.1, adapt=lambda name: name == "0.masks.default")
    assert maml._adapted.mixed
    x, y = torch.randn(TASKS, SAMPLES, 2, 4, 4).double(), torch.randn(TASKS, SAMPLES, 12).double()
    alone = torch.stack([maml(F.mse_loss, (x[t, None], y[t, None]), (x[t, None], y[t, None])) for t in range(TASKS)])
    torch.testing.assert_close(maml(F.mse_loss, (x, y), (x, y)), alone.mean(), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(BACKEND == "reference", reason="no kernels")
def test_im2col_is_not_called():
    """The path is that of grouped convolutions: the other one gives the same numbers, several times slower."""
    maml = MAML(nn.Sequential(MaskedConv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten()), 0.1)
    x, y = torch.randn(TASKS, SAMPLES, 2, 4, 4), torch.randn(TASKS, SAMPLES, 12)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        maml(F.mse_loss, (x, y), (x, y)).backward()
    ops = {event.key for event in profiler.key_averages()}
    assert {"metamask::masked_weight", "metamask::masked_weight_backward"} <= ops
    assert not any("im2col" in op or "task_masked_linear" in op for op in ops), ops


def noisy(prediction, target):
    return F.dropout(prediction - target["y"], 0.5).square().sum() + target["z"].float().mean()


LOSSES = {
    "mse": (F.mse_loss, torch.randn(5, 4, 3)),
    "cross entropy": (F.cross_entropy, torch.arange(20).view(5, 4) % 3),
    "huber": (F.huber_loss, torch.randn(5, 4, 3)),
    "a tree, with random numbers": (noisy, {"y": torch.randn(5, 4, 3), "z": torch.arange(20).view(5, 4)}),
    "the same for all": (lambda prediction, target: torch.tensor(2.0), torch.zeros(5, 4)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_tasks_are_those_of_vmap(name):
    loss_fn, target = LOSSES[name]
    prediction = torch.randn(5, 4, 3, requires_grad=True)
    made = []
    for run in (mapped, lambda *given: torch.vmap(given[0], randomness="different")(*given[1:])):
        torch.manual_seed(0)
        losses = run(loss_fn, prediction, target)
        grads = torch.autograd.grad(losses.sum(), prediction) if losses.requires_grad else ()
        made.append((losses, *grads))
    assert made[0][0].shape == (5,)
    torch.testing.assert_close(*made, rtol=0, atol=0)


def test_an_error_in_a_loss_leaves_no_level_of_vmap():
    def wrong(prediction, target):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        mapped(wrong, torch.zeros(2, 3), torch.zeros(2, 3))
    assert torch._C._functorch.maybe_current_level() is None
    with pytest.raises(ValueError, match="loss_fn must give a scalar for one task, got float"):
        mapped(lambda prediction, target: 1.0, torch.zeros(2, 3), torch.zeros(2, 3))
