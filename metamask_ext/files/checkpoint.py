"""Checkpoints: a state of tensors, numbers and strings in one file, with a checksum; nothing in it is executed."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .atomic import write_atomic
from .errors import CheckpointError

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
        CheckpointError: the file cannot be read, is no checkpoint, or any byte of it changed or is missing.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {str(path)!r}: {error.strerror}") from error
    start = len(MAGIC) + _DIGEST_LENGTH + 1
    payload = memoryview(data)[start:]
    header = MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n"
    if data[:start] != header:
        raise CheckpointError(f"the checkpoint {str(path)!r} is damaged (its checksum is wrong): delete it to start again")
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


def check_same_settings(path: Path, then: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Refuse to continue another run.

    Raises:
        CheckpointError: names the first setting in which the run that wrote ``path`` differs from this one.
    """
    for key in [*now, *(key for key in then if key not in now)]:
        was, wanted = (repr(settings[key]) if key in settings else "absent" for settings in (then, now))
        if was != wanted:
            raise CheckpointError(
                f"{str(path)!r} is of a run with other settings: {key} was {was}, now {wanted}. Use another folder, or the "
                "same settings"
            )
