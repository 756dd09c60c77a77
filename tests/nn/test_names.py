"""Any non-empty string is a task name: one injective escape into parameter keys and file names."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import metamask_ext
from metamask_ext.nn import MaskedLinear
from metamask_ext.nn.names import escape, unescape

NAMES = {
    "dot": "a.b",
    "only-dots": "..",
    "keys": "keys",
    "type": "type",
    "training": "training",
    "update": "update",
    "T_destination": "T_destination",
    "parameters": "_parameters",
    "underscore": "_x",
    "dunder": "__class__",
    "path": "../x",
    "absolute-path": "/etc/x",
    "backslash": "..\\x",
    "escaped-dot": "%2E",
    "percent": "%",
    "umlaut": "ä",
    "decomposed-umlaut": "a\u0308",
    "emoji": "🦊",
    "space": " ",
    "newline": "a\nb",
    "zero-byte": "a\0b",
    "long": "x" * 300,
    "surrogate": "\ud800",
    "windows-device": "CON",
    "digits": "0",
    "masks": "masks",
    "weight": "weight",
}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        # Worked out from the rule: UTF-8 bytes as %XX, letters, digits, - and _ as they are.
        ("mnist", "mnist"),
        ("split-3_b", "split-3_b"),
        ("a.b", "a%2Eb"),
        ("%2E", "%252E"),
        ("../x", "%2E%2E%2Fx"),
        ("ä", "%C3%A4"),
        ("🦊", "%F0%9F%A6%8A"),
        (" ", "%20"),
        ("keys", "%6Beys"),
        ("type", "%74ype"),
        ("training", "%74raining"),
        ("_x", "%5Fx"),
        ("_", "%5F"),
        ("%6Beys", "%256Beys"),
        ("Keys", "Keys"),
    ],
)
def test_escapes_worked_out_by_hand(name, key):
    assert escape(name) == key
    assert unescape(key) == name


@pytest.mark.parametrize("key", ["", "a.b", "a b", "ä", "%", "%2", "%2e", "%GG", "%FF", "a/b"])
def test_what_is_no_escaped_name_is_told_apart(key):
    assert unescape(key) is None


@given(st.text(st.characters(), min_size=1))
@example("keys")
@example("_")
@example("_:")
@example("%6Beys")
@example("\udfff")
def test_unescape_undoes_escape_and_keys_are_safe_for_files_and_parameters(name):
    key = escape(name)
    assert unescape(key) == name
    assert re.fullmatch(r"[A-Za-z0-9%_-]+", key)
    assert not key.startswith("_")
    nn.ParameterDict().register_parameter(key, nn.Parameter(torch.zeros(())))  # torch refuses the names of attributes


@given(st.text(min_size=1), st.text(min_size=1))
def test_two_names_have_two_keys(one, other):
    assert (escape(one) == escape(other)) == (one == other)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_every_string_works_as_a_task_from_adding_to_removing(name):
    model = nn.Sequential(MaskedLinear(3, 2, mask_init=0.0))
    metamask_ext.add_task(model, name)
    assert metamask_ext.tasks(model) == ["default", name]
    with torch.no_grad():
        model[0].masks[name].fill_(1.0)
    with metamask_ext.using_task(model, name):
        assert model[0].mask_logits.unique().tolist() == [1.0]
    keys = [key for key in model.state_dict() if "masks" in key]
    assert all(re.fullmatch(r"0\.(bias_)?masks\.[A-Za-z0-9%_-]+", key) for key in keys)
    fresh = nn.Sequential(MaskedLinear(3, 2))
    fresh.load_state_dict(model.state_dict())
    assert metamask_ext.tasks(fresh) == ["default", name]
    assert torch.equal(fresh[0].masks[name], model[0].masks[name])
    assert name in model[0].masks and name + "x" not in model[0].masks
    metamask_ext.remove_task(model, name)
    assert metamask_ext.tasks(model) == ["default"]


def test_names_that_differ_only_in_case_are_two_tasks():
    layer = MaskedLinear(3, 2)
    metamask_ext.add_task(layer, "Default")
    assert metamask_ext.tasks(layer) == ["default", "Default"]
    with metamask_ext.using_task(layer, "Default"):
        assert layer.mask_logits is layer.masks["Default"]
        assert layer.mask_logits is not layer.masks["default"]


@pytest.mark.parametrize(
    ("name", "error"),
    [("", ValueError), (None, TypeError), (3, TypeError), (b"a", TypeError), ({"a": 1}, TypeError)],
    ids=["empty", "none", "number", "bytes", "dict"],
)
def test_what_is_no_name_is_refused(name, error):
    layer = MaskedLinear(3, 2)
    with pytest.raises(error, match=r"task name|task must be"):
        metamask_ext.add_task(layer, name)
    with pytest.raises(error, match=r"task name|task must be"):
        metamask_ext.using_task(layer, name)
    assert metamask_ext.tasks(layer) == ["default"]
