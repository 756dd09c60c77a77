"""Small banks on disk for the tests, and how two states are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metamask_ext.bank import Store, save

META = {"layers": {"fc": {"weight": [5, 9], "bias": [5], "gate": "hard", "temperature": 1.0, "threshold": 0.0, "dtype": "float32"}}}


def shared(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"fc.weight": torch.randn(5, 9, generator=generator), "fc.bias": torch.randn(5, generator=generator)}


def packed(seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A task as bits: rows of 9 weights are two bytes, the 5 biases are one."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(0, 256, (5, 2), dtype=torch.uint8, generator=generator)
    weight[:, 1] &= 1
    bias = torch.randint(0, 32, (1,), dtype=torch.uint8, generator=generator)
    return {"bits/fc.weight": weight, "bits/fc.bias": bias}, {"packed": True}


def logits(seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"logits/fc.weight": torch.randn(5, 9, generator=generator), "logits/fc.bias": torch.randn(5, generator=generator)}
    return {**tensors, "state/head.weight": torch.randn(2, 5, generator=generator)}, {"packed": False}


def new_bank(folder: Path, names: Sequence[str] = ("a", "b"), meta: dict[str, Any] = META) -> Store:
    """Tasks of bits, seeded by slot."""
    return save(folder, meta, shared(), [(name, packed(slot)) for slot, name in enumerate(names)])


def contents(store: Store) -> dict[str, Any]:
    """All that a bank holds, read from its files."""
    tasks = [None if name is None else (name, store.task(name), store.entry(name)) for name in store.tasks]
    return {"meta": store.meta, "shared": store.shared(), "tasks": tasks}


def files(folder: Path) -> dict[str, bytes]:
    """All files below ``folder`` but the lock."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found.pop("bank.lock", None)
    return found


def read_body(folder: Path) -> dict[str, Any]:
    """``bank.json`` without its version and checksum."""
    body = json.loads((folder / "bank.json").read_bytes())
    return {key: value for key, value in body.items() if key not in ("metamask_bank", "sha256")}


def write_body(folder: Path, body: dict[str, Any]) -> None:
    """Writes as a foreign program that knows the format would: the checksum is right."""
    first, rest = b'{"metamask_bank": 1,\n', json.dumps(body)[1:].encode()
    checksum = hashlib.sha256(first + rest).hexdigest().encode()
    (folder / "bank.json").write_bytes(first + b'"sha256": "%s",\n' % checksum + rest)
