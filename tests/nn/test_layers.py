"""MaskedLinear and MaskedConv2d are torch's layers in every respect but the mask."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
from support.gpu import DEVICES, SECOND
from support.models import LOGIT_ON, masks_on
from torch import nn
from torch.nn.utils import skip_init

import metamask_ext
from metamask_ext.nn import MaskedConv2d, MaskedLayer, MaskedLinear

LINEAR_CASES = {
    "plain": ((5, 3), {}, (2, 5)),
    "no-bias": ((5, 3), {"bias": False}, (2, 5)),
    "unbatched": ((5, 3), {}, (5,)),
    "many-batch-dims": ((5, 3), {}, (2, 1, 4, 5)),
    "one-by-one": ((1, 1), {}, (3, 1)),
    "empty-batch": ((5, 3), {}, (0, 5)),
    "no-outputs": ((5, 0), {}, (2, 5)),
}
CONV_CASES = {
    "plain": ((3, 4, 3), {}, (2, 3, 7, 8)),
    "no-bias": ((3, 4, 3), {"bias": False}, (2, 3, 7, 8)),
    "unbatched": ((3, 4, 3), {}, (3, 7, 8)),
    "unbatched-circular": ((3, 4, 3), {"padding": 1, "padding_mode": "circular"}, (3, 7, 8)),
    "kernel-stride-padding-pairs": ((3, 4, (3, 2)), {"stride": (2, 1), "padding": (0, 2)}, (2, 3, 7, 8)),
    "dilation": ((3, 4, 2), {"dilation": (2, 3), "padding": 2}, (2, 3, 7, 8)),
    "groups": ((4, 6, 3), {"groups": 2}, (2, 4, 7, 8)),
    "depthwise": ((4, 8, 3), {"groups": 4, "padding": 1}, (2, 4, 7, 8)),
    "positional-arguments": ((4, 6, 3, 2, 1, 1, 2, False, "reflect"), {}, (2, 4, 7, 8)),
    "valid": ((3, 4, 3), {"padding": "valid"}, (2, 3, 7, 8)),
    "same-even-kernel": ((3, 4, (2, 3)), {"padding": "same"}, (2, 3, 7, 8)),
    "same-dilated": ((3, 4, 3), {"padding": "same", "dilation": 2}, (2, 3, 7, 8)),
    **{
        f"{padding}-{mode}": ((3, 4, 3), {"padding": padding, "padding_mode": mode}, (2, 3, 7, 8))
        for mode in ("zeros", "reflect", "replicate", "circular")
        for padding in ((1, 2), "same")
    },
    "empty-batch": ((3, 4, 3), {}, (0, 3, 7, 8)),
}
CASES = [
    *(pytest.param(MaskedLinear, nn.Linear, *case, id=f"linear-{name}") for name, case in LINEAR_CASES.items()),
    *(pytest.param(MaskedConv2d, nn.Conv2d, *case, id=f"conv2d-{name}") for name, case in CONV_CASES.items()),
]
each_device = pytest.mark.parametrize("device", DEVICES)
LAYERS = [
    pytest.param(lambda **options: MaskedLinear(5, 3, **options), (2, 5), id="linear"),
    pytest.param(lambda **options: MaskedConv2d(2, 3, 3, **options), (2, 2, 5, 5), id="conv2d"),
]


def _pair(masked_type, plain_type, arguments, options, dtype, device):
    """A masked layer and torch's with the same weights."""
    plain = plain_type(*arguments, **options, dtype=dtype, device=device)
    masked = masked_type(*arguments, **options, dtype=dtype, device=device)
    masked.load_state_dict(plain.state_dict())
    return masked, plain


def _run(layer, input):
    """Output, and gradients of the input, the weight and the bias."""
    input = input.clone().requires_grad_()
    output = layer(input)
    leaves = [input, *(p for p in (layer.weight, layer.bias) if p is not None)]
    return [output, *torch.autograd.grad(output.square().sum(), leaves)]


@each_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("masked_type", "plain_type", "arguments", "options", "shape"), CASES)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_with_all_logits_at_plus_100_the_layer_is_torchs(masked_type, plain_type, arguments, options, shape, dtype, device):
    masked, plain = _pair(masked_type, plain_type, arguments, options, dtype, device)
    masks_on(masked)
    input = torch.randn(shape, dtype=dtype).to(device)
    for got, wanted in zip(_run(masked, input), _run(plain, input), strict=True):
        torch.testing.assert_close(got, wanted)


