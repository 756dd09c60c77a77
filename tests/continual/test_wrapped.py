"""Checkpoints of a loop whose model is wrapped resume with the plain model, or another wrapper, and bring its gates along."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel

from metamask_ext import slots
from metamask_ext.continual import TaskLoop
from metamask_ext.files.errors import CheckpointError
from metamask_ext.nn import MaskedLinear, TaskBatchNorm2d

X = torch.linspace(-1, 1, 6)[:, None]


def _net():
    torch.manual_seed(0)
    return nn.Sequential(MaskedLinear(1, 2), nn.Unflatten(1, (2, 1, 1)), TaskBatchNorm2d(2), nn.Flatten(), MaskedLinear(2, 1))


def _compiled(model):
    return torch.compile(model, backend="eager")


def _inside(wrap):
    def make(model):
        model[0] = wrap(model[0])
        return model

    return make


WRAPS = {
    "plain": lambda model: model,
    "compile": _compiled,
    "DataParallel": DataParallel,
    "activation checkpoints, inside": _inside(checkpoint_wrapper),
    "compile, inside": _inside(_compiled),
}


def _loop(wrap, folder, evaluate=None):
    tasks = {"a.b": (X, X), "c": (X, -X)}
    order = ["a.b", "c", "a.b", "c"]
    model = wrap(_net())
    return TaskLoop(model, tasks, nn.functional.mse_loss, order=order, steps=1, out=folder, tensorboard=False, evaluate=evaluate)


def _anneal(loop):
    for module in loop.model.modules():
        if isinstance(module, MaskedLinear):
            module.temperature = 1 / (1 + loop.round)
    return {}


@pytest.mark.parametrize("first", WRAPS)
@pytest.mark.parametrize("second", ["plain", "compile"])
def test_a_run_goes_on_in_another_wrapper(first, second, tmp_path):
    whole = _loop(WRAPS["plain"], tmp_path / "whole", _anneal).run(4)
    _loop(WRAPS[first], tmp_path / "run", _anneal).run(2)
    resumed = _loop(WRAPS[second], tmp_path / "run", _anneal)
    resumed.run(4)
    assert resumed.resumed == 2 and slots(resumed.model) == slots(whole.model)
    for got, wanted in zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_temperature_of_a_checkpoint_is_taken_over(tmp_path):
    _loop(WRAPS["plain"], tmp_path, _anneal).run(2)
    resumed = _loop(WRAPS["plain"], tmp_path, lambda loop: {}).run(2)
    assert resumed.resumed == 2 and resumed.model[0].temperature == pytest.approx(1 / 3)


def test_another_gate_is_another_run(tmp_path):
    _loop(WRAPS["compile"], tmp_path).run(1)

    def hard(model):
        model[0].gate = "hard"
        return model

    with pytest.raises(CheckpointError, match="gate of 0 was"):
        _loop(hard, tmp_path).run(2)
