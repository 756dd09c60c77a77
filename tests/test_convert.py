"""convert: a plain model becomes a masked one, in place; merge: one task of it becomes a plain model again."""

from __future__ import annotations

import copy
import io
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import masks_on, randomize_masks
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

import metamask_ext
from metamask_ext import add_task, convert, merge, tasks, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLayer, MaskedLinear
from metamask_ext.tasks._torchvision import import_torchvision


def _kinds(model):
    """Name, type and parameters of every module: what must not change when convert fails."""
    return {
        name: (type(module), dict(module._parameters), list(module._modules), dict(module.__dict__).keys())
        for name, module in model.named_modules()
    }


def _small():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))


def _small_input():
    return torch.randn(2, 2, 5, 5)


def _masked_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, MaskedLayer)]


class TestKeeps:
    def test_every_linear_and_conv2d_becomes_masked_in_place(self):
        model = _small()
        layers = list(model)
        weights = dict(model.named_parameters())
        assert convert(model) is model
        assert list(model) == layers  # the same module objects
        assert _masked_names(model) == ["0", "3", "5"]
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
        model = convert(_small())
        add_task(model, "b")
        before = _kinds(model)
        parameters = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
        convert(model, mask_init=0.0, gate="hard")
        assert _kinds(model) == before
        for name, parameter in model.named_parameters():
            assert parameters[name][0] == id(parameter) and torch.equal(parameters[name][1], parameter)
        assert model[0].gate == "sigmoid"

    def test_mode_dtype_device_frozen_weights_and_memory_format_are_kept(self):
        model = _small().eval().bfloat16().requires_grad_(False)
        model[0].to(memory_format=torch.channels_last)
        convert(model)
        assert not any(module.training for module in model.modules())
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
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
                self.conv1d, self.up, self.bilinear = nn.Conv1d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.Bilinear(1, 1, 1)

        model = Other()
        before = _kinds(model)
        convert(model)
        assert _kinds(model) == before


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
        assert _masked_names(convert(_small(), **options)) == wanted

    def test_dotted_names_and_a_layer_reached_by_two_names(self):
        layer = nn.Linear(2, 2)
        model = nn.ModuleDict({"a": nn.Sequential(layer, nn.Linear(2, 2)), "b": layer})
        assert _masked_names(convert(copy.deepcopy(model), include="a.*")) == ["a.0", "a.1"]
        assert _masked_names(convert(copy.deepcopy(model), exclude="b")) == ["a.1"]
        assert _masked_names(convert(copy.deepcopy(model), include="b")) == ["a.0"]

    @pytest.mark.parametrize("options", [{"include": "nothing"}, {"exclude": "fc"}, {"include": ["0", "layer4"]}, {"exclude": "1"}])
    def test_a_pattern_that_matches_no_layer_is_an_error(self, options):
        # "layer4" of a Sequential alone would silently leave its layers out (or in): 'layer4.*' is meant.
        model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        model.add_module("layer4", nn.Sequential(nn.Linear(2, 2)))
        before = _kinds(model)
        with pytest.raises(ValueError, match="matches no Linear or Conv2d"):
            convert(model, **options)
        assert _kinds(model) == before


class _OwnForward(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


class _OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight / weight.std(), bias)


