"""Finds the masked layers' nodes of a graph, and how often each leaf is used."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction

from metamask_ext.ops.conv2d.autograd import MaskedConv2d
from metamask_ext.ops.linear.autograd import MaskedLinear
from metamask_ext.ops.weight.autograd import MaskedWeight
from metamask_ext.torch_private import function_of

# Where a node's parameters are among its inputs.
_PARAMETERS: dict[type[Function] | None, tuple[int, ...]] = {
    MaskedLinear: (1, 2, 3, 4),
    MaskedConv2d: (1, 2, 3, 4),
    MaskedWeight: (0, 1),
}
Node = Any
"""A node of autograd's graph. Its attributes depend on its function: ``variable`` of a leaf's, ``steps`` of a masked layer's."""


def walk(root: Node) -> tuple[dict[Tensor, int], list[tuple[Node, list[Tensor | None]]]]:
    """Counts the edges to each leaf of the graph, and finds the masked layers' nodes with their parameters (None: no leaf)."""
    uses: dict[Tensor, int] = {}
    nodes = []
    seen, stack = {root}, [root]
    hidden = False
    while stack:
        node = stack.pop()
        # Most nodes are C++'s. A reentrant checkpoint's runs a backward of its own, over a graph that does not exist yet.
        if isinstance(node, BackwardCFunction):
            positions = _PARAMETERS.get(function_of(node))
            if positions is not None:
                nodes.append((node, _leaves(node, positions)))
            hidden = hidden or type(node).__name__ == "CheckpointFunctionBackward"
        for child, _ in node.next_functions:
            if child is None:
                continue
            if type(child).__name__ == "AccumulateGrad":
                uses[child.variable] = uses.get(child.variable, 0) + 1
            elif child not in seen:
                seen.add(child)
                stack.append(child)
    return uses, [] if hidden else nodes


def _leaves(node: Node, positions: tuple[int, ...]) -> list[Tensor | None]:
    """The leaves among the inputs of ``node`` at these positions. What is absent, a bias or its logits, has no edge.

    A bias without logits is left out: the ops that take steps give its gradient.
    """
    edges: dict[int, Node] = dict(enumerate(edge for edge, _ in node.next_functions))
    if positions[-1] not in edges:
        edges.pop(positions[-1] - 1, None)
    inputs: list[Node] = [edges.get(position) for position in positions]
    return [edge.variable if type(edge).__name__ == "AccumulateGrad" else None for edge in inputs]
