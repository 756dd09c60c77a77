"""What a bank of packed tasks of LeNet-300-100 costs: bytes a task, and, measured in processes of their own, time and memory."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import MaskBank, unpack_mask
from .problems import SEED
from .tasks import lenet

OUTPUTS, BATCH, PROCESSES = 500, 64, 5


def make_bank(tasks: int) -> MaskBank:
    """Random masks, as many set as not."""
    torch.manual_seed(SEED)
    model = lenet(OUTPUTS)
    bank = MaskBank(model)
    for number in range(tasks):
        bank.add_task(f"task {number}")
        bank.pack(f"task {number}")
    bank.remove_task("default")
    return bank


def task_bytes(tasks: int) -> dict[str, float]:
    """The bytes of a packed task in memory, and all of a bank's folder but its shared weights, a task."""
    bank = make_bank(tasks)
    with tempfile.TemporaryDirectory() as folder:
        bank.save(folder)
        files = [path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith("shared-")]
        on_disk = sum(path.stat().st_size for path in files)
    return {"bytes a task in memory": max(map(bank.bytes_per_task, bank.tasks)), "bytes a task on disk": on_disk / tasks}


def opened_bank(tasks: int) -> dict[str, float]:
    """Seconds and MB (10^6 bytes) of a process that opens a bank of so many tasks: the medians of :data:`PROCESSES` of them.

    The bank was written just before, so that the system's cache holds its files. "open" is :meth:`metamask_ext.MaskBank.load` into
    a model that is there; "first batch" that of samples of different tasks, whose files are read and checked in it. Its output is
    compared with plain torch's. The memory is what is resident more than after ``import torch``.
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
            command = [sys.executable, Path(__file__).with_name("bank_process.py"), folder, str(OUTPUTS)]
            child = subprocess.run(command, capture_output=True, text=True)
            assert child.returncode == 0, f"a bank of {tasks} tasks: {child.stderr.strip().splitlines()[-1]}"
            runs.append(dict(line.rsplit(":", 1) for line in child.stdout.splitlines()))
    return {name: statistics.median(float(run[name]) for run in runs) for name in runs[0]}


def _plain(bank: MaskBank, task: str, x: Tensor) -> Tensor:
    """The task's logits of one sample, in float64."""
    y = x.double()
    for module in bank.model:  # type: ignore[union-attr]
        if isinstance(module, nn.Linear):
            weight, bias = module.weight.detach(), module.bias.detach()
            mask, bias_mask = (unpack_mask(masks[task], like.shape) for masks, like in zip(_masks(module), (weight, bias)))
            y = F.linear(y, weight.double() * mask, bias.double() * bias_mask)
        else:
            y = module(y)
    return y


def _masks(layer: nn.Module) -> tuple[Any, Any]:
    return layer.masks, layer.bias_masks
