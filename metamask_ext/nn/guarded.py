"""Tensors that a layer gives to code that reads its weight: computed ones that refuse writes, and ambiguous ones of known shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..torch_private import tree_leaves, without_torch_function

T = TypeVar("T")

_METADATA = frozenset(
    ("dim", "size", "numel", "nelement", "ndimension", "stride", "element_size", "is_floating_point", "is_complex", "is_contiguous")
    + ("get_device", "storage_offset", "type", "__len__", "is_same_size", "result_type", "new_empty", "new_zeros", "new_ones")
    + ("new_full", "new_tensor", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
)
"""Functions that read no value."""
_TO_LIKE = ("to", "type_as")
"""Methods that read no value of their second argument."""
_ATTRIBUTES = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_sparse")
    + ("is_leaf", "is_quantized", "is_mps", "is_xpu", "itemsize", "is_nested")
)
"""Properties that read no value."""


class GuardedTensor(Tensor):
    """A tensor that a layer gave to code that read it, with the layer's words for what it refuses. Results are plain tensors."""

    _words: str

    @classmethod
    def of(cls, tensor: Tensor, words: str) -> Tensor:
        guarded = tensor.as_subclass(cls)
        guarded._words = words
        return guarded


class ComputedTensor(GuardedTensor):
    """A masked weight or bias, computed when it was read: a write to it, or to a view of it, would be lost and is refused."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., T], types: Iterable[type], args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> T:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        target = None
        if (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__") or kwargs.get("inplace") is True:
            target = _first(args[:1] or tuple(kwargs.values())[:1])
        if "out" in kwargs:
            target = target or _first(kwargs["out"])
        if target is not None:
            raise RuntimeError(target._words)
        with without_torch_function():
            result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            source = _first(args)
            if source is not None and type(result) is not cls and _shares_memory(result, source):
                return cls.of(result, source._words)  # type: ignore[return-value]  # a Tensor in the place of a Tensor
        return result


def _first(values: object) -> ComputedTensor | None:
    return next((value for value in tree_leaves(values) if isinstance(value, ComputedTensor)), None)


def _shares_memory(result: Tensor, source: Tensor) -> bool:
    if result.layout != torch.strided or result.device != source.device or result.device.type == "meta":
        return False
    with without_torch_function():
        return result.numel() > 0 and result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()


class AmbiguousTensor(GuardedTensor):
    """A weight or bias of which a mixed-task batch has several: it has shape, dtype and device; its values are refused."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., T], types: Iterable[type], args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> T:
        name = getattr(func, "__name__", "")
        if name in _METADATA or func in _ATTRIBUTES or (name in _TO_LIKE and not isinstance(args[0], cls)):
            with without_torch_function():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(next(value._words for value in tree_leaves((args, kwargs or {})) if isinstance(value, cls)))


def raise_folded(layer: nn.Module, name: str) -> NoReturn:
    """Refuse another Parameter in the place of one that masks apply to."""
    raise RuntimeError(
        f"{name} of this copy of a {type(layer).__name__} is masked; another Parameter in its place would be masked too. For tools "
        "that fold or fuse layers use metamask_ext.merge(model, task) first; to change its values write to them in place; to share "
        "a Parameter, assign it in the original"
    )
