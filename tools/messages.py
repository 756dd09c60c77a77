"""Prints every error message of the package, to be read as a whole: ``python tools/messages.py [--plain]``.

A line is ``file:line  Error: message``, with ``{expression}`` where a value comes in. Messages are those of ``raise`` statements,
of functions that return an error, and of ``TORCH_CHECK`` and its kin in C++. ``--plain`` leaves out file and line, so that two
versions can be compared.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Message(NamedTuple):
    """An error message: its file, line, the error's type and the text. ``text`` is empty where the error has none of its own."""

    file: str
    line: int
    error: str
    text: str


def messages() -> list[Message]:
    """All messages of metamask_ext, bench and csrc, by file and line."""
    found: list[Message] = []
    for folder in ("metamask_ext", "bench"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "bench" in path.relative_to(ROOT).parts[1:]:  # a link that an editable install makes
                continue
            found += sorted(_of_python(path), key=lambda message: message.line)
    for pattern in ("*.h", "*.cpp", "*.cu", "*.cuh"):
        for path in sorted((ROOT / "csrc").rglob(pattern)):
            found += _of_cpp(path)
    return found


def _of_python(path: Path) -> Iterator[Message]:
    name = path.relative_to(ROOT).as_posix()
    for node in ast.walk(ast.parse(path.read_text(), name)):
        if isinstance(node, (ast.Raise, ast.Return)):
            made = node.exc if isinstance(node, ast.Raise) else node.value
            if isinstance(made, ast.Call) and (isinstance(node, ast.Raise) or _is_error(made.func)):
                yield Message(name, node.lineno, ast.unparse(made.func), _text(made.args[0]) if made.args else "")


def _is_error(function: ast.expr) -> bool:
    return ast.unparse(function).rpartition(".")[2].endswith(("Error", "Exception"))


def _text(node: ast.expr) -> str:
    """The text of an expression that makes a message; ``{expression}`` for what is known only when it is raised."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value) + "}"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "{" + ast.unparse(node) + "}"


_CHECK = re.compile(r"\b(TORCH_CHECK(?:_[A-Z_]+)?)\(")
_ERRORS = {"TORCH_CHECK": "RuntimeError", "TORCH_CHECK_VALUE": "ValueError", "TORCH_CHECK_TYPE": "TypeError"}


def _of_cpp(path: Path) -> Iterator[Message]:
    name, code = path.relative_to(ROOT).as_posix(), path.read_text()
    for match in _CHECK.finditer(code):
        line_start = code.rfind("\n", 0, match.start()) + 1
        if code[line_start : match.start()].lstrip().startswith(("#", "//")):
            continue
        arguments = _arguments(code, match.end())
        parts = arguments[1:]
        text = "".join(_literal(part) for part in parts)
        yield Message(name, code.count("\n", 0, match.start()) + 1, _ERRORS.get(match[1], match[1]), text)


def _literal(argument: str) -> str:
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', argument)
    rest = re.sub(r'"(?:[^"\\]|\\.)*"', "", argument).strip()
    return "".join(strings) if strings and not rest else "{" + " ".join(argument.split()) + "}"


def _arguments(code: str, start: int) -> list[str]:
    """The arguments of a call whose parenthesis opens just before ``start``, split at commas outside of strings and brackets."""
    depth, quoted, begin, at, found = 0, False, start, start, []
    while True:
        character = code[at]
        if quoted:
            if character == "\\":
                at += 1
            quoted = character != '"'
        elif character == '"':
            quoted = True
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            if depth == 0:
                return [*found, code[begin:at]]
            depth -= 1
        elif character == "," and depth == 0:
            found.append(code[begin:at])
            begin = at + 1
        at += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="leave out the places, and what has no words")
    plain = parser.parse_args().plain
    for message in messages():
        if not plain:
            print(f"{message.file}:{message.line}  {message.error}: {message.text}")
        elif message.text:
            print(f"{message.error}: {message.text}")


if __name__ == "__main__":
    main()
