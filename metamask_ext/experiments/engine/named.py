"""Objects that an option names as ``module:name``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .settings import OptionError


def by_name(option: str, text: str) -> Any:
    """The object that ``text`` names, ``package.module:name``; what it is, only its user knows.

    Args:
        option: named by errors.
        text: the module and the name.

    Raises:
        OptionError: there is no such module, or nothing of that name in it.
    """
    module, _, name = text.partition(":")
    try:
        found: Any = import_module(module)
    except (ImportError, ValueError) as error:  # ValueError: an empty name
        raise OptionError(f"{option} must be module:name, cannot import {module!r} of {text!r}: {error}") from error
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise OptionError(f"{option} must be module:name, {text!r}: {error}") from error
    return found
