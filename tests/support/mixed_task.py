"""Mixed-task batches, and comparisons of the mixed-task ops with plain torch sample by sample."""

from __future__ import annotations

from functools import partial

import torch
from support import closeness
from support.samples import GATES, wider
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metamask_ext.ops.mixed_task import raw as mixed_task_raw
from metamask_ext.ops.mixed_task import reference as mixed_task_reference
from metamask_ext.ops.weight import reference as weight_reference

# (B, ...), groups, in, out, slots: one row a task, all rows one task, ragged, sorted, tasks absent and repeated, tiles and panels
# with remainders, more columns than a tile, rows between, nothing at all
CASES = {
    "1x1": ((1,), 1, 1, 1, [0]),
    "one row a task": ((3,), 1, 17, 5, [2, 0, 1]),
    "all rows one task": ((5,), 1, 3, 17, [1] * 5),
    "sorted": ((6,), 1, 16, 33, [0, 0, 2, 2, 2, 3]),
    "3-d": ((4, 3), 1, 17, 129, [3, 0, 3, 1]),
    "ragged": ((7,), 1, 129, 1134, [2, 0, 2, 2, 5, 0, 2]),
    "wide": ((3,), 1, 16417, 9, [1, 0, 1]),
    "129 rows": ((129,), 1, 40, 40, [i * i % 7 for i in range(129)]),
    "groups": ((3, 4), 3, 5, 12, [1, 0, 1]),
    "depthwise": ((2, 9), 17, 9, 17, [1, 0]),
    "groups over panels": ((2, 3), 2, 1134, 130, [1, 0]),
    "no samples": ((0,), 1, 17, 5, []),
    "no rows": ((2, 0), 1, 17, 5, [1, 0]),
    "no input": ((3,), 1, 0, 5, [1, 0, 1]),
    "no output": ((3,), 1, 17, 0, [1, 0, 1]),
}
TASKS = 6


class Batch:
    """Arguments of the op: input, slots, weight, masks, bias, bias masks and a gradient; the masks stacked, or a list."""

    def __init__(self, case, dtype=torch.float64, stacked=True, bias=True, tasks=TASKS, seed=0, device="cpu", mask_dtype=None):
        self.shape, self.groups, columns, out, slots = CASES[case] if isinstance(case, str) else case
        generator = torch.Generator().manual_seed(seed)

        def random(*shape, kind=dtype):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, kind)

        mask_dtype = mask_dtype or dtype

        self.input = random(*self.shape, self.groups * columns)
        self.slots = torch.tensor(slots, dtype=torch.int64, device=device)
        self.weight, masks = random(out, columns), random(tasks, out, columns, kind=mask_dtype)
        self.bias, bias_masks = (random(out), random(tasks, out, kind=mask_dtype)) if bias else (None, None)
        self.grad = random(*self.shape, out)
        self.masks = [masks] if stacked else list(masks)
        self.bias_masks = [] if bias_masks is None else [bias_masks] if stacked else list(bias_masks)

    def arguments(self, gate):
        return self.input, self.slots, self.weight, self.masks, self.bias, self.bias_masks, *gate, self.groups

    def tensors(self):
        """Lists the tensors that have a gradient, in the order of the gradients."""
        return tree_leaves([self.input, self.weight, self.masks, *([] if self.bias is None else [self.bias]), self.bias_masks])

    def with_tensors(self, tensors):
        """The same batch of other tensors."""
        other = Batch.__new__(Batch)
        other.__dict__.update(self.__dict__)
        tensors = list(tensors)
        other.input, other.weight, *tensors = tensors
        other.masks, tensors = tensors[: len(self.masks)], tensors[len(self.masks) :]
        if self.bias is not None:
            other.bias, *other.bias_masks = tensors
        return other

    def double(self):
        """On the CPU, for the reference."""
        other = self.with_tensors(tensor.detach().double().cpu() for tensor in self.tensors())
        other.grad, other.slots = self.grad.double().cpu(), self.slots.cpu()
        return other

    def wider(self):
        """Every tensor with gaps in memory."""
        other = self.with_tensors(wider(tensor) for tensor in self.tensors())
        other.grad, other.slots = wider(self.grad), torch.stack([self.slots] * 2, 1)[:, 0]
        return other


