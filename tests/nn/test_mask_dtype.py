"""Masks are float32 beside 16-bit weights, whatever the model was converted to, unless ``mask_dtype`` says otherwise."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from support.fused_steps import ADAMW, SGD, compare
from torch import nn

import metamask_ext as mm
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d

SIXTEEN = (torch.bfloat16, torch.float16)
each_sixteen = pytest.mark.parametrize("dtype", SIXTEEN, ids=lambda dtype: str(dtype)[6:])
KINDS = {
    "linear": (lambda **options: MaskedLinear(4, 3, **options), (2, 4)),
    "conv2d": (lambda **options: MaskedConv2d(4, 3, 3, **options), (2, 4, 5, 5)),
    "convert": (lambda dtype=None, **options: mm.convert(nn.Linear(4, 3, dtype=dtype), **options), (2, 4)),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
CONVERSIONS = {
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "half": (lambda model: model.half(), torch.float16),
    "to": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "to-dtype": (lambda model: model.to(dtype=torch.float16), torch.float16),
    "to-device-dtype": (lambda model: model.to("cpu", torch.bfloat16), torch.bfloat16),
    "to-other": (lambda model: model.to(torch.zeros(1, dtype=torch.bfloat16)), torch.bfloat16),
    "type": (lambda model: model.type(torch.bfloat16), torch.bfloat16),
    "twice": (lambda model: model.half().bfloat16(), torch.bfloat16),
    "from-double": (lambda model: model.double().bfloat16(), torch.bfloat16),
}


def _mask_dtypes(layer):
    return {mask.dtype for masks in layer._dicts().values() for mask in masks.values()}


@pytest.mark.parametrize("how", CONVERSIONS)
@each_kind
def test_a_conversion_to_16_bits_leaves_the_masks_exact_and_new_tasks_are_float32_too(kind, how):
    make, shape = KINDS[kind]
    layer = make(mask_init="normal")
    before = layer.masks["default"].detach().clone()
    parameter = layer.masks["default"]
    convert, dtype = CONVERSIONS[how]
    convert(layer)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert _mask_dtypes(layer) == {torch.float32}
    assert layer.masks["default"] is parameter and torch.equal(parameter, before)
    for init in ("random", "mean", "copy:default", {"default": 0.5}):
        mm.add_task(layer, f"by {init}", init)
    assert _mask_dtypes(layer) == {torch.float32}
    assert torch.equal(layer.masks["by copy:default"], before)
    with mm.using_task(layer, "by mean"):
        y = layer(torch.randn(shape, dtype=dtype))
        y.float().sum().backward()
    assert y.dtype == dtype and layer.masks["by mean"].grad.dtype == torch.float32 and layer.weight.grad.dtype == dtype


@each_sixteen
@each_kind
def test_built_in_16_bits(kind, dtype):
    make, _ = KINDS[kind]
    layer = make(dtype=dtype)
    assert layer.weight.dtype == dtype and _mask_dtypes(layer) == {torch.float32}
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = make()
        mm.add_task(layer, "b")
        mm.add_task(layer, "c", {"b": 0.5})
    finally:
        torch.set_default_dtype(default)
    assert layer.weight.dtype == dtype and _mask_dtypes(layer) == {torch.float32}


@each_kind
def test_float64_weights_have_float64_masks_and_float32_weights_float32_ones(kind):
    make, _ = KINDS[kind]
    layer = make(dtype=torch.float64)
    assert _mask_dtypes(layer) == {torch.float64}
    assert _mask_dtypes(layer.float()) == {torch.float32}
    assert _mask_dtypes(layer.bfloat16().double()) == {torch.float64}
    mm.add_task(layer, "b")
    assert _mask_dtypes(layer) == {torch.float64}
    assert _mask_dtypes(layer.half().float()) == {torch.float32}


@each_sixteen
@each_kind
def test_mask_dtype_of_16_bits_is_kept(kind, dtype):
    make, shape = KINDS[kind]
    layer = make(dtype=dtype, mask_dtype=dtype)
    mm.add_task(layer, "b", init="mean")
    assert _mask_dtypes(layer) == {dtype}
    assert _mask_dtypes(layer.to("cpu")) == {dtype}
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    assert _mask_dtypes(layer.to(other)) == {other}  # the kernels take one 16-bit type
    assert _mask_dtypes(layer.float()) == {torch.float32}
    assert _mask_dtypes(layer.to(dtype)) == {dtype}
    assert _mask_dtypes(copy.deepcopy(layer).to(other)) == {other}
    with mm.using_task(layer, "b"):
        assert layer(torch.randn(shape, dtype=dtype)).dtype == dtype


@each_kind
@pytest.mark.parametrize(
    ("dtype", "mask_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.int8),
        (torch.float32, "float32"),
    ],
    ids=str,
)
def test_a_mask_dtype_that_no_kernel_takes_is_refused(kind, dtype, mask_dtype):
    with pytest.raises(TypeError, match=f"mask_dtype must be None or torch.float.* beside .*{dtype} weight.*, got .*{mask_dtype}"):
        KINDS[kind][0](dtype=dtype, mask_dtype=mask_dtype)


def test_convert_refuses_a_mask_dtype_with_the_layers_name_before_it_changes_one():
    model = nn.Sequential(nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 2))
    with pytest.raises(TypeError, match="torch.float32 weight of '1', got torch.bfloat16"):
        mm.convert(model, mask_dtype=torch.bfloat16)
    assert type(model[0]) is nn.Linear
    with pytest.raises(TypeError, match="options"):
        mm.convert(model, masks_dtype=torch.float32)


def test_a_mask_trains_in_a_16_bit_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4)).bfloat16()
    mm.convert(model)
    optimizer = torch.optim.Adam(model[0].masks.parameters(), lr=1e-3)
    x = torch.randn(256, 64).bfloat16()
    for _ in range(20):
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model[0].masks["default"] != 4).all()


def test_mixed_task_batches_superpositions_reads_merges_and_packs():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True).bfloat16()
    model = mm.convert(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).bfloat16(), mask_init="normal")
    bank = mm.MaskBank(model)
    bank.add_task("b")
    x = torch.randn(2, 4).bfloat16()
    with mm.using_task(model, ["b", "default"]):
        y = model(x)
        y.float().sum().backward()
    assert {mask.grad.dtype for mask in model[0].masks.values()} == {torch.float32}
    for index, name in enumerate(("b", "default")):
        torch.testing.assert_close(mm.merge(model, name)(x)[index], y[index], rtol=0.02, atol=0.02)
    with bank.superpose({"b": 0.5, "default": 0.5}):
        assert model(x).dtype == torch.bfloat16
    mm.convert(attention)
    assert attention.out_proj.weight.dtype == torch.bfloat16  # read past forward: the masked one
    assert attention(x[None], x[None], x[None])[0].dtype == torch.bfloat16
    bank.pack("b")
    with mm.using_task(model, ["b", "default"]):
        assert model(x).dtype == torch.bfloat16
    assert len(bank.infer_task(x)) == 2


@each_sixteen
def test_packing_a_hard_mask_changes_no_output(dtype):
    torch.manual_seed(0)
    layer = MaskedLinear(200, 100, gate="hard", threshold=0.1, dtype=dtype)
    x = torch.randn(3, 200).to(dtype)
    with torch.no_grad():
        before = layer(x)
        mm.MaskBank(layer).pack("default")
        torch.testing.assert_close(layer(x), before, rtol=0.02, atol=0.02)


def test_bits_stay_bits_whatever_the_model_becomes():
    for convert, _ in CONVERSIONS.values():
        model = nn.Sequential(MaskedLinear(9, 3))
        bank = mm.MaskBank(model)
        bank.pack("default")
        bits = model[0].masks["default"].clone()
        convert(model)
        assert torch.equal(model[0].masks["default"], bits)


class TestStates:
    @each_sixteen
    def test_a_state_of_16_bit_masks_is_loaded_into_float32_ones(self, dtype):
        old = MaskedLinear(4, 3, dtype=dtype, mask_dtype=dtype)
        mm.add_task(old, "b")
        new = MaskedLinear(4, 3, dtype=dtype)
        new.load_state_dict(old.state_dict())
        assert _mask_dtypes(new) == {torch.float32}  # that of "b" too, which the layer lacked
        assert torch.equal(new.masks["b"], old.masks["b"].float())
        old.load_state_dict(new.state_dict())
        assert _mask_dtypes(old) == {dtype}

    def test_assign_takes_16_bit_masks_as_they_are_and_they_train_as_before(self):
        old = MaskedLinear(4, 3, dtype=torch.bfloat16, mask_dtype=torch.bfloat16)
        new = MaskedLinear(4, 3, dtype=torch.bfloat16)
        new.load_state_dict(old.state_dict(), assign=True)
        assert _mask_dtypes(new) == {torch.bfloat16}
        x = torch.randn(2, 4).bfloat16()
        assert torch.equal(new(x), old(x))
        assert _mask_dtypes(new.float().bfloat16()) == {torch.float32}

    def test_logits_in_the_place_of_bits(self):
        packed, layer = MaskedLinear(4, 3, dtype=torch.bfloat16), MaskedLinear(4, 3, dtype=torch.bfloat16)
        mm.MaskBank(packed).pack("default")
        packed.load_state_dict(layer.state_dict())
        assert _mask_dtypes(packed) == {torch.float32}

    def test_copies_pickles_and_the_meta_device(self):
        layer = MaskedLinear(4, 3, dtype=torch.bfloat16, mask_dtype=torch.bfloat16)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
            assert twin.mask_dtype == torch.bfloat16
            mm.add_task(twin, "b")
            assert _mask_dtypes(twin.half()) == {torch.float16}
        made = MaskedLinear(4, 3, device="meta", dtype=torch.bfloat16)
        assert _mask_dtypes(made) == {torch.float32}
        assert _mask_dtypes(made.to_empty(device="cpu").half()) == {torch.float32}
        assert made.masks["default"].device.type == "cpu"
        assert _mask_dtypes(MaskedLinear(4, 3).to("meta", torch.bfloat16)) == {torch.float32}

    def test_a_layer_made_before_there_was_mask_dtype(self):
        layer = MaskedLinear(4, 3)
        del layer.__dict__["mask_dtype"], layer.masks.__dict__["_wanted"]
        assert _mask_dtypes(copy.deepcopy(layer).half()) == {torch.float32}

    def test_a_conversion_keeps_the_memory_format_and_the_gradient(self):
        layer = MaskedConv2d(4, 3, 3)
        layer(torch.randn(1, 4, 5, 5)).sum().backward()
        grad = layer.masks["default"].grad.clone()
        layer.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
        mask = layer.masks["default"]
        assert mask.is_contiguous(memory_format=torch.channels_last) and not mask.is_contiguous()
        assert mask.grad.dtype == torch.float32 and torch.equal(mask.grad, grad)


class TestBanks:
    @pytest.mark.parametrize("mask_dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_a_16_bit_model_is_saved_and_loaded_into_one_of_either_kind(self, tmp_path, mask_dtype):
        def make(mask_dtype):
            return mm.convert(nn.Sequential(nn.Linear(4, 3)).bfloat16(), mask_init="normal", mask_dtype=mask_dtype)

        model = make(mask_dtype)
        bank = mm.MaskBank(model)
        bank.add_task("b")
        bank.pack("b")
        bank.save(tmp_path)
        for theirs in (None, torch.bfloat16):
            other = make(theirs)
            mm.MaskBank.load(tmp_path, other)
            mask = other[0].masks["default"]
            assert mask.dtype == (torch.float32 if theirs is None else theirs)
            if mask_dtype == theirs:
                assert torch.equal(mask, model[0].masks["default"])
            else:
                assert torch.equal(mask, model[0].masks["default"].to(mask.dtype))
            assert torch.equal(other[0].masks["b"], model[0].masks["b"])

    def test_a_task_of_a_16_bit_model_is_exported_as_the_model_computes_it(self, tmp_path):
        from metamask_ext.bank.export import task_state
        from metamask_ext.bank.store import Store

        model = mm.convert(nn.Sequential(nn.Linear(4, 3)).bfloat16(), mask_init="normal")
        mm.MaskBank(model).save(tmp_path)
        state = task_state(Store.open(tmp_path), "default")
        assert torch.equal(state["0.weight"], mm.merge(model, "default")[0].weight)


class TestMeta:
    @pytest.mark.parametrize("start", [None, {"default": 0.5, "b": 0.5}], ids=["task", "mixture"])
    def test_a_16_bit_model_adapts_float32_masks(self, start):
        model = mm.convert(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).bfloat16(), mask_init="normal")
        if start:
            mm.add_task(model, "b")
        maml = MAML(model, 0.1, inner_steps=2, start=start)
        x, y = torch.randn(3, 5, 4).bfloat16(), torch.randn(3, 5, 2)

        def loss(prediction, target):
            return (prediction.float() - target).square().mean()

        adapted = maml.adapt(loss, (x, y))
        assert {tensor.dtype for tensor in adapted.values()} == {torch.float32}
        maml(loss, (x, y), (x, y)).backward()
        assert model[0].masks["default"].grad.dtype == torch.float32
        assert model[0].weight.grad.dtype == torch.bfloat16


def test_the_statistics_of_a_batch_norm_and_other_tensors_of_tasks_are_converted_as_torch_does():
    layer = TaskBatchNorm2d(3).bfloat16()
    assert layer.per_task["weight"]["default"].dtype == torch.bfloat16


STEPS = {
    SGD: {"lr": 0.1, "momentum": 0.9, "mask_weight_decay": 0.1},
    ADAMW: {"lr": 0.1, "eps": 1e-2, "weight_decay": 0.0, "mask_weight_decay": 0.1},
}
each_optimizer = pytest.mark.parametrize("kind", STEPS, ids=lambda kind: kind.name)


@each_optimizer
@pytest.mark.parametrize("dtype", SIXTEEN, ids=lambda dtype: str(dtype)[6:])
def test_fused_steps_of_float32_masks_beside_16_bit_weights_are_torchs(dtype, kind):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(MaskedLinear(5, 6), nn.Tanh(), MaskedLinear(6, 3)).to(dtype)

    compare(make, kind, STEPS[kind], tolerance=50 * torch.finfo(dtype).eps)


@each_optimizer
@pytest.mark.parametrize("dtype", SIXTEEN, ids=lambda dtype: str(dtype)[6:])
def test_float32_masks_beside_frozen_16_bit_weights_step_inside_the_backward(dtype, kind):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(MaskedLinear(5, 6), nn.Tanh(), MaskedLinear(6, 3)).to(dtype)
        for layer in (model[0], model[2]):
            layer.weight.requires_grad_(False), layer.bias.requires_grad_(False)
        return model

    names = compare(make, kind, STEPS[kind], tolerance=1e-6)
    assert set(names) == {kind.ops[0]}
