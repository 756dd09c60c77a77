"""Saving a bank: safetensors files named by their contents, and ``bank.json``, whose rename commits a save.

::

    bank.json                          index: format version, SHA-256 of every file and of itself (see index.py)
    bank.lock                          locked by the process that writes
    shared-<hash>.safetensors          the shared weights, by state_dict name
    tasks/<name>-<hash>.safetensors    one task's bits or logits and its own state

No file is ever changed: a save writes new ones under other names, then replaces ``bank.json``, then deletes the files that it
names no more. So a reader never sees half a save, and what it has mapped stays as it was.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TypeAlias

import safetensors.torch
import torch
from torch import Tensor

from ..files.atomic import TEMPORARY, sync, write_temporary
from ..files.lock import locked
from ..files.read import read_file
from ..nn.names import check_name
from .index import (
    INDEX,
    SHARED_FILE,
    TASK_FILE,
    TASKS,
    BankError,
    File,
    Index,
    Task,
    decode,
    encode,
    read_index,
    regular_file,
    shared_path,
    task_path,
)
from .store import Store

LOCK = "bank.lock"
_ROOT_FILES = re.compile(rf"({SHARED_FILE.pattern}|{re.escape(INDEX)})({TEMPORARY})?")
_TASK_FILES = re.compile(rf"{TASK_FILE.pattern}({TEMPORARY})?")

DTYPES = frozenset(
    {
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    }
)
"""The dtypes that safetensors can hold."""

TaskSource: TypeAlias = (
    tuple[Mapping[str, Tensor], Mapping[str, object]] | tuple[Store, str] | tuple[Store, str, Mapping[str, object]]
)
"""A task to save: its tensors and its info, or an opened store and the name of the task there, perhaps with other info."""

Slots: TypeAlias = Sequence[tuple[str, TaskSource] | None]
"""The tasks to save by slot, each with its name; None where one was removed."""


def save(
    directory: str | os.PathLike[str],
    meta: Mapping[str, object],
    shared: Mapping[str, Tensor],
    tasks: Slots,
    *,
    seen: Collection[str] | None = None,
    committing: Callable[[str], object] = lambda state: None,
) -> Store:
    """Make the folder hold this bank, whatever it held before. Files whose contents are there already are not written again.

    After a kill at any moment, and after a power failure if the disk has kept what it said was synced, the folder holds the old
    bank or the new one, whole. When this returns, the new one is on the disk (fsync). One process writes at a time; a second one is
    refused at once. Files that no ``bank.json`` names, left by killed saves, are deleted; files with names that no bank gives stay.

    Args:
        directory: the folder; it and its parents are made if they are not there.
        meta: anything that JSON holds; tuples come back as lists.
        shared: the shared weights; any device and layout in memory, tensors may share memory (each is then stored by itself).
        tasks: by slot, None for a removed one: the name, and either tensors and info (a JSON object without the keys ``file`` and
            ``bytes``), or a reference ``(store, name)`` to an unchanged task of an opened bank, perhaps with other info
            ``(store, name, info)``. A reference into this folder costs
            no reading and no writing, unless ``shared`` has changed: a file says which shared weights it belongs to.
        seen: the states of the folder (:attr:`Store.state`) that may be replaced, compared under the lock of the commit: no save of
            others is undone unseen. None: any. A folder without a bank may always be written to.
        committing: called with the new state just before it is committed: where this raises then, the folder may hold it.

    Returns:
        The bank, opened. Later references into this folder must be to this one: it knows the newest state.

    Raises:
        BankError: another process is writing, or the folder cannot be locked; it holds a state that is not in ``seen``; its
            ``bank.json`` is damaged (delete it to start anew); a referenced file is damaged or missing; a reference into this
            folder is from a store opened before the last save, which would be undone.
        TypeError, ValueError: a task's name, tensor, info or ``meta`` cannot be stored, or a name occurs twice.
        OSError: the files cannot be written (disk full); it names the file. The old bank is whole, and what was written is removed.
    """
    tasks = [None if task is None else (check_name(task[0]), task[1]) for task in tasks]
    for name, count in Counter(task[0] for task in tasks if task is not None).items():
        if count > 1:
            raise ValueError(f"tasks must have different names, got {name!r} {count} times")
    folder = Path(directory).resolve()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        sync(path.parent)
    with locked_bank(folder):
        if (folder / TASKS).is_symlink():
            raise BankError(
                f"{folder / TASKS}: a symbolic link, through which nothing is written: save into a folder of its own, or put a "
                "folder in its place"
            )
        before = _committed(folder)
        if before is not None and seen is not None and before.state not in seen:
            raise BankError(
                f"{folder / INDEX}: holds commit {before.commit}, which this bank has not seen: another saved here. Load it, or "
                "save with overwrite=True to replace it"
            )
        _sweep(folder, before)
        try:
            index = _Writer(folder, before, committing).commit(meta, shared, tasks)
        except BaseException:
            # Where the last fsync failed, the rename of bank.json may be on the disk or not: the files of both states stay.
            # Where this fails too, the error above is the one to know, and the next save deletes what is left.
            with suppress(OSError, BankError):
                _sweep(folder, before, _committed(folder))
            raise
        with suppress(OSError):  # the bank is saved, and the next save deletes what is left
            _sweep(folder, index)
    return Store(folder, index)


def locked_bank(folder: Path) -> AbstractContextManager[None]:
    """Keep other writers out of the bank during the block. Readers need no lock.

    The lock is a file of its own, because NFS locks no folders; it stays, because deleting it would be a race.

    Raises:
        BankError: another process is writing.
    """
    path = folder / LOCK

    def refuse(error: OSError) -> BankError:
        if isinstance(error, BlockingIOError):
            return BankError(f"{path}: another process is writing to this bank; try again when it is done")
        return BankError(f"{path}: cannot be locked: {error.strerror}")

    return locked(path, refuse, create=True)


def _committed(folder: Path) -> Index | None:
    return read_index(folder) if (folder / INDEX).exists() else None


def _sweep(folder: Path, *keep: Index | None) -> None:
    """Delete the files whose names a bank gives and no index in ``keep`` names."""
    named = {INDEX}.union(*(index.paths() for index in keep if index is not None))
    for below, pattern in (("", _ROOT_FILES), (f"{TASKS}/", _TASK_FILES)):
        if (folder / below).is_dir():
            for name in os.listdir(folder / below):
                if pattern.fullmatch(below + name) and below + name not in named:
                    os.unlink(folder / below / name)


class _Writer:
    """Makes one save: files under temporary names first, then their renames, then that of ``bank.json``."""

    def __init__(self, folder: Path, before: Index | None, committing: Callable[[str], object]):
        self.folder = folder
        self.committing = committing
        self.before = before
        self.present = set() if before is None else before.paths()
        self.new: dict[str, Path] = {}
        """The temporary names of new files by their own, in order, each once: two tasks may have one file."""

    def commit(self, meta: Mapping[str, object], shared: Mapping[str, Tensor], tasks: Slots) -> Index:
        """Write what is new, then ``bank.json``; return the new index."""
        (self.folder / TASKS).mkdir(exist_ok=True)
        file = self._add(shared_path, serialise("shared", shared, None))
        entries = [None if task is None else self._task(file.sha256, *task) for task in tasks]
        commit = 0 if self.before is None else self.before.commit + 1
        data = encode(commit, meta, file, entries)
        index = decode(self.folder / INDEX, data)

        # All written before the first is synced: the file system then has many to put on the disk at once.
        for temporary in self.new.values():
            sync(temporary)
        for path, temporary in self.new.items():
            os.replace(temporary, self.folder / path)
        sync(self.folder / TASKS)
        sync(self.folder)
        self._write(INDEX, data)
        sync(self.new[INDEX])
        self.committing(index.state)
        os.replace(self.new[INDEX], self.folder / INDEX)
        sync(self.folder)
        return index

    def _task(self, shared: str, name: str, data: TaskSource) -> Task:
        if isinstance(data[0], Store):
            store, source, *other = data
            info = dict(other[0]) if other else store.info(source)
            if store.directory == self.folder:
                if self.before is None or store.state != self.before.state:
                    raise BankError(f"{self.folder / INDEX}: was saved again since this bank was opened. Open it again")
                if shared == store.shared_sha256:
                    kept = store._task(self.before, store._slot(source))
                    return Task(name, self._kept(kept.file), info if other else kept.info)
            # Checked again: a file damaged since its first use must not get a new checksum.
            store = Store(store.directory, store._opened)
            tensors: Mapping[str, Tensor] = store.task(source)
            if not other:
                info = store.info(source)
        else:
            tensors, info = data[0], dict(data[1])
            if reserved := sorted({"file", "bytes"} & info.keys()):
                raise ValueError(f"the info of task {name!r} must not have the key {reserved[0]!r}")
        serialised = serialise(f"task {name!r}", tensors, shared)
        return Task(name, self._add(lambda sha256: task_path(name, sha256), serialised), info)

    def _kept(self, file: File) -> File:
        """Keep a file of the committed bank. A link is replaced by a file of the folder's own: its target may go away."""
        try:
            size = regular_file(self.folder, file.path)
            if size == file.bytes and (self.folder / file.path).is_symlink() and file.path not in self.new:
                data = read_file(self.folder / file.path)
                if hashlib.sha256(data).hexdigest() != file.sha256:
                    raise BankError(f"{self.folder / file.path}: damaged, its SHA-256 is not {file.sha256}")
                self._write(file.path, data)
        except FileNotFoundError as error:
            raise BankError(f"{self.folder / file.path}: missing, and {INDEX} names it") from error
        if size != file.bytes:
            raise BankError(f"{self.folder / file.path}: damaged, {size} bytes instead of {file.bytes}")
        return file

    def _add(self, name: Callable[[str], str], data: bytes) -> File:
        """Write ``data``, unless the committed bank has it. (What a killed save left is not used: it may not be synced.)"""
        sha256 = hashlib.sha256(data).hexdigest()
        file = File(name(sha256), sha256, len(data))
        if file.path not in self.new and not (file.path in self.present and self._holds(file.path, data)):
            self._write(file.path, data)
        return file

    def _holds(self, path: str, data: bytes) -> bool:
        """Compare a file with ``data``: a damaged one is mended by saving the task again, a link replaced."""
        try:
            own = not (self.folder / path).is_symlink()
            return own and regular_file(self.folder, path) == len(data) and read_file(self.folder / path) == data
        except FileNotFoundError:
            return False

    def _write(self, path: str, data: bytes) -> None:
        self.new[path] = write_temporary(self.folder / path, data, synced=False)


def serialise(owner: str, tensors: Mapping[str, Tensor], shared: str | None) -> bytes:
    """Return the bytes of a safetensors file; ``shared`` is the SHA-256 of the shared weights that it belongs to."""
    prepared: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise ValueError(f"{owner}: a tensor's name must be a string, and not '__metadata__', got {name!r}")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.dtype not in DTYPES:
            kind = f"{tensor.layout}, {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{owner}: {name!r} must be a dense tensor of a dtype that safetensors can hold, got {kind}")
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        # safetensors refuses tensors in one memory, such as tied weights.
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        prepared[name] = tensor
    return safetensors.torch.save(prepared, None if shared is None else {"shared": shared})
