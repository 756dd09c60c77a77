"""Task names as parameter keys and file names."""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import unquote

from torch import nn

_ESCAPED = re.compile(r"(?:[A-Za-z0-9_-]|%[0-9A-F]{2})+")


def check_name(name: str) -> str:
    """``name`` if it can name a task: any non-empty string. TypeError or ValueError otherwise."""
    if not isinstance(name, str):
        raise TypeError(f"a task name must be a string, got {type(name).__name__}")
    if not name:
        raise ValueError("a task name must not be empty")
    return name


def escape(name: str) -> str:
    """``name`` as a parameter key and a file name: ASCII letters, digits, ``-`` and ``_`` stay, other bytes become ``%XX``.

    torch refuses keys with a dot, and keys that are attributes of a ParameterDict (``keys``, ``type``): of those, and of names
    that start with an underscore, the first character is escaped too. :func:`unescape` gives every name back.
    """
    return _escaped(check_name(name))


# A mixed batch, or the inference of tasks, escapes the names of all its tasks in every call.
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
