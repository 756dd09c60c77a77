"""Masked layers whose parameters are read as attributes: there they are the masked ones."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor, nn

from ..torch_private import fx_trace, in_dispatch_mode, in_transform, reparametrises, saving_hook, traced_attribute
from .context import AmbiguousTaskError
from .guarded import AmbiguousTensor, ComputedTensor, raise_taken
from .layers import MaskedConv2d, MaskedLinear
from .masked_layer import MaskedLayer, masked_value, masks_name

_TYPES: dict[type[MaskedLayer], type[ReadThrough]] = {}
"""By the class of a masked layer that of one which other code reads."""


class ReadThrough(MaskedLayer):
    """A layer whose masked parameters, read as attributes (``layer.weight``), are those of what is active.

    The parameters themselves, in ``state_dict``, ``parameters()`` and optimisers, are the shared ones as everywhere; torch's own
    methods (``reset_parameters``) work on those too. A write to what was read would fill a temporary, and is refused. In a
    mixed-task batch what is read has a shape, a dtype and a device, and no values.
    """

    plain_type: Any  # its methods run on what _as_plain gives

    def __getattr__(self, name: str) -> Any:
        if name in self._masked_names and masks_name(name) in self.__dict__.get("_modules", ()):
            return _guarded(self, name)
        return super().__getattr__(name)

    def _as_plain(self) -> Any:
        """A layer of the plain class over the same parameters, for the methods of that class."""
        plain = self.plain_type.__new__(self.plain_type)
        plain.__dict__.update(self.__dict__)
        plain._modules = {
            name: child._as_plain() if isinstance(child, ReadThrough) else child for name, child in self._modules.items()
        }
        return plain

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (self.plain_type.extra_repr(self._as_plain()), self._mask_repr())))

    def reset_parameters(self) -> None:
        for name in ("reset_parameters", "_reset_parameters"):
            if hasattr(self.plain_type, name):
                getattr(self.plain_type, name)(self._as_plain())
                break
        self._reset_masks()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # torch asks hasattr(self, name), which computes the masked weight.
        if name in self._masked_names and (param is None or isinstance(param, nn.Parameter)):
            if self._copied_alone:
                self._refuse_folding(name, param)
            self._parameters[name] = param
        else:
            super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        if name in self._masked_names:
            raise_taken(self, name)
        super().__delattr__(name)

    def _parameter(self, name: str) -> Tensor | None:
        return self._parameters[name]


class _Reads(threading.local):
    values: dict[tuple[MaskedLayer, str], _Read] | None = None
    """The tensors that the forward of a layer has read so far; None outside one."""


class _Read(NamedTuple):
    """A masked parameter, what it was computed of, and in which state of torch: in another one it is computed again."""

    of: tuple[object, ...]
    state: tuple[object, ...]
    value: Tensor | None

    def holds(self, of: tuple[object, ...], state: tuple[object, ...]) -> bool:
        return self.state == state and all(one is other for one, other in zip(self.of, of))


_READS = _Reads()


@contextmanager
def reads_kept() -> Iterator[None]:
    """Compute what is read in here once: the forward of a layer of experts reads its weights once for each of them."""
    before, _READS.values = _READS.values, {}
    try:
        yield
    finally:
        _READS.values = before


def _guarded(layer: MaskedLayer, what: str) -> Tensor | None:
    if fx_trace._is_fx_tracing_flag and (traced := traced_attribute(layer, what)) is not None:
        return traced
    if torch.compiler.is_dynamo_compiling():
        return masked_value(layer, what)
    shared, masks = layer._group(what)
    if reparametrises(sys._getframe(2)):
        raise_taken(layer, what)
    if shared is None or masks is None:
        return shared
    if _READS.values is None or in_transform() or in_dispatch_mode():
        return _computed(layer, what, shared)
    active = layer._active()
    logits = active[layer._masked_names.index(what)] if isinstance(active, tuple) else None
    versions = [one._version for one in (shared, logits) if one is not None and not one.is_inference()]
    of = (shared, logits, None if isinstance(active, tuple) else active, saving_hook())
    state = (*versions, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *layer._gate().values())
    found = _READS.values.get((layer, what))
    if found is None or not found.holds(of, state):
        found = _READS.values[layer, what] = _Read(of, state, _computed(layer, what, shared))
    return found.value


def _computed(layer: MaskedLayer, what: str, shared: Tensor) -> Tensor | None:
    try:
        read = masked_value(layer, what)
    except AmbiguousTaskError as error:
        return AmbiguousTensor.like(shared, str(error))
    # A mode, and torch's own subclasses (FakeTensor), know no subclass of ours.
    if read is None or read is shared or type(read) is not Tensor or in_transform() or in_dispatch_mode():
        return read
    return ComputedTensor.of(
        read,
        f"{what} of {type(layer).__name__} is computed from the shared parameter and the active task's mask: a write to it is "
        f"lost. Write to dict(layer.named_parameters())[{what!r}], which all tasks share, or use metamask_ext.merge(model, task)",
    )


def read_through_type(kind: type[MaskedLayer]) -> type[ReadThrough]:
    """The class of a masked layer of class ``kind`` whose ``weight`` other code reads, as ``MultiheadAttention``'s ``out_proj``."""
    if kind not in _TYPES:
        name = f"ReadThrough{kind.__name__.removeprefix('Masked')}"
        _TYPES[kind] = type(name, (_Made, kind), {"masked_type": kind, "__module__": __name__})
    return _TYPES[kind]


class _Made(ReadThrough):
    """The base of these classes, which are made at run time."""

    masked_type: type[MaskedLayer]

    def _shared(self) -> tuple[Tensor | None, Tensor | None]:
        return self._parameters["weight"], self._parameters["bias"]

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        return _new, (self.masked_type,), self.__dict__


def _new(kind: type[MaskedLayer]) -> ReadThrough:
    made = read_through_type(kind)
    return made.__new__(made)


ReadThroughLinear = read_through_type(MaskedLinear)
ReadThroughConv2d = read_through_type(MaskedConv2d)
