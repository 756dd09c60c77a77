"""Tensors that no kernel can read (sparse, nested, quantised, of another dtype or device) are refused by the argument's name."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import metamask_ext as mm
from metamask_ext import MaskBank, add_task, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:.*[qQ]uantiz"),
]


def _quantised(tensor):
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


OTHERS = {
    "sparse": (lambda t: t.to_sparse(), r"must be a dense tensor, got one of layout torch.sparse_coo: use \S+\.to_dense\(\)"),
    "csr": (lambda t: t.to_sparse_csr(), r"must be a dense tensor, got one of layout torch.sparse_csr: use \S+\.to_dense\(\)"),
    "nested": (lambda t: torch.nested.nested_tensor(list(t.unbind())), "must be a dense tensor, got a nested one: pad it"),
    "ragged": (lambda t: torch.nested.nested_tensor([t[0], t[0, :1]]), "must be a dense tensor, got a nested one: pad it"),
    "jagged": (
        lambda t: torch.nested.nested_tensor(list(t.unbind()), layout=torch.jagged),
        "must be a dense tensor, got a nested one: pad it",
    ),
    "quantised": (_quantised, r"must be a dense tensor, got a quantised one, torch.qint8: use \S+\.dequantize\(\)"),
    "complex": (lambda t: t.to(torch.complex64), "torch.complex64"),
    "integer": (lambda t: t.to(torch.int32), "torch.int32"),
    "bool": (lambda t: t > 0, "torch.bool"),
    "float8": (lambda t: t.float().to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    "elsewhere": (lambda t: t.to("meta"), "meta"),
    "list": (lambda t: t.tolist(), "got list"),
    "array": (lambda t: t.numpy(), "got ndarray"),
}


def _arguments():
    weight, logits, bias, bias_logits = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4), torch.randn(4)
    kernel, kernel_logits = torch.randn(4, 3, 1, 1), torch.randn(4, 3, 1, 1)
    x, images, slots = torch.randn(2, 3), torch.randn(2, 3, 2, 2), torch.tensor([0, 0])
    bits, kernel_bits, bias_bits = map(mm.pack_mask, (logits, kernel_logits, bias_logits))
    one = {"bias": bias, "bias_mask_logits": bias_logits}
    tasks, packed = {"bias": bias, "bias_masks": [bias_logits]}, {"bias": bias, "packed_bias": [bias_bits]}
    return {
        mm.masked_weight: {"weight": weight, "mask_logits": logits},
        mm.masked_linear: {"input": x, "weight": weight, "mask_logits": logits, **one},
        mm.masked_conv2d: {"input": images, "weight": kernel, "mask_logits": kernel_logits, **one},
        mm.task_masked_linear: {"input": x, "slots": slots, "weight": weight, "masks": [logits], **tasks},
        mm.task_masked_conv2d: {"input": images, "slots": slots, "weight": kernel, "masks": kernel_logits[None], **tasks},
        mm.packed_masked_linear: {"input": x, "slots": slots, "weight": weight, "packed": [bits], **packed},
        mm.packed_masked_conv2d: {"input": images, "slots": slots, "weight": kernel, "packed": kernel_bits[None], **packed},
        mm.pack_mask: {"mask_logits": logits},
        mm.unpack_mask: {"packed": bits, "shape": (4, 3)},
    }


def _made(make, tensor):
    """A tensor of another kind, by ``make``; None where there is no such thing."""
    try:
        return make(tensor)
    except Exception:
        return None


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("function", _arguments(), ids=lambda function: function.__name__)
def test_every_argument_of_every_function_is_refused_by_its_name(function, kind):
    make, words = OTHERS[kind]
    arguments = _arguments()[function]
    tried = 0
    for name, right in arguments.items():
        if name == "shape" or (kind in ("integer", "bool") and name == "slots"):
            continue
        if kind == "list" and function is mm.masked_weight:
            continue  # a sequence of weights
        if kind == "elsewhere" and function in (mm.pack_mask, mm.unpack_mask):
            continue
        value = _made(make, right[0] if isinstance(right, list) else right)
        if value is None:
            continue
        value = [value] if isinstance(right, list) else value
        tried += 1
        with pytest.raises((TypeError, ValueError)) as caught:
            function(**{**arguments, name: value})
        text = str(caught.value)
        # A weight of another dtype or device may be the one that is right, and its logits wrong.
        assert re.match(rf"{name}(\[0\])? ", text) or (name == "weight" and " of weight, " in text), text
        assert re.search(words, text) or "must have the dtype" in text or "must be on the device" in text or "uint8" in text, text
    assert tried or kind in ("csr", "ragged", "elsewhere", "list")


LAYERS = {
    "linear": (lambda: MaskedLinear(3, 4), (2, 3)),
    "conv": (lambda: MaskedConv2d(3, 4, 1), (2, 3, 2, 2)),
    "norm": (lambda: TaskBatchNorm2d(3), (2, 3, 2, 2)),
}
SELECTED = ["b", "p", ["b", "default"], ["p", "p"], ["p", "b"], {"b": 0.5, "p": 0.5}]


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_refuse_such_inputs_whatever_is_active(layer, kind):
    make_layer, shape = LAYERS[layer]
    make, words = OTHERS[kind]
    model = nn.Sequential(MaskedLinear(1, 1), make_layer()).eval()
    bank = MaskBank(model)
    for task in ("b", "p"):
        add_task(model, task)
    bank.pack("p")
    value = _made(make, torch.randn(shape))
    if value is None:
        pytest.skip("there is no such tensor")
    for selected in SELECTED:
        block = bank.superpose(selected) if isinstance(selected, dict) else using_task(model, selected)
        with block, pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            model[1](value)
        text = str(caught.value)
        assert text.startswith("input must") or "must be called with one tensor" in text, text
        assert re.search(words, text) or "must be called with one tensor" in text, text


def test_integers_and_complex_numbers_are_not_normalised_and_rounded():
    norm = TaskBatchNorm2d(2)
    add_task(norm, "b")
    for dtype in (torch.int64, torch.uint8, torch.complex64):
        with using_task(norm, ["b", "default"]), pytest.raises(TypeError, match=f"input must be float64.*got {dtype}"):
            norm(torch.ones(2, 2, 3, 3).to(dtype))
