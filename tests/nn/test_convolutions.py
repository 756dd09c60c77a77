"""MaskedConv1d, MaskedConv3d and the transposed convolutions, built as torch's layers are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.models import masks_on
from torch import nn

import metamask_ext as mm
from metamask_ext.nn import MaskedConv1d, MaskedConv3d, MaskedConvTranspose1d, MaskedConvTranspose2d, MaskedConvTranspose3d

KINDS = {
    MaskedConv1d: (nn.Conv1d, (4, 6, 3, 2, 1, 2, 2, False, "circular"), (4, 9)),
    MaskedConv3d: (nn.Conv3d, (4, 6, (2, 1, 2), 2, (1, 0, 1), 1, 2, True, "replicate"), (4, 3, 4, 3)),
    MaskedConvTranspose1d: (nn.ConvTranspose1d, (4, 6, 3, 2, 1, 1, 2, True, 1), (4, 5)),
    MaskedConvTranspose2d: (nn.ConvTranspose2d, (4, 6, (3, 2), 2, 1, 1, 2, False, 2), (4, 3, 4)),
    MaskedConvTranspose3d: (nn.ConvTranspose3d, (4, 2, 2, 2, 0, 0, 2, True, 1, "zeros"), (4, 2, 3, 2)),
}


@pytest.mark.parametrize("kind", KINDS)
class TestBuilt:
    def test_as_torchs_with_every_argument(self, kind):
        plain_kind, arguments, shape = KINDS[kind]
        plain = plain_kind(*arguments, dtype=torch.float64, device="cpu")
        layer = kind(*arguments, dtype=torch.float64, device="cpu", gate="sigmoid", temperature=2.0, mask_init=0.5)
        assert isinstance(layer, plain_kind) and layer.temperature == 2.0
        assert layer.masks["default"].shape == layer.weight.shape and layer.masks["default"].unique().tolist() == [0.5]
        layer.load_state_dict(plain.state_dict(), strict=False)
        assert torch.equal(layer.weight, plain.weight)
        x = torch.randn(2, *shape, dtype=torch.float64)
        torch.testing.assert_close(masks_on(layer)(x), plain(x))
        torch.testing.assert_close(layer(x[0]), plain(x[0]))
        assert plain.extra_repr() in repr(layer) and "gate=sigmoid" in repr(layer)
        layer.reset_parameters()
        assert layer.masks["default"].unique().tolist() == [0.5] and not torch.equal(layer.weight, plain.weight)

    def test_errors_are_torchs_or_name_the_argument(self, kind):
        _, arguments, shape = KINDS[kind]
        layer = kind(*arguments)
        for wrong in (arguments[:2], (5, *arguments[1:])):
            with pytest.raises((TypeError, ValueError)):
                kind(*wrong)
        with pytest.raises(ValueError, match="gate must be one of"):
            kind(*arguments, gate="soft")
        with pytest.raises(TypeError, match="other"):
            kind(*arguments, other=1)
        with pytest.raises(TypeError, match="input must"):
            layer(torch.ones(2, *shape, dtype=torch.int64))
        with pytest.raises(TypeError, match="input must be a tensor"):
            layer([1.0])
        with pytest.raises(TypeError, match="input must have the dtype of weight"):
            layer(torch.randn(2, *shape, dtype=torch.float64))
        with pytest.raises((RuntimeError, ValueError)):
            layer(torch.randn(2, 3))

    def test_autocast_computes_as_torch_does(self, kind):
        _, arguments, shape = KINDS[kind]
        layer = kind(*arguments)
        mm.add_task(layer, "b")
        x = torch.randn(2, *shape)
        with torch.autocast("cpu", torch.bfloat16), mm.using_task(layer, ["b", "default"]):
            assert layer(x).dtype == torch.bfloat16


def test_the_formula():
    layer = MaskedConvTranspose2d(2, 3, 2, stride=2).double()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    theta = layer.weight * layer.masks["default"].sigmoid()
    wanted = F.conv_transpose2d(x, theta, layer.bias * layer.bias_masks["default"].sigmoid(), stride=2)
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer(x, output_size=[7, 7])[..., :6, :6], wanted)
    with pytest.raises(ValueError, match="requested an output size"):
        layer(x, output_size=[9, 9])


def test_gradcheck_of_a_mixed_task_batch():
    layer = MaskedConv1d(2, 2, 2).double()
    mm.add_task(layer, "b")
    x = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)

    def run(x, *_):
        with mm.using_task(layer, ["b", "default"]):
            return layer(x)

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))
    assert torch.autograd.gradgradcheck(run, (x, *layer.parameters()))


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_convert_leaves_of_these_kinds():
    class Own(nn.Conv3d):
        def forward(self, x):
            return F.conv3d(x, self._parameters["weight"])

    model = nn.Sequential(nn.LazyConv1d(2, 3), Own(1, 1, 1), nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(2, 2, 2)))
    assert [left.reason for left in mm.conversion_report(mm.convert(model)).left] == [
        "it is lazy: run the model once first",
        "its forward takes parameters from _parameters, not from its attributes",
        "its weight is not a parameter of its own (parametrized, pruned or normalised)",
    ]


def test_a_subclass_with_a_forward_of_its_own_keeps_it():
    class Causal(nn.Conv1d):
        def forward(self, x):
            return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))

    model = mm.convert(nn.Sequential(Causal(2, 3, 3).double()))
    mm.add_task(model, "b", init="copy:default")
    x = torch.randn(2, 2, 5, dtype=torch.float64)
    with mm.using_task(model, ["b", "default"]):
        y = model(x)
    torch.testing.assert_close(y, mm.merge(model, "b")(x))
    assert y.shape == (2, 3, 5)
