"""Marks tests that pin private symbols of torch, and lists what they pin."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch

from .paths import ROOT


def pinned() -> set[str]:
    """The last parts of the names of all symbols that tests pin."""
    texts = [path.read_text() for path in (ROOT / "tests").glob("test_torch_private*.py")]
    return {name.rpartition(".")[2] for text in texts for name in re.findall(r'@pins\(\s*"([^"]+)"', text)}


def pins(symbol: str, use: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Marks the test of a private symbol: however it fails, the message names the symbol and its use."""

    def decorate(test: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(test)
        def run() -> None:
            try:
                test()
            except Exception as error:
                pytest.fail(
                    f"torch {torch.__version__} has changed the private symbol {symbol}.\n"
                    f"metamask_ext/torch_private.py uses it: {use}.\n{type(error).__name__}: {error}",
                    pytrace=False,
                )

        return run

    return decorate