def _in_the_emulator(masked_type, options, **_):
    return masked_type is MaskedLinear or options == {"groups": 2}


@pytest.mark.every_device(emulated_if=_in_the_emulator)
@pytest.mark.parametrize("device", [*DEVICES, SECOND])
@pytest.mark.parametrize(("masked_type", "plain_type", "arguments", "options", "shape"), CASES)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_random_masks_give_torchs_layer_with_theta_and_its_gradients_by_the_chain_rule(
    masked_type, plain_type, arguments, options, shape, device
):
    masked, plain = _pair(masked_type, plain_type, arguments, options, torch.float64, device)
    gates = {"weight": masked.masks["default"].detach().sigmoid()}
    if plain.bias is not None:
        gates["bias"] = masked.bias_masks["default"].detach().sigmoid()
    with torch.no_grad():
        for name, gate in gates.items():
            getattr(plain, name).mul_(gate)
    input = torch.randn(shape, dtype=torch.float64).to(device)
    output, wanted = masked(input), plain(input)
    torch.testing.assert_close(output, wanted)
    output.square().sum().backward()
    wanted.square().sum().backward()
    for name, gate in gates.items():
        shared, logits = getattr(masked, name), getattr(masked, "masks" if name == "weight" else "bias_masks")["default"]
        of_theta = getattr(plain, name).grad
        torch.testing.assert_close(shared.grad, of_theta * gate)
        torch.testing.assert_close(logits.grad, of_theta * shared.detach() * gate * (1 - gate))


def test_linear_worked_out_by_hand():
    # W = [2, 4], b = 8; logits ln 3 -> 3/4, 0 -> 1/2, bias -ln 3 -> 1/4: theta = [1.5, 2], bias 2; x = [2, 3] -> 3 + 6 + 2 = 11.
    layer = MaskedLinear(2, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, 4.0]]))
        layer.bias.fill_(8.0)
        layer.masks["default"].copy_(torch.tensor([[math.log(3), 0.0]]))
        layer.bias_masks["default"].fill_(-math.log(3))
    x = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.item() == pytest.approx(11.0)
    y.sum().backward()
    # dM = x * W * s * (1 - s): 2*2*3/16 and 3*4*1/4; for the bias 8 * 3/16.
    assert x.grad.tolist() == pytest.approx([1.5, 2.0])
    assert layer.weight.grad[0].tolist() == pytest.approx([1.5, 1.5])
    assert layer.masks["default"].grad[0].tolist() == pytest.approx([0.75, 3.0])
    assert layer.bias.grad.item() == pytest.approx(0.25)
    assert layer.bias_masks["default"].grad.item() == pytest.approx(1.5)


def test_hard_gate_and_temperature_worked_out_by_hand():
    def layer(**options):
        made = MaskedLinear(2, 1, dtype=torch.float64, mask_init=0.5, **options)
        with torch.no_grad():
            made.weight.fill_(2.0)
            made.bias.fill_(1.0)
            made.masks["default"][0, 1] = 0.4
        return made

    ones = torch.ones(2, dtype=torch.float64)
    # Threshold 0.45 passes the 0.5s (weight 0 and the bias), not the 0.4.
    assert layer(gate="hard", threshold=0.45)(ones).item() == 3.0
    # Straight through: dM = W * x, for the weight that is off too.
    hard = layer(gate="hard", threshold=0.45)
    hard(ones).sum().backward()
    assert hard.masks["default"].grad.tolist() == [[2.0, 2.0]]
    soft = layer(temperature=0.5)
    s = [1 / (1 + math.exp(-logit / 0.5)) for logit in (0.5, 0.4)]
    assert soft(ones).item() == pytest.approx(2 * s[0] + 2 * s[1] + s[0])
    soft.temperature = 1e-3  # annealed: all gates open
    assert soft(ones).item() == pytest.approx(5.0)


