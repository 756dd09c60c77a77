"""Small models for the tests of metamask_ext.meta, and MAML for them written out in plain torch, a loop over tasks and steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support.models import randomize_masks
from torch import Tensor, nn

from metamask_ext.nn import MaskedConv2d, MaskedLinear

TASKS, SHOTS, QUERIES = 3, 4, 5
LR = 0.3


def linear_net() -> nn.Sequential:
    return randomize_masks(
        nn.Sequential(MaskedLinear(2, 6), nn.Tanh(), MaskedLinear(6, 5, bias=False), nn.Tanh(), MaskedLinear(5, 1))
    )


def cnn() -> nn.Sequential:
    conv, pool = MaskedConv2d(2, 3, 3, padding=1), nn.AvgPool2d(2)
    return randomize_masks(
        nn.Sequential(conv, nn.Tanh(), pool, MaskedConv2d(3, 4, 2), nn.Tanh(), nn.Flatten(), MaskedLinear(16, 3))
    )


def regression(shots: int = SHOTS, tasks: int = TASKS) -> tuple[Tensor, Tensor]:
    return torch.randn(tasks, shots, 2, dtype=torch.float64), torch.randn(tasks, shots, 1, dtype=torch.float64)


def images(shots: int = SHOTS, tasks: int = TASKS) -> tuple[Tensor, Tensor]:
    return torch.randn(tasks, shots, 2, 6, 6, dtype=torch.float64), torch.randint(3, (tasks, shots))


def on(device: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


MODELS = {"linear": (linear_net, regression, F.mse_loss), "cnn": (cnn, images, F.cross_entropy)}


def chosen(model: nn.Module, adapt: str) -> list[str]:
    """The names of what is adapted."""
    wanted = {"masks": lambda name: "masks" in name, "weights": lambda name: "masks" not in name, "all": lambda name: True}
    return [name for name, _ in model.named_parameters() if wanted[adapt](name)]


def run(model: nn.Sequential, given: dict[str, Tensor], x: Tensor) -> Tensor:
    """The model with these parameters, from torch alone; batch norms take the statistics of ``x``."""
    for index, layer in enumerate(model):

        def own(name: str, index=index) -> Tensor | None:
            weight, mask = given.get(f"{index}.{name}"), given.get(f"{index}.{'' if name == 'weight' else 'bias_'}masks.default")
            return weight if weight is None or mask is None else weight * mask.sigmoid()

        if isinstance(layer, nn.Linear):
            x = F.linear(x, own("weight"), own("bias"))
        elif isinstance(layer, nn.Conv2d):
            x = F.conv2d(x, own("weight"), own("bias"), layer.stride, layer.padding)
        elif isinstance(layer, nn.BatchNorm2d):
            x = F.batch_norm(x, None, None, own("weight"), own("bias"), True)
        else:
            x = layer(x)
    return x


def adapted(model, names, loss_fn, x, y, steps, first_order=False, rates=None) -> dict[str, Tensor]:
    """One task's parameters after the inner steps."""
    given = dict(model.named_parameters())
    for _ in range(steps):
        own = [given[name] for name in names]
        grads = torch.autograd.grad(loss_fn(run(model, given, x), y), own, create_graph=not first_order)
        lrs = [LR] * len(own) if rates is None else rates
        given = {**given, **{name: value - lr * grad for name, value, lr, grad in zip(names, own, lrs, grads)}}
    return given


def by_hand(model, names, loss_fn, support, query, steps, first_order=False, rates=None) -> Tensor:
    """The meta-loss of the tasks, one after another; a task's set may be shorter than another's."""
    losses = []
    for x, y, query_x, query_y in zip(*support, *query):
        given = adapted(model, names, loss_fn, x, y, steps, first_order, rates)
        losses.append(loss_fn(run(model, given, query_x), query_y))
    return torch.stack(losses).mean()


def assert_same(got: Tensor, wanted: Tensor, parameters, tolerance: float = 1e-10) -> None:
    """The same losses, with the same gradients for every parameter, none of which is left out."""
    parameters = list(parameters)
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    ours, theirs = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (got, wanted))
    assert all(grad.abs().max() > 0 for grad in theirs)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
