"""Small training loops, and how two ends of a run are compared."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from metamask_ext.continual import TaskLoop
from metamask_ext.files.checkpoint import load_checkpoint
from metamask_ext.nn import MaskedLinear


def new_data(names: str, rows: int = 16) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return {name: (torch.randn(rows, 3, generator=generator), torch.randn(rows, 1, generator=generator)) for name in names}


def new_model() -> MaskedLinear:
    torch.manual_seed(2)
    return MaskedLinear(3, 1)


def new_loop(out: Path, **options) -> TaskLoop:
    return TaskLoop(new_model(), **{"tasks": new_data("ab"), "loss": F.mse_loss, "steps": 2, "lr": 0.01, "out": out, **options})


def state(out: Path) -> dict:
    return load_checkpoint(out / "checkpoint.pt")


def assert_same(a: object, b: object, path: str = "state") -> None:
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            if key != "seconds":
                assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for index, (left, right) in enumerate(zip(a, b)):
            assert_same(left, right, f"{path}[{index}]")
    else:
        assert a == b, path
