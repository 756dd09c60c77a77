"""Tools that take layers apart: hooks that compute a weight, parametrizations, replacers that go by a module's class."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import metamask_ext
from metamask_ext import MaskBank, add_task, convert, merge, using_task
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated")


class _Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _prune_twice(layer):
    prune.l1_unstructured(layer, "weight", 0.3)
    prune.random_unstructured(layer, "weight", 0.3)


TOOLS = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "prune twice": _prune_twice,
    "prune channels": lambda layer: prune.ln_structured(layer, "weight", 0.5, 2, 0),
    "prune bias": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
    "prune by a mask": lambda layer: prune.custom_from_mask(layer, "weight", torch.ones_like(layer.weight)),
    "weight_norm, old": weight_norm,
    "spectral_norm, old": spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrize": lambda layer: parametrize.register_parametrization(layer, "weight", _Double()),
    "parametrize bias": lambda layer: parametrize.register_parametrization(layer, "bias", _Double()),
    "prune, weight_norm of the bias": lambda layer: (prune.l1_unstructured(layer, "weight", 0.5), weight_norm(layer, "bias")),
}
every_tool = pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)


def _plain_state(model):
    return [(name, tuple(tensor.shape), tensor.requires_grad) for name, tensor in model.named_parameters()]


class TestMerge:
    @every_tool
    @pytest.mark.parametrize("packed", [False, True], ids=["logits", "bits"])
    @pytest.mark.parametrize("make", [lambda: MaskedLinear(6, 4), lambda: MaskedConv2d(6, 4, 1)], ids=["linear", "conv2d"])
    def test_bakes_in_what_a_tool_computes(self, tool, packed, make):
        model = nn.Sequential(make())
        add_task(model, "b")
        tool(model[0])
        if packed:
            MaskBank(model).pack("b")
        x = torch.randn(3, 6, 1, 1) if isinstance(model[0], MaskedConv2d) else torch.randn(3, 6)
        with using_task(model, "b"):
            model(x).sum().backward()  # leaves a weight with a graph behind
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1)  # what the last forward computed is stale now
            before = {key: value.clone() for key, value in model.state_dict().items()}
            merged = merge(model.eval(), "b")
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            torch.testing.assert_close(merged(x), model(x))
        assert type(merged[0]) in (nn.Linear, nn.Conv2d)
        assert _plain_state(merged) == _plain_state(nn.Sequential(type(merged[0])(6, 4, *([1] if x.dim() == 4 else []))))
        merged(x).sum().backward()
        assert not merged[0]._forward_pre_hooks and not merged[0]._state_dict_hooks and not merged[0]._load_state_dict_pre_hooks

    def test_keeps_whether_it_is_trained(self):
        for tool in ("prune", "parametrize", "weight_norm, old"):
            model = nn.Sequential(MaskedLinear(6, 4))
            TOOLS[tool](model[0])
            with torch.no_grad():
                assert merge(model, "default")[0].weight.requires_grad
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            model(torch.randn(1, 6))
            assert not merge(model, "default")[0].weight.requires_grad

    def test_takes_the_hooks_of_users_along(self):
        calls = []
        model = nn.Sequential(MaskedLinear(6, 4))
        layer = model[0]
        prune.l1_unstructured(layer, "weight", 0.5)
        layer.register_forward_pre_hook(lambda module, inputs: calls.append("before"))
        layer.register_forward_hook(lambda module, inputs, output: output + 1)
        layer.register_full_backward_hook(lambda module, gradients, more: calls.append("backward"))
        layer.register_state_dict_post_hook(lambda module, state, prefix, metadata: calls.append("state"))
        layer.register_load_state_dict_post_hook(lambda module, keys: calls.append("load"))
        x = torch.randn(2, 6)
        merged = merge(model, "default")
        torch.testing.assert_close(merged(x), model(x))
        calls.clear()
        merged(x).sum().backward()
        merged.load_state_dict(merged.state_dict())
        assert calls == ["before", "backward", "state", "load"]

    def test_a_plain_layer_with_a_computed_weight_is_copied(self):
        model = nn.Sequential(MaskedLinear(6, 4), nn.Linear(4, 4), weight_norm(nn.Linear(4, 2)))
        prune.l1_unstructured(model[1], "weight", 0.5)
        x = torch.randn(2, 6)
        model(x).sum().backward()
        torch.testing.assert_close(merge(model, "default")(x), model(x))

    def test_a_weight_that_is_a_plain_tensor_is_baked_in(self):
        model = nn.Sequential(MaskedLinear(6, 4))
        weight = model[0].weight.detach() * 2
        del model[0].weight
        model[0].weight = weight
        x = torch.randn(2, 6)
        torch.testing.assert_close(merge(model, "default")(x), model(x))

    def test_what_it_does_not_know_is_refused_by_name(self):
        model = nn.Sequential(MaskedLinear(6, 4))
        weight = nn.Parameter(model[0].weight.detach())
        del model[0].weight
        model[0].hyper = weight
        model[0].register_forward_pre_hook(lambda module, inputs: setattr(module, "weight", module.hyper * 2))
        model(torch.randn(1, 6))
        with pytest.raises(ValueError, match="weight of layer '0' is no parameter"):
            merge(model, "default")

        model = nn.Sequential(MaskedLinear(6, 4))
        weight_norm(model[0])
        prune.l1_unstructured(model[0], "weight_v", 0.5)
        model(torch.randn(1, 6))
        with pytest.raises(ValueError, match="weight of layer '0' is no parameter"):
            merge(model, "default")

        model = nn.Sequential(MaskedLinear(6, 4), nn.Unflatten(1, (4, 1, 1)), TaskBatchNorm2d(4, per_task_affine=False))
        parametrize.register_parametrization(model[2], "weight", _Double())
        with pytest.raises(ValueError, match="weight of layer '2' is parametrized"):
            merge(model, "default")
        model[0].scale = nn.Parameter(torch.ones(()))
        parametrize.register_parametrization(model[0], "scale", _Double())
        with pytest.raises(ValueError, match="scale of layer '0' is parametrized"):
            merge(model, "default")


class _Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return nn.functional.linear(x, self.fc.weight, self.fc.bias)


class TestWeightsThatDependOnTheTask:
    @every_tool
    @pytest.mark.parametrize("several", [False, True], ids=["one task", "two tasks"])
    def test_are_not_taken_for_parameters(self, tool, several):
        model = convert(_Reads())
        norm = TaskBatchNorm2d(4)
        if several:
            add_task(model, "b")
            add_task(nn.Sequential(norm), "b")
        before = model.state_dict()
        x = torch.randn(2, 6)
        with using_task(model, "default"):
            wanted = model(x)
            with pytest.raises(RuntimeError, match=r"of ReadThroughLinear depends on the task.*merge\(model, task\)"):
                tool(model.fc)
            assert torch.equal(model(x), wanted) and list(model.state_dict()) == list(before)
        with using_task(norm, "default"):
            before = norm.state_dict()
            with pytest.raises((RuntimeError, ValueError, IndexError)):
                tool(norm)
            assert list(norm.state_dict()) == list(before) and norm(torch.randn(3, 4, 2, 2)).shape == (3, 4, 2, 2)
            assert norm.weight is norm.per_task["weight"]["default"]

    def test_convert_refuses_a_layer_whose_weight_is_computed(self):
        for tool in TOOLS.values():
            model = nn.Sequential(nn.Linear(6, 4))
            tool(model[0])
            try:
                convert(model)
            except ValueError as error:
                assert "'0'" in str(error)
            assert type(model[0]).__name__ in ("Linear", "ParametrizedLinear")

    @pytest.mark.parametrize(
        "tool",
        [
            lambda masks: prune.l1_unstructured(masks, "default", 0.5),
            lambda masks: parametrize.register_parametrization(masks, "default", _Double()),
            lambda masks: masks.register_parameter("other", nn.Parameter(torch.ones(4, 6))),
            lambda masks: delattr(masks, "default"),
        ],
        ids=["prune", "parametrize", "register", "delete"],
    )
    def test_masks_are_not_taken_either(self, tool):
        layer = MaskedLinear(6, 4)
        before = layer.state_dict()
        with pytest.raises(RuntimeError, match="are those of tasks"):
            tool(layer.masks)
        assert type(layer.masks).__name__ == "TaskMasks"
        assert list(layer.state_dict()) == list(before)

    def test_an_assignment_goes_to_the_active_task(self):
        norm = TaskBatchNorm2d(3)
        add_task(norm, "b")
        with using_task(norm, "b"):
            norm.weight = nn.Parameter(torch.full((3,), 5.0))
            norm.running_mean = torch.full((3,), 7.0)
            norm.register_buffer("running_var", torch.full((3,), 9.0))
            assert norm.weight.tolist() == [5.0] * 3
            with pytest.raises(TypeError, match=r"weight of TaskBatchNorm2d.*must be a Parameter"):
                norm.weight = torch.ones(3)
            with pytest.raises(RuntimeError, match="depends on the task"):
                del norm.weight
        for name, value in (("weight", 5.0), ("running_mean", 7.0), ("running_var", 9.0)):
            assert norm.per_task[name]["b"].tolist() == [value] * 3 != norm.per_task[name]["default"].tolist()
        with pytest.raises(RuntimeError, match="none is active"):
            norm.weight = nn.Parameter(torch.ones(3))
        with using_task(norm, ["b", "default"]), pytest.raises(RuntimeError, match="several are active"):
            norm.weight = nn.Parameter(torch.ones(3))

    def test_a_module_that_counts_by_assignment_counts_for_each_task(self):
        class Counts(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x):
                self.calls = self.calls + 1
                return x

        model = nn.Sequential(MaskedLinear(2, 2), Counts())
        MaskBank(model, per_task="1.calls").add_task("b")
        for name in ("default", "b", "b"):
            with using_task(model, name):
                model(torch.ones(1, 2))
        assert [model[1].per_task["calls"][name].item() for name in ("default", "b")] == [1.0, 2.0]


class TestReplacers:
    @pytest.mark.parametrize("active", [None, "b", ["b", "default"]], ids=str)
    @pytest.mark.parametrize(
        "options", [{}, {"affine": False}, {"per_task_affine": False}, {"track_running_stats": False}], ids=str
    )
    def test_statistics_of_tasks_cannot_be_synchronised(self, options, active):
        model = nn.Sequential(MaskedConv2d(3, 4, 3), TaskBatchNorm2d(4, **options))
        add_task(model, "b")
        before = model.state_dict()
        block = nullcontext() if active is None else using_task(model, active)
        with block, pytest.raises(RuntimeError, match="cannot become a SyncBatchNorm"):
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert type(model[1]) is TaskBatchNorm2d and list(model.state_dict()) == list(before)

    def test_one_task_and_tensors_that_a_bank_keeps_are_refused_too(self):
        for model in (
            nn.Sequential(MaskedConv2d(3, 4, 3), TaskBatchNorm2d(4)),
            MaskBank(nn.Sequential(MaskedLinear(3, 4), nn.BatchNorm1d(4)), per_task="1.*").model,
        ):
            with pytest.raises(RuntimeError, match="cannot become a SyncBatchNorm"):
                nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def test_other_layers_are_synchronised_beside_it(self):
        model = nn.Sequential(MaskedConv2d(3, 4, 3), TaskBatchNorm2d(4), nn.BatchNorm2d(4))
        model[2] = nn.SyncBatchNorm.convert_sync_batchnorm(model[2])
        assert [type(module) for module in model] == [MaskedConv2d, TaskBatchNorm2d, nn.SyncBatchNorm]
        masked = nn.Sequential(MaskedConv2d(3, 4, 3), nn.BatchNorm2d(4))
        add_task(masked, "b")
        masked = nn.SyncBatchNorm.convert_sync_batchnorm(masked)
        assert metamask_ext.tasks(masked) == ["default", "b"] and type(masked[1]) is nn.SyncBatchNorm

    def test_another_replacer_that_moves_children(self):
        norm = TaskBatchNorm2d(4)
        swapped = nn.GroupNorm(2, 4)
        with pytest.raises(RuntimeError, match="or another class"):
            for name, child in norm.named_children():
                swapped.add_module(name, child)

    def test_a_batch_norm_of_a_meta_learner_that_was_replaced_is_noticed(self):
        maml = MAML(nn.Sequential(MaskedLinear(3, 4), nn.BatchNorm1d(4), MaskedLinear(4, 1)), 0.1)
        x, y = torch.randn(2, 5, 3), torch.randn(2, 5, 1)
        loss = nn.functional.mse_loss
        adapted = maml.adapt(loss, (x, y))
        replaced = nn.SyncBatchNorm.convert_sync_batchnorm(maml)
        for act in (lambda: replaced.adapt(loss, (x, y)), lambda: replaced.predict(adapted, x), lambda: replaced.clone()(x[0])):
            with pytest.raises(RuntimeError, match=r"batch norm 'model\.1'|batch norm '1'"):
                act()
