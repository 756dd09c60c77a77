"""Ctrl-C at any place of a change of tasks: the model has all of it or nothing, in every layer, and goes on working."""

from __future__ import annotations

import gc

import pytest
import torch
from support.faults import interrupted, seen
from torch import Tensor, nn

import metamask_ext
from metamask_ext.nn import MaskedLinear, TaskBatchNorm2d
from metamask_ext.nn.context import LIVE, Context
from metamask_ext.nn.task_dict import TaskDict


@pytest.fixture(autouse=True)
def _same_count_of_open_blocks():
    """An interruption may leave the count of this process too high, and other tests look at it."""
    gc.collect()
    before = LIVE._contexts, LIVE._selections
    yield
    gc.collect()
    LIVE.count(before[0] - LIVE._contexts, False)
    LIVE._selections = before[1]
    LIVE.count(0, False)


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(MaskedLinear(3, 4), TaskBatchNorm2d(4), MaskedLinear(4, 2), nn.Linear(2, 2))
    metamask_ext.add_task(model, "a")
    return model


def _state(model: nn.Module) -> object:
    dicts = [module for module in model.modules() if isinstance(module, TaskDict)]
    tensors = {name: value.tolist() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return metamask_ext.tasks(model), tensors, [(each._names, each._slots, each._single, list(each)) for each in dicts]


CHANGES = {
    "add": lambda model: metamask_ext.add_task(model, "b"),
    "add a mean": lambda model: metamask_ext.add_task(model, "b", init="mean"),
    "remove": lambda model: metamask_ext.remove_task(model, "a"),
    "keep per task": lambda model: metamask_ext.MaskBank(model, per_task=["3.*"]) and None,
    "pack": lambda model: metamask_ext.MaskBank(model).pack("a"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_tasks_is_whole_or_absent(name):
    def changed(nth: int) -> object:
        model = _model()
        torch.manual_seed(1)
        try:
            with interrupted(nth, "metamask_ext"):
                CHANGES[name](model)
        except KeyboardInterrupt:
            assert nth
        return _state(model)

    new, old = changed(0), _state(_model())
    events = seen[0]
    assert new != old and events > 100
    found = [changed(nth) for nth in range(1, events + 1, 3)]
    assert all(state in (old, new) for state in found)
    assert old in found


def test_an_interrupted_load_of_a_bank_is_whole_or_absent(tmp_path):
    bank = metamask_ext.MaskBank(_model())
    bank.add_task("b")
    bank.pack("b")
    bank.save(tmp_path)
    expected = _state(metamask_ext.MaskBank.load(tmp_path, _model()).model)
    with interrupted(0, "metamask_ext"):
        metamask_ext.MaskBank.load(tmp_path, _model())
    old, found = _state(_model()), []
    for nth in range(1, seen[0] + 1, 41):
        model = _model()
        try:
            with interrupted(nth, "metamask_ext"):
                metamask_ext.MaskBank.load(tmp_path, model)
        except KeyboardInterrupt:
            found.append(_state(model))
        assert _state(metamask_ext.MaskBank.load(tmp_path, model).model) == expected
    assert old in found and all(state in (old, expected) for state in found)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupted_block_never_hides_a_selection_from_compiled_layers():
    """The count of open blocks may stay too high after an interruption, never too low."""

    model = _model()
    with interrupted(0, "metamask_ext"), metamask_ext.using_task(model, ["a", "a"]):
        pass
    for nth in range(1, seen[0] + 1):
        try:
            with interrupted(nth, "metamask_ext"), metamask_ext.using_task(model, ["a", "a"]):
                pass
        except KeyboardInterrupt:
            pass
        with metamask_ext.using_task(model, ["a", "default"]):
            assert LIVE.selections and LIVE.contexts


def test_a_context_may_be_collected_where_its_count_is_changed():

    context = Context(dict, False, -1, None, object())
    with LIVE._lock:
        del context  # would wait for ever for a lock that this thread holds
