"""``bank.json``, the index of a bank's folder, with the SHA-256 of every file and of itself.

The text is JSON. Its first two lines have a fixed form, so that the checksum covers every other byte of the file and a reader
knows the format's version before it trusts anything else::

    {"metamask_bank": 1,
    "sha256": "<of the first line and of all that follows this one>",
    "commit": 7, "meta": {...}, "shared": {"file": ..., "sha256": ..., "bytes": ...},
    "tasks": [{"name": ..., "file": ..., "sha256": ..., "bytes": ..., "info": {...}}, null, ...]}

``null`` is a removed slot. ``commit`` counts the saves: two states of a folder never have the same text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from ..files.read import MAX_BYTES, parse_json, read_file, regular_size
from ..nn.names import escape

INDEX, TASKS = "bank.json", "tasks"

_FORMAT = 1
_FIRST_LINE = f'{{"metamask_bank": {_FORMAT},\n'.encode()
_ANY_FIRST_LINE = re.compile(rb'\{"metamask_bank": (\d{1,9}),\n')

_HASH_DIGITS = 32  # 128 bits in a file's name; bank.json has all 256
_READABLE = 64  # characters of a task's name in its file's name: with the rest under 143 bytes, the least that file systems allow
SHARED_FILE = re.compile(r"shared-([0-9a-f]{32})\.safetensors")
TASK_FILE = re.compile(r"tasks/[a-z0-9_%-]{1,64}-([0-9a-f]{32})\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


JsonObject: TypeAlias = dict[str, Any]
"""An object as ``json.loads`` returns it."""


class BankError(ValueError):
    """A bank's folder is damaged, not of this format, or in use. The message names the file and what is wrong."""


class BankNotFoundError(BankError, FileNotFoundError):
    """There is no bank in the folder."""


@dataclass(frozen=True)
class File:
    """One safetensors file of a bank; ``path`` is relative to the folder."""

    path: str
    sha256: str
    bytes: int

    def described(self) -> JsonObject:
        """Return the entry in ``bank.json``."""
        return {"file": self.path, "sha256": self.sha256, "bytes": self.bytes}


@dataclass(frozen=True)
class Task:
    """One task of a bank: its file, and what was saved as its ``info``."""

    name: str
    file: File
    info: JsonObject


@dataclass(frozen=True)
class Index:
    """The contents of one ``bank.json``."""

    commit: int
    meta: JsonObject
    shared: File
    tasks: Sequence[Task | None]
    data: bytes = field(repr=False)

    @cached_property
    def state(self) -> str:
        """Name this state of the folder: the SHA-256 of ``bank.json``."""
        return hashlib.sha256(self.data).hexdigest()

    def paths(self) -> set[str]:
        """Collect the files that the index names."""
        return {self.shared.path, *(task.file.path for task in self.tasks if task is not None)}


def shared_path(sha256: str) -> str:
    """Name the file of shared weights with this checksum."""
    return f"shared-{sha256[:_HASH_DIGITS]}.safetensors"


def task_path(name: str, sha256: str) -> str:
    """Name the file of a task, in lower case: a file system that ignores case would mix up two names. The hash tells them apart."""
    readable = re.sub(r"%[0-9a-f]?$", "", escape(name).lower()[:_READABLE])
    return f"{TASKS}/{readable}-{sha256[:_HASH_DIGITS]}.safetensors"


def encode(commit: int, meta: Mapping[str, object], shared: File, tasks: Sequence[Task | None]) -> bytes:
    """Return the bytes of ``bank.json``. TypeError or ValueError if ``meta`` or a task's info is not JSON."""
    listed = [None if task is None else {"name": task.name, **task.file.described(), "info": task.info} for task in tasks]
    body = {"commit": commit, "meta": dict(meta), "shared": shared.described(), "tasks": listed}
    rest = json.dumps(body, allow_nan=False)[1:].encode() + b"\n"
    return _FIRST_LINE + _checksum_line(rest) + rest


def _checksum_line(rest: bytes) -> bytes:
    return f'"sha256": "{hashlib.sha256(_FIRST_LINE + rest).hexdigest()}",\n'.encode()


def read_index(directory: Path) -> Index:
    """Read and check ``bank.json``, which may be a link: download caches make them.

    Raises:
        BankNotFoundError: there is none.
        BankError: it cannot be read, a byte of it changed or is missing, it is of another format, larger or more deeply nested than
            any, or it names a file as no bank does.
    """
    path = directory / INDEX
    try:
        data = read_file(path, MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BankNotFoundError(f"{path}: there is no bank here ({error.strerror})") from error
    except OSError as error:
        raise BankError(f"{path}: cannot be read: {error.strerror}") from error
    return decode(path, data)


def decode(path: Path, data: bytes) -> Index:
    """Check the bytes of ``bank.json`` and return what they say; ``path`` is for messages. Errors as :func:`read_index`."""
    if not data.startswith(_FIRST_LINE):
        if version := _ANY_FIRST_LINE.match(data):
            raise BankError(f"{path}: format {version[1].decode()}, this version of metamask_ext reads format {_FORMAT}")
        raise BankError(f"{path}: damaged, or not the index of a bank (its first line is not that of one)")
    end = data.find(b"\n", len(_FIRST_LINE)) + 1
    rest = data[end:]
    if data[len(_FIRST_LINE) : end] != _checksum_line(rest):
        raise BankError(f"{path}: damaged (its SHA-256 is not the one written in it)")
    try:
        body = parse_json(data)
        meta, commit = body["meta"], body["commit"]
        if not isinstance(meta, dict) or not _is_count(commit):
            raise BankError(f"{path}: meta must be an object and commit an integer, at least 0")
        shared = _file(path, body["shared"], SHARED_FILE)
        tasks = [None if task is None else _task(path, task) for task in body["tasks"]]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, BankError):
            raise
        raise BankError(f"{path}: not the index of a bank ({type(error).__name__}: {error})") from error
    names = [task.name for task in tasks if task is not None]
    if len(set(names)) != len(names):
        raise BankError(f"{path}: two of its tasks have one name")
    return Index(commit, meta, shared, tasks, data)


def _task(path: Path, described: JsonObject) -> Task:
    name, info = described["name"], described["info"]
    if not isinstance(name, str) or not name or not isinstance(info, dict):
        raise BankError(f"{path}: a task must have a name and an info object, got {name!r} and {info!r}")
    return Task(name, _file(path, described, TASK_FILE), info)


def _file(path: Path, described: JsonObject, pattern: re.Pattern[str]) -> File:
    """Read a file's entry. The file must have the name that its checksum gives it: no name leads out of the folder."""
    file, sha256, size = described["file"], described["sha256"], described["bytes"]
    if not _is_count(size) or not _SHA256.fullmatch(sha256):
        raise BankError(f"{path}: bytes and sha256 of {file!r} must be a size and 64 hexadecimal digits, got {size!r}, {sha256!r}")
    named = pattern.fullmatch(file)
    if named is None or named[1] != sha256[:_HASH_DIGITS]:
        raise BankError(f"{path}: names the file {file!r}, which a bank does not give to contents with the SHA-256 {sha256}")
    return File(file, sha256, size)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def regular_file(directory: Path, relative: str) -> int:
    """Return the size of a file of the bank, or of the one that a link in its place leads to: its checksum tells if it is right.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        BankError: it is a folder, a pipe or a device, or cannot be looked at.
    """
    path = directory / relative
    try:
        return regular_size(path, path.stat())
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise BankError(f"{path}: {error.strerror}") from error
