"""tools/messages.py finds the messages that the package raises, in Python and C++."""

from __future__ import annotations

import importlib.util
import re
import sys

import pytest
from support.paths import ROOT


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("messages_tool", ROOT / "tools/messages.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_messages_of_both_languages(tool):
    found = tool.messages()
    python = [message for message in found if message.file.endswith(".py")]
    cpp = [message for message in found if message.file.startswith("csrc/")]
    assert len(python) > 400 and len(cpp) > 50
    texts = {(message.error, message.text) for message in found}
    assert ("ValueError", "task name must not be empty, got ''") in texts
    assert all(message.line >= 1 and (ROOT / message.file).exists() for message in found)


def test_text_of_every_form(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    (tmp_path / "metamask_ext").mkdir()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "metamask_ext/a.py").write_text(
        'def f(x):\n    if x:\n        raise ValueError(f"x must be 0, got {x!r}" + " at once")\n    return KeyError("gone")\n'
    )
    (tmp_path / "csrc/a.cpp").write_text(
        'void f() {\n  TORCH_CHECK_VALUE(g(1, "a,b"), "x must be ",\n                    sizes(x), " long\\"");\n}\n'
        '#define X TORCH_CHECK(1, "no")\n'
    )
    assert [tuple(message) for message in tool.messages()] == [
        ("metamask_ext/a.py", 3, "ValueError", "x must be 0, got {x} at once"),
        ("metamask_ext/a.py", 4, "KeyError", "gone"),
        ("csrc/a.cpp", 2, "ValueError", 'x must be {sizes(x)} long\\"'),
    ]


def test_no_message_ends_in_a_full_stop_or_has_two_spaces(tool):
    found = [message for message in tool.messages() if re.search(r"[^.]\.$|  |\bplease\b", message.text, re.IGNORECASE)]
    assert not found, "\n".join(f"{m.file}:{m.line}: {m.text}" for m in found)
