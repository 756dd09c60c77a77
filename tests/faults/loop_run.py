"""Training of which one call fails: the same loop called again, and a new one, end where an undisturbed run ends, bit for bit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from support.faults import INTERRUPT, KILL, Attempt, Fault, calls_of, failing, faults, interrupted, main, seen
from torch import nn

from metamask_ext.continual import OutputError, TaskLoop
from metamask_ext.nn import MaskedLinear

ROUNDS = 5


def new_loop(out: Path) -> TaskLoop:
    """Three tasks in changing order; a checkpoint after every round."""
    torch.manual_seed(1)
    model = nn.Sequential(MaskedLinear(4, 6), nn.ReLU(), MaskedLinear(6, 2))
    chance = torch.Generator().manual_seed(3)
    tasks = {f"t{k}": (torch.randn(9, 4, generator=chance), torch.randn(9, 2, generator=chance)) for k in range(3)}
    options = {"steps": 2, "momentum": 0.9, "checkpoint_seconds": 0.0, "tensorboard": False}
    return TaskLoop(model, tasks, F.mse_loss, out=out, **options)


class _Attempts:
    def __init__(self, root: Path):
        self.root, self.out = root, root / "out"
        self._start()
        self.calls = calls_of(root, lambda: new_loop(self.out).run(ROUNDS))
        self.expected = self._result(new_loop(self.out).run(ROUNDS))
        self._start()
        with interrupted(0, "metamask_ext"):
            new_loop(self.out).run(ROUNDS)
        self.events = seen[0]

    def _start(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)

    def _result(self, loop: TaskLoop) -> object:
        state = {name: tensor.tolist() for name, tensor in loop.model.state_dict().items() if isinstance(tensor, torch.Tensor)}
        return state, (self.out / "metrics.jsonl").read_text()

    def fault(self, fault: Fault) -> str | None:
        self._start()
        if fault.action == KILL:
            return self._killed(fault)
        loop = new_loop(self.out)
        reported = "done"
        try:
            with failing(self.root, fault):
                loop.run(ROUNDS)
        except OutputError:
            reported = "refused"
        except KeyboardInterrupt:
            if fault.action != INTERRUPT:
                raise
            reported = "interrupted"
        except Exception as error:
            return f"raised {error!r}"
        return self._judge(reported, [loop, new_loop(self.out)])

    def interrupt(self, nth: int) -> str | None:
        self._start()
        loop = new_loop(self.out)
        try:
            with interrupted(nth, "metamask_ext"):
                loop.run(ROUNDS)
        except KeyboardInterrupt:
            pass
        return self._judge("interrupted", [loop, new_loop(self.out)])

    def _killed(self, fault: Fault) -> str | None:
        child = os.fork()
        if child == 0:
            try:
                with failing(self.root, fault):
                    new_loop(self.out).run(ROUNDS)
            finally:
                os._exit(7)
        _, status = os.waitpid(child, 0)
        return self._judge("killed", [new_loop(self.out)]) if os.WIFSIGNALED(status) else "not killed"

    def _judge(self, reported: str, again: Sequence[TaskLoop]) -> str | None:
        for which, loop in zip(("the same", "a new"), again[-2:]):
            try:
                loop.run(ROUNDS)
            except Exception as error:
                return f"{reported}, and {which} loop raises {error!r}"
            if self._result(loop) != self.expected:
                return f"{reported}, and {which} loop ends elsewhere"
        return None


def attempts(root: Path) -> list[tuple[str, Attempt]]:
    tried = _Attempts(root / "faults")
    found: list[tuple[str, Attempt]] = [(str(fault), partial(tried.fault, fault)) for fault in faults(tried.calls)]
    return found + [(f"Ctrl-C at event {nth}", partial(tried.interrupt, nth)) for nth in range(1, tried.events + 1)]


if __name__ == "__main__":
    main(attempts)
