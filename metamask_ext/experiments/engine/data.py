"""Data sets within the jobs of a run: loaded once a process, from where the run's start found or put them, never downloaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from metamask_ext.data import Characters, Digits, load_characters, load_digits
from metamask_ext.data.digits import default_root


def digits() -> Digits:
    """The digits that :func:`metamask_ext.data.load_digits` gave when the run began."""
    return _digits(default_root())


def characters() -> Characters:
    """The characters that :func:`metamask_ext.data.load_characters` gave when the run began."""
    return _characters(default_root())


@cache
def _digits(root: Path) -> Digits:
    return load_digits(root, download=False)


@cache
def _characters(root: Path) -> Characters:
    return load_characters(root, download=False)
