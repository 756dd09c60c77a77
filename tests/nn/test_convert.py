"""convert: a plain model becomes a masked one, in place; merge: one task of it becomes a plain model again."""

from __future__ import annotations

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from support.models import kinds, masked_names, randomize_masks, small_cnn
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from metamask_ext import add_task, conversion_report, convert, merge, tasks
from metamask_ext.nn import MaskedConv2d, MaskedLinear


class TestKeeps:
    def test_every_linear_and_conv2d_becomes_masked_in_place(self):
        model = small_cnn()
        layers = list(model)
        weights = dict(model.named_parameters())
        assert convert(model) is model
        assert list(model) == layers  # the same module objects
        assert masked_names(model) == ["0", "3", "5"]
        assert isinstance(model[0], MaskedConv2d) and isinstance(model[3], MaskedLinear)
        after = dict(model.named_parameters())
        assert all(after[name] is parameter for name, parameter in weights.items())
        assert {name.rpartition(".")[2] for name in after.keys() - weights.keys()} == {"default"}
        assert tasks(model) == ["default"]

    def test_masks_begin_at_plus_4_or_as_told(self):
        assert convert(nn.Linear(3, 2)).masks["default"].unique().tolist() == [4.0]
        layer = convert(nn.Linear(3, 2), mask_init=-1.0, gate="hard", threshold=0.5)
        assert (layer.bias_masks["default"].unique().tolist(), layer.gate, layer.threshold) == ([-1.0], "hard", 0.5)
        assert convert(nn.Linear(3, 2), temperature=2.0).temperature == 2.0
        assert convert(nn.Linear(50, 50), mask_init="normal").masks["default"].unique().numel() > 2000

    def test_the_output_is_the_originals_scaled_by_sigmoid_of_4(self):
        layer = nn.Linear(3, 2).double()
        x = torch.randn(4, 3).double()
        wanted = layer(x) * torch.sigmoid(torch.tensor(4.0, dtype=torch.float64))
        torch.testing.assert_close(convert(layer)(x), wanted)

    def test_a_second_convert_changes_nothing(self):
        model = convert(small_cnn())
        add_task(model, "b")
        before = kinds(model)
        parameters = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
        convert(model, mask_init=0.0, gate="hard")
        assert kinds(model) == before
        for name, parameter in model.named_parameters():
            assert parameters[name][0] == id(parameter) and torch.equal(parameters[name][1], parameter)
        assert model[0].gate == "sigmoid"

    def test_mode_dtype_device_frozen_weights_and_memory_format_are_kept(self):
        model = small_cnn().eval().bfloat16().requires_grad_(False)
        model[0].to(memory_format=torch.channels_last)
        convert(model)
        assert not any(module.training for module in model.modules())
        dtypes = {name.rpartition(".")[2]: parameter.dtype for name, parameter in model.named_parameters()}
        assert dtypes == {"weight": torch.bfloat16, "bias": torch.bfloat16, "default": torch.float32}
        assert not model[3].weight.requires_grad and model[3].masks["default"].requires_grad
        assert model[0].masks["default"].is_contiguous(memory_format=torch.channels_last)
        assert convert(nn.Linear(3, 2, device="meta")).masks["default"].device.type == "meta"

    def test_hooks_survive(self):
        layer = nn.Linear(3, 2)
        calls = []
        layer.register_forward_hook(lambda *_: calls.append("forward"))
        layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
        layer.register_full_backward_hook(lambda *_: calls.append("backward"))
        layer.register_state_dict_post_hook(lambda *_: calls.append("state"))
        layer.weight.register_hook(lambda grad: calls.append("weight"))
        convert(layer)(torch.randn(1, 3).requires_grad_()).sum().backward()
        layer.state_dict()
        assert sorted(calls) == ["backward", "forward", "pre", "state", "weight"]

    def test_an_optimiser_made_before_goes_on_training_the_weights(self):
        layer = nn.Linear(3, 2)
        optimiser = torch.optim.SGD(layer.parameters(), 0.1)
        convert(layer)
        before = layer.weight.detach().clone()
        layer(torch.ones(1, 3)).sum().backward()
        optimiser.step()
        assert not torch.equal(layer.weight, before)

    def test_new_layers_get_the_tasks_of_the_masked_ones(self):
        model = nn.Sequential(MaskedLinear(3, 3), nn.Linear(3, 2))
        for name in ("b", "a"):
            add_task(model[0], name)
        convert(model)
        assert tasks(model) == list(model[1].masks) == ["default", "b", "a"]

    def test_other_layers_are_left_plain(self):
        class Other(nn.Module):
            def __init__(self):
                super().__init__()
                self.recurrent, self.norm, self.bilinear = nn.GRU(1, 1), nn.LayerNorm(1), nn.Bilinear(1, 1, 1)

        model = Other()
        before = kinds(model)
        convert(model)
        assert kinds(model) == before


