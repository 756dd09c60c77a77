"""MAML of a compiled model: adapted predictions, meta-losses and meta-gradients are those of eager mode."""

from __future__ import annotations

import pytest
import torch
from support.gpu import DEVICES
from torch import nn

from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d

pytestmark = pytest.mark.once
BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
MODELS = {
    "linear": (lambda: nn.Sequential(MaskedLinear(1, 8), nn.Tanh(), MaskedLinear(8, 1)), (1,)),
    "batch norm": (
        lambda: nn.Sequential(MaskedConv2d(1, 4, 3, padding=1), TaskBatchNorm2d(4), nn.Flatten(), MaskedLinear(64, 1)),
        (1, 4, 4),
    ),
}


def loss(prediction, target):
    return (prediction - target).square().mean()


def case(name, adapt, device):
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build().double().to(device)
    data = [torch.randn(3, 5, *size).double().to(device) for size in (shape, (1,), shape, (1,))]
    return model, MAML(model, 0.1, 2, adapt=adapt), tuple(data[:2]), tuple(data[2:])


def meta_gradients(model, maml, support, query):
    value = maml(loss, support, query)
    value.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return value.detach(), found


@pytest.mark.parametrize("adapt", ["masks", "weights", "all"])
@pytest.mark.parametrize("name", MODELS)
@BACKENDS
@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_model_is_adapted_as_in_eager_mode(name, adapt, backend, device):
    model, maml, support, query = case(name, adapt, device)
    adapted = maml.adapt(loss, support)
    with torch.no_grad():
        wanted = maml.predict(adapted, query[0])
        unadapted = maml.predict(maml.adapt(loss, support, steps=0), query[0])
    value, wanted_gradients = meta_gradients(model, maml, support, query)
    assert not torch.allclose(wanted, unadapted)

    torch.compiler.reset()
    model.compile(backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(maml.predict(adapted, query[0]), wanted)
        torch.testing.assert_close(maml.predict(maml.adapt(loss, support), query[0]), wanted)
    got, gradients = meta_gradients(model, maml, support, query)
    torch.testing.assert_close(got, value)
    torch.testing.assert_close(gradients, wanted_gradients)


@BACKENDS
def test_predict_itself_compiled(backend):
    _, maml, support, query = case("linear", "masks", "cpu")
    adapted = maml.adapt(loss, support)
    torch.compiler.reset()
    predict = torch.compile(maml.predict, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(predict(adapted, query[0]), maml.predict(adapted, query[0]))
