"""Names of subclasses of str become plain ones wherever they enter; what is no string is refused in words."""

from __future__ import annotations

import enum
import io

import numpy
import pytest
import torch
from torch import nn

import metamask_ext
from metamask_ext import MaskBank, add_task, merge, remove_task, slots, tasks, using_task
from metamask_ext.bank.export import task_state
from metamask_ext.bank.store import Store
from metamask_ext.bank.writer import save as write_store
from metamask_ext.continual import LoopConfig, TaskLoop
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedLinear, TaskBatchNorm2d


class _Enumerated(str, enum.Enum):
    B = "b"


class _Odd(str):
    """Hashes, compares and prints in its own way."""

    def __hash__(self):
        return 7

    def __eq__(self, other):
        return False

    def __str__(self):
        return "odd"


class _Attributed(str):
    owner = "someone"


CLASSES = {
    "numpy": lambda: numpy.array(["b"])[0],
    "enumeration": lambda: _Enumerated.B,
    "odd": lambda: _Odd("b"),
    "attributed": lambda: _Attributed("b"),
}
every_class = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)


def _model():
    return nn.Sequential(nn.Conv2d(2, 2, 1), TaskBatchNorm2d(2), nn.Flatten(), MaskedLinear(8, 3)).eval()


X = torch.randn(2, 2, 2, 2)


def _plain(names):
    return all(type(name) is str for name in names)


@every_class
def test_tasks_slots_and_the_state_have_plain_names_and_files_load(make):
    model = _model()
    add_task(model, make())
    assert tasks(model) == slots(model) == ["default", "b"] and _plain(tasks(model)) and _plain(slots(model))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded = _model()
    loaded.load_state_dict(torch.load(buffer))
    with using_task(model, "b"), using_task(loaded, "b"):
        assert torch.equal(loaded(X), model(X))
    with pytest.raises(ValueError, match="that of a new task"):
        add_task(model, make())


@every_class
def test_a_task_may_be_named_so_wherever_it_is_used(make):
    model = _model()
    add_task(model, "b")
    with using_task(model, "b"):
        wanted = model(X)
    with using_task(model, make()):
        assert torch.equal(model(X), wanted)
    with using_task(model, [make(), "b"]):
        torch.testing.assert_close(model(X), wanted)
    bank = MaskBank(model)
    with bank.superpose({make(): 1.0}):
        torch.testing.assert_close(model(X), wanted)
    torch.testing.assert_close(merge(model, make())(X), wanted)
    assert bank.bytes_per_task(make()) > 0 and not bank.is_packed(make())
    assert make() in model[3].masks and model[3].masks[make()] is model[3].masks["b"]
    by_start = [MAML(nn.Sequential(model[3]), 0.1, start=start).adapted_names for start in (make(), "b")]
    assert by_start[0] == by_start[1]
    for name, init in (("c", {make(): 1.0}), ("d", _Odd("copy:b")), ("e", _Odd("mean"))):
        add_task(model, name, init)
    assert torch.equal(model[3].masks["d"], model[3].masks["b"])
    bank.pack(make())
    assert bank.is_packed("b")
    remove_task(model, make())
    assert "b" not in tasks(model)


@every_class
def test_a_bank_and_its_folder_have_plain_names(make, tmp_path):
    model = _model()
    bank = MaskBank(model)
    bank.add_task(make())
    bank.pack(make())
    bank.save(tmp_path)
    loaded = MaskBank.load(tmp_path, _model())
    assert loaded.tasks == ["default", "b"] and _plain(loaded.tasks)
    with using_task(loaded.model, [make(), "b"]), using_task(model, "b"):
        torch.testing.assert_close(loaded.model(X), model(X))
    found = loaded.infer_task(X)
    assert _plain(found)
    store = Store.open(tmp_path)
    assert task_state(store, make()).keys() == task_state(store, "b").keys()
    write_store(tmp_path / "other", {}, {}, [(make(), ({}, {}))])
    assert Store.open(tmp_path / "other").tasks == ["b"]


@every_class
def test_the_layers_dictionaries_hold_plain_names(make):
    layer, norm = MaskedLinear(3, 2), TaskBatchNorm2d(2)
    layer.masks[make()] = torch.zeros(2, 3)
    norm.per_task["weight"][make()] = torch.ones(2)
    assert _plain(layer.masks) and _plain(norm.per_task["weight"])
    del layer.masks[make()]
    assert list(layer.masks) == ["default"]


@every_class
def test_a_loop_resumes_whatever_class_its_names_and_numbers_have(make, tmp_path):
    def loop():
        torch.manual_seed(0)
        x = torch.linspace(-1, 1, 8)[:, None]
        return TaskLoop(
            nn.Sequential(MaskedLinear(1, 1)),
            {make(): (x, x), "c": (x, -x)},
            nn.functional.mse_loss,
            LoopConfig(
                order=[make(), "c", make()],
                steps=numpy.int64(2),
                lr=numpy.float64(0.1),
                mask_lr=numpy.float32(0.5),
                settings={make(): make(), "note": numpy.float32(0.5)},
                out=tmp_path,
                tensorboard=False,
            ),
        )

    loop().run(2)
    resumed = loop()
    resumed.run(3)
    assert resumed.resumed == 2 and list(resumed.steps_of) == ["b", "c"] and _plain(resumed.steps_of)
    assert tasks(resumed.model) == ["b", "c"]
    with resumed.using(make()):
        resumed.model(torch.zeros(1, 1))


def test_two_names_of_one_text_are_refused():
    model = _model()
    add_task(model, "b")
    with pytest.raises(ValueError, match="'b' twice"):
        MaskBank(model).superpose({"b": 0.5, _Odd("b"): 0.5})
    data = torch.zeros(1, 1), torch.zeros(1, 1)
    with pytest.raises(ValueError, match="different names"):
        TaskLoop(nn.Sequential(MaskedLinear(1, 1)), {"b": data, _Odd("b"): data}, nn.functional.mse_loss)


@pytest.mark.parametrize("name", [7, None, b"b", 1.5, ["b"], numpy.bytes_(b"b"), torch.tensor(1)], ids=repr)
def test_what_is_no_string_is_refused_in_words(name):
    model = _model()
    bank = MaskBank(model)
    acts = {
        "add": lambda: add_task(model, name),
        "remove": lambda: remove_task(model, name),
        "use": lambda: using_task(model, name),
        "merge": lambda: merge(model, name),
        "pack": lambda: bank.pack(name),
        "start": lambda: MAML(model, 0.1, start=name) if name is not None else remove_task(model, name),
    }
    for act in acts.values():
        with pytest.raises((TypeError, ValueError), match=r"task name must be|task must be|start must be|task\[0\] must be"):
            act()
    assert tasks(model) == ["default"]


def test_gates_of_other_classes_are_plain():
    layer = metamask_ext.convert(nn.Linear(3, 2), gate=numpy.str_("hard"))
    assert type(layer.gate) is str
    layer.gate = numpy.str_("sigmoid")
    MaskedLinear(3, 2).load_state_dict(layer.state_dict())
