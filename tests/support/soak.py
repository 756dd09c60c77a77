"""A bank beside a model of it in plain torch: every operation of the one is done to the other, and both must compute the same."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import resource
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import metamask_ext
from metamask_ext import MaskBank, add_task, convert, merge, remove_task, tasks, using_task
from metamask_ext.nn import MaskedLinear
from metamask_ext.optim import FusedMaskedSGD

IN, HIDDEN, OUT = 5, 9, 3
NAMES = ["a", "b", "keys", "training", "_x", "ü", "A", "a.b", "a/b", "%41", "..", "items", "\x1b[1m", "x" * 200, "weight", " ", "0"]
TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}
LEARNING_RATE, MOMENTUM = 0.05, 0.9


def new_model(gate: str) -> nn.Sequential:
    return nn.Sequential(MaskedLinear(IN, HIDDEN, gate=gate), nn.ReLU(), MaskedLinear(HIDDEN, OUT, bias=False, gate=gate))


def parameters(model: nn.Sequential, task: str) -> list[Tensor]:
    """Both weights and the bias, then the masks of a task in that order."""
    first, last = model[0], model[2]
    masks = [first.masks[task], last.masks[task], first.bias_masks[task]]
    return [tensor.detach() for tensor in (first.weight, last.weight, first.bias, *masks)]


@dataclass
class Plain:
    """The model in plain torch: the shared weights, and each task's logits, or its gates once it is packed."""

    gate: str
    shared: list[Tensor]
    tasks: dict[str, list[Tensor]] = field(default_factory=dict)
    packed: set[str] = field(default_factory=set)
    slots: list[str | None] = field(default_factory=list)
    temperature: float = 1.0
    threshold: float = 0.0

    def gates_of(self, logits: Sequence[Tensor], straight_through: bool = False) -> list[Tensor]:
        if self.gate == "sigmoid":
            return [torch.sigmoid(each / self.temperature) for each in logits]
        hard = [(each > self.threshold).float() for each in logits]
        return [gate + each - each.detach() for gate, each in zip(hard, logits)] if straight_through else hard

    def gates(self, task: str) -> list[Tensor]:
        return self.tasks[task] if task in self.packed else self.gates_of(self.tasks[task])

    def mixed(self, amounts: dict[str, float]) -> list[Tensor]:
        each = [[amount * gate for gate in self.gates(task)] for task, amount in amounts.items()]
        return [torch.stack(gates).sum(0) for gates in zip(*each)]

    def forward(self, x: Tensor, gates: Sequence[Tensor], shared: Sequence[Tensor] | None = None) -> Tensor:
        first, last, bias = self.shared if shared is None else shared
        return F.linear(F.relu(F.linear(x, first * gates[0], bias * gates[2])), last * gates[1])

    def add(self, task: str, logits: Sequence[Tensor]) -> None:
        self.tasks[task] = [each.clone() for each in logits]
        self.slots.append(task)

    def remove(self, task: str) -> None:
        del self.tasks[task]
        self.packed.discard(task)
        self.slots[self.slots.index(task)] = None

    def pack(self, task: str) -> None:
        if task not in self.packed:
            self.tasks[task] = [(each > (self.threshold if self.gate == "hard" else 0.0)).float() for each in self.tasks[task]]
            self.packed.add(task)

    def trained(self, task: str, x: Tensor, target: Tensor) -> list[Tensor]:
        """Weights, bias and logits after one step of gradient descent."""
        before = [each.clone().requires_grad_() for each in (*self.shared, *self.tasks[task])]
        output = self.forward(x, self.gates_of(before[3:], straight_through=True), before[:3])
        gradients = torch.autograd.grad(F.mse_loss(output, target), before)
        return [each.detach() - LEARNING_RATE * gradient for each, gradient in zip(before, gradients)]


