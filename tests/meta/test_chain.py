"""Chains of known layers, which a meta-learner runs by hand: which nets are chains, and that all of them give the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.meta_models import LR, QUERIES, assert_same, by_hand, chosen, linear_net, regression
from support.models import randomize_masks, two_task_model
from torch import nn

import metamask_ext as mm
from metamask_ext.meta import MAML, adapted
from metamask_ext.nn import MaskedLinear

each_choice = pytest.mark.parametrize("adapt", ["masks", "weights", "all"])


def chain(model, adapt="masks", **options):
    return MAML(model, LR, adapt=adapt, **options)._adapted._chain()


def mixed_net():
    return randomize_masks(
        nn.Sequential(nn.Linear(2, 6), nn.Sequential(nn.GELU(), MaskedLinear(6, 5)), nn.Softplus(), nn.Linear(5, 1, bias=False))
    )


@each_choice
@pytest.mark.parametrize("gate", ["sigmoid", "hard"])
@pytest.mark.parametrize("make", [linear_net, mixed_net])
def test_a_chain_is_what_the_model_gives_task_by_task(make, gate, adapt, monkeypatch):
    model = make().double()
    for layer in model.modules():
        if isinstance(layer, MaskedLinear):
            layer.gate = gate
    maml = MAML(model, LR, 2, adapt)
    support, query = regression(), regression(QUERIES)
    assert maml._adapted._chain() is not None
    loss = maml(F.mse_loss, support, query)
    monkeypatch.setattr(adapted, "chain_of", lambda *_: None)
    assert_same(loss, maml(F.mse_loss, support, query), model.parameters())


def test_layers_between_may_treat_rows_of_any_number():
    model = nn.Sequential(MaskedLinear(2, 6), nn.LayerNorm((3, 6)), nn.Tanh(), nn.Dropout(0.5), MaskedLinear(6, 1)).double().eval()
    (x, y), (query_x, query_y) = ((torch.randn(2, 4, 3, 2).double(), torch.randn(2, 4, 3, 1).double()) for _ in range(2))
    maml = MAML(model, LR, 2)
    assert maml._adapted._chain() is not None
    alone = [maml(F.mse_loss, (x[t, None], y[t, None]), (query_x[t, None], query_y[t, None])) for t in range(2)]
    torch.testing.assert_close(maml(F.mse_loss, (x, y), (query_x, query_y)), torch.stack(alone).mean())
    # Adapted weights of other layers than linear ones: not a chain
    assert chain(model, "weights") is None and chain(model, lambda name: "1." not in name) is not None


class Own(nn.Sequential):
    def forward(self, x):
        return super().forward(x) - x.mean(0, keepdim=True).sum()


class OwnLinear(MaskedLinear):
    def forward(self, x):
        return 2 * super().forward(x)


@each_choice
def test_what_a_model_does_beside_its_layers_is_not_lost(adapt):
    for model in (Own(MaskedLinear(2, 1)), nn.Sequential(OwnLinear(2, 1)), nn.Sequential(MaskedLinear(2, 3), nn.BatchNorm1d(3))):
        assert chain(model, adapt) is None
    seen = []
    for hook in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        model = linear_net().double()
        maml = MAML(model, LR, 1, adapt)
        assert maml._adapted._chain() is not None
        handle = getattr(model[2], hook)(lambda *_: seen.append(1))
        assert maml._adapted._chain() is None
        maml.adapt(F.mse_loss, regression())
        handle.remove()
        assert maml._adapted._chain() is not None
        assert seen or hook == "register_full_backward_hook"
        seen.clear()
    model.forward = lambda x: x
    assert maml._adapted._chain() is None
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert chain(linear_net()) is None
    model = linear_net()
    model.compile(backend="eager")
    assert chain(model) is None


def test_a_layer_put_in_later_runs():
    model = linear_net().double()
    maml = MAML(model, LR, 1)
    support, query = regression(), regression(QUERIES)
    before = maml(F.mse_loss, support, query)
    model[1] = nn.ReLU()
    wanted = by_hand(model, chosen(model, "masks"), F.mse_loss, support, query, 1)
    torch.testing.assert_close(maml(F.mse_loss, support, query), wanted)
    assert not torch.allclose(before, wanted)


@pytest.mark.parametrize("packed", [False, True])
def test_fixed_masks_are_those_of_the_start(packed):
    model = two_task_model(MaskedLinear(2, 6), nn.Tanh(), MaskedLinear(6, 1)).double()
    if packed:
        mm.MaskBank(model).pack("a")
    maml = MAML(model, LR, 2, "weights", start="a")
    assert maml._adapted._chain() is not None
    support, query = regression(), regression(QUERIES)
    learners = []
    for x, y, query_x, query_y in zip(*support, *query):
        learner = maml.clone()
        for _ in range(2):
            learner.adapt(F.mse_loss(learner(x), y))
        learners.append(F.mse_loss(learner(query_x), query_y))
    parameters = [p for name, p in model.named_parameters() if "masks" not in name]
    assert_same(maml(F.mse_loss, support, query), torch.stack(learners).mean(), parameters)
    assert chain(model, "weights", start={"a": 0.5, "b": 0.5}) is None


def test_a_learner_of_one_of_two_masks():
    """The mask of the bias is adapted, that of the weight is not."""
    model = linear_net().double()
    names = ["0.bias_masks.default", "4.masks.default"]
    maml = MAML(model, LR, 1, lambda name: name in names)
    support, query = regression(), regression(QUERIES)
    losses = []
    for x, y, query_x, query_y in zip(*support, *query):
        learner = maml.clone()
        learner.adapt(F.mse_loss(learner(x), y))
        losses.append(F.mse_loss(learner(query_x), query_y))
    wanted = by_hand(model, names, F.mse_loss, support, query, 1)
    assert_same(torch.stack(losses).mean(), wanted, model.parameters())
    assert_same(maml(F.mse_loss, support, query), wanted, model.parameters())


@each_choice
def test_errors_of_inputs(adapt):
    maml = MAML(linear_net().double(), LR, 1, adapt)
    (x, y) = regression()
    with pytest.raises(ValueError, match=r"input must be \[.*, in\] with in = 2 as in weight"):
        maml.adapt(F.mse_loss, (x[..., :1], y))
    with pytest.raises(TypeError, match="input must have the dtype of weight"):
        maml.adapt(F.mse_loss, (x.float(), y))
