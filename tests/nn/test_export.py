"""Merged models in torch.export, ONNX and tracing; masked modules in functional_call, vmap and grad."""

from __future__ import annotations

import io

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from support.models import assert_same_gradients, gradients, mlp, randomize_masks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from metamask_ext import add_task, convert, merge, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLinear


def _network():
    """A convolution with batch norm and a head, masked, with two tasks."""
    model = nn.Sequential(
        MaskedConv2d(2, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), MaskedLinear(4 * 5 * 5, 3)
    )
    add_task(model, "b")
    return model.eval()


@pytest.fixture
def model():
    return _network()


@pytest.fixture
def x():
    return torch.randn(2, 2, 5, 5)


class TestMerged:
    @pytest.mark.parametrize("task", ["default", "b"])
    def test_torch_export_of_the_merged_model_gives_the_tasks_output(self, model, x, task):
        exported = torch.export.export(merge(model, task), (x,)).module()
        with using_task(model, task):
            torch.testing.assert_close(exported(x), model(x))

    def test_a_saved_export_is_loaded_without_masks(self, model, x):
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(merge(model, "b"), (x,)), buffer)
        buffer.seek(0)
        program = torch.export.load(buffer)
        assert not any("mask" in name for name in program.state_dict)
        with using_task(model, "b"):
            torch.testing.assert_close(program.module()(x), model(x))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_onnx_export_of_the_merged_model_gives_the_tasks_output(self, model, x, tmp_path):
        path = tmp_path / "model.onnx"
        torch.onnx.export(merge(model, "b"), (x,), path, dynamo=True, verbose=False)
        program = onnx.load(path)
        onnx.checker.check_model(program)
        evaluator = ReferenceEvaluator(program)
        (got,) = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
        with using_task(model, "b"):
            torch.testing.assert_close(torch.from_numpy(got), model(x))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_a_trace_of_the_merged_model_gives_the_tasks_output(self, model, x):
        traced = torch.jit.trace(merge(model, "b"), x)
        other = torch.randn(3, 2, 5, 5)
        with using_task(model, "b"):
            torch.testing.assert_close(traced(other), model(other))

    def test_a_transformer_of_one_task_can_be_exported(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        model = randomize_masks(convert(layer))
        x = torch.randn(2, 4, 8)
        exported = torch.export.export(merge(model, "default"), (x,)).module()
        torch.testing.assert_close(exported(x), model(x))


class TestMasked:
    def test_torch_export_of_a_masked_model_with_one_task(self, x):
        model = nn.Sequential(MaskedConv2d(2, 4, 3), nn.Flatten(), MaskedLinear(36, 3))
        program = torch.export.export(model, (x,))
        assert "2.masks.default" in program.state_dict
        assert not any("metamask" in str(node.target) for node in program.graph.nodes)  # plain torch: runs anywhere
        torch.testing.assert_close(program.module()(x), model(x))

    def test_torch_export_of_a_block_with_several_tasks_bakes_the_active_one_in_and_with_none_is_refused(self, model, x):
        with using_task(model, "b"):
            exported = torch.export.export(model, (x,), strict=False).module()
            wanted = model(x)
        torch.testing.assert_close(exported(x), wanted)
        with using_task(model, "default"):
            torch.testing.assert_close(exported(x), wanted)
            assert not torch.allclose(exported(x), model(x))
        with pytest.raises(RuntimeError, match="none is active"):
            torch.export.export(model, (x,), strict=False)


class TestFunctional:
    def test_functional_call_takes_other_weights_and_masks_for_one_call(self):
        model = mlp()
        x = torch.randn(5, 4).double()
        other = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        with using_task(model, "b"):
            got = functional_call(model, other, x)
        for index in (0, 2, 4):
            theta = other[f"{index}.weight"] * other[f"{index}.masks.b"].sigmoid()
            x = x @ theta.T + other[f"{index}.bias"] * other[f"{index}.bias_masks.b"].sigmoid()
            x = torch.tanh(x) if index < 4 else x
        torch.testing.assert_close(got, x)
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    @pytest.mark.parametrize(
        ("make", "shape"),
        [
            pytest.param(lambda: MaskedLinear(4, 3).double(), (5, 4), id="linear"),
            pytest.param(lambda: MaskedConv2d(2, 3, 3).double(), (5, 2, 4, 4), id="conv2d"),
            pytest.param(mlp, (5, 4), id="mlp-of-two-tasks"),
        ],
    )
    def test_vmap_over_an_ensemble_equals_a_loop_forward_and_backward(self, make, shape):
        models = [make() for _ in range(3)]
        base = make()
        parameters, buffers = stack_module_state(models)
        x = torch.randn(shape).double()

        def under(model):
            return using_task(model, "b" if isinstance(model, nn.Sequential) else "default")

        def loss(parameters, buffers, x):
            return functional_call(base, (parameters, buffers), x).square().sum()

        with under(base):
            losses = vmap(loss, (0, 0, None))(parameters, buffers, x)
            grads = vmap(grad(loss), (0, 0, None))(parameters, buffers, x)
        for index, model in enumerate(models):
            with under(model):
                wanted = model(x).square().sum()
            wanted.backward()
            torch.testing.assert_close(losses[index], wanted)
            for name, parameter in model.named_parameters():
                # torch.func gives zeros where autograd gives None: the masks of the other task.
                of_loop = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.testing.assert_close(grads[name][index], of_loop)

    def test_per_sample_gradients_sum_to_the_batchs(self):
        model = mlp()
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        x = torch.randn(5, 4).double()
        with using_task(model, "a"):
            one = vmap(grad(lambda p, sample: functional_call(model, p, sample).square().sum()), (None, 0))(parameters, x)
            model(x).square().sum().backward()
        wanted = gradients(model)
        got = {name: one[name].sum(0) if wanted[name] is not None else None for name in wanted}
        assert_same_gradients(got, wanted)

    def test_jvp_of_a_masked_layer_worked_out_by_hand(self):
        # y = W s(M) x with W = 2, M = 0, x = 3; dy in direction (dW, dM) = (1, 1): s x + W x / 4 = 1.5 + 1.5.
        layer = MaskedLinear(1, 1, bias=False, mask_init=0.0, dtype=torch.float64)
        parameters = {"weight": torch.full((1, 1), 2.0).double(), "masks.default": torch.zeros(1, 1).double()}
        ones = {name: torch.ones_like(value) for name, value in parameters.items()}
        x = torch.tensor([3.0], dtype=torch.float64)
        output, tangent = torch.func.jvp(lambda p: functional_call(layer, p, x), (parameters,), (ones,))
        assert (output.item(), tangent.item()) == (pytest.approx(3.0), pytest.approx(3.0))


class _Casting(nn.Linear):
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class _Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.fc.weight, self.fc.bias)


@pytest.mark.parametrize("make", [lambda: _Casting(4, 3), _Reading], ids=["own-forward", "read"])
class TestLayersThatGiveTheirWeight:
    def test_export_and_make_fx_give_the_active_tasks_output(self, make):
        model = convert(nn.Sequential(make()))
        add_task(model, "b")
        x = torch.randn(2, 4)
        for task in ("b", "default"):
            with using_task(model, task):
                wanted = model(x)
                exported = torch.export.export(model, (x,), strict=False).module()
                traced = make_fx(model)(x)
            torch.testing.assert_close(exported(x), wanted)
            with torch.no_grad():  # what make_fx traces of a masked layer has no derivative
                torch.testing.assert_close(traced(x), wanted)

    def test_a_fake_mode_gives_shapes(self, make):
        with FakeTensorMode():
            assert convert(nn.Sequential(make()))(torch.randn(2, 4)).shape == (2, 3)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert convert(nn.Sequential(make()))(mode.from_tensor(torch.randn(2, 4))).shape == (2, 3)
