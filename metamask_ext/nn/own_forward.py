"""Modules of which some parameters are masked, and whose own forward reads them."""

from __future__ import annotations

from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from ..torch_private import in_transform
from .each_task import Call, Place
from .grouped import GroupedLayer
from .read_through import ReadThrough, reads_kept
from .selection import GivenMasks, MarkedBatch, TaskBatch

_TYPES: dict[type[nn.Module], type[OwnForward]] = {}
"""By the class of a plain module that of the masked one."""

_SAMPLE_DIMS = {
    nn.Linear: 1,
    **dict.fromkeys((nn.Conv1d, nn.ConvTranspose1d), 2),
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d), 3),
    **dict.fromkeys((nn.Conv3d, nn.ConvTranspose3d), 4),
}
"""Of layers, the dimensions of the input of one sample."""


class OwnForward(ReadThrough, GroupedLayer):
    """A module that runs the forward of its plain class, in which the masked parameters read as ``W * g(M)``.

    That may pad as TensorFlow does, standardise or cast a weight, or have other parameters than a layer's (``in_proj_weight``). In
    a mixed-task batch the samples of each task run by themselves, one task after another.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        # The class is made at run time.
        return _new, (self.plain_type,), self.__dict__

    has_tokens = False
    """True for experts: all their arguments have one row a token, and the output too."""

    def _divided(self, batch: TaskBatch, *inputs: Any, **options: Any) -> tuple[TaskBatch, Call]:
        if not self.has_tokens:
            return super()._divided(batch, *inputs, **options)
        places: dict[Place, Any] = dict(enumerate(inputs))
        places.update(options)
        dims = {place: 0 for place, value in places.items() if isinstance(value, Tensor)}
        if isinstance(batch, MarkedBatch) and dims:
            batch = batch.fitting(self, places[next(iter(dims))], 0)
        sizes = {tuple(places[place].shape[:1]) for place in dims}
        if sizes != {(batch.size,)}:
            raise RuntimeError(
                f"{type(self).__name__} was called with {sorted(sizes)} rows inside a using_task block that names a task for each "
                f"of {batch.size} samples: it does not know whose token a row is. Call metamask_ext.nn.split_by_task(module) for "
                "the module around it, whose input has the samples first"
            )
        return batch, Call(inputs, options, dims)

    def _run(self, *inputs: Any, **options: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self.plain_type.forward(self, *inputs, **options)
        with reads_kept():
            return self.plain_type.forward(self, *inputs, **options)


_OF_ATTENTION = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")


class OwnAttention(OwnForward):
    """A :class:`torch.nn.MultiheadAttention` with masked projections."""

    def _run(self, *inputs: Any, **options: Any) -> Any:
        is_torchs = self.plain_type.forward is nn.MultiheadAttention.forward and not torch.compiler.is_dynamo_compiling()
        if not is_torchs or not (in_transform() or isinstance(self._active(), GivenMasks)):
            return super()._run(*inputs, **options)
        # A meta-learner differentiates twice. Neither the fast path, which does not see that what a transform gives it is to be
        # differentiated, nor the fused product, which runs without weights, has such derivatives. The fast path is for self-
        # attention alone, which torch knows by the identity of query and key.
        given = {**dict(zip(_OF_ATTENTION, inputs)), **options}
        if given["query"] is given["key"]:
            given["query"] = given["query"].view_as(given["query"])
        output, weights = super()._run(**{**given, "need_weights": True})
        return output, weights if given.get("need_weights", True) else None

    def _divided(self, batch: TaskBatch, *inputs: Any, **options: Any) -> tuple[TaskBatch, Call]:
        if self.plain_type.forward is not nn.MultiheadAttention.forward:
            return super()._divided(batch, *inputs, **options)
        return self._divide_attention(batch, *inputs, **options)

    def _divide_attention(
        self,
        batch: TaskBatch,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[TaskBatch, Call]:
        batch_first: bool = self.batch_first
        dim = 0 if batch_first else 1
        if batch.dim != dim and batch.differs:
            raise RuntimeError(
                f"{type(self).__name__} has batch_first={batch_first} and attends along dimension {1 - dim} of its input: the "
                f"samples of a mixed-task batch must lie along dimension {dim}, and using_task was given batch_dim={batch.dim}"
            )
        for tensor in (query, key, value):
            batch = batch.along(dim).fitting(self, tensor, 2 - dim)
        inputs = [query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal]
        dims: dict[Place, int] = {0: dim, 1: dim, 2: dim}
        rows: dict[Place, int] = {}
        if key_padding_mask is not None:
            dims[3] = 0
        if attn_mask is not None and attn_mask.dim() == 3:
            dims[5], rows[5] = 0, self.num_heads
        return batch, Call(inputs, {}, dims, (dim, 0), rows)


def own_forward_type(kind: type[nn.Module]) -> type[OwnForward]:
    """The class that a module of class ``kind`` gets when parameters of it are masked, and its own forward reads them."""
    if kind not in _TYPES:
        base = OwnAttention if issubclass(kind, nn.MultiheadAttention) else OwnForward
        attributes: dict[str, object] = {"plain_type": kind}
        for layer, sample_dim in _SAMPLE_DIMS.items():
            if issubclass(kind, layer):
                attributes |= {"sample_dim": sample_dim, "stacks_tasks": True}
        _TYPES[kind] = type(f"Masked{kind.__name__}", (base, kind), attributes)
    return _TYPES[kind]


def _new(kind: type[nn.Module]) -> OwnForward:
    made = own_forward_type(kind)
    return made.__new__(made)
