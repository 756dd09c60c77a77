"""One task of a bank on disk as the state of a plain torch model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import check_pair
from ..ops.gate import resolve_gate
from ..ops.weight import reference as weight_reference
from .index import INDEX, BankError
from .store import Store

BITS, LOGITS, STATE = "bits/", "logits/", "state/"
"""What a task's tensors are, by the beginning of their names; a state_dict name follows."""


def task_state(store: Store, name: str) -> dict[str, Tensor]:
    """The state_dict of a plain model that computes what the task does: ``theta = W * g(M)`` in place of every masked weight.

    Weights and biases of the layers in ``meta["layers"]`` are masked by the task's bits (``W * bit``) or logits (by the layer's
    gate). Other shared tensors stay as they are, and the task's own state (heads, statistics) takes its place among them.

    Raises:
        KeyError: the bank has no such task.
        BankError: a file is damaged; a mask is missing, does not fit its weight or belongs to none; ``meta`` does not describe
            the layers.
    """
    shared, task = store.shared(), dict(store.task(name))
    state = dict(shared)
    for key, (layer, shape) in _masked(store).items():
        weight = shared.get(key)
        if weight is None or weight.shape != shape:
            got = "none" if weight is None else str(list(weight.shape))
            raise BankError(f"{store.directory / INDEX}: meta says that {key} has the shape {list(shape)}, its weights have {got}")
        bits, logits = task.pop(BITS + key, None), task.pop(LOGITS + key, None)
        if (bits is None) == (logits is None):
            got = "neither" if bits is None else "both"
            raise BankError(f"{_file(store, name)}: task {name!r} must have bits or logits for {key}, got {got}")
        try:
            if bits is not None:
                state[key] = weight * _unpack(bits, shape)
            elif logits is not None:
                check_pair(weight, logits, key, LOGITS + key)
                gate = resolve_gate(layer["gate"], layer["temperature"], layer["threshold"])
                state[key] = weight_reference.masked_weight(weight, logits, *gate)
        except (KeyError, TypeError, ValueError) as error:
            raise BankError(f"{_file(store, name)}: {key}: {error}") from error
    for key, tensor in task.items():
        if not key.startswith(STATE):
            raise BankError(f"{_file(store, name)}: {key!r} of task {name!r} belongs to no masked weight")
        state[key[len(STATE) :]] = tensor
    return state


def _masked(store: Store) -> dict[str, tuple[Mapping[str, Any], torch.Size]]:
    """Every masked weight's and bias's state_dict name, with its layer's settings and its shape."""
    try:
        return {
            f"{layer}.{part}" if layer else part: (settings, torch.Size(shape))
            for layer, settings in store.meta["layers"].items()
            for part, shape in (("weight", settings["weight"]), ("bias", settings.get("bias")))
            if part == "weight" or shape is not None
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise BankError(f"{store.directory / INDEX}: meta does not describe the masked layers ({error!r})") from error


def _file(store: Store, name: str) -> str:
    return str(store.directory / store.entry(name)["file"])


def _unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Weight k of a row is bit k % 8 of byte k // 8; a vector is one row."""
    length = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
    packed = [*shape[: len(shape) > 1], -(-length // 8)]
    if bits.dtype != torch.uint8 or list(bits.shape) != packed:
        raise ValueError(f"bits must be torch.uint8 {packed} for the shape {list(shape)}, got {bits.dtype} {list(bits.shape)}")
    each = (bits[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return each.flatten(-2)[..., :length].reshape(shape).bool()
