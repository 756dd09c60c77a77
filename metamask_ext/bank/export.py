"""Export of one task of a bank on disk: the state of a plain torch model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.checks import check_pair, nan_flag
from ..ops.gate import resolve_gate
from ..ops.geometry import packed_shape
from ..ops.packed.functional import unpack_mask
from ..ops.weight import reference as weight_reference
from ..torch_private import EXTRA_STATE
from .index import INDEX, BankError
from .per_task import full_name
from .settings import gate_settings, layer_shapes
from .store import Store

BITS, LOGITS, STATE = "bits/", "logits/", "state/"
"""The kinds of a task's tensors: the beginning of their names, which a state_dict name follows."""


def task_state(store: Store, name: str) -> dict[str, Tensor]:
    """Return the state_dict of a plain model that computes what the task does, ``theta = W * g(M)`` in place of masked weights.

    Weights and biases of the layers in ``meta["layers"]`` are masked by the task's bits (``W * bit``) or logits (by the layer's
    gate). Other shared tensors stay as they are, and the task's own state (heads, statistics) takes its place among them.

    Raises:
        KeyError: the bank has no such task.
        BankError: a file is damaged; a mask is missing, does not fit its weight or belongs to none; ``meta`` does not describe
            the layers.
    """
    with torch.inference_mode(False):
        return _task_state(store, name)


def _task_state(store: Store, name: str) -> dict[str, Tensor]:
    shared, task = store.shared(), dict(store.task(name))
    masked = _masked(store)
    of_masks = {full_name(layer, EXTRA_STATE) for layer, _ in masked.values()}  # settings that a plain layer does not have
    state = {key: tensor for key, tensor in shared.items() if key not in of_masks}
    for key, (layer, shape) in masked.items():
        weight = shared.get(key)
        if weight is None or weight.shape != shape:
            got = "none" if weight is None else str(list(weight.shape))
            raise BankError(f"{store.directory / INDEX}: meta says that {key} has the shape {list(shape)}, its weights have {got}")
        bits, logits = task.pop(BITS + key, None), task.pop(LOGITS + key, None)
        if (bits is None) == (logits is None):
            got = "neither" if bits is None else "both"
            raise BankError(f"{store.path(name)}: task {name!r} must have bits or logits for {key}, got {got}")
        try:
            if bits is not None:
                state[key] = weight * _unpack(bits, shape)
            elif logits is not None:
                if bool(nan_flag(logits)):
                    raise ValueError(f"the logits of task {name!r} hold NaN")
                gate = resolve_gate(*gate_settings(store.meta["layers"][layer]))
                check_pair(weight, logits, key, LOGITS + key)
                state[key] = weight_reference.masked_weight(weight, logits, *gate)
        except (TypeError, ValueError) as error:
            raise BankError(f"{store.path(name)}: {key}: {error}") from error
    for key, tensor in task.items():
        if not key.startswith(STATE):
            raise BankError(f"{store.path(name)}: {key!r} of task {name!r} belongs to no masked weight")
        state[key[len(STATE) :]] = tensor
    return state


def _masked(store: Store) -> dict[str, tuple[str, torch.Size]]:
    """Map every masked parameter's state_dict name to its layer's path and its shape."""
    return {
        full_name(path, part): (path, torch.Size(shape))
        for path, shapes in layer_shapes(store.directory / INDEX, store.meta).items()
        for part, shape in shapes.items()
    }


def _unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    packed = list(packed_shape(shape))
    if bits.dtype != torch.uint8 or list(bits.shape) != packed:
        raise ValueError(f"bits must be torch.uint8 {packed} for the shape {list(shape)}, got {bits.dtype} {list(bits.shape)}")
    return unpack_mask(bits, shape)
