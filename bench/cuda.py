"""What only the suite ``cuda`` times: a copy that moves as many bytes as a case must, and batches that mix tasks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from metamask_ext import pack_mask, packed_masked_linear, task_masked_linear, unpack_mask

from .problems import SEED, Contender, Problem, masked_linear, masked_weight


def with_copy(problem: Problem, elements: int, device: str) -> Problem:
    """The same with a contender ``copy``, which reads ``elements`` / 2 and writes as many: the floor of the case, in bytes.

    ``copy/ours`` is the share of the copy bandwidth, measured in the same rounds, that ours reaches.
    """
    source = torch.randn(elements // 2, device=device).to(problem.dtype)
    copied = torch.empty_like(source)
    copy = Contender(lambda: (copied.copy_(source),), lambda: (source.double(),), ("copy",))
    return Problem({**problem.contenders, "copy": copy}, problem.reduction, problem.missing, problem.tolerance, problem.dtype)


def weight_against_copy(width: int, mode: str, device: str) -> Problem:
    """:func:`masked_weight`; forward it reads W and M and writes theta, the backward reads G too and writes dW and dM.

    A ``"backward"`` is both, as plain torch's is.
    """
    arrays = 3 if mode == "forward" else 3 + 5
    return with_copy(masked_weight(width, mode, device), arrays * width * width, device)


def linear_against_copy(batch: int, width: int, device: str) -> Problem:
    """:func:`masked_linear` forward; it reads W and M."""
    return with_copy(masked_linear(batch, width, "forward", device=device), 2 * width * width, device)


def packed_tasks(batch: int, tasks: int, width: int, device: str) -> Problem:
    """One packed mask a task, and the samples spread over the tasks, against every way that plain torch has."""
    weight, logits, x, slots = _mixed(batch, tasks, width, device)
    packed = torch.stack([pack_mask(mask) for mask in logits])
    del logits
    order = [(slots == task).nonzero()[:, 0] for task in range(tasks)]

    def theta(task: int, weight: Tensor) -> Tensor:
        return weight * unpack_mask(packed[task], weight.shape)

    def loop(x: Tensor, weight: Tensor) -> Tensor:
        y = x.new_empty(batch, width)
        for task, rows in enumerate(order):
            y[rows] = x[rows] @ theta(task, weight).t()
        return y

    def gather(x: Tensor, weight: Tensor) -> Tensor:
        thetas = torch.stack([theta(task, weight) for task in slots.tolist()])
        return torch.bmm(thetas, x[:, :, None])[:, :, 0]

    def exact() -> tuple[Tensor, ...]:
        return (loop(x.double(), weight.double()),)

    contenders = {
        "ours": _forward(lambda: packed_masked_linear(x, slots, weight, packed), exact),
        "loop": _forward(lambda: loop(x, weight), exact),
        "gather": _forward(lambda: gather(x, weight), exact),
        "dense": _forward(lambda: x @ weight.t(), lambda: (x.double() @ weight.double().t(),)),
    }
    return Problem(contenders, width)


def float_tasks(tasks: int, rows: int, width: int, device: str) -> Problem:
    """Float masks, ``rows`` samples a task, in any order."""
    weight, masks, x, slots = _mixed(tasks * rows, tasks, width, device)

    def plain(x: Tensor, weight: Tensor, masks: Tensor) -> Tensor:
        grouped = x[slots.argsort(stable=True)].view(tasks, rows, width)
        y = torch.bmm(grouped, (weight * torch.sigmoid(masks)).transpose(1, 2)).flatten(0, 1)
        return torch.empty_like(y).index_copy_(0, slots.argsort(stable=True), y)

    compiled: Callable[..., Tensor] = torch.compile(plain, dynamic=False)

    def exact() -> tuple[Tensor, ...]:
        return (plain(x.double(), weight.double(), masks.double()),)

    contenders = {
        "ours": _forward(lambda: task_masked_linear(x, slots, weight, masks), exact),
        "eager": _forward(lambda: plain(x, weight, masks), exact),
        "compiled": _forward(lambda: compiled(x, weight, masks), exact),
    }
    return Problem(contenders, width, {"dense": "one dense layer is not the work of many"})


def _mixed(batch: int, tasks: int, width: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight, a mask for each task, input, slots: each task as often as the others."""
    generator = torch.Generator().manual_seed(SEED)
    weight = (torch.randn(width, width, generator=generator) / math.sqrt(width)).to(device)
    x = torch.randn(batch, width, generator=generator).to(device)
    slots = (torch.arange(batch) % tasks)[torch.randperm(batch, generator=generator)].to(device)
    torch.manual_seed(SEED)
    return weight, torch.randn(tasks, width, width, device=device), x, slots


def _forward(work: Callable[[], Tensor], exact: Callable[[], tuple[Tensor, ...]]) -> Contender:
    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (work(),)

    return Contender(run, exact, ("output",))
