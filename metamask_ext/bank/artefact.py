"""One task in one safetensors file, without the weights that it masks: to be sent, kept, and taken in by another bank.

The tensors are named as in a bank's folder (``bits/<name>``, ``logits/<name>``, ``state/<name>``); the file's metadata describe the
task and its base. Nothing in it is executed when it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..files.read import parse_json, read_file
from ..ops.gate import SIXTEEN_BITS
from .base import Fingerprint, as_bytes
from .export import BITS, LOGITS, STATE
from .index import BankError
from .metrics import Metrics
from .settings import LayerSettings, layer_settings, names_per_task

_FORMAT = "1"
_KEY = "metamask_task"


@dataclass(frozen=True)
class Artefact:
    """A task without its base.

    Attributes:
        name: of the task.
        base_name: of what it masks, for people.
        base: the fingerprints of what it masks, by state_dict names.
        meta: the layers and what else belongs to tasks, as ``meta`` of a bank describes them.
        metrics: what was recorded of it.
        card: a text about it, in Markdown.
        tensors: its masks and its own state.
    """

    name: str
    base_name: str
    base: Mapping[str, Fingerprint]
    meta: Mapping[str, Any]
    metrics: Metrics
    card: str
    tensors: Mapping[str, Tensor]

    @property
    def packed(self) -> bool:
        """True if its masks are bits."""
        return not any(key.startswith(LOGITS) for key in self.tensors)

    @property
    def base_sha256(self) -> str:
        """Name the base: the SHA-256 of all its fingerprints."""
        described = {name: fingerprint.described() for name, fingerprint in sorted(self.base.items())}
        return hashlib.sha256(_text(described).encode()).hexdigest()

    def layers(self, path: Path) -> dict[str, LayerSettings]:
        """Return the masked layers by their paths; ``path`` is for messages. BankError if they are not described."""
        return layer_settings(path, dict(self.meta))

    def per_task(self, path: Path) -> dict[str, list[str]]:
        """Return what belongs to tasks beside the masks, by the paths of modules. BankError if it is not described."""
        return names_per_task(path, dict(self.meta))

    def encode(self) -> bytes:
        """Return the bytes of its file."""
        tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in self.tensors.items()}
        described = {
            "name": self.name,
            "base": _text({name: fingerprint.described() for name, fingerprint in sorted(self.base.items())}),
            "base_name": self.base_name,
            "base_sha256": self.base_sha256,
            "meta": _text(self.meta),
            "metrics": _text(self.metrics.described()),
            "card": self.card,
        }
        metadata = {_KEY: _FORMAT, **described, "sha256": _checksum(described, tensors)}
        return safetensors.torch.save(tensors, metadata)


def read(path: Path) -> Artefact:
    """Read and check the file of a task.

    Raises:
        BankError: it is damaged, of another format, or none of a task.
        OSError: it cannot be read; it names the file.
    """
    data = read_file(path)
    try:
        tensors = safetensors.torch.load(data)
        metadata = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BankError(f"{path}: damaged, or not a safetensors file ({error})") from error
    if (version := metadata.get(_KEY)) != _FORMAT:
        if version is None:
            raise BankError(f"{path}: not the file of a task, as MaskBank.save_task writes them")
        raise BankError(f"{path}: format {version!s:.20}, this version of metamask_ext reads format {_FORMAT}")
    described = {key: value for key, value in metadata.items() if key not in (_KEY, "sha256")}
    if metadata.get("sha256") != _checksum(described, tensors):
        raise BankError(f"{path}: damaged (its SHA-256 is not the one written in it)")
    try:
        return _decoded(path, described, tensors)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, BankError):
            raise
        raise BankError(f"{path}: not the file of a task ({type(error).__name__}: {error})") from error


def _decoded(path: Path, described: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Artefact:
    base, meta, metrics = (parse_json(described[key].encode()) for key in ("base", "meta", "metrics"))
    if not isinstance(base, dict) or not isinstance(meta, dict) or not described["name"]:
        raise ValueError("its name, its base or its layers are no such")
    found = Artefact(
        described["name"],
        described["base_name"],
        {name: Fingerprint.read(value) for name, value in base.items()},
        meta,
        Metrics.read(metrics),
        described["card"],
        tensors,
    )
    found.layers(path), found.per_task(path)
    if unknown := sorted(key for key in tensors if not key.startswith((BITS, LOGITS, STATE))):
        raise ValueError(f"{unknown[0]!r} is no tensor of a task")
    for key, tensor in tensors.items():
        if key.startswith(LOGITS) and not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
            raise ValueError(f"{key!r} must be finite numbers")
    return found


def _checksum(described: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(_text(described).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(_text([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def _text(value: object) -> str:
    return json.dumps(value, allow_nan=False, sort_keys=True)


def converted(tensor: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """Return floating-point numbers in another dtype, each rounded once. ValueError where that is no conversion of numbers."""
    if tensor.dtype == dtype:
        return tensor.clone()
    if not (tensor.is_floating_point() and dtype.is_floating_point):
        raise ValueError(f"{key!r} is {tensor.dtype}, and the model has {dtype}")
    result = tensor.to(dtype)
    if dtype in SIXTEEN_BITS and not bool((result.isfinite() == tensor.isfinite()).all()):
        raise ValueError(f"{key!r} has numbers that {dtype} has not")
    return result
