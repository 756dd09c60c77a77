"""torch's FlopCounterMode counts a masked layer as the plain one, and gives every op a number."""

from __future__ import annotations

import copy
import importlib
import re
import subprocess
import sys

import pytest
import torch
from support.fused_steps import each_kind
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import metamask_ext as mm
from metamask_ext import MaskBank, add_task, convert, merge, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLinear
from metamask_ext.ops import flops

# Composite ops, which stand in compiled graphs, run others that are counted.
OPS = sorted(name for name in torch._C._dispatch_get_all_op_names() if re.match("metamask::(?!compiled_)", name))


def count(function, *arguments) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


PLAIN = {
    "linear": (lambda: nn.Linear(6, 10), (4, 6)),
    "linear-no-bias": (lambda: nn.Linear(6, 10, bias=False), (4, 6)),
    "linear-3d": (lambda: nn.Linear(6, 10), (4, 3, 6)),
    "conv": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), (4, 2, 7, 6)),
    "conv-1x1": (lambda: nn.Conv2d(2, 4, 1), (4, 2, 5, 5)),
    "conv-as-a-product": (lambda: nn.Conv2d(2, 64, 3), (4, 2, 3, 3)),
    "conv-groups": (lambda: nn.Conv2d(4, 8, 3, groups=2, padding="same", bias=False), (4, 4, 5, 5)),
    "conv-depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 4, 5, 5)),
    "conv-reflect": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (4, 2, 5, 5)),
    "net": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3)), (4, 2, 4, 4)),
}
TASKS = {
    "one": "b",
    "packed": "p",
    "mixed": ["b", "default", "b", "c"],
    "mixed packed": ["p", "q", "p", "p"],
    "both": ["p", "b", "q", "default"],
}


def _masked(make):
    torch.manual_seed(0)
    model = convert(nn.Sequential(make()))
    bank = MaskBank(model)
    for task in ("b", "c", "p", "q"):
        add_task(model, task)
    bank.pack("p")
    bank.pack("q")
    return model


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("name", PLAIN)
def test_forward_and_backward_count_as_the_plain_layers(name, tasks):
    make, shape = PLAIN[name]
    plain, model = nn.Sequential(make()), _masked(make)
    for train_input in (False, True):
        for trained in (True, False):
            counts = []
            for one in (plain, model):
                x = torch.randn(shape, requires_grad=train_input)
                for parameter in one.parameters():
                    parameter.requires_grad_(trained)
                with using_task(model, TASKS[tasks]):
                    with torch.no_grad():
                        forward = count(one, x)
                    y = one(x)
                    backward = count(y.sum().backward) if trained or train_input else 0
                counts.append((forward, backward))
            assert counts[0] == counts[1]
            assert counts[0][0] > 0


@pytest.mark.parametrize("name", ["linear", "conv-as-a-product", "conv", "net"])
@pytest.mark.parametrize("mask_only", [False, True])
@each_kind
def test_a_fused_step_counts_as_a_backward(name, mask_only, kind):
    make, shape = PLAIN[name]
    model = _masked(make)
    if mask_only:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("masks" in key)
    x = torch.randn(shape)
    optimizer = kind.ours(model, **kind.settings)
    with using_task(model, "b"):
        plain = count(lambda: model(x).sum().backward())
        model.zero_grad()
        assert count(lambda: optimizer.backward(model(x).sum())) == plain > 0


@pytest.mark.parametrize("name", ["linear", "linear-3d", "linear-no-bias"])
def test_second_derivatives_count_as_the_plain_layers(name):
    make, shape = PLAIN[name]
    model = _masked(make)
    plain = merge(model, "b")
    counts = []
    for one, tasks in ((plain, "b"), (model, "b"), (model, TASKS["mixed"])):
        x = torch.randn(shape, requires_grad=True)
        with using_task(model, tasks):
            y = one(x).square().sum()  # torch's counter does not follow modules through autograd.grad

            def differentiate(y=y, inputs=(x, one[0].weight)):
                first = torch.autograd.grad(y, inputs, create_graph=True)
                sum(each.square().sum() for each in first).backward()

            counts.append(count(differentiate))
    assert len(set(counts)) == 1


