"""Files that a kill at any moment leaves whole: atomic replacement, checkpoints with a checksum, metrics that can be cut back."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..nn import MaskedLayer
from .folders import sync_folder

MAGIC = b"metamask_ext checkpoint 1\n"
CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"
_DIGEST_LENGTH = 64


class OutputError(RuntimeError):
    """A folder or file of a run cannot be used; the message is one line and names it."""


class CheckpointError(OutputError):
    """A checkpoint is damaged, or of another run."""


def prepare_folder(folder: Path) -> None:
    """Make ``folder`` and its parents, and prove that files can be written there. OutputError if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"out must be a folder that can be written, got {str(folder)!r}: {error.strerror}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes' runs out of ``folder``. The lock is on the folder itself and dies with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"another run is writing to {str(folder)!r} ({error.strerror})") from error
        yield
    finally:
        os.close(descriptor)


def write_atomic(path: Path, *parts: bytes | memoryview) -> None:
    """Replace ``path`` by ``parts``: after a kill it holds the old bytes or the new ones, never a mixture.

    Raises:
        OutputError: the file cannot be written; the old one is still there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write {str(path)!r}: {error.strerror}") from error


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings, containers of them) atomically: a header with the SHA-256, then the bytes."""
    payload = io.BytesIO()
    torch.save(state, payload)
    data = payload.getbuffer()
    write_atomic(path, MAGIC, hashlib.sha256(data).hexdigest().encode() + b"\n", data)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote, with its tensors on the CPU. Nothing in the file is executed (``weights_only``).

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


def name_of(function: Any) -> str:
    """A function's name, or the type of a module or another object that can be called."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__qualname__)


def describe_settings(tasks: Mapping[str, Any], shared: Mapping[str, nn.Parameter], model: nn.Module) -> dict[str, str]:
    """The data and the model, in settings that can be compared: a checksum, a name or a shape each."""
    described = {f"shape of {name}": f"{list(parameter.shape)} {parameter.dtype}" for name, parameter in shared.items()}
    for name, module in model.named_modules():
        if isinstance(module, MaskedLayer):
            described[f"gate of {name or 'the model'}"] = f"{module.gate}, {module.temperature:g}, {module.threshold:g}"
    for name, data in tasks.items():
        if callable(data):
            digest = f"a function, {name_of(data)}"
        else:
            checksum = hashlib.sha256()
            for tensor in data:
                checksum.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
                checksum.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            digest = checksum.hexdigest()
        described[f"data of task {name!r}"] = digest
    return described


def check_same_settings(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """CheckpointError that names the first setting in which the run that wrote ``path`` differs from this one."""
    for key in [*now, *(key for key in then if key not in now)]:
        was, wanted = (repr(settings[key]) if key in settings else "absent" for settings in (then, now))
        if was != wanted:
            raise CheckpointError(
                f"{str(path)!r} is of a run with other settings: {key} was {was}, now {wanted}. Use another folder, or the "
                "same settings"
            )


class MetricsFile:
    """One JSON object a line. ``length`` bytes are kept, what follows them was written after the last checkpoint and is cut off."""

    def __init__(self, path: Path, length: int):
        self.path = path
        try:
            size = path.stat().st_size if path.exists() else 0
            if size < length:
                raise CheckpointError(f"{str(path)!r} has {size} bytes and its checkpoint was made at {length}: lines are missing")
            self._file = open(path, "ab")  # noqa: SIM115  open for as long as the run
            self._file.truncate(length)
        except OSError as error:
            raise OutputError(f"cannot write {str(path)!r}: {error.strerror}") from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line. ValueError if a number in it is not finite: JSON has no such numbers."""
        for key, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} must be finite to be written to {str(self.path)!r}, got {value}")
        with self._errors():
            self._file.write(json.dumps(record).encode() + b"\n")

    def sync(self) -> int:
        """Put all lines on the disk; the length of the file in bytes."""
        with self._errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        with self._errors():
            self._file.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"cannot write {str(self.path)!r}: {error.strerror}") from error


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines that a loop with ``out=folder`` has written, a dict each. OutputError if there are none to read."""
    path = Path(folder) / METRICS
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except OSError as error:
        raise OutputError(f"cannot read {str(path)!r}: {error.strerror}") from error
