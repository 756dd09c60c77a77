"""Measures a bank of packed tasks of LeNet-300-100: bytes a task and, in processes of their own, time and memory."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from metamask_ext import MaskBank, unpack_mask
from metamask_ext.nn import MaskedLinear

from .mixed_task import lenet
from .problem import SEED

OUTPUTS, BATCH, PROCESSES = 500, 64, 5


def make_bank(tasks: int) -> MaskBank:
    """Makes a bank of random masks, as many bits set as not."""
    torch.manual_seed(SEED)
    model = lenet(OUTPUTS)
    bank = MaskBank(model)
    for number in range(tasks):
        bank.add_task(f"task {number}")
        bank.pack(f"task {number}")
    bank.remove_task("default")
    return bank


def task_bytes(tasks: int) -> dict[str, float]:
    """Returns the bytes of a packed task in memory, and on disk: all of a bank's folder but its shared weights, a task."""
    bank = make_bank(tasks)
    with tempfile.TemporaryDirectory() as folder:
        bank.save(folder)
        files = [path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith("shared-")]
        on_disk = sum(path.stat().st_size for path in files)
    return {"bytes a task in memory": max(map(bank.bytes_per_task, bank.tasks)), "bytes a task on disk": on_disk / tasks}


def opened_bank(tasks: int) -> dict[str, float]:
    """Returns seconds and MB (10^6 bytes) of a process that opens a bank of so many tasks: medians of :data:`PROCESSES` of them.

    The bank was written just before, so that the system's cache holds its files. "open" is :meth:`metamask_ext.MaskBank.load` into
    a model that is there; "first batch" that of samples of different tasks, whose files are read and checked in it. Its output is
    compared with plain torch's. The memory is the resident memory beyond that after ``import torch``.
    """
    bank = make_bank(tasks)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        bank.save(folder)
        torch.manual_seed(SEED)
        chosen = torch.randperm(tasks)[:BATCH]
        x = torch.randn(len(chosen), 784)
        names = [f"task {number}" for number in chosen.tolist()]
        expected = torch.stack([_plain(bank, name, sample) for name, sample in zip(names, x)])
        torch.save({"x": x, "names": names, "expected": expected}, Path(folder, "batch.pt"))
        for _ in range(PROCESSES):
            command = [sys.executable, str(Path(__file__).with_name("bank_process.py")), folder, str(OUTPUTS)]
            child = subprocess.run(command, capture_output=True, text=True)
            assert child.returncode == 0, f"a bank of {tasks} tasks: {child.stderr.strip().splitlines()[-1]}"
            runs.append(dict(line.rsplit(":", 1) for line in child.stdout.splitlines()))
    return {name: statistics.median(float(run[name]) for run in runs) for name in runs[0]}


def _plain(bank: MaskBank, task: str, x: Tensor) -> Tensor:
    """Computes the task's logits of one sample by plain torch, in float64."""
    y = x.double()
    for module in bank.model.children():
        if isinstance(module, MaskedLinear):
            assert module.bias_masks is not None
            mask, bias_mask = module.masks[task], module.bias_masks[task]
            weight = module.weight.detach().double() * unpack_mask(mask, module.weight.shape)
            y = F.linear(y, weight, module.bias.detach().double() * unpack_mask(bias_mask, module.bias.shape))
        else:
            y = module(y)
    return y
