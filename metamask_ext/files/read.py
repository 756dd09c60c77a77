"""Reading of files that others may have made: regular files alone, of a bounded size, and JSON of a bounded depth."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from .atomic import naming, opened

MAX_BYTES = 1 << 26
MAX_VALUES = 4_000_000
MAX_DEPTH = 100


def read_file(path: Path, limit: int | None = None) -> bytes:
    """Return the contents of a regular file, or of one that a link leads to. A pipe is not waited for.

    Raises:
        OSError: that names the file: it cannot be read, is no regular file, or has more than ``limit`` bytes.
    """
    with naming(path), opened(path, os.O_RDONLY | os.O_NONBLOCK) as descriptor:
        size = regular_size(path, os.fstat(descriptor))
        if limit is not None and size > limit:
            raise OSError(errno.EFBIG, f"{size:,} bytes are more than such a file has, at most {limit:,}", str(path))
        try:
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read()
        except MemoryError:
            raise OSError(errno.ENOMEM, f"{size:,} bytes are more than there is memory for", str(path)) from None


def regular_size(path: Path, status: os.stat_result) -> int:
    """Return the size of a file of this status. OSError that names ``path`` if it is a folder, a pipe or a device."""
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return status.st_size


def read_json(path: Path) -> Any:
    """Return the value in a JSON file. OSError as of :func:`read_file`, ValueError as of :func:`parse_json`."""
    return parse_json(read_file(path, MAX_BYTES))


def parse_json(data: bytes) -> Any:
    """Return the value of a JSON text, in UTF-8.

    Raises:
        ValueError: it is none, holds NaN or an infinity, has more than 64 MiB or about 4,000,000 values, or lists and objects
            within more than 100 others.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data):,} bytes of JSON, at most {MAX_BYTES:,} are read")
    if data.count(b",") > MAX_VALUES:
        raise ValueError(f"about {data.count(b',') + 1:,} values of JSON, at most {MAX_VALUES:,} are read")
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        check_depth(value)
    return value


def check_depth(value: object) -> None:
    """Refuse containers within more than 100 others, as those that hold themselves are.

    Raises:
        ValueError: they are, or there are more than 4,000,000, each counted as often as it is met.
    """
    level, left = [value], MAX_VALUES
    for _ in range(MAX_DEPTH + 1):
        inner = (item for container in level for item in _items(container) if isinstance(item, _CONTAINERS))
        level = list(islice(inner, left))
        if not level:
            return
        left -= len(level)
        if not left:
            break
    raise ValueError(_too_deep())


_CONTAINERS = (dict, list, tuple, set)


def _items(container: object) -> Iterable[object]:
    if isinstance(container, dict):
        return container.values()
    return container if isinstance(container, _CONTAINERS) else ()


def _too_deep() -> str:
    return f"lists and objects within more than {MAX_DEPTH} others"


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number
