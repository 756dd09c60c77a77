"""torch's own samples of nn.Linear and nn.Conv2d (ModuleInfo), run through the masked modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_leaves, tree_map

from metamask_ext.nn import MaskedConv2d, MaskedLinear

MASKED = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}
INFOS = {info.module_cls: info for info in module_db if info.module_cls in MASKED}
DTYPES = [torch.float64, torch.float32]


def _samples(plain_type, dtype):
    """Constructor arguments and forward arguments of each sample, as many as torch has."""
    info = INFOS[plain_type]
    inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True)
    return [(sample.constructor_input, sample.forward_input) for sample in inputs]


CASES = [
    pytest.param(plain_type, dtype, index, id=f"{plain_type.__name__}-{index}-{dtype}".replace("torch.", ""))
    for plain_type in MASKED
    for dtype in DTYPES
    for index in range(len(_samples(plain_type, dtype)))
]


def _run(module, args, kwargs):
    """The output, and the gradients of the inputs."""
    args, kwargs = tree_map(_fresh_leaf, (args, kwargs))
    output = module(*args, **kwargs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    (output * weights).sum().backward()
    return output.detach(), [leaf.grad for leaf in tree_leaves((args, kwargs))]


def _fresh_leaf(value):
    return value.detach().clone().requires_grad_(value.requires_grad)


@pytest.mark.parametrize(("plain_type", "dtype", "index"), CASES)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_the_masked_module_is_torchs_module_holding_theta(plain_type, dtype, index):
    constructor, forward = _samples(plain_type, dtype)[index]
    options = {**constructor.kwargs, "dtype": dtype}
    masked = MASKED[plain_type](*constructor.args, **options)
    plain = plain_type(*constructor.args, **options)
    pairs = {"weight": masked.masks["default"]}
    if masked.bias is not None:
        pairs["bias"] = masked.bias_masks["default"]
    with torch.no_grad():
        for name, logits in pairs.items():
            getattr(plain, name).copy_(getattr(masked, name) * logits.sigmoid())

    got, input_grads = _run(masked, forward.args, forward.kwargs)
    wanted, wanted_grads = _run(plain, forward.args, forward.kwargs)
    torch.testing.assert_close(got, wanted)
    assert any(grad is not None for grad in wanted_grads)
    for grad, wanted_grad in zip(input_grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted_grad)
    for name, logits in pairs.items():
        shared, of_theta, s = getattr(masked, name), getattr(plain, name).grad, logits.detach().sigmoid()
        torch.testing.assert_close(shared.grad, of_theta * s)
        torch.testing.assert_close(logits.grad, of_theta * shared.detach() * s * (1 - s))


def test_torch_has_samples_of_both_modules_with_and_without_batch():
    for plain_type in MASKED:
        inputs = [tree_leaves((forward.args, forward.kwargs)) for _, forward in _samples(plain_type, torch.float32)]
        assert len({input.dim() for (input,) in inputs}) > 1, plain_type