def test_conv2d_worked_out_by_hand():
    # A 1x2 kernel [4, 8], logits 0 and -ln 3: theta [2, 2]; bias 6 with logit ln 2 -> 2/3: 4. Row [1, 2, 3] -> [2*3 + 4, 2*5 + 4].
    layer = MaskedConv2d(1, 1, (1, 2), dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([4.0, 8.0]).view(1, 1, 1, 2))
        layer.bias.fill_(6.0)
        layer.masks["default"].copy_(torch.tensor([0.0, -math.log(3)]).view(1, 1, 1, 2))
        layer.bias_masks["default"].fill_(math.log(2))
    row = torch.tensor([[[1.0, 2.0, 3.0]]], dtype=torch.float64)
    assert layer(row).flatten().tolist() == pytest.approx([10.0, 14.0])


@pytest.mark.parametrize(
    ("masked_type", "plain_type"), [(MaskedLinear, nn.Linear), (MaskedConv2d, nn.Conv2d)], ids=["linear", "conv2d"]
)
def test_constructors_take_torchs_arguments_in_torchs_order_and_defaults(masked_type, plain_type):
    ours = inspect.signature(masked_type).parameters
    for name, parameter in inspect.signature(plain_type).parameters.items():
        assert ours[name].default == parameter.default, name
    positional = [name for name in inspect.signature(plain_type).parameters if name not in ("device", "dtype")]
    assert list(ours)[: len(positional)] == positional


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_weight_and_bias_are_drawn_as_torch_draws_them(make, shape):
    torch.manual_seed(3)
    masked = make()
    torch.manual_seed(3)
    plain = nn.Linear(5, 3) if isinstance(masked, nn.Linear) else nn.Conv2d(2, 3, 3)
    assert torch.equal(masked.weight, plain.weight)
    assert torch.equal(masked.bias, plain.bias)


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_weight_bias_and_one_parameter_per_task_are_the_parameters(make, shape):
    layer = make()
    metamask_ext.add_task(layer, "b")
    assert [name for name, _ in layer.named_parameters()] == [
        "weight",
        "bias",
        "masks.default",
        "masks.b",
        "bias_masks.default",
        "bias_masks.b",
    ]
    assert isinstance(layer.masks, nn.ParameterDict)
    assert list(layer.masks) == list(layer.bias_masks) == ["default", "b"]
    assert layer.masks["b"].shape == layer.weight.shape
    assert layer.bias_masks["b"].shape == layer.bias.shape
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in layer.parameters())
    without = make(bias=False)
    assert without.bias is None and without.bias_masks is None and without.bias_mask_logits is None
    assert [name for name, _ in without.named_parameters()] == ["weight", "masks.default"]


