"""torch.fx: masked layers are leaves, as torch's own are, and the traced model follows the tasks."""

from __future__ import annotations

import copy
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.models import randomize_masks
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import metamask_ext as mm
from metamask_ext import MaskBank, add_task, convert, merge, using_task
from metamask_ext.data._torchvision import import_torchvision
from metamask_ext.nn import MaskedConv2d, MaskedLinear


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(inplace=True))
        self.head = nn.Linear(8, 3)

    def forward(self, x, scale=2.0):
        x = self.block(torch.relu(self.norm(self.conv(x))))
        return self.head(input=x.to(self.head.weight.dtype)) * scale


class _Reads(nn.Module):
    """Reads a weight past its layer, a head of a task, and logits."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.proj = nn.Linear(6, 6)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.linear(x, self.inner.proj.weight / 2, self.inner.proj.bias) * self.norm.weight
        return self.head(x), self.inner.proj.mask_logits.square().mean()


def _tasks(model, batch_norm="task"):
    model = convert(model, mask_init="normal", batch_norm=batch_norm)
    bank = MaskBank(model)
    for task in ("b", "p"):
        add_task(model, task)
    randomize_masks(model)
    bank.pack("p")
    return model.eval()


ONE = ["default", "b", "p"]
SELECTED = [*ONE, ["b", "p", "default"], ["b", "b", "b"]]
IMAGES = torch.randn(3, 2, 4, 4)


def _assert_same(traced, model, x, selected=SELECTED, block=None):
    for task in selected:
        with using_task(model if block is None else block, task):
            wanted, got = model(x), traced(x)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


class TestModels:
    def test_the_traced_model_is_right_for_every_task_and_block(self):
        model = _tasks(_Net())
        traced = fx.symbolic_trace(model)
        leaves = [node.target for node in traced.graph.nodes if node.op == "call_module"]
        assert leaves == ["conv", "norm", "block.0", "block.1", "block.2", "head"]
        traced.graph.lint()
        assert traced.conv is model.conv
        for block in (model, traced):
            _assert_same(traced, model, IMAGES, block=block)
        with pytest.raises(RuntimeError, match="none is active"):
            traced(IMAGES)

    @pytest.mark.parametrize("active", [None, "b", ["b", "p", "default"]])
    def test_the_task_that_is_active_while_it_is_traced_leaves_no_trace(self, active):
        model = _tasks(_Net())
        if active is None:
            traced = fx.symbolic_trace(model)
        else:
            with using_task(model, active):
                traced = fx.symbolic_trace(model)
        _assert_same(traced, model, IMAGES)

    def test_tasks_that_are_added_trained_and_packed_later(self):
        model = _tasks(_Net())
        traced = fx.symbolic_trace(model)
        add_task(traced, "later")
        optimizer = torch.optim.SGD(traced.parameters(), 0.1)
        with using_task(traced, "later"):
            traced(IMAGES).sum().backward()
        optimizer.step()
        MaskBank(model).pack("b")
        _assert_same(traced, model, IMAGES, [*SELECTED, "later"])

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda traced: pickle.loads(pickle.dumps(traced)), fx.symbolic_trace])
    def test_copies_pickles_and_traces_of_the_traced(self, again):
        model = _tasks(_Net())
        made = again(fx.symbolic_trace(model))
        for task in SELECTED:
            with using_task(made, task), using_task(model, task):
                torch.testing.assert_close(made(IMAGES), model(IMAGES), rtol=0, atol=0)

    def test_one_task_and_gradients(self):
        model = convert(_Net()).eval()
        traced = fx.symbolic_trace(model)
        grads = []
        for one in (model, traced):
            model.zero_grad()
            one(IMAGES).square().sum().backward()
            grads.append([parameter.grad.clone() for parameter in model.parameters()])
        for one, other in zip(*grads):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        torch.testing.assert_close(fx.symbolic_trace(merge(model, "default"))(IMAGES), model(IMAGES))

    def test_what_is_read_past_a_forward_is_read_in_every_run(self):
        model = _tasks(_Reads())
        traced = fx.symbolic_trace(model)
        x = torch.randn(2, 6)
        _assert_same(traced, model, x, ["default", "b", "default"])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5)
        _assert_same(traced, model, x, ["b", "default"])
        with using_task(model, "p"), pytest.raises(RuntimeError, match="the active task is packed"):
            traced(x)
        with using_task(traced, ["b", "default"]), pytest.raises(RuntimeError, match="is ambiguous"):
            traced(x)

    def test_a_model_that_is_converted_after_it_was_traced(self):
        model = fx.symbolic_trace(_Net().eval())
        x, wanted = IMAGES, model(IMAGES)
        convert(model, mask_init=100.0)
        torch.testing.assert_close(model(x), wanted)
        add_task(model, "b")
        with using_task(model, ["b", "default", "b"]):
            assert model(x).shape == wanted.shape
        _assert_same(fx.symbolic_trace(model), model, x, ["b", "default"])

    def test_nested_models_and_one_layer_used_twice(self):
        shared = MaskedLinear(4, 4)

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.parts = nn.ModuleList([nn.Sequential(shared, nn.Tanh()), nn.ModuleDict({"again": shared})["again"]])

            def forward(self, x):
                return [part(x) for part in self.parts] + [self.parts[0](x + 1)]

        model = Outer()
        add_task(model, "b")
        traced = fx.symbolic_trace(model)
        assert sum(node.op == "call_module" for node in traced.graph.nodes) == 5
        _assert_same(traced, model, torch.randn(2, 4), ["default", "b", ["b", "default"]])

    def test_a_constant_input_and_a_layer_alone(self):
        class Constant(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.start = nn.Linear(3, 2), torch.ones(1, 3)

            def forward(self, x):
                return self.fc(self.start) + x

        for model, x in ((_tasks(Constant()), torch.randn(1, 2)), (_tasks(nn.Linear(3, 2)), torch.randn(1, 3))):
            if isinstance(model, MaskedLinear):
                model = nn.Sequential(model)
            _assert_same(fx.symbolic_trace(model), model, x, ONE)

    def test_a_sequence_first_model_whose_module_is_gone_in_the_graph(self):
        class SequenceFirst(nn.Module):
            batch_first = False

            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(3, 3)

            def forward(self, x):
                return self.fc(x)

        model = _tasks(nn.Sequential(SequenceFirst()))
        traced = fx.symbolic_trace(model)
        for length in (2, 3):
            x, names = torch.randn(length, 3, 3), ["b", "p", "default"]
            with using_task(model, names):
                wanted = model(x)
            with using_task(traced, names, batch_dim=1):
                torch.testing.assert_close(traced(x), wanted)
            with using_task(traced, names), pytest.raises(RuntimeError, match="batch_dim=0"):
                traced(x)

    def test_a_tracer_that_takes_no_layer_for_a_leaf(self):
        class Through(fx.Tracer):
            def is_leaf_module(self, module, name):
                return False

        model = _tasks(_Net())
        _assert_same(fx.GraphModule(model, Through().trace(model)), model, IMAGES)

    def test_make_fx_runs_the_ops(self):
        layer = MaskedConv2d(2, 3, 1)
        traced = make_fx(lambda x: layer(x))(IMAGES)
        with torch.no_grad():  # the graph is of raw ops
            torch.testing.assert_close(traced(IMAGES), layer(IMAGES))
        assert not any(node.op == "call_module" for node in traced.graph.nodes)


class TestTorchvision:
    def test_feature_extractors(self):
        torchvision = import_torchvision()
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

        model = _tasks(torchvision.models.resnet18(num_classes=3))
        features = create_feature_extractor(model, {"layer1.0.conv2": "early", "avgpool": "late", "fc": "out"})
        x = torch.randn(3, 3, 32, 32)
        for task in (*ONE, ["b", "p", "default"]):
            seen = {}
            hook = model.layer1[0].conv2.register_forward_hook(lambda *call, seen=seen: seen.update(early=call[-1]))
            with using_task(model, task), torch.no_grad():
                found = features(x)
                seen["out"] = model(x)
            hook.remove()
            assert found["late"].shape == (3, 512, 1, 1)
            for name, wanted in seen.items():
                torch.testing.assert_close(found[name], wanted, rtol=0, atol=0)
        assert "layer2.0.downsample.0" in get_graph_node_names(model)[0]


def _functions():
    weight, logits, bias = torch.randn(4, 3), torch.randn(2, 4, 3), torch.randn(4)
    kernel, kernel_logits = torch.randn(4, 3, 1, 1), torch.randn(2, 4, 3, 1, 1)
    bits, kernel_bits = [[mm.pack_mask(one) for one in each] for each in (logits, kernel_logits)]
    x, images, slots = torch.randn(2, 3), torch.randn(2, 3, 2, 2), torch.tensor([1, 0])
    return {
        "masked_weight": (mm.masked_weight, (weight, logits[0]), {"gate": "hard"}),
        "masked_linear": (mm.masked_linear, (x, weight, logits[0], bias), {}),
        "masked_conv2d": (mm.masked_conv2d, (images, kernel, kernel_logits[0], bias, None, 2), {"temperature": 0.5}),
        "task_masked_linear": (mm.task_masked_linear, (x, slots, weight, list(logits)), {"bias": bias}),
        "task_masked_conv2d": (mm.task_masked_conv2d, (images, slots, kernel, kernel_logits, bias), {}),
        "packed_masked_linear": (mm.packed_masked_linear, (x, slots, weight, bits), {}),
        "packed_masked_conv2d": (mm.packed_masked_conv2d, (images, slots, kernel, kernel_bits), {"padding": 1}),
        "pack_mask": (mm.pack_mask, (weight,), {"threshold": 0.5}),
        "unpack_mask": (mm.unpack_mask, (bits[0], (4, 3)), {}),
    }


@pytest.mark.parametrize("name", _functions())
def test_functions_of_proxies_are_calls_in_the_graph(name):
    function, arguments, options = _functions()[name]

    def run(*given):
        return function(*given, **options)

    wanted = run(*arguments)

    class Around(nn.Module):
        def __init__(self, index):
            super().__init__()
            self.index = index

        def forward(self, x):
            return function(*arguments[: self.index], x, *arguments[self.index + 1 :], **options)

    for index, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            traced = fx.symbolic_trace(Around(index))
            assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [function]
            again = pickle.loads(pickle.dumps(traced))
            for one in (traced, again):
                torch.testing.assert_close(one(argument), wanted, rtol=0, atol=0)


def test_a_list_that_holds_proxies():
    def masked(a, b, mask, slots):
        first = mm.masked_weight([a, b], [mask, mask])[0]
        return mm.task_masked_linear(a, slots, first, [mask, operator.neg(mask)])

    traced = fx.symbolic_trace(masked)
    given = torch.randn(3, 3), torch.randn(3, 3), torch.randn(3, 3), torch.tensor([0, 1, 1])
    torch.testing.assert_close(traced(*given), masked(*given), rtol=0, atol=0)


def test_a_function_of_a_models_parameters():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.m = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return mm.masked_linear(x, self.w, self.m).relu() + mm.masked_weight(self.w, self.m).sum()

    model, x = Own(), torch.randn(2, 4)
    traced = fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
    traced(x).sum().backward()
    assert model.w.grad is not None and model.m.grad is not None
