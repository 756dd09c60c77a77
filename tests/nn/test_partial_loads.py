"""States that have a part of a model, or other tasks than it: they load, or the error says what to call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metamask_ext import MaskBank, add_task, merge, remove_task, tasks, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d


def _net():
    return nn.ModuleDict({"body": MaskedConv2d(2, 3, 1), "norm": TaskBatchNorm2d(3), "head": MaskedLinear(3, 2)})


def _run(model, x):
    return model["head"](model["norm"](model["body"](x)).mean((2, 3)))


def _part(state, *prefixes):
    return {key: value for key, value in state.items() if key.startswith(prefixes)}


ACTS = {
    "tasks": tasks,
    "add another": lambda model: add_task(model, "c"),
    "remove": lambda model: remove_task(model, "b"),
    "bank": lambda model: MaskBank(model).tasks,
    "pack": lambda model: MaskBank(model).pack("b"),
    "use": lambda model: using_task(model, "b"),
    "use in a batch": lambda model: using_task(model, ["b", "default"]),
    "merge": lambda model: merge(model, "b"),
    "superpose": lambda model: MaskBank(model).superpose({"b": 1.0}),
}


@pytest.mark.parametrize("act", ACTS)
def test_what_needs_the_same_tasks_everywhere_says_how_to_complete_them(act):
    saved, model = _net(), _net()
    add_task(saved, "b")
    model.load_state_dict(_part(saved.state_dict(), "body"), strict=False)
    with pytest.raises(ValueError, match=r"add_task\(model, name\).*for 'b'"):
        ACTS[act](model)


@pytest.mark.filterwarnings("ignore:the state dict has masks and no gate")
@pytest.mark.parametrize("part", ["body", "norm", "head", "body.masks", "head.bias_masks", "norm.per_task.weight"])
@pytest.mark.parametrize("init", ["random", "mean", "copy:default", {"default": 1.0}], ids=str)
def test_add_task_gives_the_layers_that_lack_a_task_theirs(part, init):
    saved, model = _net(), _net()
    add_task(saved, "b")
    model.load_state_dict(_part(saved.state_dict(), part), strict=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    add_task(model, "b", init)
    assert tasks(model) == ["default", "b"] == MaskBank(model).tasks
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if not key.endswith("_extra_state"))
    model.eval()
    with using_task(model, "b"):
        _run(model, torch.randn(2, 2, 4, 4))
    remove_task(model, "b")
    assert tasks(model) == ["default"]


def test_several_tasks_are_completed_one_after_another():
    saved, model = _net(), _net()
    for name in ("b", "c"):
        add_task(saved, name)
    model.load_state_dict(_part(saved.state_dict(), "head"), strict=False)
    with pytest.raises(ValueError, match="for 'b', 'c'"):
        tasks(model)
    add_task(model, "c")
    with pytest.raises(ValueError, match="for 'b'"):
        add_task(model, "d")
    add_task(model, "b")
    assert set(tasks(model)) == {"default", "b", "c"}
    with pytest.raises(ValueError, match="that of a new task, got 'b'"):
        add_task(model, "b")


def test_bits_of_a_part_of_a_layer_get_bits_beside_them():
    saved, model = MaskedLinear(9, 3), MaskedLinear(9, 3)
    add_task(saved, "b")
    MaskBank(saved).pack("b")
    state = {key: value for key, value in saved.state_dict().items() if key != "bias_masks.b"}
    with pytest.raises(RuntimeError, match="must both be bits"):
        model.load_state_dict(state, strict=False)
    model = MaskedLinear(9, 3)
    model.masks["b"] = saved.masks["b"]
    add_task(model, "b")
    assert model.bias_masks["b"].dtype == torch.uint8 and MaskBank(model).is_packed("b")
    with using_task(model, "b"):
        model(torch.randn(2, 9))


def test_a_packed_body_and_a_new_head():
    saved, model = _net(), _net()
    add_task(saved, "b")
    MaskBank(saved).pack("b")
    model.load_state_dict(_part(saved.state_dict(), "body"), strict=False)
    add_task(model, "b")
    assert model["body"].masks["b"].dtype == torch.uint8 and model["head"].masks["b"].dtype == torch.float32
    with using_task(model, "b"):
        _run(model, torch.randn(2, 2, 4, 4)).sum().backward()
    assert model["head"].masks["b"].grad is not None


def test_a_state_without_a_task_of_the_model_says_how_to_do_without_it():
    saved, model = _net(), _net()
    add_task(saved, "b")
    remove_task(saved, "default")
    with pytest.raises(RuntimeError, match=r"no masks for 'default'.*strict=False.*remove_task") as refused:
        model.load_state_dict(saved.state_dict())
    assert str(refused.value).count("remove_task") == 1  # not once a layer
    model = _net()
    model.load_state_dict(saved.state_dict(), strict=False)
    remove_task(model, "default")
    x = torch.randn(2, 2, 4, 4)
    assert tasks(model) == ["b"] and torch.equal(_run(model, x), _run(saved, x))


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: nn.ModuleDict({"inner": model})], ids=["top", "inside"])
def test_a_task_that_was_left_out_on_the_way_is_missed(wrap):
    # As a reader does that asks a file for the entries of the model it has.
    saved, model = wrap(_net()), wrap(_net())
    add_task(saved, "b")
    state = {key: value for key, value in saved.state_dict().items() if key in model.state_dict()}
    with pytest.raises(RuntimeError, match=r"saved with 2 tasks.*masks for 'default' alone.*add_task.*strict=False"):
        model.load_state_dict(state)
    model.load_state_dict(state, strict=False)
    assert tasks(model) == ["default"]


def test_a_dense_state_and_the_masks_by_themselves_load():
    saved, model = _net(), _net()
    for each in (saved, model):
        del each["norm"]
    add_task(saved, "b")
    state = saved.state_dict()
    dense = {key: value for key, value in state.items() if "masks" not in key}
    model.load_state_dict(dense)
    assert tasks(model) == ["default"] and torch.equal(model["head"].weight, saved["head"].weight)
    masks = {key: value for key, value in state.items() if "masks" in key or "_extra_state" in key}
    missing = model.load_state_dict(masks, strict=False).missing_keys
    assert set(missing) == {"body.weight", "body.bias", "head.weight", "head.bias"}
    assert tasks(model) == ["default", "b"]


def test_strict_is_known_however_it_is_given():
    saved, model = MaskedLinear(3, 2), MaskedLinear(3, 2)
    add_task(model, "b")
    state = saved.state_dict()
    for refused in (lambda: model.load_state_dict(state), lambda: model.load_state_dict(state, True)):
        with pytest.raises(RuntimeError, match="no masks for 'b'"):
            refused()
    for loaded in (model.load_state_dict(state, False), model.load_state_dict(strict=False, state_dict=state)):
        assert set(loaded.missing_keys) == {"masks.b", "bias_masks.b"}
