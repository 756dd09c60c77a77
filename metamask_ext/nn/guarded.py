"""Tensors that a layer gives to code that reads its weight: computed ones that refuse writes, and ambiguous ones of known shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..ops.checks import stored_as
from ..torch_private import in_transform, tensor_without_memory, tree_leaves, tree_map, without_torch_function

T = TypeVar("T")

METADATA = frozenset(
    ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "retains_grad", "itemsize", "nbytes", "grad_fn")
    + ("dim", "size", "numel", "nelement", "ndimension", "stride", "element_size", "get_device", "storage_offset", "dim_order")
    + (
        "is_floating_point",
        "is_complex",
        "is_signed",
        "is_conj",
        "is_neg",
        "is_contiguous",
        "is_inference",
        "is_pinned",
        "is_shared",
    )
    + ("is_cuda", "is_cpu", "is_meta", "is_mps", "is_xla", "is_xpu", "is_mtia", "is_mkldnn", "is_sparse", "is_sparse_csr")
    + ("is_quantized", "is_nested", "__len__")
)
"""Attributes and methods of a tensor that read no value, and give none that others could be computed from."""
_NEW_LIKE = frozenset(
    ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided", "empty_like", "zeros_like", "ones_like")
    + ("full_like", "rand_like", "randn_like", "randint_like")
)
"""Functions that make other tensors of its shape, dtype or device."""
_OF_TWO = frozenset(("to", "type_as", "is_same_size", "result_type", "expand_as", "view_as", "reshape_as"))
"""Functions that read no value of their second argument."""
_SAME_VALUES = frozenset(
    ("data", "T", "mT", "H", "mH", "real", "detach", "t", "transpose", "swapaxes", "permute", "movedim", "adjoint", "conj")
    + ("view", "reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "expand", "narrow", "select", "__getitem__")
    + ("chunk", "split", "unbind", "contiguous", "clone", "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu")
    + ("cuda", "expand_as", "view_as", "reshape_as", "requires_grad_")
)
"""Attributes and methods whose results hold the tensor's own values: these are guarded as it is."""
_NAMES_OF = {getattr(Tensor, name).__get__: name for name in METADATA | _SAME_VALUES if not callable(getattr(Tensor, name))}
"""The functions behind attributes, with the attributes' names."""
_READ_NO_VALUE = METADATA | _NEW_LIKE | _OF_TWO | _SAME_VALUES | {"__repr__", "__format__"}


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
        if name in ("__deepcopy__", "__reduce_ex__"):  # what is copied or saved is a tensor like any other
            copied: T = getattr(args[0].as_subclass(Tensor), name)(*args[1:])  # type: ignore[attr-defined]  # a ComputedTensor
            return copied
        with without_torch_function():
            result = func(*args, **kwargs)
        several = type(result) in (tuple, list)  # no torch.Size
        if (several or isinstance(result, Tensor)) and (source := _first((args, kwargs))) is not None:
            if several:
                return type(result)(cls._guard(source, part) for part in result)  # type: ignore[attr-defined, call-arg]  # of parts
            return cls._guard(source, result)  # type: ignore[return-value]  # a Tensor in the place of a Tensor
        return result

    @classmethod
    def _guard(cls, source: ComputedTensor, result: object) -> object:
        """A result, or a part of one, which is guarded as ``source`` is if it is a view of that."""
        if isinstance(result, Tensor) and type(result) is not cls and _shares_memory(result, source):
            return cls.of(result, source._words)
        return result


def _first(values: object) -> ComputedTensor | None:
    return next((value for value in tree_leaves(values) if isinstance(value, ComputedTensor)), None)


def _shares_memory(result: Tensor, source: Tensor) -> bool:
    if result.layout != torch.strided or result.device != source.device or result.device.type == "meta":
        return False
    with without_torch_function():
        return result.numel() > 0 and result.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()


class AmbiguousTensor(GuardedTensor):
    """A weight or bias of which a mixed-task batch has several: it has shape, dtype and device; its values are refused.

    So are those of its views and copies, which have their shapes and dtypes. It has no memory of its own: what does not ask
    ``__torch_function__``, as ``torch.tensor(weight)``, is refused too.
    """

    _like: Tensor
    """A tensor that it describes; its values are of no task."""

    @classmethod
    def like(cls, tensor: Tensor, words: str) -> Tensor:
        """Return one of the shape, dtype, device and ``requires_grad`` of ``tensor``."""
        described = tensor.detach()
        if tensor.requires_grad and not in_transform():  # no requires_grad there
            described.requires_grad_()
        guarded = tensor_without_memory(cls, described)
        guarded._words, guarded._like = words, described
        return guarded

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., T], types: Iterable[type], args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> T:
        kwargs = kwargs or {}
        name = _NAMES_OF.get(func) or getattr(func, "__name__", "")
        subject = args[0] if args else kwargs.get("input")
        guarded = [value for value in tree_leaves((args, kwargs)) if isinstance(value, cls)]
        words = guarded[0]._words
        if name not in _READ_NO_VALUE or (name not in _OF_TWO and (len(guarded) > 1 or guarded[0] is not subject)):
            raise RuntimeError(words)
        if name in ("__repr__", "__format__"):
            like = guarded[0]._like
            return f"{list(like.shape)} of {like.dtype} on {like.device}: {words}"  # type: ignore[return-value]
        args, kwargs = tree_map(lambda value: value._like if isinstance(value, cls) else value, (tuple(args), dict(kwargs)))
        result: T = func(*args, **kwargs)
        if name in _SAME_VALUES and isinstance(subject, cls):
            result = tree_map(lambda value: cls.like(value, words) if isinstance(value, Tensor) else value, result)
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own gives any result
        cls, func: object, types: Iterable[type], args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> NoReturn:
        raise RuntimeError(next(value._words for value in tree_leaves((args, kwargs or {})) if isinstance(value, cls)))


def raise_folded(layer: nn.Module, name: str) -> NoReturn:
    """Refuse another Parameter in the place of one that masks apply to."""
    raise RuntimeError(
        f"{name} of this copy of a {type(layer).__name__} is masked; another Parameter in its place would be masked too. For tools "
        "that fold or fuse layers use metamask_ext.merge(model, task) first; to change its values write to them in place; to share "
        "a Parameter, assign it in the original"
    )


def raise_taken(layer: nn.Module, name: str) -> NoReturn:
    """Refuse to have a tensor that depends on the task replaced by parameters that no task owns."""
    raise RuntimeError(
        f"{name} of {type(layer).__name__} depends on the task: prune, weight_norm, spectral_norm and parametrize would take that "
        "of the active one for the parameter. Use metamask_ext.merge(model, task) first"
    )


def refuse_quantised(layer: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """Refuse a quantised tensor in the place of a masked layer's weight or bias: its values cannot be masked, nor trained."""
    stored = None if param is None else stored_as(param)
    if stored is not None:
        raise TypeError(
            f"{name} of {type(layer).__name__} cannot be quantised ({type(param).__name__}, {stored}) below its masks: quantise "
            "what metamask_ext.merge(model, task) gives"
        )
