"""The cases of :mod:`support.compiled_cases` for convolutions, mixed-task batches, packed masks and modules."""

from __future__ import annotations

from functools import partial

import torch
from support.compiled_cases import ALL, DOUBLE, TRACED, case, inputs, leaves, loss_and_gradients, ours, plain, plain_gate
from torch import nn

import metamask_ext as mm
from metamask_ext.ops.packed import reference as packed_reference


def draw(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=DOUBLE) for shape in shapes]


def loss_with(function):
    return lambda *tensors: function(*tensors).sin().sum()


def meta_step(loss):
    """The gradients of the loss after a step on the masks."""

    def gradients(x, w, m, b, bm):
        dm, dbm = torch.autograd.grad(loss(x, w, m, b, bm), (m, bm), create_graph=True)
        return torch.autograd.grad(loss(x, w, m - dm, b, bm - dbm), (x, w, m, b, bm))

    return gradients


class PlainLayer(nn.Module):
    """A masked layer in plain torch, with its parameters."""

    def __init__(self, masked):
        super().__init__()
        self.weight, self.bias, self.masks, self.bias_masks = masked.weight, masked.bias, masked.masks, masked.bias_masks

    def forward(self, x):
        mask, bias_mask = (next(iter(masks.parameters())) for masks in (self.masks, self.bias_masks))
        return plain(x, self.weight, mask, self.bias, bias_mask)


def module_of(layer):
    torch.manual_seed(0)
    net = nn.Sequential(mm.nn.MaskedLinear(7, 6, temperature=0.7), nn.Tanh(), mm.nn.MaskedLinear(6, 2, temperature=0.7)).double()
    return net if layer is ours else nn.Sequential(PlainLayer(net[0]), nn.Tanh(), PlainLayer(net[2]))


def called_with(net):
    return lambda parameters, x: torch.func.functional_call(net, parameters, x).sin().sum()


@case("functional_call inside", masked_linear=2, masked_linear_backward=2)
def _(layer, compiled):
    net = module_of(layer)
    given = {name: (tensor.detach() * 1.5).requires_grad_() for name, tensor in net.named_parameters()}
    loss = compiled(called_with(net))(given, inputs()[0])
    return [loss, *torch.autograd.grad(loss, tuple(given.values()))]


@case("func.grad of functional_call inside")
def _(layer, compiled):
    net = module_of(layer)
    given = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    return list(compiled(torch.func.grad(called_with(net)))(given, inputs()[0]).values())


def convolution(layer):
    if layer is ours:
        return lambda x, w, m, b, bm: mm.masked_conv2d(x, w, m, b, bm, padding=1, temperature=0.7)
    return lambda x, w, m, b, bm: nn.functional.conv2d(x, w * plain_gate(m), b * plain_gate(bm), padding=1)


def images(samples=1, size=2, out=80):
    return draw((samples, 8, size, size), (out, 8, 3, 3), (out, 8, 3, 3), (out,), (out,))


PRODUCT = {"im2col": 1, "masked_linear": 1, "masked_linear_backward": 1, "col2im": 1}
PRODUCT_TWICE = {op: 2 for op in (*PRODUCT, "masked_weight_backward", "masked_weight_double_backward")}
MIXED_TWICE = {"task_masked_linear": 2, "task_masked_linear_backward": 3, "task_masked_linear_double_backward": 1}
for kind, sizes, ops, ops_of_both in (
    ("product", {}, PRODUCT, PRODUCT_TWICE),
    ("ordinary", {"samples": 2, "size": 8, "out": 6}, {}, {}),
):

    @case(f"{kind} convolution: backward outside", **ops)
    def _(layer, compiled, sizes=sizes):
        return loss_and_gradients(compiled(loss_with(convolution(layer))), leaves(images(**sizes)))

    @case(f"{kind} convolution: func.grad inside")
    def _(layer, compiled, sizes=sizes):
        return compiled(torch.func.grad(loss_with(convolution(layer)), ALL))(*images(**sizes))

    @case(f"{kind} convolution: a meta-step traced in both orders", **ops_of_both)
    def _(layer, compiled, sizes=sizes):
        return compiled(meta_step(loss_with(convolution(layer))), config=TRACED)(*leaves(images(**sizes)))