class _OwnWeight(nn.Linear):
    @property
    def weight(self):
        weight = self._parameters.get("weight")
        if weight is None:
            raise AttributeError("weight")
        return weight.abs()


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
    "own-forward": lambda: _OwnForward(3, 2),
    "own-conv-forward": lambda: _OwnConvForward(3, 2, 1),
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
        before = _kinds(model)
        with pytest.raises(ValueError, match=r"cannot mask 'inner.0', a \w+: .*exclude='inner.0'"):
            convert(model)
        assert _kinds(model) == before
        assert _masked_names(convert(model, exclude="inner.0")) == ["first"]

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            pytest.param({"gate": "soft"}, ValueError, id="gate"),
            pytest.param({"temperature": -1.0}, ValueError, id="temperature"),
            pytest.param({"mask_init": "uniform"}, ValueError, id="mask-init"),
            pytest.param({"bias": False}, TypeError, id="unknown-option"),
        ],
    )
    def test_wrong_options_change_nothing(self, options, error):
        model = _small()
        before = _kinds(model)
        with pytest.raises(error):
            convert(model, **options)
        assert _kinds(model) == before

    @pytest.mark.parametrize("good", range(5))
    def test_a_mask_init_that_fails_at_any_layer_changes_nothing(self, good):
        model = _small()
        before = _kinds(model)
        left = [good]

        def fill(logits):
            left[0] -= 1
            if left[0] < 0:
                raise MemoryError("no room")

        with pytest.raises(MemoryError):
            convert(model, mask_init=fill)
        assert _kinds(model) == before

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


# Modules that read a layer's weight themselves.


class _SwinLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 12), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        q, _, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return F.conv2d((q * v)[..., None, None], self.proj.weight, self.proj.bias).flatten(1)


class _InAMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self._project(x)

    def _project(self, x):
        return F.linear(x, self.fc.weight)


class _InTheParentsForward(_InAMethod):
    def forward(self, x):
        return super().forward(x) + 1


