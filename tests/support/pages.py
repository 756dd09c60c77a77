"""The code blocks of the documentation's pages."""

from __future__ import annotations

import re
from typing import Any

from support.paths import ROOT


def blocks_of(page: str, language: str, first_line: str = "") -> list[str]:
    """The blocks of a page in a language; with ``first_line`` those that begin with it."""
    text = (ROOT / page).read_text()
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for block in found if block.startswith(first_line)]


def run_blocks(page: str, blocks: list[str]) -> dict[str, Any]:
    """Execute Python blocks one after another; the names that they leave."""
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return names


def commands_of(page: str) -> list[str]:
    """The lines of a page's shell blocks."""
    return [line for block in blocks_of(page, "sh") for line in block.splitlines()]
