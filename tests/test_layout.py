"""Rules of the tree that no linter knows: what tests import, words, sizes of files, first words of docstrings."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict

import pytest
from support.paths import ROOT

CODE = (".py", ".h", ".cpp", ".cu", ".cuh")
TEXT = (*CODE, ".md", ".toml", ".txt", ".yml", "Makefile", "run", ".gitignore", ".clang-format")
MOST_LINES = 500

# Words that only those who wrote the project understand: numbers of tasks, documents that are not published, paths of a machine.
INSIDER = re.compile(
    r"\bcontracts?\b|\bissues? #?\d|(?<!')\bseeds' [a-z]|\bseed (?:document|paper|text|proposal|article)s?\b|/(?:work|root|home)/",
    re.IGNORECASE,
)
# import-linter's own word; a compiler contracts a product and a sum to one instruction
ALLOWED = re.compile(r"importlinter|contracts a \*")


def tracked(*endings: str) -> list[str]:
    """Files of this checkout, by their path from its root."""
    ran = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if ran.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in ran.stdout.splitlines() if name.endswith(endings) and (ROOT / name).exists()]


def parsed(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(), name)


def folder(name: str) -> str:
    """``docs``, ``metamask_ext/nn``, or ``.`` for a file at the top."""
    return "/".join(name.split("/")[:-1][: 2 if name.startswith("metamask_ext") else 1]) or "."


def assert_none(found: dict[str, list[str]], rule: str) -> None:
    """``found``: the offending lines of each file."""
    offences = defaultdict(list)
    for name, lines in found.items():
        offences[folder(name)] += lines
    new = {place: lines for place, lines in offences.items() if lines}
    assert not new, "\n".join([rule, *(f"{place}: {len(lines)}\n  " + "\n  ".join(lines) for place, lines in new.items())])


def modules_imported(tree: ast.Module) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, f"{node.module or ''}.{alias.name}") for alias in node.names]
            found.append((node.lineno, node.module or ""))
    return found


def test_no_test_imports_a_test():
    found = {}
    for name in tracked(".py"):
        if name.startswith(("tests/", "tools/")):
            parts = [(line, module.split(".")) for line, module in modules_imported(parsed(name))]
            lines = [f"{name}:{line}: {'.'.join(path)}" for line, path in parts if any(part.startswith("test_") for part in path)]
            lines += [f"{name}:{line}: {'.'.join(path)}" for line, path in parts if "conftest" in path or path[0] == "tests"]
            found[name] = lines
    assert_none(found, "tests share what is in tests/support")


def test_no_insider_words():
    found: dict[str, list[str]] = {}
    for name in tracked(*TEXT):
        if name != "tests/test_layout.py":
            for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
                if INSIDER.search(line) and not ALLOWED.search(line):
                    found.setdefault(name, []).append(f"{name}:{number}: {line.strip()}")
    assert_none(found, "a reader of the code does not know these words")


def test_no_file_is_too_long():
    found = {}
    for name in tracked(*CODE):
        count = len((ROOT / name).read_text().splitlines())
        found[name] = [f"{name}: {count} lines"] if count > MOST_LINES else []
    assert_none(found, f"a file has at most {MOST_LINES} lines")


def docstrings(tree: ast.Module) -> list[tuple[int, str]]:
    """Of modules, classes and functions, and those below assignments."""
    found = []
    for node in ast.walk(tree):
        for one in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant) and isinstance(one.value.value, str):
                found.append((one.lineno, one.value.value.strip()))
    return found


def test_docstrings_are_statements():
    found = {}
    for name in tracked(".py"):
        lines = [
            f"{name}:{line}: {text.splitlines()[0]}"
            for line, text in docstrings(parsed(name))
            if re.match(r"(?:What|How|Where|Whether)\b", text)
        ]
        found[name] = lines
    assert_none(found, "a docstring opens with its subject or its verb")
