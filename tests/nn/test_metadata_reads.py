"""Code that reads a weight's dtype, device or shape only has read no value: it works where the values are ambiguous."""

from __future__ import annotations

import io

import numpy
import pytest
import torch
from torch import nn

from metamask_ext import MaskBank, add_task, convert, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d
from metamask_ext.nn.read_through import ReadThroughConv2d, ReadThroughLinear

READS = {
    "dtype": lambda w: w.dtype,
    "data.dtype": lambda w: w.data.dtype,
    "detach": lambda w: (w.detach().device, w.detach().requires_grad),
    "device": lambda w: (
        w.device,
        w.device.type,
        w.get_device(),
        w.is_cuda,
        w.is_cpu,
        w.is_meta,
        w.is_xpu,
        w.is_mps,
        w.is_pinned(),
    ),
    "shape": lambda w: (w.shape, w.size(), w.size(0), w.size(dim=1), w.ndim, w.dim(), w.numel(), w.nelement(), len(w), w.nbytes),
    "shapes of views": lambda w: (w.T.shape, w.mT.shape, w[0].shape, w[:, None].shape, w.flatten().shape, w.view(-1).shape),
    "shapes of parts": lambda w: [part.shape for part in (*w.chunk(2), *w.split(1), *w.unbind())],
    "numbers of torch": lambda w: (torch.numel(w), torch.is_floating_point(w), torch.is_complex(w), torch.is_tensor(w)),
    "limits": lambda w: (torch.finfo(w.dtype).min, w.element_size(), w.itemsize, w.is_signed()),
    "requires_grad": lambda w: w.requires_grad,
    "layout": lambda w: (w.layout, w.is_sparse, w.is_nested, w.is_quantized, w.is_mkldnn, w.is_contiguous(), w.stride()),
    "None": lambda w: w is None or isinstance(w, (int, float)),
    "attributes of others": lambda w: (hasattr(w, "quant_state"), getattr(w, "CB", None)),
    "result_type": lambda w: (torch.result_type(w, torch.ones(2)), torch.promote_types(w.dtype, torch.float16)),
    "another's dtype": lambda w: (torch.ones(2).to(w).dtype, torch.ones(2, dtype=torch.int64).type_as(w).dtype),
    "its dtype": lambda w: (w.half().dtype, w.to(torch.float64).dtype, w.type(torch.bfloat16).dtype, w.type()),
    "new": lambda w: (torch.zeros_like(w), torch.ones_like(input=w), w.new_zeros(3), w.new_full((2,), 5.0), w.new_tensor([1.0])),
    "empty": lambda w: (torch.empty_like(w).shape, torch.rand_like(w).dtype, w.new_empty(3).dtype),
    "is_same_size": lambda w: w.is_same_size(torch.ones(w.shape)),
}
VALUES = {
    "linear": lambda w: nn.functional.linear(torch.ones(3), w.detach()),
    "view": lambda w: w.data.T + 1,
    "part": lambda w: w[0].sum(),
    "item": lambda w: w[0, 0].item(),
    "list": lambda w: w.tolist(),
    "numpy": lambda w: w.detach().numpy(),
    "copied": lambda w: w.clone() + 1,
    "converted": lambda w: w.to(torch.float64) * 2,
    "typed": lambda w: w.type(torch.float64) * 2,
    "moved": lambda w: w.to("cpu").sum(),
    "filled from": lambda w: torch.zeros(2, 3).copy_(w),
    "stacked": lambda w: torch.stack([torch.ones(2, 3), w]),
    "compared": lambda w: torch.equal(w, torch.ones(2, 3)),
    "written to": lambda w: w.data.zero_(),
    "made a tensor of": lambda w: torch.tensor(w),
    "taken as a tensor": lambda w: torch.as_tensor(w) + 1,
    "new of it": lambda w: torch.ones(1).new_tensor(w),
    "array": lambda w: numpy.asarray(w),
    "by dlpack": lambda w: torch.from_dlpack(w),
    "saved": lambda w: torch.save(w, io.BytesIO()),
    "a parameter of it": lambda w: nn.Parameter(w) + 1,
}


def _layer() -> ReadThroughLinear:
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(3, 2)

        def forward(self, x):
            return x @ self.proj.weight.t()

    model = convert(Attention())
    add_task(model, "b")
    assert isinstance(model.proj, ReadThroughLinear)
    return model.proj


def _same(a, b) -> bool:
    if isinstance(a, (list, tuple)) and not isinstance(a, torch.Size):
        return all(map(_same, a, b)) and len(a) == len(b)
    return torch.equal(a, b) and type(a) is torch.Tensor if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("read", READS)
def test_what_describes_a_weight_is_read_where_its_values_are_ambiguous(read):
    layer = _layer()
    for trained in (True, False):
        layer.weight_parameter = layer._parameters["weight"].requires_grad_(trained)
        wanted = READS[read](layer._parameters["weight"])
        for names in (["default", "b"], ["b", "b"], []):
            with using_task(layer, names):
                assert _same(READS[read](layer.weight), wanted)
        assert _same(READS[read](layer.weight), wanted)  # no task is active


