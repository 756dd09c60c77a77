"""convert: modules that read a layer's weight instead of calling the layer see the masked weight, in training and evaluation."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from support.models import masked_names, masks_on, randomize_masks
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from metamask_ext import add_task, convert, merge, tasks, using_task
from metamask_ext.data._torchvision import import_torchvision

WRITES = {
    "unbind": lambda w: w.unbind(0)[0].fill_(0),
    "chunk": lambda w: w.chunk(2)[1].zero_(),
    "split": lambda w: torch.split(w, 1)[0].mul_(2),
    "tensor-split": lambda w: w.tensor_split(2)[1].mul_(2),
    "rows": lambda w: [row.zero_() for row in w],
    "unpacked": lambda w: nn.init.zeros_(w.chunk(3)[0].T),
    "keyword": lambda w: torch.unbind(input=w)[0].zero_(),
    "view-by-keyword": lambda w: torch.transpose(input=w, dim0=0, dim1=1).zero_(),
}


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

    @pytest.mark.parametrize("write", WRITES)
    def test_a_write_to_a_part_of_what_is_read_is_refused(self, write):
        model = convert(_SwinLike())
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad(), pytest.raises(RuntimeError, match="a write to it is lost"):
            WRITES[write](model.qkv.weight)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if torch.is_tensor(value))

    def test_results_that_are_no_parts_keep_their_types(self):
        weight = convert(_SwinLike()).qkv.weight
        assert type(weight.shape) is type(weight.size()) is torch.Size
        assert type(weight.max(0)) is torch.return_types.max
        assert type(weight.tolist()) is list
        assert type(torch.split(weight, [4, 8])) is tuple

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
        assert len(masks) == 16  # in_proj, out_proj, linear1, linear2 with bias, twice
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
            # resnet18: 20 convolutions and fc. vit: conv_proj, two attentions with out_proj and a two-layer MLP, the head.
            pytest.param(lambda models: models.resnet18(num_classes=5), 32, 21, id="resnet18"),
            pytest.param(lambda models: models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5), 16, 10, id="vit"),
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
        assert model is plain and len(masked_names(model)) == layers
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