class TestTied:
    def test_two_layers_with_one_weight_still_share_it_and_have_masks_of_their_own(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        model[2].weight = model[0].weight
        convert(model)
        assert model[2].weight is model[0].weight
        assert model[2].masks["default"] is not model[0].masks["default"]
        randomize_masks(model)
        merged = merge(model, "default")
        assert merged[2].weight is not merged[0].weight
        x = torch.randn(2, 3)
        torch.testing.assert_close(merged(x), model(x))

    def test_a_weight_tied_to_an_embedding_stays_tied(self):
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
        model["out"].weight = model["embed"].weight
        convert(model)
        assert model["out"].weight is model["embed"].weight
        merged = merge(model, "default")
        assert torch.equal(merged["embed"].weight, model["embed"].weight)
        torch.testing.assert_close(merged["out"].weight, model["embed"].weight * model["out"].masks["default"].sigmoid())

    def test_one_layer_used_twice_is_one_masked_layer_and_one_merged_layer(self):
        layer = nn.Linear(3, 3)
        model = randomize_masks(convert(nn.Sequential(layer, nn.Tanh(), layer)))
        assert model[0] is model[2] and len(list(model.parameters())) == 4
        merged = merge(model, "default")
        assert merged[0] is merged[2] and type(merged[0]) is nn.Linear
        x = torch.randn(2, 3)
        torch.testing.assert_close(merged(x), model(x))

    def test_layers_that_share_weight_and_masks_share_the_merged_weight(self):
        model = convert(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
        for name in ("weight", "bias", "masks", "bias_masks"):
            setattr(model[2], name, getattr(model[0], name))
        merged = merge(randomize_masks(model), "default")
        assert merged[0].weight is merged[2].weight and merged[0].bias is merged[2].bias
        x = torch.randn(2, 3)
        torch.testing.assert_close(merged(x), model(x))
        model[2].temperature = 2.0  # not the same theta any more
        assert merge(model, "default")[0].weight is not merge(model, "default")[2].weight


class TestPatterns:
    @pytest.mark.parametrize(
        ("options", "wanted"),
        [
            pytest.param({"include": "0"}, ["0"], id="include-one"),
            pytest.param({"include": ["0", "5"]}, ["0", "5"], id="include-list"),
            pytest.param({"include": "[35]"}, ["3", "5"], id="include-glob"),
            pytest.param({"exclude": "0"}, ["3", "5"], id="exclude-one"),
            pytest.param({"exclude": ("0", "3")}, ["5"], id="exclude-tuple"),
            pytest.param({"include": "*", "exclude": "5"}, ["0", "3"], id="both"),
        ],
    )
    def test_names_choose_the_layers(self, options, wanted):
        assert masked_names(convert(small_cnn(), **options)) == wanted

    def test_dotted_names_and_a_layer_reached_by_two_names(self):
        layer = nn.Linear(2, 2)
        model = nn.ModuleDict({"a": nn.Sequential(layer, nn.Linear(2, 2)), "b": layer})
        assert masked_names(convert(copy.deepcopy(model), include="a.*")) == ["a.0", "a.1"]
        assert masked_names(convert(copy.deepcopy(model), exclude="b")) == ["a.1"]
        assert masked_names(convert(copy.deepcopy(model), include="b")) == ["a.0"]

    @pytest.mark.parametrize("options", [{"include": "nothing"}, {"exclude": "fc"}, {"include": ["0", "layer4"]}, {"exclude": "1"}])
    def test_a_pattern_that_matches_no_layer_is_an_error(self, options):
        # "layer4" of a Sequential alone would silently leave its layers out (or in): 'layer4.*' is meant.
        model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        model.add_module("layer4", nn.Sequential(nn.Linear(2, 2)))
        before = kinds(model)
        with pytest.raises(ValueError, match="matches no Linear or Conv2d"):
            convert(model, **options)
        assert kinds(model) == before


class _OwnWeight(nn.Linear):
    @property
    def weight(self):
        weight = self._parameters.get("weight")
        if weight is None:
            raise AttributeError("weight")
        return weight.abs()


class _OwnGetattr(nn.Linear):
    def __getattr__(self, name):
        return super().__getattr__(name)


class _Slots(nn.Linear):
    __slots__ = ("extra",)


def _patched_forward():
    layer = nn.Linear(3, 2)
    layer.forward = types.MethodType(lambda self, x: F.linear(x, self.weight), layer)
    return layer


def _with_mask():
    layer = nn.Linear(3, 2)
    layer.masks = torch.ones(2, 3)
    return layer


REFUSED = {
    "lazy-linear": lambda: nn.LazyLinear(2),
    "lazy-conv2d": lambda: nn.LazyConv2d(2, 3),
    "parametrized": lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
    "parametrized-bias": lambda: _parametrized_bias(),
    "spectral-norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 2)),
    "old-spectral-norm": lambda: old_spectral_norm(nn.Linear(3, 2)),
    "weight-norm": lambda: parametrizations.weight_norm(nn.Conv2d(3, 2, 1)),
    "old-weight-norm": lambda: _old_weight_norm(),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5),
    "pruned-bias": lambda: prune.l1_unstructured(nn.Linear(3, 2), "bias", 0.5),
    "own-getattr": lambda: _OwnGetattr(3, 2),
    "own-weight": lambda: _OwnWeight(3, 2),
    "forward-patched-on-the-object": _patched_forward,
    "attribute-of-our-name": _with_mask,
    "slots": lambda: _Slots(3, 2),
    "complex": lambda: nn.Linear(3, 2, dtype=torch.complex64),
}


def _parametrized_bias():
    layer = nn.Linear(3, 2)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh())
    return layer


