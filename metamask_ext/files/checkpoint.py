"""Checkpoints: a state of tensors, numbers and strings in one file, with a checksum; nothing in it is executed."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .atomic import write_atomic
from .errors import CheckpointError
from .read import check_depth, read_file

CHECKPOINT = "checkpoint.pt"
MAGIC = b"metamask_ext checkpoint 1\n"
_DIGEST_LENGTH = 64


def save_checkpoint(path: Path, state: Mapping[str, object]) -> None:
    """Write ``state`` (tensors, numbers, strings, containers of them) atomically: a header with the SHA-256, then the bytes."""
    payload = io.BytesIO()
    torch.save(state, payload)
    data = payload.getbuffer()
    write_atomic(path, MAGIC, hashlib.sha256(data).hexdigest().encode() + b"\n", data)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote, with its tensors on the CPU. Nothing in the file is executed (``weights_only``).

    Raises:
        CheckpointError: the file cannot be read, is no checkpoint, any byte of it changed or is missing, or a program has put
            other contents under a right checksum. What the state holds, the caller checks, before it changes anything.
    """
    try:
        data = read_file(path)
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {str(path)!r}: {error.strerror}") from error
    start = len(MAGIC) + _DIGEST_LENGTH + 1
    payload = memoryview(data)[start:]
    header = MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n"
    if data[:start] != header:
        raise CheckpointError(f"the checkpoint {str(path)!r} is damaged (its checksum is wrong): delete it to start again")
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        check_depth(state)
    except Exception as error:  # torch's reader has no error of its own for bytes that it cannot read
        reason = str(error).strip().partition("\n")[0][:200]
        raise not_ours(path, f"{type(error).__name__}: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise not_ours(path, f"it holds {type(state).__name__}, not a dict of names")
    return state


def not_ours(path: Path, why: str) -> CheckpointError:
    """Make the error for a checkpoint whose checksum is right and whose contents cannot be."""
    advice = "Use another folder, or delete it to start again"
    return CheckpointError(f"the checkpoint {str(path)!r} cannot be of this run: {why}. {advice}")


def is_plain(tensor: Tensor, like: Tensor | None = None) -> bool:
    """Return whether ``tensor`` is on the CPU, and dense: each element has its place, unless those of ``like`` lie the same way."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    # torch keeps strides only where no elements overlap and none are left out.
    dense = tensor.stride() == torch.empty_like(tensor, device="meta").stride()
    return dense or (like is not None and like.layout == torch.strided and tensor.stride() == like.stride())


def take_over_state_dict(path: Path, given: object, model: nn.Module) -> None:
    """Load a state dict, unless ``model`` cannot take it over whole: torch's ``load_state_dict`` changes it before it complains.

    Raises:
        CheckpointError: it is none, or a tensor is missing, too much, of another shape or dtype, not dense, not on the CPU, or
            holds NaN. Nothing has changed.
    """
    own = model.state_dict()
    if not isinstance(given, dict) or given.keys() != own.keys():
        raise not_ours(path, "its model has other tensors")
    for name, wanted in own.items():
        tensor = given[name]
        if not isinstance(tensor, Tensor) or (tensor.dtype, tensor.shape) != (wanted.dtype, wanted.shape):
            got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise not_ours(path, f"{name} must be {wanted.dtype} {list(wanted.shape)}, got {got}")
        if not is_plain(tensor, wanted):
            raise not_ours(path, f"{name} must be a dense tensor on the CPU")
        if bool(tensor.isnan().any()):
            raise not_ours(path, f"{name} holds NaN")
    model.load_state_dict(given)


def check_same_settings(path: Path, then: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Refuse to continue another run.

    Raises:
        CheckpointError: names the first setting in which the run that wrote ``path`` differs from this one.
    """
    for key in [*now, *(key for key in then if key not in now)]:
        was, wanted = (repr(settings[key]) if key in settings else "absent" for settings in (then, now))
        if was != wanted:
            change = f"{key} was {was:.500}, now {wanted:.500}"
            raise CheckpointError(
                f"{str(path)!r} is of a run with other settings: {change}. Use another folder, or the same settings"
            )
