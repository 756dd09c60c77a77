"""Masked layers whose parameters other code reads past ``forward``: there ``weight`` and ``bias`` are the masked ones."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.weight.functional import masked_weight
from ..torch_private import disable_dynamo, fx_trace, in_dispatch_mode, in_transform, reparametrises, traced_attribute
from .context import AmbiguousTaskError
from .given import GivenTasks
from .guarded import AmbiguousTensor, ComputedTensor, raise_taken, refuse_quantised
from .layers import MaskedConv2d, MaskedLinear
from .masked_layer import MaskedLayer


class ReadThrough(MaskedLayer):
    """For a layer whose parameters other code reads past forward: there ``weight`` and ``bias`` are the masked ones.

    The parameters themselves, in ``state_dict``, ``parameters()`` and optimisers, are the shared ones as everywhere; torch's own
    methods (``reset_parameters``) work on those too. A write to what was read would fill a temporary, and is refused. In a
    mixed-task batch what is read has a shape, a dtype and a device, and no values.
    """

    plain_type: Any  # its methods run on what _as_plain gives

    def _as_plain(self) -> Any:
        """A layer of the plain class over the same parameters, for the methods of that class."""
        plain = self.plain_type.__new__(self.plain_type)
        plain.__dict__.update(self.__dict__)
        return plain

    def extra_repr(self) -> str:
        return f"{self.plain_type.extra_repr(self._as_plain())}, {self._mask_repr()}"

    def reset_parameters(self) -> None:
        self.plain_type.reset_parameters(self._as_plain())
        self._reset_masks()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # torch asks hasattr(self, name), which computes the masked weight.
        if name in ("weight", "bias") and (param is None or isinstance(param, nn.Parameter)):
            if self._copied_alone:
                self._refuse_folding(name, param)
            refuse_quantised(self, name, param)
            self._parameters[name] = param
        else:
            super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        if name in ("weight", "bias"):
            raise_taken(self, name)
        super().__delattr__(name)

    def _shared(self) -> tuple[Tensor, Tensor | None]:
        return cast(Tensor, self._parameters["weight"]), self._parameters["bias"]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # computed, not assigned
        return cast(Tensor, _guarded(self, "weight"))

    @property
    def bias(self) -> Tensor | None:
        return _guarded(self, "bias")


def _guarded(layer: MaskedLayer, what: str) -> Tensor | None:
    if fx_trace._is_fx_tracing_flag and (traced := traced_attribute(layer, what)) is not None:
        return traced
    if torch.compiler.is_dynamo_compiling():
        return _read(layer, what)
    shared = layer._group(what)[0]
    if reparametrises(sys._getframe(2)):
        raise_taken(layer, what)
    try:
        read = _read(layer, what)
    except AmbiguousTaskError as error:
        return None if shared is None else AmbiguousTensor.like(shared, str(error))
    # A mode, and torch's own subclasses (FakeTensor), know no subclass of ours.
    if read is None or read is shared or type(read) is not Tensor or in_transform() or in_dispatch_mode():
        return read
    return ComputedTensor.of(
        read,
        f"{what} of {type(layer).__name__} is computed from the shared parameter and the active task's mask: a write to it is "
        f"lost. Write to dict(layer.named_parameters())[{what!r}], which all tasks share, or use metamask_ext.merge(model, task)",
    )


def _read(layer: MaskedLayer, what: str) -> Tensor | None:
    active = layer._active()
    if active is None:
        return _read_in_eager(layer, what)
    if isinstance(active, tuple):
        shared, logits = layer._group(what)[0], active[what == "bias"]
        return None if shared is None else masked_weight(shared, cast(Tensor, logits), **layer._gate())
    assert not isinstance(active, GivenTasks)  # only layers that nobody reads past forward are given some
    return layer._read(what, active)


@disable_dynamo
def _read_in_eager(layer: MaskedLayer, what: str) -> Tensor | None:
    return _read(layer, what)


class ReadThroughLinear(ReadThrough, MaskedLinear):  # type: ignore[misc, override]  # computed, not assigned
    """A MaskedLinear inside a module that reads its ``weight`` (``MultiheadAttention``'s ``out_proj``)."""


class ReadThroughConv2d(ReadThrough, MaskedConv2d):  # type: ignore[override]  # computed, not assigned
    """A MaskedConv2d inside a module that reads its ``weight``."""


_READ: dict[type[MaskedLayer], type[MaskedLayer]] = {MaskedLinear: ReadThroughLinear, MaskedConv2d: ReadThroughConv2d}


def read_through_type(kind: type[MaskedLayer]) -> type[MaskedLayer] | None:
    """The class that a masked layer of class ``kind`` has where other code reads its weight; None if there is none."""
    return kind if issubclass(kind, ReadThrough) else _READ.get(kind)
