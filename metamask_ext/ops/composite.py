"""Ops that stand for the kernels in a graph of torch.compile: Dynamo does not look into an op.

Dynamo rewrites an autograd Function that it meets: its backward is traced once, as something that nobody differentiates, and under
``torch.func`` it is dropped. A composite op has no kernel of its own but a Python function, its body, which runs where the graph
runs: in AOTAutograd's trace, where the real engine meets the real Functions and only raw ops remain; with ``backend="eager"`` at
every call. What is to be decided, a Function, a raw op or plain torch, the body decides by the transforms, autocast, grad mode and
tensors of that moment (:func:`metamask_ext.ops.dispatch.is_plain`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from metamask_ext._build import BACKEND, VERSION

_library = torch.library.Library("metamask", "FRAGMENT")
"""The ops are there as long as this is."""
COMPOSITE, UNDER_VMAP = "CompositeImplicitAutograd", "FuncTorchBatched"


def composite_op(schema: str, body: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op ``name(arguments) -> Tensor``, whose name gets the digest of the sources; in a build without kernels the body itself.

    Args:
        schema: as torch.library's. A gate's parameter is a Scalar: with a float each value of a temperature would be compiled.
        body: what runs where the graph runs.
    """
    if BACKEND == "reference":
        return body
    name, arguments = schema.split("(", 1)
    name = f"{name}_{digest()}"
    _library.define(f"{name}({arguments}")
    _library.impl(name, body, COMPOSITE)
    _library.impl(name, body, UNDER_VMAP)  # else vmap would run it once for each sample
    op: Callable[..., Tensor] = getattr(torch.ops.metamask, name).default
    return op


@functools.cache
def digest() -> str:
    """Of the code that bodies run.

    torch keeps on disk what it traced, by the names of the ops in Dynamo's graph. A release whose bodies do something else must
    have other names, or the old one's code runs.
    """
    folder = Path(__file__).parent
    found = hashlib.sha256(f"{VERSION} {BACKEND} ".encode())
    for path in sorted(folder.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]
