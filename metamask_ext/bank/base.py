"""Fingerprints of the weights that all tasks share: they tell whether a task belongs to a model, also one of another dtype.

A tensor has a SHA-256 in its own dtype and in each narrower one: that of what ``tensor.to(dtype)`` gives. Two tensors are of one
base where they are the same, bit for bit, in the narrower one of their dtypes. So tasks trained beside float32 weights go into
``model.bfloat16()`` and back, and nothing else passes. bfloat16 and float16 are not compared: neither is the narrower one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NARROWER = {
    torch.float64: (torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.bfloat16, torch.float16),
}
_DIGITS = 32


@dataclass(frozen=True)
class Fingerprint:
    """One shared tensor: its shape, its dtype, and the first half of a SHA-256 by dtype."""

    shape: list[int]
    dtype: str
    sha256: dict[str, str]

    @classmethod
    def of(cls, tensor: Tensor) -> Fingerprint:
        """Return that of a tensor."""
        dtypes = (tensor.dtype, *_NARROWER.get(tensor.dtype, ()))
        return cls(list(tensor.shape), _name(tensor.dtype), {_name(dtype): _digest(tensor, dtype) for dtype in dtypes})

    @classmethod
    def read(cls, value: Any) -> Fingerprint:
        """Return what :meth:`described` gave. ValueError if it is something else."""
        found = value if isinstance(value, dict) else {}
        shape, dtype, sha256 = found.get("shape"), found.get("dtype"), found.get("sha256")
        if (
            isinstance(shape, list)
            and all(type(size) is int and size >= 0 for size in shape)
            and isinstance(sha256, dict)
            and all(isinstance(digest, str) for digest in sha256.values())
            and isinstance(dtype, str)
            and dtype in sha256
        ):
            return cls(shape, dtype, sha256)
        raise ValueError(f"a tensor of the base must have a shape, a dtype and its SHA-256, got {value!r:.100}")

    def described(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {"shape": self.shape, "dtype": self.dtype, "sha256": self.sha256}

    def difference(self, tensor: Tensor) -> str | None:
        """Say how a tensor differs from this one; None where it is of the same base."""
        if list(tensor.shape) != self.shape:
            return f"has the shape {list(tensor.shape)}, that of the task {self.shape}"
        own = _name(tensor.dtype)
        narrower = {_name(dtype): dtype for dtype in (tensor.dtype, *_NARROWER.get(tensor.dtype, ()))}
        common = own if own in self.sha256 else self.dtype
        if common not in narrower:
            return f"is {own}, that of the task {self.dtype}"
        if _digest(tensor, narrower[common]) != self.sha256[common]:
            return "has other values" if common == self.dtype == own else f"has other values, compared in {common}"
        return None


def differences(base: Mapping[str, Fingerprint], shared: Mapping[str, Tensor], but: frozenset[str]) -> list[str]:
    """Say how the shared tensors of a model differ from a task's base; ``but``: those of the model that belong to tasks there."""
    found = [f"{name!r} is missing in the model" for name in base if name not in shared]
    found += [f"the model's {name!r} is not in it" for name in shared if name not in base and name not in but]
    for name, fingerprint in base.items():
        if name in shared and (difference := fingerprint.difference(shared[name])) is not None:
            found.append(f"the model's {name!r} {difference}")
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(tensor: Tensor, dtype: torch.dtype) -> str:
    return hashlib.sha256(as_bytes(tensor.detach().to(dtype))).hexdigest()[:_DIGITS]


def as_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor in the order of its elements."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
