"""Layers some of whose tasks are bits: the same outputs as hard masks, alone and in mixed-task batches with logits."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from support.fused_steps import each_kind
from support.gpu import DEVICES
from support.mixed_task_models import MIXED, MODELS, alone, compare, make
from support.models import assert_same_gradients, gradients, mlp, randomize_masks
from torch import nn

import metamask_ext
from metamask_ext import add_task, convert, merge, remove_task, slots, tasks, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLinear
from metamask_ext.nn.masked_layer import MaskedLayer
from metamask_ext.nn.tasks import pack_task

each_device = pytest.mark.parametrize("device", DEVICES)
each_model = pytest.mark.parametrize("name", MODELS)


def hardened(model, task):
    """A copy in which the task's logits are so far from the gate's threshold that the sigmoid is 0 or 1."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in twin.modules():
            if isinstance(layer, MaskedLayer):
                threshold = layer.threshold if layer.gate == "hard" else 0.0
                for masks in layer._dicts().values():
                    masks[task].copy_(torch.where(masks[task] > threshold, 1e4, -1e4))
    return twin


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, MaskedLayer)]


@pytest.mark.every_device(emulated_if=lambda name, **_: name in ("mlp", "cnn-hard"))
@each_device
@each_model
@pytest.mark.parametrize("given", ["b", ["b"] * 5], ids=["name", "batch"])
def test_a_packed_task_is_its_hard_mask_with_gradients_of_the_shared_weights_only(name, given, device):
    model, x = make(name, device=device)
    wanted_model = hardened(model, "b")
    pack_task(model, "b")
    results = []
    for each in (model, wanted_model):
        leaf = x.clone().requires_grad_()
        with using_task(each, given):
            output = each(leaf)
        output.square().sum().backward()
        shared = {key: grad for key, grad in gradients(each).items() if "masks" not in key}
        results.append((output.detach(), leaf.grad, shared))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert_same_gradients(results[0][2], results[1][2])


@pytest.mark.every_device(emulated_if=lambda packed, name, **_: packed == "ab" and name != "mlp-more-dimensions")
@each_device
@each_model
@pytest.mark.parametrize("packed", ["b", "ab", "abc"])
def test_a_batch_of_bits_and_logits_is_each_sample_alone(name, packed, device):
    model, x = make(name, device=device)
    for task in packed:
        pack_task(model, task)
    grads = compare(model, x, MIXED)
    assert not any(parameter.endswith(tuple(f".{task}" for task in packed)) for parameter in grads)
    twin = model
    for task in set("abc") - set(packed):
        assert twin.get_parameter("0.masks." + task).requires_grad


def test_bits_are_as_the_contract_lays_them_out():
    layer = MaskedLinear(10, 2)
    with torch.no_grad():
        layer.masks["default"].fill_(-1.0)
        layer.masks["default"][0, [0, 3, 9]] = 1.0
        layer.masks["default"][1, 8] = 0.0  # not above the threshold
        layer.bias_masks["default"].copy_(torch.tensor([-1.0, 1.0]))
    pack_task(layer, "default")
    assert layer.masks["default"].tolist() == [[0b1001, 0b10], [0, 0]]
    assert layer.bias_masks["default"].tolist() == [0b10]
    assert layer.masks["default"].dtype == torch.uint8
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_the_threshold_of_the_hard_gate_counts_and_that_of_the_sigmoid_is_zero():
    for gate, threshold, wanted in (("hard", 0.5, 0b100), ("sigmoid", 0.5, 0b110)):
        layer = MaskedLinear(3, 1, bias=False, gate=gate, threshold=threshold, temperature=0.1)
        with torch.no_grad():
            layer.masks["default"].copy_(torch.tensor([[-1.0, 0.4, 0.6]]))
        pack_task(layer, "default")
        assert layer.masks["default"].item() == wanted


class TestTasks:
    def test_packed_and_other_tasks_are_listed_alike_and_keep_their_slots(self):
        model = mlp()
        before = slots(model)
        pack_task(model, "a")
        assert tasks(model) == ["a", "b"] and slots(model) == before
        pack_task(model, "a")  # nothing left to do
        remove_task(model, "a")
        assert tasks(model) == ["b"]
        assert not list(model.buffers())

    def test_the_only_task_may_be_packed(self):
        layer = MaskedConv2d(1, 2, 3)
        x = torch.randn(2, 1, 4, 4)
        wanted = merge(hardened(layer, "default"), "default")
        pack_task(layer, "default")
        torch.testing.assert_close(layer(x), wanted(x))
        torch.testing.assert_close(layer(x[0]), wanted(x[0]))

    def test_merge_bakes_the_bits_in(self):
        model, x = make("cnn")
        wanted = hardened(model, "b")
        pack_task(model, "b")
        with using_task(wanted, "b"):
            torch.testing.assert_close(merge(model, "b")(x), wanted(x))

    def test_a_new_task_can_begin_with_a_mixture_of_bits_and_not_with_their_logits(self):
        layer = MaskedLinear(2, 1, bias=False, temperature=2.0).double()
        with torch.no_grad():
            layer.masks["default"].copy_(torch.tensor([[3.0, -3.0]]))
        add_task(layer, "b", init="copy:default")
        pack_task(layer, "default")
        for init in ("mean", "copy:default"):
            with pytest.raises(ValueError, match="'default' is packed"):
                add_task(layer, "new", init=init)
        assert tasks(layer) == ["default", "b"]
        add_task(layer, "new", init={"default": 1.0})
        torch.testing.assert_close(layer.masks["new"], torch.tensor([[8.0, -8.0]], dtype=torch.float64))  # 4 temperatures
        add_task(layer, "half", init={"default": 0.2, "b": 0.7})
        s = torch.tensor([[1.5, -1.5]], dtype=torch.float64).sigmoid() * 0.7 + torch.tensor([[0.2, 0.0]], dtype=torch.float64)
        torch.testing.assert_close(layer.masks["half"], 2 * torch.logit(s))

    def test_what_has_no_logits_cannot_be_read_as_logits(self):
        layer = MaskedLinear(2, 1)
        pack_task(layer, "default")
        with pytest.raises(RuntimeError, match="packed"):
            _ = layer.mask_logits

    def test_code_that_reads_the_weight_gets_the_packed_one(self):
        attention = randomize_masks(convert(nn.MultiheadAttention(4, 2, batch_first=True))).double()
        wanted = merge(hardened(attention, "default"), "default")
        pack_task(attention, "default")
        x = torch.randn(2, 3, 4, dtype=torch.float64)
        torch.testing.assert_close(attention(x, x, x)[0], wanted(x, x, x)[0])


