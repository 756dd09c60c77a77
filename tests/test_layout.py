"""Rules of the tree that no linter knows: what tests import, words, sizes of files, first words of docstrings."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict
from functools import cache

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


ABSENT_BESIDE_A_GPU = ("gymnasium", "mlxtend", "expecttest", "torch.testing._internal", "tomli_w", "torchvision")


@cache
def source_of(module: str) -> str | None:
    """The file of a module of the tests' support or of the package, by its path from the root."""
    path = module.replace(".", "/")
    path = f"tests/{path}" if module.startswith("support") else path.replace("metamask_ext/bench", "bench")
    found = [name for name in (f"{path}.py", f"{path}/__init__.py") if (ROOT / name).exists()]
    return found[0] if found else None


@cache
def imports_of(name: str) -> frozenset[str]:
    """The modules that a file imports outside functions."""
    package = name.split("/")[:-1]
    found = set()
    for node in top_level(parsed(name).body):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        else:
            begin = package[: len(package) - node.level + 1] if node.level else []
            if begin[:1] == ["bench"]:
                begin = ["metamask_ext", *begin]
            base = ".".join([*begin, *([node.module] if node.module else [])])
            found.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
    return frozenset(found)


def imported_with(name: str) -> set[str]:
    """Every module that is imported when this file is, as far as the files of this checkout say."""
    found: set[str] = set()
    files, todo = set(), [name]
    while todo:
        if (name := todo.pop()) not in files:
            files.add(name)
            found |= imports_of(name)
            todo += [source for module in imports_of(name) if (source := source_of(module)) is not None]
    return found


def top_level(body: list[ast.stmt]) -> list[ast.Import | ast.ImportFrom]:
    """Imports outside functions."""
    found: list[ast.Import | ast.ImportFrom] = []
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        elif isinstance(node, (ast.Try, ast.With, ast.ClassDef)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test)
        ):
            found += top_level(node.body)
    return found


def test_tests_of_a_gpu_import_what_a_machine_with_one_has():
    names = [name for name in tracked(".py") if name.startswith("tests/") and "/test_" in name]
    of_gpu = [name for name in names if "from support.gpu import" in (ROOT / name).read_text()]
    assert len(of_gpu) > 20 and "metamask_ext.nn.layers" in imported_with("tests/nn/test_layers.py")
    found = {}
    for name in of_gpu:
        modules = [module for module in sorted(imported_with(name)) if module.startswith(ABSENT_BESIDE_A_GPU)]
        found[name] = [f"{name}: {module}" for module in modules]
    assert_none(found, "a machine with a GPU has no registry to install these from")
