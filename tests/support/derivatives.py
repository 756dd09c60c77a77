"""Gradients of every order, for tests that compare them with those of plain torch."""

from __future__ import annotations

import torch

from metamask_ext.ops.gate import SIGMOID

NAMES = {0: "sigmoid", 1: "hard"}


def options(gate):
    number, parameter = gate
    return {"gate": NAMES[number], ("temperature" if number == SIGMOID else "threshold"): parameter}


def nested_gradients(function, inputs, order):
    """The gradients of every order up to ``order``, each of a fixed random projection of the one before."""
    generator = torch.Generator().manual_seed(3)
    values, found = function(*inputs), []
    for step in range(order):
        # For all but the last one the graph is needed
        weights = torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values)
        grads = [None] * len(inputs)
        if values.requires_grad:  # the derivative of a constant is zero (the hard gate is linear in each input)
            grads = torch.autograd.grad((values * weights).sum(), inputs, create_graph=step < order - 1, allow_unused=True)
        grads = [torch.zeros_like(tensor) if grad is None else grad for tensor, grad in zip(inputs, grads)]
        found += [grad.detach() for grad in grads]
        values = torch.cat([grad.flatten() for grad in grads])
    return found


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else [tensor for part in result for tensor in flat(part)]
