"""Masked layers whose parameters other code reads past ``forward``: there ``weight`` and ``bias`` are the masked ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor, nn

from ..ops.weight.functional import masked_weight
from ..torch_private import disable_dynamo
from .layers import MaskedConv2d, MaskedLinear
from .masked_layer import MaskedLayer


class _ReadThrough:
    """For a layer whose parameters other code reads past forward: there ``weight`` and ``bias`` are the masked ones.

    The parameters themselves, in ``state_dict``, ``parameters()`` and optimisers, are the shared ones as everywhere; torch's own
    methods (``reset_parameters``) work on those too. Code that fills ``layer.weight`` from outside would fill a temporary.
    """

    _parameters: dict[str, nn.Parameter | None]
    plain_type: Any

    def _as_plain(self) -> Any:
        return SimpleNamespace(**{**self.__dict__, **self._parameters})

    def extra_repr(self) -> str:
        return f"{self.plain_type.extra_repr(self._as_plain())}, {self._mask_repr()}"  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        self.plain_type.reset_parameters(self._as_plain())
        self._reset_masks()  # type: ignore[attr-defined]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # torch asks hasattr(self, name), which computes the masked weight, or raises when no task is active.
        if name in ("weight", "bias") and (param is None or isinstance(param, nn.Parameter)):
            self._parameters[name] = param
        else:
            super().register_parameter(name, param)  # type: ignore[misc]

    def _shared(self) -> tuple[Tensor, Tensor | None]:
        return cast(Tensor, self._parameters["weight"]), self._parameters["bias"]

    @property
    def weight(self) -> Any:
        return _read(self, "weight")  # type: ignore[arg-type]

    @property
    def bias(self) -> Any:
        return _read(self, "bias")  # type: ignore[arg-type]


def _read(layer: MaskedLayer, what: str) -> Any:
    active = layer._active()
    if active is None:
        return _read_in_eager(layer, what)
    if isinstance(active, tuple):
        shared, logits = layer._group(what)[0], active[what == "bias"]
        return None if shared is None else masked_weight(shared, cast(Tensor, logits), **layer._gate())
    return layer._read(what, active)


@disable_dynamo
def _read_in_eager(layer: MaskedLayer, what: str) -> Any:
    return _read(layer, what)


class ReadThroughLinear(_ReadThrough, MaskedLinear):  # type: ignore[misc, override]
    """A MaskedLinear inside a module that reads its ``weight`` (``MultiheadAttention``'s ``out_proj``)."""


class ReadThroughConv2d(_ReadThrough, MaskedConv2d):  # type: ignore[misc, override]
    """A MaskedConv2d inside a module that reads its ``weight``."""