@pytest.mark.parametrize("read", VALUES)
def test_values_are_refused_in_words(read):
    layer = _layer()
    with (
        using_task(layer, ["default", "b"]),
        pytest.raises(RuntimeError, match="weight of ReadThroughLinear is ambiguous"),
    ):
        VALUES[read](layer.weight)
    with pytest.raises(RuntimeError, match="none is active"):
        VALUES[read](layer.weight)


def test_it_says_what_it_is_where_it_is_printed():
    layer = _layer()
    with using_task(layer, ["default", "b"]):
        for text in (repr(layer.weight), str(layer.weight), f"{layer.weight}"):
            assert "[2, 3] of torch.float32 on cpu: weight of ReadThroughLinear is ambiguous in a mixed-task batch" in text


class _Casts(nn.Module):
    """Casts its input to a layer's dtype, as ViT, CLIP and T5 of transformers do."""

    def __init__(self):
        super().__init__()
        self.conv, self.proj, self.head = nn.Conv2d(2, 4, 1), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.conv(x.to(dtype=self.conv.weight.dtype, device=self.conv.weight.data.device)).flatten(1)
        if x.dtype != self.proj.weight.data.dtype and self.proj.bias is not None and x.shape[1] == self.proj.weight.size(1):
            x = x.to(self.proj.weight.dtype)
        if isinstance(self.head.weight, (torch.Tensor, nn.Parameter)) and self.head.weight.dtype != torch.int8:
            x = x.to(self.head.weight.dtype)
        return self.head(self.proj(x))


def test_a_layer_of_which_a_forward_reads_only_the_dtype_is_not_one_that_is_read():
    model = convert(_Casts())
    assert [type(layer) for layer in (model.conv, model.proj, model.head)] == [MaskedConv2d, MaskedLinear, MaskedLinear]


def test_how_a_model_initialises_its_weights_is_no_read_of_its_forward():
    class Model(_Casts):
        def forward(self, x):
            return super().forward(x.to(torch.float32))

        def to(self, *arguments):
            self._init_weights(self)
            return super().to(*arguments)

        def _init_weights(self, module):
            module.proj.weight.data.normal_()

    assert type(convert(Model()).proj) is MaskedLinear


def test_what_looks_like_it_and_reads_values():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(3, 3) for _ in range(4))

        def forward(self, x):
            if isinstance(self.scaled(self.a.weight, 2), torch.Tensor) and isinstance(torch.relu(self.b.weight), torch.Tensor):
                x = x @ self.c.weight.data.t() + self.d.weight.data
            return x

        def scaled(self, weight, by):
            return weight * by

    model = convert(Reads())
    assert all(isinstance(layer, ReadThroughLinear) for layer in (model.a, model.b, model.c, model.d))


class _CastsByVariable(_Casts):
    def forward(self, x):
        for layer in (self.conv, self.proj, self.head):
            weight, bias = layer.weight, layer.bias
            assert weight.dim() >= 2 and bias is not None and bias.shape[0] == weight.shape[0]
            x = layer(x.to(weight))
            x = x.flatten(1)
        return x


@pytest.mark.parametrize("kind", [_Casts, _CastsByVariable])
def test_mixed_batches_mixtures_transforms_and_the_inference_of_tasks(kind):
    model = convert(kind(), mask_init="normal")
    bank = MaskBank(model)
    add_task(model, "b")
    x, names = torch.randn(3, 2, 1, 1), ["b", "default", "b"]
    alone = []
    for one, name in zip(x, names):
        with using_task(model, name):
            alone.append(model(one[None]))
    with using_task(model, names):
        torch.testing.assert_close(model(x), torch.cat(alone))
        torch.testing.assert_close(torch.func.jvp(model, (x,), (x,))[0], torch.cat(alone))
        gradient = torch.func.grad(lambda x: model(x).sum())(x)
        assert gradient.isfinite().all() and gradient.any()
        model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with bank.superpose({"b": 1.0}):
        torch.testing.assert_close(model(x[:1]), alone[0])
    plain = convert(_Casts(), mask_init="normal")
    add_task(plain, "b")
    plain.load_state_dict(model.state_dict())
    assert bank.infer_task(x) == MaskBank(plain).infer_task(x)
    assert isinstance(model.conv, ReadThroughConv2d) == (kind is _CastsByVariable)


def test_a_head_and_statistics_of_tasks():
    norm = TaskBatchNorm2d(2).half()
    add_task(norm, "b")
    for names in (["default", "b"], ["b"]):
        with using_task(norm, names):
            assert norm.weight.dtype is norm.running_mean.data.dtype is torch.float16 and norm.weight.requires_grad
            assert norm.running_var.shape == (2,) and not norm.running_var.requires_grad
    with using_task(norm, ["default", "b"]), pytest.raises(RuntimeError, match="weight of TaskBatchNorm2d is ambiguous"):
        norm.weight.sum()
