"""Measures a bank in service: loading, a cold and a warm mixed batch, entering blocks, refreshing, inferring tasks."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn

from metamask_ext import MaskBank, add_task, merge, using_task
from metamask_ext.nn import MaskedLinear

from .bank import BATCH, OUTPUTS, make_bank
from .mixed_task import lenet
from .problem import SEED

ROUNDS = 15
ENTERED = (32, 200)
"""The layers of the models whose blocks are entered."""


def served_bank(tasks: int) -> dict[str, float]:
    """Returns the median times of a bank of so many packed tasks of LeNet-300-100, whose files the system's cache holds.

    A batch has 64 samples of 64 tasks, drawn at random; it is cold where no task was used before, in a model loaded anew. The
    merged dense model computes all samples with one task's weights. Outputs are compared with those of each task by itself.
    """
    torch.manual_seed(SEED)
    bank = make_bank(tasks)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        bank.save(folder)
        x, loads, cold = torch.randn(BATCH, 784), [], []
        for number in range(ROUNDS):
            model = lenet(OUTPUTS)
            begin = time.perf_counter()
            loaded = MaskBank.load(folder, model)
            loads.append(time.perf_counter() - begin)
            names = [bank.tasks[place] for place in torch.randperm(tasks)[:BATCH].tolist()]
            begin = time.perf_counter()
            with using_task(model, names):
                y = model(x)
            cold.append(time.perf_counter() - begin)
            if number == 0:
                _check(bank, x, names, y)
        found["load, ms"], found["cold batch, ms"] = 1e3 * statistics.median(loads), 1e3 * statistics.median(cold)

        def warm() -> None:
            with using_task(model, names):
                model(x)

        dense = merge(model, names[0])
        found["warm batch / merged dense"] = _median(warm) / _median(lambda: dense(x))
        loaded.refresh()
        found["refresh, ms"] = 1e3 * _median(loaded.refresh)
        loaded.infer_task(x)
        found["infer_task, s"] = _median(lambda: loaded.infer_task(x), 3)
    for layers in ENTERED:
        found[f"entering {layers} layers, us"] = 1e6 * _entering(layers)
    return found


def _entering(layers: int) -> float:
    model = nn.Sequential(*(MaskedLinear(8, 8) for _ in range(layers)))
    add_task(model, "other")

    def enter() -> None:
        for _ in range(100):
            with using_task(model, "other"):
                pass

    return _median(enter) / 100


def _median(function: Callable[[], object], rounds: int = ROUNDS) -> float:
    function()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _check(bank: MaskBank, x: torch.Tensor, names: list[str], y: torch.Tensor) -> None:
    for row, name in enumerate(names):
        with using_task(bank.model, name):
            torch.testing.assert_close(y[row], bank.model(x[row : row + 1])[0], rtol=1e-4, atol=1e-4)
