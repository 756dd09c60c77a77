"""Data sets within the jobs of a run: loaded once a process, from where the run's start found or put them, never downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

from metamask_ext.data import Characters, Digits, load_characters, load_digits
from metamask_ext.data.digits import default_root

_words: ContextVar[str | None] = ContextVar("words", default=None)


@contextmanager
def described(data: str | None) -> Iterator[None]:
    """Within the block, data sets must be those that ``data`` names: another machine may have other ones. None: any will do."""
    token = _words.set(data)
    try:
        yield
    finally:
        _words.reset(token)


def digits() -> Digits:
    """The digits that :func:`metamask_ext.data.load_digits` gave when the run began. RuntimeError if there are others here."""
    found = _digits(default_root())
    _check(found.source)
    return found


def characters() -> Characters:
    """The characters that :func:`metamask_ext.data.load_characters` gave when the run began. RuntimeError if others are here."""
    found = _characters(default_root())
    _check(found.source)
    return found


def _check(source: str) -> None:
    words = _words.get()
    if words is not None and source not in words:
        raise RuntimeError(
            f"the run is of {words!r}, and this process finds {source!r} in {str(default_root())!r}: put the files there, or let "
            "METAMASK_DATA name their folder, on every machine"
        )


@cache
def _digits(root: Path) -> Digits:
    return load_digits(root, download=False)


@cache
def _characters(root: Path) -> Characters:
    return load_characters(root, download=False)
