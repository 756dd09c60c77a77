"""Saves of a bank of which one call fails: the folder then holds the old bank or the new one, whole, and the next save is right."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from support.faults import INTERRUPT, KILL, Attempt, Fault, calls_of, failing, faults, interrupted, main, seen
from torch import nn

import metamask_ext
from metamask_ext.bank import BankError, Store, save
from metamask_ext.nn import MaskedLinear

State = object
"""All that a bank holds, as something that compares."""


def generation(number: int, *, shared: int | None = None, tasks: Sequence[str] = ("t0", "t1", "t2")) -> tuple[object, ...]:
    """Arguments of ``save``: ``number`` is in every tensor of a task, ``shared`` (or it) in the shared ones."""
    weights = number if shared is None else shared
    contents = ({"x": torch.full((50,), float(number)), "y": torch.tensor(number)}, {"n": number})
    return {"weights": weights}, {"w": torch.full((9,), float(weights))}, [(task, contents) for task in tasks]


@dataclass(frozen=True)
class Scenario:
    """A save in a folder: what was there before, and how its state is read (None: there is no bank)."""

    before: Callable[[Path], object]
    act: Callable[[Path], object]
    read: Callable[[Path], State]


def read_store(folder: Path) -> State:
    store = Store.open(folder)
    store.verify()
    weights = store.meta["weights"]
    assert bool((store.shared()["w"] == weights).all()), "the shared weights are another generation's"
    tasks = []
    for name in store.tasks:
        if name is not None:
            task, number = store.task(name), store.entry(name)["n"]
            assert bool((task["x"] == number).all()) and int(task["y"]) == number, f"task {name!r} is mixed"
            tasks.append((name, number))
    return weights, tuple(tasks), len(store.tasks)


def append(folder: Path) -> None:
    store = Store.open(folder)
    meta, shared, new = generation(7, shared=1, tasks=["new"])
    save(folder, meta, shared, [*((name, (store, name)) for name in ("t0", "t1", "t2")), *new])  # type: ignore[misc,arg-type]


def remove(folder: Path) -> None:
    meta, shared, _ = generation(1)
    save(folder, meta, shared, [None, ("t1", (Store.open(folder), "t1"))])  # type: ignore[arg-type]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(MaskedLinear(3, 5), nn.ReLU(), MaskedLinear(5, 2, gate="hard"))


def read_model(folder: Path) -> State:
    bank = metamask_ext.MaskBank.load(folder, model())
    bank.verify()
    state = {name: tensor.tolist() for name, tensor in bank.model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    return bank.tasks, [bank.is_packed(task) for task in bank.tasks], state


def saved_model(folder: Path, *tasks: str, weight: float = 1.0, packed: Sequence[str] = ()) -> None:
    bank = metamask_ext.MaskBank(model())
    torch.manual_seed(1)
    for task in tasks:
        bank.add_task(task)
    for task in packed:
        bank.pack(task)
    with torch.no_grad():
        bank.model[0].weight.fill_(weight)  # type: ignore[union-attr,operator]
    bank.save(folder, overwrite=True)


def store_scenario(before: tuple[object, ...] | None, act: Callable[[Path], object]) -> Scenario:
    return Scenario(lambda folder: None if before is None else save(folder, *before), act, read_store)  # type: ignore[arg-type]


SCENARIOS = {
    "fresh": store_scenario(None, lambda folder: save(folder, *generation(1))),  # type: ignore[arg-type]
    "replace": store_scenario(generation(1), lambda folder: save(folder, *generation(2))),  # type: ignore[arg-type]
    "append by reference": store_scenario(generation(1), append),
    "remove": store_scenario(generation(1), remove),
    "same again": store_scenario(generation(1), lambda folder: save(folder, *generation(1))),  # type: ignore[arg-type]
    "a model's bank": Scenario(
        partial(saved_model, weight=1.0), lambda folder: saved_model(folder, "b", "c", weight=2.0, packed=["c"]), read_model
    ),
}


def leftovers(folder: Path) -> set[str]:
    """Files of the folder that its bank does not know."""
    known = {"bank.json", "bank.lock", *Store.open(folder)._index.paths()}
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - known


class _Attempts:
    """The attempts on one scenario."""

    def __init__(self, root: Path, scenario: Scenario):
        self.root, self.folder, self.scenario = root, root / "bank", scenario
        self._start()
        self.calls = calls_of(root, lambda: scenario.act(self.folder))
        self.new = scenario.read(self.folder)
        self._start()
        with interrupted(0, "metamask_ext"):
            scenario.act(self.folder)
        self.events = seen[0]

    def _start(self) -> State | None:
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        self.scenario.before(self.folder)
        return self.scenario.read(self.folder) if self.folder.exists() else None

    def fault(self, fault: Fault) -> str | None:
        old = self._start()
        reported = self._killed(fault) if fault.action == KILL else self._failed(fault)
        return self._judge(old, reported)

    def interrupt(self, nth: int) -> str | None:
        old = self._start()
        try:
            with interrupted(nth, "metamask_ext"):
                self.scenario.act(self.folder)
            reported = "done"
        except KeyboardInterrupt:
            reported = "interrupted"
        return self._judge(old, reported)

    def _killed(self, fault: Fault) -> str:
        child = os.fork()
        if child == 0:
            try:
                with failing(self.root, fault):
                    self.scenario.act(self.folder)
            finally:
                os._exit(7)
        _, status = os.waitpid(child, 0)
        return "killed" if os.WIFSIGNALED(status) else "not killed"

    def _failed(self, fault: Fault) -> str:
        try:
            with failing(self.root, fault):
                self.scenario.act(self.folder)
        except (OSError, BankError):
            return "refused"
        except KeyboardInterrupt:
            return "interrupted"
        except Exception as error:
            return f"raised {error!r}"
        return "interrupted" if fault.action == INTERRUPT else "done"

    def _judge(self, old: State | None, reported: str) -> str | None:
        if reported.startswith(("raised", "not killed")):
            return reported
        try:
            now = self.scenario.read(self.folder)
        except BankError as error:
            if old is not None:
                return f"{reported}, and the bank is lost: {error}"
            now = None
        if now is not None and now not in (old, self.new):
            return f"{reported}, and the bank is neither the old nor the new one"
        if reported == "done" and now != self.new:
            return "the save returned, and the old bank is there"
        try:
            self.scenario.act(self.folder)
        except Exception as error:
            return f"{reported}, and the next save raises {error!r}"
        if self.scenario.read(self.folder) != self.new or leftovers(self.folder):
            return f"{reported}, and the next save is wrong or leaves {leftovers(self.folder)}"
        return None


def attempts(root: Path) -> list[tuple[str, Attempt]]:
    found: list[tuple[str, Attempt]] = []
    for name, scenario in SCENARIOS.items():
        tried = _Attempts(root / "faults", scenario)
        found += [(f"{name}, {fault}", partial(tried.fault, fault)) for fault in faults(tried.calls)]
        found += [(f"{name}, Ctrl-C at event {nth}", partial(tried.interrupt, nth)) for nth in range(1, tried.events + 1)]
    return found


if __name__ == "__main__":
    main(attempts)
