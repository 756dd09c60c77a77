"""Entering using_task: as fast over many layers as over few, and right whatever has changed between two entries."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from support.models import expected, mlp, randomize_masks, two_task_model
from support.sequence_models import Recurrent, with_tasks
from torch import nn

import metamask_ext as mm
from metamask_ext import add_task, remove_task, slots, using_task
from metamask_ext.nn import MaskedLinear


@pytest.fixture
def x():
    return torch.randn(5, 4, dtype=torch.float64)


def _layer(*tasks, size=(4, 6)):
    layer = MaskedLinear(*size).double()
    for task in tasks:
        add_task(layer, task)
    remove_task(layer, "default")
    return randomize_masks(layer)


def test_neither_making_nor_entering_a_block_looks_at_the_layers(monkeypatch):
    model, names = mlp(), ["a", "b", "a"]
    for task in ("a", names, [1, 2, 1]):
        using_task(model, task)
    visited = []
    real = MaskedLinear._task_dict
    monkeypatch.setattr(MaskedLinear, "_task_dict", lambda layer: visited.append(layer) or real(layer))
    monkeypatch.setattr("metamask_ext.nn.known.modules_of", lambda model: visited.append(model))
    for task in ("a", names, [1, 2, 1], "b"):
        with using_task(model, task):
            pass
    # [1, 2, 1] asks one layer for the names of its slots.
    assert len(visited) <= 1


WAYS = {
    "attribute": lambda model, layer: setattr(model, "0", layer),
    "dictionary": lambda model, layer: model._modules.__setitem__("0", layer),
    "new-dictionary": lambda model, layer: model.__dict__.__setitem__("_modules", {**model._modules, "0": layer}),
}


class TestLayersThatComeAndGo:
    """Whatever way a layer is put into a model: a block over the model is over it."""

    @pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
    @pytest.mark.parametrize("way", WAYS)
    def test_a_replaced_layer_uses_the_blocks_task(self, way, inside, x):
        model, new = mlp(), _layer("a", "b")
        old = model[0]
        with using_task(model, "a"):
            model(x)
        if not inside:
            WAYS[way](model, new)
        with using_task(model, "a"):
            if inside:
                WAYS[way](model, new)
            torch.testing.assert_close(model(x), expected(model, "a", x))
            with pytest.raises(RuntimeError, match="none is active"):
                old(x)

    @pytest.mark.parametrize("way", WAYS)
    def test_a_replaced_layer_without_the_task_is_refused(self, way, x):
        model = mlp()
        block = using_task(model, "a")
        with block:
            model(x)
        WAYS[way](model, _layer("b", "c"))
        with pytest.raises((ValueError, RuntimeError), match="different tasks|was removed"), block:
            model(x)
        with using_task(model, "b"):
            torch.testing.assert_close(model(x), expected(model, "b", x))

    @pytest.mark.parametrize("way", WAYS)
    def test_a_layer_that_went_to_another_model_follows_that_one(self, way, x):
        first, second = mlp(), mlp()
        for model in (first, second):
            with using_task(model, "a"):
                model(x)
        moved = first[0]
        WAYS[way](second, moved)
        WAYS[way](first, _layer("a", "b"))
        with using_task(second, "b"), using_task(first, "a"):
            torch.testing.assert_close(second(x), expected(second, "b", x))
            torch.testing.assert_close(first(x), expected(first, "a", x))

    def test_a_layer_that_is_added_or_taken_away(self, x):
        model = mlp()
        with using_task(model, "a"):
            model(x)
        model.append(_layer("a", "b", size=(3, 2)))
        with using_task(model, "a"):
            assert model(x).shape == (5, 2)
            torch.testing.assert_close(model(x), expected(model, "a", x))
        taken = model[5]
        del model[5]
        with using_task(model, "b"):
            torch.testing.assert_close(model(x), expected(model, "b", x))
            with pytest.raises(RuntimeError, match="none is active"):
                taken(torch.randn(1, 3, dtype=torch.float64))

    def test_a_model_whose_layers_are_gone_is_refused(self):
        model = nn.Sequential(_layer("a", "b"))
        using_task(model, "a")
        model[0] = nn.Linear(4, 4)
        for task in ("a", ["a"]):
            with pytest.raises(ValueError, match="no masked layer"):
                using_task(model, task)

    def test_a_module_that_became_masked(self, x):
        model = nn.Sequential(nn.Linear(4, 6).double(), MaskedLinear(6, 3).double())
        add_task(model, "b")
        with using_task(model, "b"):
            model(x)
        mm.convert(model[0])
        with pytest.raises(ValueError, match="different tasks"):
            using_task(model, "b")


class TestTasksThatComeAndGo:
    def test_names(self, x):
        model = mlp()
        for name in ("c", "d"):
            with pytest.raises(ValueError, match="must be one of"):
                using_task(model, name)
            add_task(model, name)
            with using_task(model, name):
                torch.testing.assert_close(model(x), expected(model, name, x))
            remove_task(model, name)
            for task in (name, [name] * 5):
                with pytest.raises(ValueError, match="must be one of"):
                    using_task(model, task)

    def test_in_one_layer_alone(self, x):
        model = mlp()
        block = using_task(model, "b")
        model[2]._remove_task("b")
        with pytest.raises(ValueError, match="different tasks"), block:
            model(x)
        add_task(model, "b")
        with block:
            torch.testing.assert_close(model(x), expected(model, "b", x))

    def test_slots_are_those_of_the_moment(self, x):
        model = mlp()
        by_name = {name: slot for slot, name in enumerate(slots(model))}
        with using_task(model, [by_name["a"]] * 5):
            torch.testing.assert_close(model(x), expected(model, "a", x))
        state = two_task_model(*[MaskedLinear(4, 6), nn.Tanh(), MaskedLinear(6, 6), nn.Tanh(), MaskedLinear(6, 3)], tasks="ba")
        model.load_state_dict(state.double().state_dict())  # which counts its tasks the other way round
        assert slots(model)[1] == "b"
        with using_task(model, [1] * 5):
            torch.testing.assert_close(model(x), expected(model, "b", x))
        remove_task(model, "b")
        with pytest.raises(ValueError, match="got 1, whose task was removed"):
            using_task(model, [1] * 5)

    @pytest.mark.parametrize("way", WAYS)
    def test_slots_of_a_body_that_was_replaced(self, way, x):
        """All layers are others, which know both tasks and count them the other way round."""
        model, other = mlp(), nn.Sequential(_layer("b", "a"), nn.Tanh(), _layer("b", "a", size=(6, 3)))
        outer = nn.Sequential(model)
        with using_task(outer, [1] * 5):
            outer(x)
        WAYS[way](outer, other)
        wanted = slots(outer)[1]
        assert wanted == "b"
        try:
            with using_task(outer, [1] * 5):
                got = outer(x)
        except ValueError as error:
            assert "must be names" in str(error)
        else:
            torch.testing.assert_close(got, expected(other, wanted, x))

    def test_a_model_that_is_copied_or_let_go_of(self, x):
        model = mlp()
        with using_task(model, "a"):
            model(x)
        twin = copy.deepcopy(model)
        remove_task(model, "a")
        with using_task(twin, "a"):
            torch.testing.assert_close(twin(x), expected(twin, "a", x))
        gone = weakref.ref(model)
        model.back = [model]  # a circle, which only the collector ends
        del model
        gc.collect()
        assert gone() is None


class TestSequencesFirst:
    def test_batch_first_is_that_of_the_call(self):
        model = with_tasks(Recurrent(batch_first=True))
        x, names = torch.randn(3, 3, 4, dtype=torch.float64), ["a", "b", "c"]
        with using_task(model, names):
            model(x)
        model.batch_first = False
        with using_task(model, names):
            y = model(x)
        for row, name in enumerate(names):
            with using_task(model, name):
                torch.testing.assert_close(y[:, row : row + 1], model(x[:, row : row + 1]))

    def test_a_module_elsewhere_that_becomes_one_makes_layers_careful(self):
        model = two_task_model(MaskedLinear(4, 4), nn.Identity())
        x = torch.randn(2, 2, 4)
        with using_task(model, ["a", "b"]):
            model(x)
        model[1].batch_first = False
        with using_task(model, ["a", "b"]), pytest.raises(RuntimeError, match="first or the second dimension"):
            model(x)


def test_masks_that_layers_share(x):
    model = mlp()
    model[2].masks, model[2].bias_masks = _layer("a", "b", size=(6, 6)).masks, _layer("a", "b", size=(6, 6)).bias_masks
    with using_task(model, "a"):
        torch.testing.assert_close(model(x), expected(model, "a", x))
    shared = nn.Sequential(_layer("a", "b", size=(4, 4)), _layer("a", "b", size=(4, 4)))
    shared[1].masks = shared[0].masks
    for task in "ab":
        with using_task(shared, task):
            torch.testing.assert_close(shared(x), expected(shared, task, x))
    shared[0]._remove_task("a")
    with pytest.raises((ValueError, RuntimeError)), using_task(shared, "a"):
        shared(x)
