"""torch's attention with masked projections, alone and inside torch's transformers, whose fast paths read the weights."""

from __future__ import annotations

import pytest
import torch
from support.models import masks_on, randomize_masks
from torch import nn

import metamask_ext as mm
from metamask_ext.nn import MaskedLayer


def with_tasks(model):
    mm.convert(model.double())
    mm.add_task(model, "b")
    return randomize_masks(model)


def plain_of(model, task):
    return mm.merge(model, task)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mode", ["grad", "no-grad", "inference", "frozen"])
def test_an_encoder_layer_computes_with_the_masked_weights_on_every_path(batch_first, train, mode):
    torch.manual_seed(0)
    model = with_tasks(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first), 2)).train(train)
    model.requires_grad_(mode != "frozen")
    x = torch.randn(3, 3, 8, dtype=torch.float64)
    for task in ("default", "b"):
        merged = plain_of(model, task).train(True)  # the slow path of the plain model
        contexts = {
            "grad": torch.enable_grad,
            "frozen": torch.enable_grad,
            "no-grad": torch.no_grad,
            "inference": torch.inference_mode,
        }
        with mm.using_task(model, task), contexts[mode]():
            torch.testing.assert_close(model(x), merged(x))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_a_mixed_task_batch_through_torchs_transformers(batch_first, train):
    torch.manual_seed(0)
    options = {"batch_first": batch_first, "dropout": 0.0, "dtype": torch.float64}
    model = with_tasks(nn.Transformer(8, 2, 1, 1, 16, **options)).train(train)
    assert mm.conversion_report(model).share > 0.9
    dim = 0 if batch_first else 1
    source, target = torch.randn(2, 4, 3, 8, dtype=torch.float64)
    source, target = (x if batch_first else x.transpose(0, 1) for x in (source, target[:, :2]))
    padding = torch.tensor([[False, False, False], [False, False, True], [False, True, True], [False, False, False]])
    names = ["b", "default", "default", "b"]
    with mm.using_task(model, names):
        y = model(source, target, src_key_padding_mask=padding, memory_key_padding_mask=padding)
    for index, task in enumerate(names):
        one = torch.tensor([index])
        with mm.using_task(model, task):
            alone = model(
                source.index_select(dim, one),
                target.index_select(dim, one),
                src_key_padding_mask=padding[one],
                memory_key_padding_mask=padding[one],
            )
        torch.testing.assert_close(y.index_select(dim, one), alone)


def test_what_it_refuses_in_a_mixed_task_batch():
    model = with_tasks(nn.MultiheadAttention(4, 2))
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    with mm.using_task(model, ["b", "default", "b"], batch_dim=0), pytest.raises(RuntimeError, match="must lie along dimension 1"):
        model(x, x, x)
    with mm.using_task(model, ["b", "default", "b"]), pytest.raises(RuntimeError, match="names a task for each of 3"):
        model(x, x, x)
    with mm.using_task(model, ["b", "default"]), pytest.raises(RuntimeError, match="names a task for each of 2"):
        model(x, x[:, :1], x[:, :1])
    with mm.using_task(model, ["b", "default"]), pytest.raises(RuntimeError, match="at least 3 dimensions"):
        model(x[:, 0], x[:, 0], x[:, 0])
    with mm.using_task(model, "b"):
        assert model(x[:, 0], x[:, 0], x[:, 0])[0].shape == (3, 4)


def test_every_parameter_of_it_is_masked_and_none_is_left():
    for options in ({}, {"kdim": 3, "vdim": 5}, {"add_bias_kv": True}, {"bias": False}):
        model = mm.convert(nn.MultiheadAttention(4, 2, **options))
        report = mm.conversion_report(model)
        assert report.left == () and report.share == 1.0
        assert all(isinstance(layer, MaskedLayer) for layer in (model, model.out_proj))
    assert mm.convert(nn.MultiheadAttention(4, 2), include="out_proj").in_proj_weight.requires_grad
    report = mm.conversion_report(mm.convert(nn.MultiheadAttention(4, 2), exclude=""))
    assert [(left.name, left.reason) for left in report.left] == [("", "convert can mask it, and was not asked to")]


def test_a_subclass_with_torchs_forward_and_one_with_its_own():
    class Inherited(nn.MultiheadAttention):
        pass

    class Twice(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0] * 2

    x = torch.randn(2, 3, 4, dtype=torch.float64)
    for kind, inputs in ((Inherited, (x, x, x)), (Twice, (x,))):
        plain = kind(4, 2, batch_first=True).double()
        wanted = plain(*inputs)
        model = masks_on(mm.convert(plain))
        torch.testing.assert_close(model(*inputs), wanted)
        mm.add_task(model, "b")
        randomize_masks(model)
        with mm.using_task(model, ["b", "default"]):
            y = model(*inputs)
        with mm.using_task(model, "b"):
            alone = model(*(one[:1] for one in inputs))
        torch.testing.assert_close(
            y[0] if isinstance(y, torch.Tensor) else y[0][0], alone[0] if isinstance(y, torch.Tensor) else alone[0][0]
        )
        assert type(mm.merge(model, "b")) is kind


def test_parameters_are_reset_as_torch_does_and_masks_too():
    model = mm.convert(nn.MultiheadAttention(4, 2), mask_init=1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)
    model.reset_parameters()
    assert not bool((model._parameters["in_proj_weight"] == 9).any())
    assert not bool(model._parameters["in_proj_bias"].any())
    assert model.in_proj_weight_masks["default"].unique().tolist() == [1.0]