def test_the_functions_count_too():
    weight, logits, x = torch.randn(10, 6), torch.randn(3, 10, 6), torch.randn(4, 6)
    slots, bits = torch.tensor([0, 2, 1, 0]), mm.pack_mask(torch.randn(10, 6))
    products = {
        "masked_linear": lambda: mm.masked_linear(x, weight, logits[0]),
        "task_masked_linear": lambda: mm.task_masked_linear(x, slots, weight, logits),
        "task_masked_linear of a list": lambda: mm.task_masked_linear(x, slots, weight, list(logits)),
        "packed_masked_linear": lambda: mm.packed_masked_linear(x, slots % 1, weight, [bits]),
    }
    assert {name: count(product) for name, product in products.items()} == dict.fromkeys(products, 480)
    for free in (lambda: mm.masked_weight(weight, logits[0]), lambda: mm.pack_mask(weight), lambda: mm.unpack_mask(bits, (10, 6))):
        assert count(free) == 0


def test_the_inference_of_tasks_counts_its_products():
    model = _masked(PLAIN["linear"][0])
    bank = MaskBank(model)
    assert count(lambda: bank.infer_task(torch.randn(4, 6))) > 3 * 480


def test_modules_have_the_counts_of_their_ops():
    model = _masked(PLAIN["net"][0])
    with using_task(model, "b"), FlopCounterMode(display=False) as counter:
        model(torch.randn(4, 2, 4, 4)).sum().backward()
    counts = counter.get_flop_counts()
    assert counts["Sequential.0.3"][torch.ops.metamask.masked_linear] == 2 * 4 * 16 * 8
    assert counts["Sequential"][torch.ops.metamask.masked_linear_backward] > 0


@pytest.mark.parametrize("layer", [MaskedLinear(6, 10), MaskedConv2d(2, 4, 3)], ids=["linear", "conv"])
def test_fake_tensors_and_meta_tensors_are_counted(layer):
    layer = copy.deepcopy(layer)
    x = torch.randn(4, 6) if isinstance(layer, MaskedLinear) else torch.randn(4, 2, 4, 4)
    wanted = count(lambda: layer(x).sum().backward())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert count(lambda: layer(mode.from_tensor(x)).sum().backward()) == wanted
    layer.zero_grad()
    assert count(lambda: layer.to("meta")(x.to("meta")).sum().backward()) == wanted


def test_every_op_has_a_formula():
    registered = {f"metamask::{name}" for name in flops.FORMULAS}
    assert registered == {name.partition(".")[0] for name in OPS}
    assert all(getattr(torch.ops.metamask, name) in flop_counter.flop_registry for name in flops.FORMULAS)


def test_the_counter_gets_them_when_it_is_imported_and_keeps_its_loader(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    loader = flop_counter.__loader__
    monkeypatch.delitem(sys.modules, flops.COUNTER)
    flops.register()
    assert flops.COUNTER not in sys.modules
    length = len(sys.meta_path)
    again = importlib.import_module(flops.COUNTER)
    monkeypatch.setattr(torch.utils, "flop_counter", flop_counter)
    assert again is not flop_counter and len(sys.meta_path) == length - 1
    assert torch.ops.metamask.masked_linear in again.flop_registry
    assert type(again.__loader__) is type(loader) is type(again.__spec__.loader)


def test_a_look_for_the_counter_is_no_import_of_it():
    """In a process of its own: the counter is imported here already."""
    program = (
        "import importlib.util, torch, metamask_ext as mm; importlib.util.find_spec('torch.utils.flop_counter')\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "with FlopCounterMode(display=False) as counter: mm.nn.MaskedLinear(8, 16)(torch.randn(3, 8))\n"
        "print(counter.get_total_flops())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"{2 * 3 * 8 * 16}\n"
