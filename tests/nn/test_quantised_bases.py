"""Quantised weights are not masked: convert leaves them and says so, a masked layer refuses them, a merged task is quantised."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from metamask_ext import add_task, conversion_report, convert, masked_linear, masked_weight, merge
from metamask_ext.nn import MaskedConv2d, MaskedLinear


class _Quantised(Tensor):
    """As torchao's tensors: float32 for whoever asks, int8 or float8 and a scale inside."""

    @staticmethod
    def __new__(cls, values, scale):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values, scale):
        self.values_, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values_", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, _context, _size, _stride):
        return cls(inner["values_"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values_, args[0].scale)
        raise NotImplementedError(f"{func} of a quantised tensor")

    @classmethod
    def of(cls, weight, dtype=torch.int8):
        scale = weight.detach().abs().amax() / 127
        return cls((weight.detach() / scale).round().to(dtype), scale)


class _Twice(_Quantised):
    """A tensor made of a quantised one, as a sharded one is."""

    def __init__(self, values, scale):
        self.values_, self.scale = _Quantised(values, scale), scale


def _quantise(model, kind=_Quantised, **options):
    """As torchao's quantize_: another Parameter in the place of each linear layer's weight."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = dict(module.named_parameters())["weight"]
            module.weight = nn.Parameter(kind.of(weight, **options), requires_grad=False)
    return model


def _net():
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 2))


@pytest.mark.parametrize(("kind", "dtype"), [(_Quantised, torch.int8), (_Quantised, torch.float8_e4m3fn), (_Twice, torch.int8)])
class TestConvert:
    def test_leaves_quantised_layers_and_says_so(self, kind, dtype):
        model = convert(_quantise(_net(), kind, dtype=dtype))
        assert [type(module) for module in (model[0], model[2], model[3])] == [MaskedConv2d, nn.Linear, nn.Linear]
        for left in conversion_report(model).left:
            assert f"its weight is quantised ({kind.__name__}, {dtype})" in left.reason and "merge(model, task)" in left.reason

    def test_refuses_where_asked_to(self, kind, dtype):
        model = _quantise(_net(), kind, dtype=dtype)
        with pytest.raises(ValueError, match=r"'2', a Linear: its weight is quantised"):
            convert(model, on_unsupported="error")
        assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("read", [False, True], ids=["own", "read"])
def test_masked_model_is_not_quantised(read):
    model = nn.MultiheadAttention(4, 2) if read else _net()
    convert(model)
    add_task(model, "b")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"weight of .*Linear cannot be quantised \(_Quantised, torch.int8\) below its masks"):
        _quantise(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_bias_and_states():
    layer = MaskedLinear(4, 3)
    with pytest.raises(TypeError, match="bias of MaskedLinear cannot be quantised"):
        layer.bias = nn.Parameter(_Quantised.of(layer.bias), requires_grad=False)
    state = layer.state_dict()
    state["weight"] = _Quantised.of(layer.weight)
    before = layer.weight
    with pytest.raises(RuntimeError, match="cannot be quantised"):
        layer.load_state_dict(state, assign=True)
    assert layer.weight is before


def test_functions_name_the_argument():
    weight, logits, x = torch.randn(3, 4), torch.zeros(3, 4), torch.randn(2, 4)
    quantised = _Quantised.of(weight)
    with pytest.raises(TypeError, match=r"weight must be a dense tensor, got a quantised one, _Quantised \(torch.int8\)"):
        masked_linear(x, quantised, logits)
    with pytest.raises(TypeError, match="weight must be a dense tensor, got a quantised one"):
        masked_weight(quantised, logits)


class _InTwo(_Quantised):
    """A tensor that is made of others and keeps its values as they are, as DTensor."""

    @classmethod
    def of(cls, weight):
        return cls(weight.detach(), torch.ones(()))


def test_tensors_made_of_others_are_not_refused():
    layer = MaskedLinear(4, 3)
    layer.weight = nn.Parameter(_InTwo.of(layer.weight), requires_grad=False)
    assert isinstance(layer.weight, _InTwo)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_a_merged_task_is_quantised():
    model, x = convert(_net(), mask_init="normal"), torch.randn(5, 1, 2, 2)
    plain = merge(model, "default")
    quantised = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    assert type(quantised[2]).__module__.startswith("torch.ao")
    assert (quantised(x) - plain(x)).abs().max() < 0.05
