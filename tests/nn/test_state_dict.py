"""The state dict of a masked model: its entries, and what loading one does."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import metamask_ext
from metamask_ext import add_task, remove_task, tasks, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLinear

MODES = pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])


def _model(bias=True):
    return nn.Sequential(
        nn.Sequential(MaskedConv2d(2, 3, 3, bias=bias), nn.BatchNorm2d(3)), nn.Flatten(), MaskedLinear(27, 2, bias=bias)
    )


def _plain(bias=True):
    return nn.Sequential(nn.Sequential(nn.Conv2d(2, 3, 3, bias=bias), nn.BatchNorm2d(3)), nn.Flatten(), nn.Linear(27, 2, bias=bias))


def _masks(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "masks." in name}


def _assert_equal_states(got, wanted):
    assert got.keys() == wanted.keys()
    for key in wanted:
        assert torch.equal(got[key], wanted[key]), key


def test_keys_are_torchs_keys_one_for_the_gate_and_one_for_each_mask():
    layer = MaskedLinear(3, 2)
    add_task(layer, "a.b")
    assert list(layer.state_dict()) == [
        "weight",
        "bias",
        "_extra_state",
        "masks.default",
        "masks.a%2Eb",
        "bias_masks.default",
        "bias_masks.a%2Eb",
    ]
    assert list(MaskedLinear(3, 2, bias=False).state_dict()) == ["weight", "_extra_state", "masks.default"]


@MODES
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_a_plain_torch_state_loads_strictly_and_the_masks_keep_their_values(bias, assign):
    model, plain = _model(bias), _plain(bias)
    add_task(model, "b")
    masks = _masks(model)
    identities = {name: id(parameter) for name, parameter in model.named_parameters() if "masks." in name}
    result = model.load_state_dict(plain.state_dict(), strict=True, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    _assert_equal_states(_masks(model), masks)
    assert all(id(dict(model.named_parameters())[name]) == identity for name, identity in identities.items())
    for key, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_the_given_state_dict_is_not_written_to():
    plain = _plain().state_dict()
    keys = list(plain)
    _model().load_state_dict(plain)
    assert list(plain) == keys


@MODES
def test_round_trip_restores_every_value_and_the_output_of_every_task(assign):
    model, other = _model().eval(), _model().eval()
    for name in ("a", "ä/b"):
        add_task(model, name)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    result = other.load_state_dict(state, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert tasks(other) == tasks(model) == ["default", "a", "ä/b"]
    _assert_equal_states(other.state_dict(), model.state_dict())
    x = torch.randn(2, 2, 5, 5)
    for name in tasks(model):
        with using_task(model, name), using_task(other, name):
            assert torch.equal(model(x), other(x))


@MODES
def test_tasks_that_the_layer_lacks_are_created_as_trainable_parameters(assign):
    saved, model = MaskedLinear(3, 2), MaskedLinear(3, 2)
    add_task(saved, "new")
    default = model.masks["default"]
    model.load_state_dict(saved.state_dict(), assign=assign)
    assert list(model.masks) == list(model.bias_masks) == ["default", "new"]
    assert (model.masks["default"] is default) == (not assign)
    assert torch.equal(model.masks["default"], saved.masks["default"])
    assert torch.equal(model.bias_masks["new"], saved.bias_masks["new"])
    with using_task(model, "new"):
        model(torch.ones(1, 3)).sum().backward()
    assert model.masks["new"].grad is not None and model.masks["default"].grad is None


@pytest.mark.parametrize("missing", ["2.masks.b", "2.bias_masks.b", "2.bias_masks.default", "0.0.masks.default"])
def test_a_state_with_some_but_not_all_masks_of_a_layer_is_an_error(missing):
    model = _model()
    add_task(model, "b")
    state = model.state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=rf"Missing key.*{missing}"):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == [missing]


def test_a_state_without_one_of_the_models_tasks_is_an_error():
    model, saved = _model(), _model()
    add_task(model, "b")
    with pytest.raises(RuntimeError, match=r"Missing key.*masks\.b"):
        model.load_state_dict(saved.state_dict())


def test_plain_and_masked_layers_may_be_mixed_by_prefix():
    # The state of a model of which only the head was masked: the other layer keeps its masks.
    saved = metamask_ext.convert(_plain(), include="2", mask_init=1.0)
    model = _model()
    kept = model[0][0].masks["default"].detach().clone()
    model.load_state_dict(saved.state_dict(), strict=True)
    assert torch.equal(model[0][0].masks["default"], kept)
    assert model[2].masks["default"].unique().tolist() == [1.0]


@pytest.mark.parametrize("key", ["masks.a.b", "masks.ä", "masks.%2e", "bias_masks.a b", "masks."])
def test_a_key_that_is_no_escaped_name_is_unexpected(key):
    layer = MaskedLinear(3, 2)
    state = {**layer.state_dict(), key: torch.zeros(2, 3)}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict(state)
    assert tasks(layer) == ["default"]


def test_a_key_that_another_torch_would_have_escaped_more_is_understood():
    layer, saved = MaskedLinear(3, 2), MaskedLinear(3, 2)
    state = {key.replace("default", "%64efault"): tensor for key, tensor in saved.state_dict().items()}
    layer.load_state_dict(state, strict=True)
    assert tasks(layer) == ["default"]
    assert torch.equal(layer.masks["default"], saved.masks["default"])


def test_a_bias_mask_for_a_layer_without_bias_is_unexpected():
    layer = MaskedLinear(3, 2, bias=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias_masks"):
        layer.load_state_dict({**layer.state_dict(), "bias_masks.default": torch.zeros(2)})


@pytest.mark.parametrize("key", ["masks.default", "bias_masks.default", "masks.new"])
def test_a_mask_of_a_wrong_shape_is_an_error(key):
    layer = MaskedLinear(3, 2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({**layer.state_dict(), key: torch.zeros(7)})


def test_the_dtype_of_the_layer_is_kept_or_with_assign_the_states_taken():
    state = MaskedLinear(3, 2).double().state_dict()
    layer = MaskedLinear(3, 2)
    layer.load_state_dict(state)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
    layer.load_state_dict(state, assign=True)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float64}
    assert layer(torch.ones(1, 3).double()).dtype == torch.float64


def test_a_model_on_the_meta_device_is_filled_by_assign():
    saved = _model().eval()
    add_task(saved, "b")
    with torch.device("meta"):
        model = _model().eval()
    model.load_state_dict(saved.state_dict(), assign=True)
    x = torch.randn(1, 2, 5, 5)
    with using_task(model, "b"), using_task(saved, "b"):
        assert torch.equal(model(x), saved(x))


def test_one_layer_under_two_names_loads_a_plain_state_and_its_own():
    def build(kind):
        layer = kind(3, 3)
        return nn.ModuleDict({"a": layer, "b": layer})

    model = build(MaskedLinear)
    masks = _masks(model)
    plain = build(nn.Linear).state_dict()
    model.load_state_dict(plain, strict=True)
    _assert_equal_states(_masks(model), masks)
    assert torch.equal(model["a"].weight, plain["b.weight"])
    other = build(MaskedLinear)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other["b"].masks["default"], model["a"].masks["default"])


@MODES
def test_a_layer_whose_weight_is_read_past_forward_loads_with_several_tasks_and_none_active(assign):
    plain = nn.MultiheadAttention(4, 2)
    model = metamask_ext.convert(nn.MultiheadAttention(4, 2))
    add_task(model, "b")
    model.load_state_dict(plain.state_dict(), strict=True, assign=assign)
    assert torch.equal(model.state_dict()["out_proj.weight"], plain.out_proj.weight)
    assert isinstance(dict(model.named_parameters())["out_proj.weight"], nn.Parameter)
    again = metamask_ext.convert(nn.MultiheadAttention(4, 2))
    again.load_state_dict(model.state_dict(), strict=True, assign=assign)
    _assert_equal_states(again.state_dict(), model.state_dict())


def test_optimiser_state_survives_a_round_trip_with_the_model():
    def build():
        model = _model()
        add_task(model, "b")
        return model, torch.optim.Adam(model.parameters(), 0.1)

    def step(model, optimiser, x):
        with using_task(model, "b"):
            model(x).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    (model, optimiser), (other, other_optimiser) = build(), build()
    first, second = torch.randn(2, 3, 2, 5, 5)
    step(model, optimiser, first)
    other.load_state_dict(model.state_dict())
    other_optimiser.load_state_dict(copy.deepcopy(optimiser.state_dict()))  # torch would share its tensors
    step(model, optimiser, second)
    step(other, other_optimiser, second)
    _assert_equal_states(other.state_dict(), model.state_dict())


def test_after_removing_default_a_saved_model_loads_into_one_with_the_same_tasks():
    def build():
        model = _model()
        add_task(model, "a")
        remove_task(model, "default")
        return model

    model, other = build(), build()
    other.load_state_dict(model.state_dict(), strict=True)
    _assert_equal_states(other.state_dict(), model.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*masks\.default"):
        _model().load_state_dict(model.state_dict())
