"""The private symbols of torch that metamask_ext uses are in two files, and a test pins each."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import torch
from support.paths import ROOT
from support.pins import pinned

PRIVATE = re.compile(r"_(?!_)\w*[a-z]\w*")
TENSORS, MODULES = (set(dir(kind)) for kind in (torch.Tensor, torch.nn.Module))
"""Attributes of tensors, and of modules: those are hooks for subclasses, as _load_from_state_dict."""


def dotted(node: ast.AST) -> list[str]:
    """``a.b.c`` as its parts; of another expression only the attributes behind it, after an empty part."""
    if isinstance(node, ast.Attribute):
        return [*dotted(node.value), node.attr]
    return [node.id] if isinstance(node, ast.Name) else [""]


def private_uses(path: Path) -> list[tuple[int, str]]:
    """Private symbols of torch in a file: imported, reached from a module of torch, or an attribute of a tensor."""
    tree, found = ast.parse(path.read_text()), []
    of_torch = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    of_torch.add(alias.asname or "torch")
                    if any(map(PRIVATE.fullmatch, alias.name.split("."))):
                        found.append((node.lineno, alias.name))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                of_torch.add(alias.asname or alias.name)
                if any(map(PRIVATE.fullmatch, [*node.module.split("."), alias.name])) or node.module == "torch._C":
                    found.append((node.lineno, f"{node.module}.{alias.name}"))
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            first, *rest = dotted(node)
            private = {part for part in rest if PRIVATE.fullmatch(part)} - MODULES
            from_torch = first in of_torch and (bool(private) or first == "_functorch" or "_C" in rest)
            if from_torch or (first not in ("self", "cls") and TENSORS & private):
                found.append((node.lineno, ".".join([first, *rest])))
    return sorted(set(found))


PLACES = ("metamask_ext/torch_private.py", "metamask_ext/torch_private_distributed.py")

# The benchmark suite alone needs it; a test pins it too.
IN_BENCH = ("torch._dynamo.exc.TorchDynamoException",)


def test_private_symbols_are_used_in_their_places_only():
    found = []
    for path in [*(ROOT / "bench").rglob("*.py"), *(ROOT / "metamask_ext").rglob("*.py")]:
        name = str(path.relative_to(ROOT))
        if name in PLACES or name.startswith("metamask_ext/bench/"):
            continue
        allowed = IN_BENCH if name.startswith("bench/") else ()
        found += [f"{name}:{line}: {symbol}" for line, symbol in private_uses(path) if symbol not in allowed]
    assert not found, "private symbols of torch belong into one of " + ", ".join(PLACES) + ":\n" + "\n".join(found)


def test_every_symbol_is_pinned():
    """These files use none that no test knows."""
    used = set()
    for node in (node for place in PLACES for node in ast.walk(ast.parse((ROOT / place).read_text()))):
        if isinstance(node, ast.Attribute) and (
            PRIVATE.fullmatch(node.attr) or dotted(node.value)[-1] in ("_functorch", "_autograd")
        ):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and re.search(r"\._", node.module or ""):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PRIVATE.fullmatch(node.value):
            used.add(node.value)
    modules = {"_functorch", "_autograd", "_C"}
    assert used - modules <= pinned(), f"no test pins {sorted(used - modules - pinned())}"
    assert {"_disable_dynamo", "maybe_current_level", "_forward_cls", "lazy_load_decompositions"} <= used, "the scan finds uses"
