"""An opened bank on disk, to read."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files.read import parse_json, read_file
from ..nn.names import plain
from .index import INDEX, BankError, BankNotFoundError, File, Index, JsonObject, Task, read_index, regular_file
from .mappings import OF_PROCESS

_CHUNK = 1 << 20


class Store:
    """An opened bank on disk, to read.

    A file is checked (its length and SHA-256) when it is first used. Up to 256 KiB it is then read; larger ones are mapped, as many
    as ``mappings`` allows: their pages are read when a tensor's are touched. Mappings are private: writing to a tensor changes
    neither the file nor what the next call returns. Files may be links to others, as in download caches.

    Other processes may save into the folder meanwhile. Mapped tensors stay valid. If a file is gone at its first use, the store
    reads ``bank.json`` again: it takes the task's new file if the shared weights, ``meta`` and the task's slot are the same, and
    raises :class:`BankError` otherwise. ``tasks`` and ``meta`` stay those of the moment of :meth:`open`.
    """

    def __init__(self, directory: Path, index: Index):
        self.directory = directory
        self._opened = self._index = index
        self._slots = {task.name: slot for slot, task in enumerate(index.tasks) if task is not None}
        self._checked: set[str] = set()
        self.mappings = OF_PROCESS
        """The bound on files that are mapped; what is used beyond it is read into memory."""

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Store:
        """Read and check ``bank.json`` alone: the time does not depend on the size of the tasks.

        Raises:
            BankNotFoundError: no bank is there.
            BankError: ``bank.json`` is damaged or of another format.
        """
        folder = Path(directory).resolve()
        return cls(folder, read_index(folder))

    @property
    def meta(self) -> JsonObject:
        """The bank's description of itself (gate, layers, shapes, ...), as JSON gives it back."""
        return self._opened.meta

    @property
    def tasks(self) -> list[str | None]:
        """The tasks' names by slot; None is a removed slot."""
        return [None if task is None else task.name for task in self._opened.tasks]

    @property
    def shared_sha256(self) -> str:
        """The SHA-256 of the shared weights' file: two banks with the same one have the same weights."""
        return self._opened.shared.sha256

    @property
    def state(self) -> str:
        """Name the state of the folder that was opened: the SHA-256 of ``bank.json``. No two saves have the same one."""
        return self._opened.state

    @property
    def opened(self) -> Index:
        """The index of that state."""
        return self._opened

    @property
    def data(self) -> bytes:
        """The bytes of ``bank.json`` of that state."""
        return self._opened.data

    def is_stale(self) -> bool:
        """Return whether the folder has been saved into since, or holds no bank any more."""
        try:
            return read_index(self.directory).state != self.state
        except BankNotFoundError:
            return True

    def shared(self) -> dict[str, Tensor]:
        """Return the shared weights. BankError if their file is damaged or gone."""
        return self._current(lambda index: self._load(index.shared))

    def task(self, name: str) -> dict[str, Tensor]:
        """Return one task's tensors.

        Raises:
            KeyError: the task is unknown.
            BankError: its file is damaged, gone or of other shared weights.
        """
        slot = self._slot(name)
        return self._current(lambda index: self._load(self._task(index, slot).file, of=index.shared.sha256))

    def exactly(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of a task as it was when the bank was opened.

        Raises:
            KeyError: the task is unknown.
            BankError, FileNotFoundError: its file of that moment is damaged, or gone.
        """
        task = self._opened.tasks[self._slot(name)]
        assert task is not None
        return self._load(task.file, of=self._opened.shared.sha256)

    def entry(self, name: str) -> JsonObject:
        """Return what was saved as the task's ``info``, with ``file`` and ``bytes`` of its file."""
        task = self._task(self._index, self._slot(name))
        return {**task.info, "file": task.file.path, "bytes": task.file.bytes}

    def info(self, name: str) -> JsonObject:
        """Return what was saved as the task's ``info``."""
        return dict(self._task(self._index, self._slot(name)).info)

    def bytes_per_task(self, name: str) -> int:
        """Return the size of the task's file."""
        return self._task(self._index, self._slot(name)).file.bytes

    def path(self, name: str) -> Path:
        """Return the path of the task's file."""
        return self.directory / self._task(self._index, self._slot(name)).file.path

    def verify(self) -> None:
        """Check every file, also those that were checked before. BankError that lists all that are wrong, a line each."""
        problems = []
        self._checked.clear()
        for check in (
            lambda: read_index(self.directory),
            self.shared,
            *(lambda name=name: self.task(name) for name in self._slots),
        ):
            try:
                check()
            except BankError as error:
                problems.append(str(error))
        if problems:
            raise BankError("\n".join(dict.fromkeys(problems)))

    def _slot(self, name: str) -> int:
        name = plain(name)
        if name not in self._slots:
            raise KeyError(f"the bank {str(self.directory)!r} has no task {name!r}, it has {len(self._slots)} others")
        return self._slots[name]

    def _task(self, index: Index, slot: int) -> Task:
        wanted = self._opened.tasks[slot]
        task = index.tasks[slot] if slot < len(index.tasks) else None
        assert wanted is not None
        if task is None or task.name != wanted.name:
            raise self._changed(f"task {wanted.name!r} is no longer in slot {slot}")
        return task

    def _changed(self, what: str) -> BankError:
        return BankError(f"{self.directory / INDEX}: the bank was changed since it was opened: {what}. Open it again")

    def _current(self, load: Callable[[Index], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Call ``load`` with the newest index: a file is deleted only after the commit of an index that does not name it."""
        while True:
            index = self._index
            try:
                return load(index)
            except (FileNotFoundError, NotADirectoryError) as error:
                newer = read_index(self.directory)
                if newer.shared.sha256 != self._opened.shared.sha256:
                    raise self._changed("it has other shared weights") from error
                if newer.meta != self._opened.meta:
                    raise self._changed("it has other settings (meta)") from error
                if newer.data == index.data:
                    raise BankError(f"{error.filename}: missing, and {INDEX} names it") from error
                self._index = newer

    def _load(self, file: File, of: str | None = None) -> dict[str, Tensor]:
        """Return the tensors of ``file``; ``of``: the SHA-256 of the shared weights that it must belong to."""
        path = self.directory / file.path
        try:
            belongs, tensors = self._mapped(path, file) if self.mappings.allows(file.bytes) else _read(path, file)
        except (FileNotFoundError, NotADirectoryError, BankError):
            raise
        except OSError as error:
            raise BankError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (SafetensorError, KeyError, TypeError, ValueError) as error:  # a dtype that safetensors does not know is a KeyError
            raise BankError(f"{path}: not a safetensors file ({error})") from error
        if belongs != of:
            raise BankError(f"{path}: belongs to the shared weights {belongs!s:.100}, the bank has {of}")
        return tensors

    def _mapped(self, path: Path, file: File) -> tuple[str | None, dict[str, Tensor]]:
        try:
            belongs, tensors = self._map(path, file)
        except BaseException:
            self.mappings.give_back()
            raise
        self.mappings.note(tensors.values())
        return belongs, tensors

    def _map(self, path: Path, file: File) -> tuple[str | None, dict[str, Tensor]]:
        if file.path not in self._checked:
            _check(path, file)
            self._checked.add(file.path)
        try:
            with safe_open(path, "pt") as opened:
                belongs = (opened.metadata() or {}).get("shared")
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  not a dict
        except RuntimeError as error:
            # safetensors opens the file, then torch maps it by name: deleted in between, it is a RuntimeError.
            if not path.exists():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
            raise BankError(f"{path}: cannot be mapped: {' '.join(str(error).split())}") from error
        return belongs, tensors


def _read(path: Path, file: File) -> tuple[str | None, dict[str, Tensor]]:
    """Read a file that need not, or may not, be mapped; the bytes that are used are those that are checked."""
    _check_size(path, file, regular_file(path.parent, path.name))
    data = read_file(path, file.bytes)
    _check_size(path, file, len(data))
    _check_sha256(path, file, hashlib.sha256(data))
    tensors = safetensors.torch.load(data)
    # The header is sound by now: 8 bytes of length, then JSON.
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header.get("__metadata__", {}).get("shared"), tensors


def _check(path: Path, file: File) -> None:
    _check_size(path, file, regular_file(path.parent, path.name))
    digest = hashlib.sha256()
    with open(path, "rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    _check_sha256(path, file, digest)


def _check_size(path: Path, file: File, size: int) -> None:
    if size != file.bytes:
        raise BankError(f"{path}: damaged, {size} bytes instead of {file.bytes}")


def _check_sha256(path: Path, file: File, digest: hashlib._Hash) -> None:
    if digest.hexdigest() != file.sha256:
        raise BankError(f"{path}: damaged, its SHA-256 is {digest.hexdigest()} instead of {file.sha256}")