def assert_close(what: str, found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape and torch.allclose(found, wanted, **TOLERANCE), f"{what}: {found} is not {wanted}"


class BankBesidePlainTorch(RuleBasedStateMachine):
    """Random operations on a bank; after each, its tasks, slots and outputs are those of :class:`Plain`."""

    @initialize(gate=st.sampled_from(["sigmoid", "hard"]), seed=st.integers(0, 1000))
    def begin(self, gate: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.folder = tempfile.TemporaryDirectory()
        self.model = new_model(gate)
        self.bank = MaskBank(self.model)
        first, last, bias, *logits = parameters(self.model, "default")
        self.plain = Plain(gate, [first.clone(), last.clone(), bias.clone()])
        self.plain.add("default", logits)
        self.saved: Plain | None = None

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def _one(self, data: st.DataObject, packed: bool = True) -> str:
        names = [task for task in self.plain.tasks if packed or task not in self.plain.packed]
        return data.draw(st.sampled_from(names))

    def _outputs(self, task: str, x: Tensor) -> Tensor:
        with torch.no_grad(), using_task(self.model, task):
            return self.model(x)

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(NAMES))
        if name in self.plain.tasks:
            try:
                self.bank.add_task(name)
            except ValueError:
                return
            raise AssertionError("a task was added twice")
        self.bank.add_task(name)
        self.plain.add(name, parameters(self.model, name)[3:])

    @rule(data=st.data(), amounts=st.lists(st.sampled_from([0.3, 0.5, 1.0, -0.2]), min_size=1, max_size=3))
    def add_combined(self, data: st.DataObject, amounts: list[float]) -> None:
        name = data.draw(st.sampled_from(NAMES))
        if name in self.plain.tasks:
            return
        init = {self._one(data): amount for amount in amounts}
        self.bank.add_task(name, init=init)
        found, wanted = parameters(self.model, name)[3:], self.plain.mixed(init)
        low = torch.sigmoid(torch.tensor(-4.0)).item()
        for logits, gate in zip(found, wanted):
            if self.plain.gate == "sigmoid":
                assert_close("combined gate", torch.sigmoid(logits / self.plain.temperature), gate.clamp(low, 1 - low))
            else:
                assert_close("combined logits", logits, gate - 0.5 + self.plain.threshold)
        self.plain.add(name, found)

    @precondition(lambda self: len(self.plain.tasks) > 1)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = self._one(data)
        self.bank.remove_task(name)
        self.plain.remove(name)

    @rule(data=st.data())
    def pack(self, data: st.DataObject) -> None:
        name = self._one(data)
        self.bank.pack(name)
        self.plain.pack(name)

    @rule(value=st.sampled_from([0.1, 0.5, 1.0, 2.0]))
    def set_gate(self, value: float) -> None:
        if self.plain.gate == "sigmoid":
            self.plain.temperature = value
        else:
            self.plain.threshold = value - 1.0
        for layer in (self.model[0], self.model[2]):
            layer.temperature, layer.threshold = self.plain.temperature, self.plain.threshold

    @rule()
    def save(self) -> None:
        self.bank.save(self.folder.name)
        self.bank.verify()
        self.saved = copy.deepcopy(self.plain)

    @precondition(lambda self: self.saved is not None)
    @rule(anew=st.booleans())
    def load(self, anew: bool) -> None:
        if anew:
            self.model = new_model(self.plain.gate)
        self.bank = MaskBank.load(self.folder.name, self.model)
        self.plain = copy.deepcopy(self.saved)

    @rule(data=st.data(), length=st.sampled_from([1, 2, 5, 16]), by_slot=st.booleans())
    def run_mixed_batch(self, data: st.DataObject, length: int, by_slot: bool) -> None:
        names = [self._one(data) for _ in range(length)]
        x = torch.randn(length, IN)
        which = torch.tensor([self.plain.slots.index(name) for name in names]) if by_slot else names
        with torch.no_grad(), using_task(self.model, which):
            found = self.model(x)
        wanted = torch.cat([self.plain.forward(row[None], self.plain.gates(name)) for row, name in zip(x, names)])
        assert_close("mixed-task batch", found, wanted)

    @rule(data=st.data(), amounts=st.lists(st.floats(-1, 1), min_size=1, max_size=4))
    def superpose(self, data: st.DataObject, amounts: list[float]) -> None:
        mixture, x = {self._one(data): amount for amount in amounts}, torch.randn(3, IN)
        with torch.no_grad(), self.bank.superpose(mixture):
            found = self.model(x)
        assert_close("superposition", found, self.plain.forward(x, self.plain.mixed(mixture)))

    @precondition(lambda self: self.plain.packed < set(self.plain.tasks))
    @rule(data=st.data(), fused=st.booleans())
    def train(self, data: st.DataObject, fused: bool) -> None:
        name, x, target = self._one(data, packed=False), torch.randn(6, IN), torch.randn(6, OUT)
        wanted = self.plain.trained(name, x, target)
        with using_task(self.model, name):
            loss = F.mse_loss(self.model(x), target)
            if fused:  # the first step of momentum is plain gradient descent's
                FusedMaskedSGD(self.model, lr=LEARNING_RATE, momentum=MOMENTUM).backward(loss)
            else:
                optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        found = parameters(self.model, name)
        for each, other in zip(found, wanted):
            assert_close("trained tensor", each, other)
        self.plain.shared = [each.clone() for each in found[:3]]
        self.plain.tasks[name] = [each.clone() for each in found[3:]]

    @rule(data=st.data(), back=st.booleans())
    def merge(self, data: st.DataObject, back: bool) -> None:
        name, x = self._one(data), torch.randn(3, IN)
        plain = merge(self.model, name)
        wanted = self.plain.forward(x, self.plain.gates(name))
        assert not any(isinstance(module, MaskedLinear) for module in plain.modules())
        assert_close("merged model", plain(x), wanted)
        if back:
            assert_close("converted model", convert(plain, mask_init=50.0)(x), wanted)

    @rule(file=st.booleans())
    def reload_state(self, file: bool) -> None:
        state = self.model.state_dict()
        if file:
            stream = io.BytesIO()
            torch.save(state, stream)
            stream.seek(0)
            state = torch.load(stream, weights_only=True)
        again = new_model(self.plain.gate)
        if "default" not in self.plain.tasks:
            add_task(again, next(iter(self.plain.tasks)))
            remove_task(again, "default")
        again.load_state_dict(state)
        assert set(tasks(again)) == set(self.plain.tasks)
        x = torch.randn(2, IN)
        for name in self.plain.tasks:
            with torch.no_grad(), using_task(again, name):
                assert_close("reloaded model", again(x), self.plain.forward(x, self.plain.gates(name)))

    @rule()
    def copy(self) -> None:
        self.bank = copy.deepcopy(self.bank)
        self.model = self.bank.model

    @rule(data=st.data())
    def nest_blocks(self, data: st.DataObject) -> None:
        outer, inner, x = self._one(data), self._one(data), torch.randn(2, IN)
        with torch.no_grad(), using_task(self.model, outer):
            with using_task(self.model, inner):
                assert_close("inner block", self.model(x), self.plain.forward(x, self.plain.gates(inner)))
            assert_close("outer block", self.model(x), self.plain.forward(x, self.plain.gates(outer)))

    @rule(data=st.data())
    def run_in_threads(self, data: st.DataObject) -> None:
        jobs = [(self._one(data), torch.randn(2, IN)) for _ in range(4)]
        found: list[Tensor | None] = [None] * len(jobs)

        def run(index: int) -> None:
            found[index] = self._outputs(*jobs[index])

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for output, (name, x) in zip(found, jobs):
            assert output is not None
            assert_close("output in a thread", output, self.plain.forward(x, self.plain.gates(name)))

    @rule(method=st.sampled_from(["one_shot", "binary"]))
    def infer(self, method: str) -> None:
        found = self.bank.infer_task(torch.randn(4, IN), method)
        assert len(found) == 4 and set(found) <= set(self.plain.tasks)

    @rule(name=st.sampled_from(["", None, 3]))
    def refuse_a_name(self, name: object) -> None:
        try:
            self.bank.add_task(name)  # type: ignore[arg-type]  # what is refused
        except (TypeError, ValueError):
            return
        raise AssertionError(f"{name!r} was taken as a name")

    @rule()
    def refuse_an_unknown_task(self) -> None:
        try:
            with using_task(self.model, "nobody"):
                self.model(torch.randn(1, IN))
        except ValueError:
            return
        raise AssertionError("an unknown task ran")

    @invariant()
    def all_tasks_are_right(self) -> None:
        if not hasattr(self, "plain"):
            return
        assert self.bank.tasks == list(self.plain.tasks) and self.bank.slots == self.plain.slots
        x = torch.randn(3, IN)
        for name in list(self.plain.tasks)[-3:]:
            assert self.bank.is_packed(name) == (name in self.plain.packed)
            assert_close(f"task {name!r}", self._outputs(name, x), self.plain.forward(x, self.plain.gates(name)))


def resident_mebibytes() -> float:
    """This process's memory, what the allocator keeps for later given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def growths(calls: int) -> dict[str, float]:
    """The growth of this process's memory in MiB, over ``calls`` calls of each part of the public interface."""
    torch.manual_seed(0)
    model = new_model("sigmoid")
    bank = MaskBank(model)
    for name in ("a", "b", "packed"):
        bank.add_task(name)
    bank.pack("packed")
    x, target = torch.randn(4, IN), torch.randn(4, OUT)
    fused = FusedMaskedSGD(model, lr=1e-4, momentum=MOMENTUM)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-4)
    learner = metamask_ext.meta.MAML(new_model("sigmoid"), inner_lr=0.1, inner_steps=1)
    episode = (x[None], target[None])
    folder = tempfile.TemporaryDirectory()

    def run(task: object) -> None:
        with using_task(model, task):
            model(x)

    def train(step_fused: bool) -> None:
        with using_task(model, "a"):
            loss = F.mse_loss(model(x), target)
            if step_fused:
                fused.backward(loss)
            else:
                loss.backward()
                sgd.step()
                sgd.zero_grad()

    def add_and_remove() -> None:
        bank.add_task("new")
        bank.remove_task("new")

    def superpose() -> None:
        with torch.no_grad(), bank.superpose({"a": 0.5, "packed": 0.5}):
            model(x)

    def save() -> None:
        with torch.no_grad():
            model[0].weight[0, 0] += 1
        bank.save(folder.name)

    parts = {
        "one task": lambda: run("a"),
        "bits": lambda: run("packed"),
        "mixed-task batch": lambda: run(["a", "b", "packed", "a"]),
        "SGD": lambda: train(False),
        "FusedMaskedSGD": lambda: train(True),
        "superpose": superpose,
        "infer_task": lambda: bank.infer_task(x),
        "state_dict": lambda: model.load_state_dict(model.state_dict()),
        "merge": lambda: merge(model, "a"),
        "convert": lambda: convert(nn.Sequential(nn.Linear(IN, OUT))),
        "MAML": lambda: learner(F.mse_loss, episode, episode).backward(),
        "save": save,
        "load": lambda: MaskBank.load(folder.name, new_model("sigmoid")),
        "add and remove": add_and_remove,
    }
    found = {}
    for name, part in parts.items():
        for _ in range(100):  # caches and the allocator's pools fill
            part()
        before = resident_mebibytes()
        for _ in range(calls):
            part()
        found[name] = resident_mebibytes() - before
    folder.cleanup()
    return found
