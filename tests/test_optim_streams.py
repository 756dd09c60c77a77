"""Fused optimisers with the forward on one stream and the backward under another: the step is done before what comes after reads.

Here streams only note who waits for whom; on a GPU a kernel that sleeps stands in front of the update.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support.fused_steps import each_kind
from support.gpu import DEVICES, SLEEP, captured, needs_gpu
from support.profiling import metamask_ops
from support.streams import Recorder

from metamask_ext.nn import MaskedConv2d, MaskedLinear
from metamask_ext.optim import FusedMaskedSGD


def linear(device="cpu"):
    return MaskedLinear(4, 3, device=device), torch.randn(2, 4, device=device)


def product_with_patches(device="cpu"):
    """On a CPU: the output has one place."""
    return MaskedConv2d(2, 64, 3, device=device), torch.randn(1, 2, 3, 3, device=device)


def weight(device="cpu"):
    """A convolution in groups computes its weight."""
    return MaskedConv2d(2, 4, 3, groups=2, device=device), torch.randn(2, 2, 4, 4, device=device)


# And the place of the op among those of an optimiser.
MODELS = {"linear": (linear, 0), "product": (product_with_patches, 0), "weight": (weight, 1)}
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def stepping(monkeypatch):
    """A function that takes a step whose nodes run on stream A while its caller is on B, and returns what happens in order."""

    def run(model, x, make=FusedMaskedSGD, fail=False):
        log = []
        recorder = Recorder(monkeypatch, log)
        optimizer = make(model, 0.1)
        optimizer.register_step_pre_hook(lambda *_: log.append("step"))
        loss = model(x).square().sum()
        backward = torch.autograd.backward

        def on_a(*arguments):
            recorder.here = "A"
            try:
                backward(*arguments)
                log.append("backward")
                if fail:
                    raise KeyboardInterrupt
            finally:
                recorder.here = "B"

        monkeypatch.setattr(torch.autograd, "backward", on_a)
        recorder.here = "B"
        try:
            optimizer.backward(loss)
        except KeyboardInterrupt:
            log.append("interrupted")
        return log

    return run


@each_kind
@each_model
def test_the_callers_stream_waits_before_anything_else_reads(stepping, name, kind):
    make, place = MODELS[name]
    found = []
    ops = metamask_ops(lambda: found.extend(stepping(*make(), kind.ours)))
    assert kind.ops[place].removeprefix("metamask::") in ops
    assert found == ["backward", "B waits for A", "step"]


def test_it_waits_after_an_interrupted_backward_too(stepping):
    assert stepping(*linear(), fail=True) == ["backward", "B waits for A", "interrupted"]


def test_on_one_stream_nothing_waits(monkeypatch):
    log = []
    Recorder(monkeypatch, log)
    model, x = linear()
    FusedMaskedSGD(model, 0.1).backward(model(x).square().sum())
    assert log == []


def test_where_there_are_no_streams_none_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: pytest.fail("asked"))
    model, x = linear()
    FusedMaskedSGD(model, 0.1).backward(model(x).square().sum())


def after_a_step(make, momentum, sleep):
    """The parameters as the backward's stream copies them right after two steps."""
    torch.manual_seed(0)
    model, x = make("cuda")
    optimizer = FusedMaskedSGD(model, 0.1, momentum=momentum)
    a, b, c = (torch.cuda.Stream() for _ in range(3))
    torch.cuda.synchronize()
    with torch.cuda.stream(c):
        # Autograd's own wait is for the streams of these nodes: on a third one it does not hide what is missing.
        leaves = [parameter.view_as(parameter).grad_fn.next_functions[0][0] for parameter in model.parameters()]
    for _ in range(2):
        with torch.cuda.stream(a):
            loss = model(x).square().sum()
            if sleep:
                torch.cuda._sleep(SLEEP)
        with torch.cuda.stream(b):
            optimizer.backward(loss)
            copies = [parameter.detach().clone() for parameter in model.parameters()]
        a.wait_stream(b)
    torch.cuda.synchronize()
    assert leaves
    return copies


@pytest.mark.every_device
@pytest.mark.parametrize("device", DEVICES)
@each_model
def test_a_step_in_a_graph_steps_at_every_replay(name, device):
    torch.manual_seed(0)
    model, x = MODELS[name][0](device)
    twin = copy.deepcopy(model)
    optimizer, other = (FusedMaskedSGD(one, 0.1, momentum=0.9) for one in (model, twin))

    def step():
        optimizer.backward(model(x).square().mean())

    replay, _ = captured(step, device)
    with torch.no_grad():  # where the twin begins
        for parameter, begin in zip(model.parameters(), twin.parameters()):
            parameter.copy_(begin)
            optimizer.state[parameter]["momentum_buffer"].zero_()
    for _ in range(3):
        x.mul_(-0.5).add_(0.25)
        replay()
        other.backward(twin(x).square().mean())
    for one, wanted in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(one, wanted)


@needs_gpu
@each_model
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_copy_on_the_backwards_stream_is_of_the_step(name, momentum):
    make, _ = MODELS[name]
    for got, wanted in zip(after_a_step(make, momentum, True), after_a_step(make, momentum, False)):
        torch.testing.assert_close(got, wanted)