class TestStateDict:
    @pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
    @pytest.mark.parametrize("there", ["", "a", "b"], ids=["logits-there", "a-packed-there", "b-packed-there"])
    def test_a_state_brings_its_tasks_in_the_form_it_has_them(self, assign, there):
        model, x = make("cnn")
        pack_task(model, "b")
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other, _ = make("cnn")
        for task in there:
            pack_task(other, task)
        other.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
        assert [layer.masks["b"].dtype for layer in layers(other)] == [torch.uint8] * 3
        assert all(layer.masks["a"].requires_grad for layer in layers(other))
        assert slots(other) == slots(model)
        state = model.state_dict()
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, state[name]), name
        with using_task(other, MIXED):
            torch.testing.assert_close(other(x), alone(model, x, MIXED))

    def test_a_state_without_a_packed_mask_or_with_one_of_another_shape_is_an_error(self):
        layer = MaskedLinear(10, 2)
        pack_task(layer, "default")
        state = layer.state_dict()
        with pytest.raises(RuntimeError, match=r"Missing key.*bias_masks\.default"):
            layer.load_state_dict({name: tensor for name, tensor in state.items() if name != "bias_masks.default"})
        for fresh in (layer, MaskedLinear(10, 2)):
            with pytest.raises(RuntimeError, match=r"size mismatch for masks\.default"):
                fresh.load_state_dict({**state, "masks.default": torch.zeros(2, 10, dtype=torch.uint8)})

    def test_a_task_that_is_bits_for_the_weight_and_logits_for_the_bias_is_an_error(self):
        layer = MaskedLinear(10, 2)
        logits = layer.bias_masks["default"].detach().clone()
        pack_task(layer, "default")
        with pytest.raises(RuntimeError, match="both be bits"):
            MaskedLinear(10, 2).load_state_dict({**layer.state_dict(), "bias_masks.default": logits})

    def test_a_plain_state_leaves_the_bits(self):
        layer = MaskedLinear(10, 2)
        pack_task(layer, "default")
        bits = layer.masks["default"].clone()
        layer.load_state_dict(nn.Linear(10, 2).state_dict())
        assert torch.equal(layer.masks["default"], bits)

    def test_bits_stay_bits_when_the_model_changes_dtype(self):
        layer = MaskedLinear(10, 2)
        pack_task(layer, "default")
        assert layer.double()(torch.ones(1, 10).double()).dtype == torch.float64
        assert layer.masks["default"].dtype == torch.uint8


class TestTraining:
    @each_kind
    def test_the_optimiser_lets_go_of_a_packed_tasks_masks_and_goes_on(self, kind):
        model, x = make("mlp")
        optimizer = kind.ours(model, **kind.settings)
        with using_task(model, "b"):
            optimizer.backward(model(x).square().sum())
        pack_task(model, "b")
        before = model[0].weight.detach().clone()
        with using_task(model, "b"):
            optimizer.backward(model(x).square().sum())
        assert not torch.equal(model[0].weight, before)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in model.parameters()}
        assert {id(parameter) for parameter in optimizer.state} <= held

    def test_a_loop_refuses_to_train_a_packed_task(self):
        from metamask_ext.continual import TaskLoop

        model = nn.Sequential(MaskedLinear(2, 1))
        pack_task(model, "default")
        data = torch.randn(4, 2), torch.randn(4, 1)
        with pytest.raises(ValueError, match="'default' is packed"):
            TaskLoop(model, {"default": data}, nn.functional.mse_loss).run(1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_are_right(backend):
    model, x = make("cnn")
    pack_task(model, "b")
    compiled = torch.compile(model, backend=backend)
    for given in ("b", "a", MIXED, ["b"] * 5):
        results = []
        for call in (compiled, model):
            with using_task(model, given):
                output = call(x)
            output.square().sum().backward()
            results.append((output.detach(), gradients(model)))
        torch.testing.assert_close(results[0][0], results[1][0])
        assert_same_gradients(results[0][1], results[1][1])
    single = MaskedLinear(4, 2)
    pack_task(single, "default")
    x = torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(single, backend=backend)(x), single(x))


def test_a_deep_copy_has_bits_of_its_own():
    model = mlp()
    pack_task(model, "a")
    twin = copy.deepcopy(model)
    twin[0].masks["a"].zero_()
    assert model[0].masks["a"].any()
    assert metamask_ext.tasks(twin) == ["a", "b"]
