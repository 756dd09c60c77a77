"""Task names: what may be one, and its form as a parameter key and a file name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import TypeVar
from urllib.parse import unquote

from torch import nn

T = TypeVar("T")

DEFAULT_TASK = "default"
"""The one task of a new layer."""

_ESCAPED = re.compile(r"(?:[A-Za-z0-9_-]|%[0-9A-F]{2})+")


def check_name(name: str) -> str:
    """``name`` as a plain str, if it can name a task: any non-empty string. TypeError or ValueError otherwise.

    Subclasses of str (numpy's, enumerations) do not come back from files, and may compare and hash in their own ways.
    """
    if type(name) is not str:
        name = plain(name)
        if type(name) is not str:
            raise TypeError(f"task name must be a string, got {type(name).__name__}")
    if not name:
        raise ValueError("task name must not be empty, got ''")
    return name


def plain(value: T) -> T | str:
    """The text of a str of any class as a plain str; anything else as it is."""
    return str.__str__(value) if isinstance(value, str) else value


def escape(name: str) -> str:
    """``name`` as a parameter key and a file name: ASCII letters, digits, ``-`` and ``_`` stay, other bytes become ``%XX``.

    torch refuses keys with a dot, and keys that are attributes of a ParameterDict (``keys``, ``type``): of those, and of names
    that start with an underscore, the first character is escaped too. :func:`unescape` gives every name back.
    """
    return _escaped(check_name(name))


def escape_all(names: Iterable[str]) -> tuple[str, ...]:
    """:func:`escape` of each of ``names``, faster."""
    names = tuple(names)
    if set(map(type, names)) <= {str} and "" not in names:
        return tuple(map(_escaped, names))
    return tuple(map(escape, names))


# A mixed-task batch, or the inference of tasks, escapes the names of all its tasks in every call.
@lru_cache(maxsize=1 << 16)
def _escaped(name: str) -> str:
    if name.isascii() and name.replace("_", "").replace("-", "").isalnum():
        text = name
    else:
        text = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else _percent(c) for c in name)
    if name[0] == "_" or (text == name and (name == "training" or hasattr(nn.ParameterDict, name))):
        text = _percent(name[0]) + text[1:]
    return text


def unescape(key: str) -> str | None:
    """The name of which ``key`` is the escaped form; None when it is of no name."""
    if not _ESCAPED.fullmatch(key):
        return None
    try:
        return unquote(key, errors="surrogatepass")
    except UnicodeDecodeError:
        return None


def _percent(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def describe(names: Iterable[str]) -> str:
    """Names for an error message: the first eight of them."""
    listed = list(names)
    return ", ".join(repr(name) for name in listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