def _old_weight_norm():
    with pytest.warns(FutureWarning):
        return old_weight_norm(nn.Linear(3, 2))


class TestRefuses:
    @pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
    @pytest.mark.filterwarnings("ignore:Lazy modules")
    def test_what_it_could_not_mask_rightly_is_refused_by_name_and_nothing_changes(self, make):
        model = nn.ModuleDict({"first": nn.Linear(3, 3), "inner": nn.Sequential(make())})
        before = kinds(model)
        with pytest.raises(ValueError, match=r"cannot mask 'inner.0', a \w+: .*exclude='inner.0'"):
            convert(model, on_unsupported="error")
        assert kinds(model) == before
        assert masked_names(convert(model, exclude="inner.0", on_unsupported="error")) == ["first"]

    @pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
    @pytest.mark.filterwarnings("ignore:Lazy modules")
    def test_none_of_them_stops_a_convert_which_leaves_it_as_it_is_and_reports_it(self, make):
        model = nn.ModuleDict({"first": nn.Linear(3, 3), "inner": nn.Sequential(make())})
        left, state = model["inner"][0], dict(model["inner"][0].__dict__)
        kind = type(left)
        assert convert(model) is model and masked_names(model) == ["first"]
        assert model["inner"][0] is left and type(left) is kind and left.__dict__ == state
        (entry,) = conversion_report(model).left
        assert (entry.name, entry.type) == ("inner.0", kind.__name__) and entry.reason

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            pytest.param({"gate": "soft"}, ValueError, id="gate"),
            pytest.param({"temperature": -1.0}, ValueError, id="temperature"),
            pytest.param({"mask_init": "uniform"}, ValueError, id="mask-init"),
            pytest.param({"bias": False}, TypeError, id="unknown-option"),
            pytest.param({"on_unsupported": "warn"}, ValueError, id="on-unsupported"),
        ],
    )
    def test_wrong_options_change_nothing(self, options, error):
        model = small_cnn()
        before = kinds(model)
        with pytest.raises(error):
            convert(model, **options)
        assert kinds(model) == before

    @pytest.mark.parametrize("good", range(5))
    def test_a_mask_init_that_fails_at_any_layer_changes_nothing(self, good):
        model = small_cnn()
        before = kinds(model)
        left = [good]

        def fill(logits):
            left[0] -= 1
            if left[0] < 0:
                raise MemoryError("no room")

        with pytest.raises(MemoryError):
            convert(model, mask_init=fill)
        assert kinds(model) == before

    def test_no_module_is_refused(self):
        with pytest.raises(TypeError, match="Module"):
            convert([nn.Linear(3, 2)])

    @pytest.mark.filterwarnings("ignore:Lazy modules")
    def test_a_lazy_layer_is_converted_once_it_has_run(self):
        layer = nn.LazyLinear(2)
        layer(torch.zeros(1, 3))
        assert convert(layer).masks["default"].shape == (2, 3)


class _Tagged(nn.Linear):
    """A subclass with torch's forward, a parameter and a child of its own."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.gain = nn.Parameter(torch.ones(3))
        self.child = nn.Linear(2, 2)


def test_a_subclass_with_torchs_forward_is_masked_and_merged_back_to_itself():
    model = randomize_masks(convert(nn.Sequential(_Tagged(3, 2))))
    assert isinstance(model[0], MaskedLinear)
    merged = merge(copy.deepcopy(model), "default")
    assert type(merged[0]) is _Tagged and type(merged[0].child) is nn.Linear
    assert list(dict(merged.named_parameters())) == ["0.weight", "0.bias", "0.gain", "0.child.weight", "0.child.bias"]
    assert torch.equal(merged[0].gain, model[0].gain) and merged[0].gain is not model[0].gain
    x = torch.randn(2, 3)
    torch.testing.assert_close(merged(x), model(x))