class _InAProperty(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    @property
    def normalised(self):
        return self.fc.weight / 2

    def forward(self, x):
        return F.linear(x, self.normalised)


class _InALoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = F.linear(x, layer.weight, layer.bias)
        return x


class _InAComprehension(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        return sum([F.linear(x, layer.weight) for layer in self.layers])


class _ByIndex(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        return x @ self.layers[0].weight.t()


def _linear_of(layer, x):
    return F.linear(x, layer.weight, layer.bias)


class _InAFunctionBeside(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return _linear_of(self.fc, x)


class _FromTheGrandparent(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4))
        self.block.add_module("fc", nn.Linear(4, 4))

    def forward(self, x):
        return F.linear(x, self.block.fc.weight)


class _Decorated(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        return F.linear(x, self.fc.weight)


READERS = [
    _SwinLike,
    _InAMethod,
    _InTheParentsForward,
    _InAProperty,
    _InALoop,
    _InAComprehension,
    _ByIndex,
    _InAFunctionBeside,
    _FromTheGrandparent,
    _Decorated,
]


class TestWeightsReadPastForward:
    @pytest.mark.parametrize("kind", READERS, ids=lambda kind: kind.__name__.strip("_"))
    def test_reads_get_the_masked_weight_and_train_the_masks(self, kind):
        plain = kind().double()
        x = torch.randn(3, 4).double()
        wanted = plain(x)
        model = convert(copy.deepcopy(plain))
        assert not torch.allclose(model(x), wanted)
        torch.testing.assert_close(masks_on(model)(x), wanted)
        randomize_masks(model)
        merged = merge(model, "default")
        torch.testing.assert_close(model(x), merged(x))
        model(x).square().sum().backward()
        merged(x).square().sum().backward()
        read = [name for name, parameter in merged.named_parameters() if parameter.grad is not None]
        assert any(name.endswith("weight") for name in read)
        parameters = dict(model.named_parameters())
        for name in read:
            path, _, kind_of = name.rpartition(".")
            logits = parameters[f"{path}.{'masks' if kind_of == 'weight' else 'bias_masks'}.default"]
            s = logits.detach().sigmoid()
            of_theta = merged.get_parameter(name).grad
            torch.testing.assert_close(parameters[name].grad, of_theta * s)
            torch.testing.assert_close(logits.grad, of_theta * parameters[name].detach() * s * (1 - s))

    def test_a_module_whose_init_alone_touches_weights_leaves_them_parameters(self):
        class InitOnly(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(4, 4)
                self._initialise()

            def _initialise(self):
                nn.init.zeros_(self.fc.weight)

            def forward(self, x):
                return self.fc(x)

        model = convert(InitOnly())
        assert model.fc.weight is model.fc._parameters["weight"]

    def test_tasks_are_told_apart_and_none_active_raises(self):
        model = convert(_SwinLike().double())
        add_task(model, "b")
        randomize_masks(model)
        x = torch.randn(3, 4).double()
        for task in ("b", "default", "b"):
            with using_task(model, task):
                torch.testing.assert_close(model(x), merge(model, task)(x))
        with pytest.raises(RuntimeError, match="none is active"):
            model(x)

    def test_the_parameters_stay_the_shared_ones(self):
        plain = _SwinLike()
        weights = dict(plain.named_parameters())
        model = convert(plain)
        add_task(model, "b")
        after = dict(model.named_parameters())
        assert all(after[name] is weight for name, weight in weights.items())
        assert torch.equal(model.state_dict()["qkv.weight"], weights["qkv.weight"])

    def test_it_can_be_printed_copied_moved_reset_and_assigned_with_several_tasks_and_none_active(self):
        model = convert(_SwinLike())
        add_task(model, "b")
        assert "in_features=4, out_features=12, bias=True, gate=sigmoid, temperature=1.0, tasks=2" in repr(model)
        assert "4, 4, kernel_size=(1, 1), stride=(1, 1), gate=sigmoid" in repr(model)
        assert {p.dtype for p in copy.deepcopy(model).double().parameters()} == {torch.float64}
        before = model.qkv._parameters["weight"].detach().clone()
        model.qkv.reset_parameters()
        assert not torch.equal(model.qkv._parameters["weight"], before)
        assert model.qkv._parameters["weight"].detach().abs().max() <= 0.5  # torch's bound, 1 / sqrt(4)
        new = nn.Parameter(torch.zeros(12, 4))
        model.qkv.weight = new
        assert dict(model.named_parameters())["qkv.weight"] is new
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert tasks(torch.load(buffer, weights_only=False)) == ["default", "b"]

    def test_functional_call_replaces_what_is_read(self):
        model = convert(_InAMethod())
        x = torch.randn(3, 4)
        weight, logits = torch.randn(4, 4), torch.randn(4, 4)
        got = torch.func.functional_call(model, {"fc.weight": weight, "fc.masks.default": logits}, x)
        torch.testing.assert_close(got, x @ (weight * logits.sigmoid()).T)


def _without_zeros(model):
    """Random biases and heads: where a weight is zero, so is the gradient of its mask."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def _encoder_layer(**options):
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)


def _call_with_padding(model, x):
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding[0, 3:] = True
    output = model(x, src_key_padding_mask=padding)
    return output[:, :3]  # the fast path leaves zeros where the slow one leaves numbers


def _attend(model, x):
    return model(x, x, x, need_weights=False)[0]


class TestTransformers:
    @pytest.mark.parametrize("grad", [True, False], ids=["slow-path", "fast-path"])
    @pytest.mark.parametrize(
        ("make", "call"),
        [
            pytest.param(_encoder_layer, lambda model, x: model(x), id="layer"),
            pytest.param(lambda: _encoder_layer(norm_first=True), lambda model, x: model(x), id="layer-norm-first"),
            pytest.param(_encoder_layer, _call_with_padding, id="layer-padding"),
            pytest.param(lambda: nn.TransformerEncoder(_encoder_layer(), 2), lambda model, x: model(x), id="encoder"),
            pytest.param(lambda: nn.TransformerEncoder(_encoder_layer(), 2), _call_with_padding, id="encoder-padding"),
            pytest.param(lambda: nn.MultiheadAttention(8, 2, batch_first=True), _attend, id="attention"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_eval_and_train_agree_for_every_task_and_differ_from_the_unmasked(self, make, call, grad):
        plain = make()
        model = convert(copy.deepcopy(plain))
        add_task(model, "b")
        randomize_masks(model)
        x = torch.randn(2, 5, 8)
        outputs = {}
        for task in ("default", "b"):
            with using_task(model, task), torch.set_grad_enabled(grad):
                train, evaluated = call(model.train(), x), call(model.eval(), x)
            torch.testing.assert_close(evaluated, train)
            merged = merge(model, task)
            torch.testing.assert_close(call(merged.train(), x), train)
            outputs[task] = train
        assert not torch.allclose(outputs["default"], outputs["b"])
        assert not torch.allclose(outputs["b"], call(plain, x))
        torch.testing.assert_close(call(merge(masks_on(model), "b"), x), call(plain, x))

    def test_training_reaches_every_mask(self):
        model = _without_zeros(convert(nn.TransformerEncoder(_encoder_layer(), 2)))
        model(torch.randn(2, 5, 8)).square().sum().backward()
        masks = {name: p.grad for name, p in model.named_parameters() if "masks." in name}
        assert len(masks) == 12  # out_proj, linear1, linear2 with bias, twice
        assert all(grad is not None and grad.abs().sum() > 0 for grad in masks.values())

    def test_merge_gives_attention_back_its_own_kind_of_linear(self):
        merged = merge(convert(nn.MultiheadAttention(8, 2)), "default")
        assert type(merged.out_proj) is NonDynamicallyQuantizableLinear

    def test_a_decoder_and_the_whole_transformer(self):
        plain = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
        model = randomize_masks(convert(copy.deepcopy(plain)))
        x, y = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
        with torch.no_grad():
            train, evaluated = model.train()(x, y), model.eval()(x, y)
        torch.testing.assert_close(evaluated, train)
        torch.testing.assert_close(merge(model, "default")(x, y), train)
        assert not torch.allclose(plain(x, y), train)


class TestTorchvision:
    @pytest.mark.parametrize(
        ("make", "size", "layers"),
        [
            # resnet18: 20 convolutions and fc. vit: conv_proj, two layers of out_proj and a two-layer MLP, the head.
            pytest.param(lambda models: models.resnet18(num_classes=5), 32, 21, id="resnet18"),
            pytest.param(lambda models: models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5), 16, 8, id="vit"),
            # swin: the patch convolution, two blocks of qkv, proj and an MLP of two, one patch merging, the head.
            pytest.param(
                lambda models: models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=5), 32, 11, id="swin"
            ),
        ],
    )
    def test_models_keep_their_weights_and_mask_every_layer(self, make, size, layers):
        plain = _without_zeros(make(import_torchvision().models)).double().eval()
        x = torch.randn(2, 3, size, size).double()
        with torch.no_grad():
            wanted = plain(x)
        weights = dict(plain.named_parameters())
        state = copy.deepcopy(plain.state_dict())
        model = convert(plain)
        assert model is plain and len(_masked_names(model)) == layers
        after = dict(model.named_parameters())
        assert all(after[name] is weight for name, weight in weights.items())
        masks_on(model)
        with torch.no_grad():
            torch.testing.assert_close(model(x), wanted)
            randomize_masks(model)
            masked = model(x)
            assert not torch.allclose(masked, wanted, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(merge(model, "default")(x), masked)
        model(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in after.items() if "masks." in name)
        model.load_state_dict(state, strict=True)


class TestMerge:
    def _model(self):
        model = convert(_small())
        add_task(model, "b")
        return randomize_masks(model).eval()

    @pytest.mark.parametrize("task", ["default", "b"])
    def test_is_the_plain_model_of_one_task(self, task):
        model = self._model()
        merged = merge(model, task)
        assert [type(module) for module in merged] == [type(module) for module in _small()]
        assert list(merged.state_dict()) == list(_small().state_dict())
        x = _small_input()
        with using_task(model, task):
            torch.testing.assert_close(merged(x), model(x))
        _small().load_state_dict(merged.state_dict(), strict=True)

    def test_weights_worked_out_by_hand(self):
        layer = MaskedLinear(2, 1, mask_init=0.0)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[2.0, -4.0]]))
            layer.bias.fill_(3.0)
            layer.masks["default"][0, 1] = 100.0
        merged = merge(layer, "default")
        assert type(merged) is nn.Linear
        assert (merged.weight.tolist(), merged.bias.tolist()) == ([[1.0, -4.0]], [1.5])

    def test_leaves_the_original_and_shares_no_memory(self):
        model = self._model()
        before = _kinds(model)
        values = copy.deepcopy(model.state_dict())
        merged = merge(model, "b")
        assert _kinds(model) == before
        addresses = {parameter.data_ptr() for parameter in model.parameters()}
        assert not addresses & {parameter.data_ptr() for parameter in merged.parameters()}
        with torch.no_grad():
            for parameter in merged.parameters():
                parameter.zero_()
        assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())

    def test_logits_at_plus_100_share_no_memory_either(self):
        layer = masks_on(MaskedLinear(3, 2))
        merged = merge(layer, "default")
        assert torch.equal(merged.weight, layer.weight) and merged.weight.data_ptr() != layer.weight.data_ptr()

    def test_keeps_requires_grad_mode_hooks_buffers_and_attributes(self):
        model = self._model()
        model[0].weight.requires_grad_(False)
        model[0].note = "kept"
        model[3].register_buffer("steps", torch.tensor(3))
        calls = []
        model[3].register_forward_hook(lambda module, *_: calls.append(type(module)))
        merged = merge(model, "b")
        assert not merged[0].weight.requires_grad and merged[3].weight.requires_grad
        assert not any(module.training for module in merged.modules())
        assert merged[0].note == "kept" and merged[3].steps.item() == 3
        assert not hasattr(merged[0], "masks") and not hasattr(merged[0], "gate")
        merged(_small_input())
        assert calls == [nn.Linear]

    def test_a_hook_bound_to_the_model_is_bound_to_the_copy(self):
        class Recorder(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(3, 2)
                self.seen = 0
                self.fc.register_forward_hook(self.record)

            def record(self, *_):
                self.seen += 1

            def forward(self, x):
                return self.fc(x)

        model = convert(Recorder())
        merged = merge(model, "default")
        merged(torch.randn(1, 3))
        assert (merged.seen, model.seen) == (1, 0)

    @pytest.mark.parametrize("gate", [{"gate": "hard", "threshold": 0.3}, {"temperature": 0.5}], ids=["hard", "temperature"])
    def test_bakes_the_gate_in(self, gate):
        layer = MaskedLinear(4, 3, **gate)
        x = torch.randn(2, 4)
        torch.testing.assert_close(merge(layer, "default")(x), layer(x))

    def test_wants_no_active_task_and_ignores_one(self):
        model = self._model()
        x = _small_input()
        with using_task(model, "b"):
            wanted = model(x)
        with using_task(model, "default"):
            merged = merge(model, "b")
        torch.testing.assert_close(merged(x), wanted)

    def test_merged_and_masked_again_is_the_same_function(self):
        model = self._model()
        x = _small_input()
        merged = merge(model, "b")
        wanted = merged(x)
        torch.testing.assert_close(masks_on(convert(merged))(x), wanted)

    @pytest.mark.parametrize(("task", "error"), [("c", ValueError), ("", ValueError), (None, TypeError)])
    def test_an_unknown_task_is_refused(self, task, error):
        with pytest.raises(error, match="task"):
            merge(self._model(), task)

    def test_a_model_without_masks_is_refused(self):
        with pytest.raises(ValueError, match="no masked layer"):
            merge(_small(), "default")

    def test_sixteen_bit_and_channels_last_models_keep_dtype_and_layout(self):
        model = convert(nn.Conv2d(4, 3, 3).bfloat16().to(memory_format=torch.channels_last))
        merged = metamask_ext.merge(model, "default")
        assert merged.weight.dtype == torch.bfloat16
        assert merged.weight.is_contiguous(memory_format=torch.channels_last)
