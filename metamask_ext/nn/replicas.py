"""Copies of a layer that ``torch.nn.DataParallel`` makes in each forward, to run them in other threads on other devices."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_TYPES: dict[type[nn.Module], type[nn.Module]] = {}
"""By the class of a module that of its copies."""


class _Replica(nn.Module):
    """A copy whose parameters, tensors that autograd follows to the original's, are found where a layer looks for its own.

    torch leaves them as plain attributes.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and name not in self._buffers:
            self.__dict__["_parameters"][name] = value
        else:
            super().__setattr__(name, value)


def as_replica(module: nn.Module) -> None:
    """Make ``module``, as torch copied it, ready for its parameters."""
    kind = type(module)
    if kind not in _TYPES:
        _TYPES[kind] = type(kind.__name__, (_Replica, kind), {"__module__": kind.__module__})
    module.__class__ = _TYPES[kind]
