"""Compiles functions for a backend, and counts the raw ops in what AOTAutograd hands to its compiler."""

from __future__ import annotations

import contextlib
from collections import Counter

import torch
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.fx import GraphModule

COUNTED = "counted"
"""As aot_eager, with a look at the graphs."""


class Compiled:
    """Compiles a function for ``backend``; None leaves it as it is."""

    def __init__(self, backend: str | None):
        self.ops: Counter[str] = Counter()
        """The raw ops in the graphs of the backend COUNTED."""
        self.backend = aot_autograd(fw_compiler=self._count) if backend == COUNTED else backend

    def __call__(self, function, fullgraph=True, dynamic=False, config=None, **options):
        if self.backend is None:
            return function
        compiled = torch.compile(function, fullgraph=fullgraph, dynamic=dynamic, backend=self.backend, **options)
        if config is None:
            return compiled

        def run(*arguments):
            with torch._dynamo.config.patch(**config):
                return compiled(*arguments)

        return run

    def backward(self):
        """The block in which compiled autograd compiles backwards."""
        if self.backend is None:
            return contextlib.nullcontext()
        return compiled_autograd._enable(torch.compile(backend=self.backend))

    def _count(self, graph, _):
        parts = [part for part in graph.modules() if isinstance(part, GraphModule)]
        self.ops.update(metamask_nodes(*parts))
        return make_boxed_func(graph.forward)


def metamask_nodes(*graphs):
    """The names of the library's ops in these graphs; a composite op's without its digest."""
    for graph in graphs:
        for node in graph.graph.nodes:
            namespace, _, name = str(node.target).partition(".")
            if node.op == "call_function" and namespace == "metamask":
                name = name.removesuffix(".default")
                yield name.rsplit("_", 1)[0] if name.startswith("compiled_") else name