def test_masks_begin_as_mask_init_says():
    normal = MaskedLinear(200, 200).masks["default"]
    # 40000 samples: the mean is within 0.03 of 0 and the deviation within 0.02 of 1, six standard errors each.
    assert abs(normal.mean().item()) < 0.03
    assert abs(normal.std().item() - 1) < 0.0212
    assert MaskedLinear(3, 2, mask_init=2.5).masks["default"].unique().tolist() == [2.5]
    filled = MaskedLinear(3, 2, mask_init=lambda logits: logits.copy_(torch.arange(logits.numel()).view(logits.shape)))
    assert filled.masks["default"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert filled.bias_masks["default"].tolist() == [0, 1]


def test_reset_parameters_draws_weights_and_masks_anew_in_place():
    layer = MaskedLinear(4, 4)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in layer.named_parameters()}
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert parameter is before[name][0]
        assert not torch.equal(parameter, before[name][1]), name


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        pytest.param({"gate": "soft"}, ValueError, "gate", id="unknown-gate"),
        pytest.param({"temperature": 0.0}, ValueError, "temperature", id="temperature-zero"),
        pytest.param({"temperature": float("nan")}, ValueError, "temperature", id="temperature-nan"),
        pytest.param({"gate": "hard", "threshold": float("nan")}, ValueError, "threshold", id="threshold-nan"),
        pytest.param({"mask_init": "uniform"}, ValueError, "mask_init", id="unknown-mask-init"),
        pytest.param({"mask_init": None}, ValueError, "mask_init", id="mask-init-none"),
        pytest.param({"dtype": torch.complex64}, TypeError, "complex64", id="complex"),
    ],
)
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_wrong_options_are_refused_by_name(make, shape, options, error, words):
    with pytest.raises(error, match=words):
        make(**options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_dtype_argument_and_conversion_reach_every_parameter(make, shape, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    for layer, mask_dtype in (
        (make(dtype=dtype), wide),
        (make().to(dtype), wide),
        (make(dtype=dtype, mask_dtype=dtype), dtype),
        (make(dtype=dtype, mask_dtype=dtype).to(dtype), dtype),
    ):
        assert {layer.weight.dtype, layer.bias.dtype} == {dtype}
        metamask_ext.add_task(layer, "b")
        assert {mask.dtype for masks in (layer.masks, layer.bias_masks) for mask in masks.values()} == {mask_dtype}
        input = torch.randn(shape, dtype=dtype)
        with metamask_ext.using_task(layer, "b"):
            output = layer(input)
            output.float().sum().backward()
        assert output.dtype == layer.weight.grad.dtype == dtype
        assert layer.masks["b"].grad.dtype == mask_dtype
        assert layer.masks["default"].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_layers_are_close_to_the_same_layer_in_float32(dtype):
    layer = MaskedLinear(8, 5).to(dtype)
    wide = copy.deepcopy(layer).float()
    input = torch.randn(3, 8).to(dtype)
    # theta and the sum of eight products are each rounded once to 16 bits; the values are about 1.
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(input).float(), wide(input.float()), rtol=4 * step, atol=4 * step)


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_meta_device_builds_shapes_and_to_empty_with_reset_makes_a_working_layer(make, shape):
    layer = make(device="meta")
    metamask_ext.add_task(layer, "b", init="mean")
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    with metamask_ext.using_task(layer, "b"):
        assert layer(torch.empty(shape, device="meta")).device.type == "meta"
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert all(torch.isfinite(parameter).all() for parameter in layer.parameters())
    with metamask_ext.using_task(layer, "b"):
        assert torch.isfinite(layer(torch.randn(shape))).all()
    assert {parameter.device.type for parameter in make().to("meta").parameters()} == {"meta"}


def test_skip_init_and_the_device_context_work_as_for_torchs_layer():
    assert skip_init(MaskedLinear, 3, 2).masks["default"].shape == (2, 3)
    with torch.device("meta"):
        assert MaskedLinear(3, 2).masks["default"].device.type == "meta"


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_deepcopy_is_independent_and_computes_the_same(make, shape):
    layer = make()
    metamask_ext.add_task(layer, "a.b")
    twin = copy.deepcopy(layer)
    input = torch.randn(shape)
    for task in ("default", "a.b"):
        with metamask_ext.using_task(layer, task), metamask_ext.using_task(twin, task):
            assert torch.equal(layer(input), twin(input))
    addresses = {parameter.data_ptr() for parameter in layer.parameters()}
    assert not addresses & {parameter.data_ptr() for parameter in twin.parameters()}
    metamask_ext.remove_task(twin, "a.b")
    assert metamask_ext.tasks(layer) == ["default", "a.b"]


@pytest.mark.parametrize(
    "through",
    [
        pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickle"),
        pytest.param(lambda model: _through_torch_save(model), id="torch-save"),
    ],
)
def test_pickled_layers_come_back_the_same(through):
    model = nn.Sequential(MaskedLinear(5, 3, gate="hard", threshold=0.25), MaskedLinear(3, 2, temperature=2.0, bias=False))
    metamask_ext.add_task(model, "../x")
    back = through(model)
    assert metamask_ext.tasks(back) == ["default", "../x"]
    assert (back[0].gate, back[0].threshold, back[1].temperature) == ("hard", 0.25, 2.0)
    input = torch.randn(4, 5)
    with metamask_ext.using_task(model, "../x"), metamask_ext.using_task(back, "../x"):
        assert torch.equal(model(input), back(input))


def _through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_repr_says_what_torchs_says_and_the_gate_and_the_number_of_tasks():
    layer = MaskedLinear(5, 3, bias=False)
    metamask_ext.add_task(layer, "b")
    assert layer.extra_repr() == "in_features=5, out_features=3, bias=False, gate=sigmoid, temperature=1.0, tasks=2"
    conv = MaskedConv2d(2, 3, 3, stride=2, padding="valid", gate="hard", threshold=0.5)
    assert conv.extra_repr() == f"{nn.Conv2d(2, 3, 3, stride=2, padding='valid').extra_repr()}, gate=hard, threshold=0.5, tasks=1"
    assert "MaskedLinear" in repr(layer)


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_is_an_instance_of_torchs_layer_and_of_masked_layer(make, shape):
    layer = make()
    assert isinstance(layer, MaskedLayer)
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    assert layer.plain_type in (nn.Linear, nn.Conv2d)


@pytest.mark.parametrize(
    ("layer", "input", "error", "words"),
    [
        pytest.param(MaskedLinear(5, 3), torch.zeros(2, 4), ValueError, r"input .*5.*\[2, 4\]", id="linear-width"),
        pytest.param(MaskedLinear(5, 3), torch.zeros(()), ValueError, "input", id="linear-scalar"),
        pytest.param(MaskedLinear(5, 3), torch.zeros(2, 5).double(), TypeError, "float32.*float64", id="linear-dtype"),
        pytest.param(MaskedLinear(5, 3), [1.0] * 5, TypeError, "input.*list", id="linear-list"),
        pytest.param(
            MaskedConv2d(2, 3, 3), torch.zeros(1, 3, 5, 5), ValueError, r"input .*2.*\[1, 3, 5, 5\]", id="conv2d-channels"
        ),
        pytest.param(MaskedConv2d(2, 3, 3), torch.zeros(2, 5), ValueError, "input", id="conv2d-dimensions"),
        pytest.param(MaskedConv2d(2, 3, 3), torch.zeros(1, 2, 5, 5, device="meta"), ValueError, "device", id="conv2d-device"),
    ],
)
def test_wrong_inputs_are_refused_with_what_was_wanted(layer, input, error, words):
    with pytest.raises(error, match=words):
        layer(input)


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_forward_hooks_and_frozen_parameters_behave_as_in_torch(make, shape):
    layer = make()
    seen = []
    layer.register_forward_hook(lambda module, given, output: seen.append(output.shape))
    layer.weight.requires_grad_(False)
    layer(torch.randn(shape)).sum().backward()
    assert len(seen) == 1
    assert layer.weight.grad is None
    assert layer.masks["default"].grad.abs().sum() > 0


def test_channels_last_weights_keep_their_layout_in_new_masks():
    layer = MaskedConv2d(4, 3, 3).to(memory_format=torch.channels_last)
    metamask_ext.add_task(layer, "b")
    assert layer.masks["b"].is_contiguous(memory_format=torch.channels_last)
    input = torch.randn(2, 4, 6, 6)
    with metamask_ext.using_task(layer, "b"):
        wanted = nn.functional.conv2d(
            input, layer.weight * layer.masks["b"].sigmoid(), layer.bias * layer.bias_masks["b"].sigmoid()
        )
        torch.testing.assert_close(layer(input), wanted)


class TestAutocast:
    @pytest.mark.parametrize(("make", "shape"), LAYERS)
    def test_output_has_the_dtype_and_about_the_values_of_torchs_layer(self, make, shape):
        layer = make(mask_init=LOGIT_ON)
        plain = metamask_ext.merge(layer, "default")
        input = torch.randn(shape)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, wanted = layer(input), plain(input)
        assert got.dtype == wanted.dtype == torch.bfloat16
        # Input, weight and result are rounded to 8 bits: three half units of the terms (ours may round theta later, or not at all).
        plain.double()
        exact = plain(input.double())
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.abs_()
        bound = 3 * 2**-9 * plain(input.double().abs())
        for result in (got, wanted):
            assert bool(((result.double() - exact).abs() <= bound).all())
        got.float().sum().backward()
        assert layer.weight.grad.dtype == layer.masks["default"].grad.dtype == torch.float32

    @pytest.mark.parametrize(("make", "shape"), LAYERS)
    def test_random_masks_are_close_to_float32(self, make, shape):
        layer = make()
        input = torch.randn(shape)
        wanted = layer(input)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = layer(input)
        # Input, theta, bias and result are rounded to 8 bits each; sums of up to 18 products of size below 1.
        torch.testing.assert_close(got.float(), wanted, rtol=2**-6, atol=2**-6)

    @pytest.mark.parametrize(("make", "shape"), LAYERS)
    def test_float64_is_left_alone_as_by_torchs_layer(self, make, shape):
        layer = make(dtype=torch.float64)
        plain = metamask_ext.merge(layer, "default")
        input = torch.randn(shape, dtype=torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, wanted = layer(input), plain(input)
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted)

    def test_input_in_the_autocast_dtype_is_taken(self):
        layer = MaskedLinear(5, 3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(torch.randn(2, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