def plain(batch: Batch, gate) -> Tensor:
    """Sample by sample, group by group, with the formula of one masked layer."""
    masks = batch.masks[0] if len(batch.masks) == 1 else batch.masks
    bias_masks = batch.bias_masks[0] if len(batch.bias_masks) == 1 else batch.bias_masks
    samples = []
    for x, slot in zip(batch.input, batch.slots.tolist()):
        theta = weight_reference.masked_weight(batch.weight, masks[slot], *gate)
        parts = zip(x.chunk(batch.groups, -1), theta.chunk(batch.groups, 0)) if batch.groups > 1 else [(x, theta)]
        y = torch.cat([part @ rows.t() for part, rows in parts], -1)
        if batch.bias is not None:
            row = batch.bias
            y = y + (weight_reference.masked_weight(row, bias_masks[slot], *gate) if len(bias_masks) else row)
        samples.append(y)
    return torch.stack(samples) if samples else batch.grad.new_zeros(batch.grad.shape)


def plain_gradients(batch: Batch, gate) -> list[Tensor]:
    """By autograd through :func:`plain`; zero for what the batch does not use."""
    leaves = [tensor.detach().requires_grad_() for tensor in batch.tensors()]
    y = plain(batch.with_tensors(leaves), gate)
    if not y.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(y, leaves, batch.grad, materialize_grads=True))


GATE = GATES[0]
# 16-bit types round input, gradient and result to 16 bits.
assert_near = partial(closeness.assert_near, units=8)


def terms_of(batch):
    out, columns = batch.weight.shape
    return max(out, columns, batch.grad.numel() // max(out, 1))


def leaves(tree):
    return [leaf for leaf in tree_leaves(tree) if leaf is not None]


def check(case, gate, dtype, stacked, bias=True, device="cpu", mask_dtype=None):
    batch = Batch(case, dtype, stacked, bias, device=device, mask_dtype=mask_dtype)
    double = batch.double()
    arguments, terms = batch.arguments(gate), terms_of(batch)
    y = mixed_task_raw.task_masked_linear(*arguments)
    assert y.dtype == dtype
    assert_near(y, plain(double, gate), batch.weight.shape[1], "y")
    grads = leaves(mixed_task_raw.task_masked_linear_backward(batch.grad, *arguments))
    wanted = plain_gradients(double, gate)
    assert len(grads) == len(wanted) == len(batch.tensors())
    for index, (one, other, argument) in enumerate(zip(grads, wanted, batch.tensors())):
        assert one.dtype == argument.dtype
        assert_near(one, other, terms, f"gradient {index}")


def cotangents_of(batch, seed=1):
    """In the order of the op: of dx, dW, dM, db, dMb."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in batch.tensors()]
    dx, dw, *rest = made
    n = len(batch.masks)
    return (dx, dw, rest[:n], rest[n], rest[n + 1 :]) if batch.bias is not None else (dx, dw, rest, None, [])


def check_double_backward(case, gate, dtype, stacked, bias=True, device="cpu", mask_dtype=None):
    batch = Batch(case, dtype, stacked, bias, device=device, mask_dtype=mask_dtype)
    cotangents = cotangents_of(batch)
    got = leaves(mixed_task_raw.task_masked_linear_double_backward(*cotangents, batch.grad, *batch.arguments(gate)))
    double = batch.double()
    primals = [tensor.detach().requires_grad_() for tensor in (double.grad, *double.tensors())]
    other = double.with_tensors(primals[1:])
    other.grad = primals[0]
    y = plain(other, gate)
    wanted = [torch.zeros_like(primal) for primal in primals]
    if y.requires_grad:
        first = torch.autograd.grad(y, primals[1:], primals[0], create_graph=True, materialize_grads=True)
        total = sum((one * c.double().cpu()).sum() for one, c in zip(first, leaves(cotangents)))
        if total.requires_grad:
            wanted = torch.autograd.grad(total, primals, materialize_grads=True)
    assert len(got) == len(wanted)
    for index, (one, two, argument) in enumerate(zip(got, wanted, (batch.grad, *batch.tensors()))):
        assert one.dtype == argument.dtype
        assert_near(one, two.detach(), terms_of(batch), f"second gradient {index}")


def check_without_bias_masks(case):
    batch = Batch(case, torch.float64)
    batch.bias_masks = []
    arguments = batch.arguments(GATE)
    assert_near(mixed_task_raw.task_masked_linear(*arguments), plain(batch, GATE), 17, "y")
    got = leaves(mixed_task_raw.task_masked_linear_backward(batch.grad, *arguments))
    for one, other in zip(got, plain_gradients(batch, GATE)):
        assert_near(one, other, 129, "gradient")
    cotangents = (*cotangents_of(batch)[:4], [])
    got = mixed_task_raw.task_masked_linear_double_backward(*cotangents, batch.grad, *arguments)
    wanted = mixed_task_reference.task_masked_linear_double_backward(*cotangents, batch.grad, *arguments)
    for one, other in zip(leaves(got), leaves(wanted)):
        assert_near(one, other, terms_of(batch), "second gradient")