@case("product convolution: a dynamic batch", **PRODUCT)
def _(layer, compiled):
    function = compiled(loss_with(convolution(layer)), dynamic=True)
    return [tensor for samples in (5, 4) for tensor in loss_and_gradients(function, leaves(images(samples)))]


SLOTS = torch.tensor([2, 0, 0, 1, 2])


def mixed(layer, slots, as_list=False):
    def with_ours(x, w, m, b, bm):
        masks, bias_masks = (list(m.unbind()), list(bm.unbind())) if as_list else (m, bm)
        return mm.task_masked_linear(x, slots, w, masks, b, bias_masks, temperature=0.7)

    def with_plain(x, w, m, b, bm):
        return torch.einsum("bi,boi->bo", x, w * plain_gate(m)[slots]) + b * plain_gate(bm)[slots]

    return with_ours if layer is ours else with_plain


def of_tasks():
    return draw((5, 7), (6, 7), (3, 6, 7), (6,), (3, 6))


MIXED = {"task_masked_linear": 1, "task_masked_linear_backward": 1}
for form in ("tensor", "list"):

    @case(f"mixed-task: a {form} of masks, backward outside", **MIXED)
    def _(layer, compiled, form=form):
        function = compiled(lambda slots, *tensors: mixed(layer, slots, form == "list")(*tensors).sin().sum())
        return loss_and_gradients(partial(function, SLOTS), leaves(of_tasks()))


@case("mixed-task: func.grad inside")
def _(layer, compiled):
    return compiled(lambda slots, *tensors: torch.func.grad(loss_with(mixed(layer, slots)), ALL)(*tensors))(SLOTS, *of_tasks())


@case("mixed-task: a meta-step traced in both orders", **MIXED_TWICE)
def _(layer, compiled):
    function = compiled(lambda slots, *tensors: meta_step(loss_with(mixed(layer, slots)))(*tensors), config=TRACED)
    return function(SLOTS, *leaves(of_tasks()))


def packed(layer, masks, bias_masks):
    if layer is ours:
        return lambda x, w, b: mm.packed_masked_linear(x, SLOTS, w, masks, b, bias_masks)
    return lambda x, w, b: packed_reference.packed_masked_linear(x, SLOTS, w, [masks], b, [bias_masks], 1)


def of_bits():
    x, w, m, b, bm = of_tasks()
    return [x, w, b], [torch.stack([mm.pack_mask(mask) for mask in masks]) for masks in (m, bm)]


@case("packed: backward outside", packed_masked_linear=1, packed_masked_linear_backward=1)
def _(layer, compiled):
    tensors, masks = of_bits()
    return loss_and_gradients(compiled(loss_with(packed(layer, *masks))), leaves(tensors))


@case("packed: func.grad inside")
def _(layer, compiled):
    tensors, masks = of_bits()
    return compiled(torch.func.grad(loss_with(packed(layer, *masks)), (0, 1, 2)))(*tensors)


@case("packed: the second order traced", packed_masked_linear=3, packed_masked_linear_backward=4)
def _(layer, compiled):
    def second(*tensors):
        grads = torch.autograd.grad(loss_with(packed(layer, *masks))(*tensors), tensors, create_graph=True)
        return torch.autograd.grad(sum(grad.sin().sum() for grad in grads), tensors)

    tensors, masks = of_bits()
    return compiled(second, config=TRACED)(*leaves(tensors))


@case("a list of masked weights")
def _(layer, compiled):
    def loss(w, m, b, bm):
        with_plain = [w * plain_gate(m), b * plain_gate(bm)]
        thetas = mm.masked_weight([w, b], [m, bm], temperature=0.7) if layer is ours else with_plain
        return sum(theta.sin().sum() for theta in thetas)

    return loss_and_gradients(compiled(loss), leaves(inputs()[1:]))
