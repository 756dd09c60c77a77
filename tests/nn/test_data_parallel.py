"""torch.nn.DataParallel: its copies of the layers run the task that was active, in threads that open no block."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from support.attention_net import AttentionNet
from support.models import randomize_masks
from torch import nn

from metamask_ext import MaskBank, add_task, convert, using_task
from metamask_ext.nn import MaskedLinear
from metamask_ext.nn.task_dict import TaskDict


@pytest.fixture
def replicate(monkeypatch):
    """torch's own function, with clones on the CPU in the place of copies on other devices."""
    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(
        module,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices],
    )
    return lambda model, count=2: module.replicate(model, list(range(count)))


def _model(tasks=("b", "c", "p")):
    model = convert(AttentionNet().double(), batch_norm="task", mask_init="normal").eval()
    bank = MaskBank(model)
    for task in tasks:
        add_task(model, task)
    randomize_masks(model)
    if "p" in tasks:
        bank.pack("p")
    return model, bank


def _run(replicas, x):
    """The outputs of the replicas of parts of the batch, each in a thread, put together."""
    outputs, errors = [None] * len(replicas), []

    def run(index, part):
        try:
            outputs[index] = replicas[index](part)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=entry) for entry in enumerate(x.chunk(len(replicas)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return torch.cat(outputs)


X = torch.randn(4, 2, 2, 2, dtype=torch.float64)


@pytest.mark.parametrize("tasks", [(), ("b", "c", "p")])
def test_every_copy_runs_the_task_that_was_active_and_trains_it(replicate, tasks):
    model, _ = _model(tasks)
    for selected in [*tasks, "default"]:
        grads, outputs = [], []
        for parallel in (True, False):
            model.zero_grad()
            with using_task(model, selected):
                output = None if parallel else model(X)
                replicas = replicate(model) if parallel else []
            output = _run(replicas, X) if parallel else output
            output.square().sum().backward()
            outputs.append(output)
            grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*grads)
        assert grads[0]


def test_a_superposition_is_that_of_the_caller(replicate):
    model, bank = _model()
    with bank.superpose({"b": 0.25, "c": 0.75}):
        wanted, replicas = model(X), replicate(model)
    torch.testing.assert_close(_run(replicas, X), wanted)
    single, bank = _model(())
    with bank.superpose({"default": 0.5}):
        wanted, replicas = single(X), replicate(single)
    torch.testing.assert_close(_run(replicas, X), wanted)


def test_a_batch_of_several_tasks_is_refused_and_so_is_none(replicate):
    model = nn.Sequential(MaskedLinear(3, 2))
    add_task(model, "b")
    x = torch.randn(4, 3)
    with using_task(model, "b"):
        wanted = model(x)
    with using_task(model, ["b"] * 4):
        torch.testing.assert_close(_run(replicate(model), x), wanted)
    with using_task(model, ["b", "default", "b", "b"]):
        replicas = replicate(model)
    with pytest.raises(RuntimeError, match="a copy that torch.nn.DataParallel made.*takes one task for the whole batch"):
        _run(replicas, x)
    with pytest.raises(RuntimeError, match="none is active"):
        _run(replicate(model), x)


def test_the_model_is_as_it_was_and_logits_can_be_read(replicate):
    model, _ = _model()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with using_task(model, "b"):
        (replica,) = replicate(model, 1)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    torch.testing.assert_close(replica.head.mask_logits, model.head.masks["b"].detach())
    assert isinstance(replica.head.masks, TaskDict) and repr(replica)


def test_on_a_cpu_it_calls_the_module():
    model, _ = _model()
    parallel = nn.DataParallel(model)
    for selected in ("b", "p"):
        with using_task(parallel, selected):
            torch.testing.assert_close(parallel(X), model(X))
