"""A training loop that is killed and started again: a program of one thread, which continual/test_files.py runs."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from support.bank_processes import exit_code, forked, kill_self
from support.loops import state
from torch import nn

from metamask_ext.continual import TaskLoop
from metamask_ext.files import checkpoint
from metamask_ext.nn import MaskedLinear

ROUNDS = 150


def new_loop(out: Path) -> TaskLoop:
    torch.manual_seed(0)
    model = nn.Sequential(MaskedLinear(3, 16), nn.Dropout(0.2), MaskedLinear(16, 1))
    generator = torch.Generator().manual_seed(1)
    tasks = {f"t.{k}": (torch.randn(32, 3, generator=generator), torch.randn(32, 1, generator=generator)) for k in range(4)}
    return TaskLoop(
        model,
        tasks,
        F.mse_loss,
        steps=3,
        lr=0.02,
        mask_lr=0.1,
        momentum=0.9,
        weight_decay=1e-3,
        batch_size=8,
        seed=5,
        out=out,
        evaluate=lambda loop: {"seen": float(len(loop.steps_of)), "noise": float(torch.rand(()))},
        evaluate_every=3,
        checkpoint_seconds=0.0,
        tensorboard=False,
    )


@contextmanager
def deadly(owner: Any, name: str, nth: int, when: str) -> Iterator[None]:
    """SIGKILL before, after or amid the nth call of a function that writes."""
    function, calls = getattr(owner, name), 0

    def call(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < nth:
            return function(*arguments)
        if when == "amid":  # half of a checkpoint is in the temporary file
            path, *parts = arguments
            path.with_name(path.name + ".tmp").write_bytes(b"".join(parts)[:200])
        elif when == "after":
            function(*arguments)
        return kill_self()

    with mock.patch.object(owner, name, call):
        yield


# Calls of fsync: of a temporary file, of its folder, of the metrics; in this order after the first checkpoint: metrics first.
VICTIMS = (
    (checkpoint, "write_atomic", 1, "amid"),
    (checkpoint, "write_atomic", 9, "amid"),
    (os, "fsync", 7, "after"),
    (os, "fsync", 8, "after"),
    (os, "fsync", 9, "after"),
    (os, "replace", 9, "before"),
    (os, "replace", 9, "after"),
)


def trained(out: Path, before_run: Callable[[], Any] = nullcontext) -> int:
    """A process that trains to the end, and then writes which round it resumed from; its number."""

    def body() -> None:
        with before_run():
            loop = new_loop(out).run(ROUNDS)
        out.with_suffix(".json").write_text(json.dumps(loop.resumed))

    return forked(body)


def killed_at_random(out: Path, seconds: float) -> int:
    reading, writing = os.pipe()

    @contextmanager
    def saying_ready() -> Iterator[None]:
        os.write(writing, b".")
        yield

    child = trained(out, saying_ready)
    os.close(writing)
    assert os.read(reading, 1), "the process died before it was killed"
    os.close(reading)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return exit_code(child)


def main(folder: Path) -> None:
    alone, killed = folder / "alone", folder / "killed"
    assert exit_code(trained(alone)) == 0
    for owner, name, nth, when in VICTIMS:
        code = exit_code(trained(killed, partial(deadly, owner, name, nth, when)))
        assert code == -signal.SIGKILL, (name, nth, when)
    reached = state(killed)["round"]
    assert 0 < reached < ROUNDS, "the kills hit a run in progress"
    chance = random.Random(0)
    for _ in range(5):
        assert killed_at_random(killed, chance.uniform(0, 0.05)) in (-signal.SIGKILL, 0)
    assert exit_code(trained(killed)) == 0
    assert json.loads(alone.with_suffix(".json").read_text()) is None
    assert json.loads(killed.with_suffix(".json").read_text()) >= reached


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
