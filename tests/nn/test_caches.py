"""Caches of modules (docs/internals/caches.md): never stale, right in several threads. Those of the bank: tests/bank."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.streams import Recorder
from torch import nn

import metamask_ext as mm
from metamask_ext import MaskBank, convert, using_task
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedLinear, TaskBatchNorm2d
from metamask_ext.nn.names import escape, unescape
from metamask_ext.nn.per_task import per_task_type
from metamask_ext.nn.read_through import ReadThroughLinear
from metamask_ext.nn.selection import TaskBatch


def together(*functions: Callable[[], object]) -> None:
    """Run all at once; the first error of any is raised."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(functions))

    def guarded(function: Callable[[], object]) -> None:
        barrier.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def model_of(tasks="abc"):
    model = nn.Sequential(MaskedLinear(6, 5), nn.Tanh(), MaskedLinear(5, 3)).double()
    for task in tasks:
        mm.add_task(model, task)
    return model


def alone(model, x, names):
    rows = []
    for row, name in zip(x, names):
        with using_task(model, name):
            rows.append(model(row[None]))
    return torch.cat(rows)


class TestABlockThatIsEnteredAgain:
    """TaskBatch keeps positions, groups and splits by device, for names that do not change."""

    def test_after_tasks_were_packed_unpacked_removed_and_added(self):
        model, names, x = model_of(), ["b", "a", "c", "a", "b"], torch.randn(5, 6, dtype=torch.float64)
        block, bank, state = using_task(model, names), MaskBank(model), model_of("abc").state_dict()
        for change in (
            lambda: None,
            lambda: bank.pack("a"),
            lambda: bank.pack("c"),
            lambda: model.load_state_dict(state),
            lambda: (bank.remove_task("b"), bank.add_task("d"), bank.add_task("b")),
            lambda: bank.pack("b"),
        ):
            change()
            with block:
                got = model(x)
            torch.testing.assert_close(got, alone(model, x, names))
        bank.remove_task("a")
        with pytest.raises((RuntimeError, ValueError), match="removed|must be one of"), block:
            model(x)

    def test_first_under_inference_mode_then_to_train(self):
        class Norm(nn.Sequential):
            pass

        model = Norm(mm.nn.MaskedConv2d(1, 3, 3), TaskBatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 16, 2))
        bank = MaskBank(model, per_task="3.*")
        bank.add_task("a"), bank.add_task("b"), bank.pack("a")
        x = torch.randn(6, 1, 6, 6)
        names = ["a", "b", "default"] * 2
        block = using_task(model, names)
        with torch.inference_mode():
            inside = using_task(model, names)
            for each in (block, inside):
                with each:
                    model(x)
        for each in (block, inside):
            with each:
                model(x).square().sum().backward()
        assert model[0].masks["b"].grad is not None

    def test_by_many_threads_at_once(self):
        model, names, x = model_of("abcdefgh"), list("hgfedcbaabcdefgh"), torch.randn(16, 6, dtype=torch.float64)
        bank = MaskBank(model)
        for task in "aceg":
            bank.pack(task)
        wanted = alone(model, x, names).detach()
        for _ in range(5):
            block = using_task(model, names)

            def run(block=block):
                with torch.no_grad(), block:
                    torch.testing.assert_close(model(x), wanted)

            together(*[run] * 6)

    def test_what_is_kept_is_right_for_every_device(self):
        batch = TaskBatch(["b", "a", "b"])
        cpu = torch.device("cpu")
        kept = batch.positions(cpu), batch.groups(cpu), batch.split((True, False), cpu)
        assert batch.positions(torch.device("meta")).device.type == "meta"
        assert batch.positions(cpu) is kept[0] and kept[0].tolist() == [0, 1, 0]
        assert batch.split((False, True), cpu)[0].tolist() == [1] and batch.split((True, False), cpu)[0].tolist() == [0, 2]
        assert [rows.tolist() for rows in batch.groups(cpu)[0]] == [[0, 2], [1]]


class TestMetaLearner:
    def maml(self):
        return MAML(model_of(""), 0.1)

    def run(self, maml, tasks, shots):
        torch.manual_seed(tasks * 100 + shots)
        x, y = torch.randn(tasks, shots, 6, dtype=torch.float64), torch.randn(tasks, shots, 3, dtype=torch.float64)
        return maml.predict(maml.adapt(F.mse_loss, (x, y)), x).detach()

    def test_sizes_that_change(self):
        """It keeps which sample is of which task, for the sizes of the last call."""
        maml = self.maml()
        for tasks, shots in ((3, 4), (4, 3), (3, 4), (1, 12), (12, 1)):
            got = self.run(maml, tasks, shots)
            fresh = MAML(maml.model, 0.1)
            torch.testing.assert_close(got, self.run(fresh, tasks, shots))

    def test_first_under_inference_mode(self):
        maml = self.maml()
        x, y = torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(3, 4, 3, dtype=torch.float64)
        with torch.inference_mode():
            assert maml._adapted._slots_of(3, 4, x.device).tolist() == [0] * 4 + [1] * 4 + [2] * 4
        maml(F.mse_loss, (x, y), (x, y)).backward()
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in maml.model.parameters())

    def test_another_stream_makes_its_own(self, monkeypatch):
        """On a GPU they may not be written yet, on the stream that makes them."""
        stream = Recorder(monkeypatch, [])
        adapted, device = self.maml()._adapted, torch.device("cpu")
        first = adapted._slots_of(3, 4, device)
        assert adapted._slots_of(3, 4, device) is first
        stream.here = "B"
        other = adapted._slots_of(3, 4, device)
        assert other is not first and other.tolist() == first.tolist()

    def test_sizes_of_several_threads(self):
        maml = self.maml()
        sizes = [(3, 4), (4, 3), (2, 6), (6, 2)]
        device = torch.device("cpu")
        wanted = {size: MAML(maml.model, 0.1)._adapted._slots_of(*size, device).tolist() for size in sizes}

        def run(size):
            for _ in range(300):
                assert maml._adapted._slots_of(*size, device).tolist() == wanted[size]

        together(*[lambda size=size: run(size) for size in sizes])


class _Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.project(x)

    def project(self, x):
        return self.fc(x)


def test_convert_sees_a_method_that_was_replaced(monkeypatch):
    assert type(convert(_Reads()).fc) is MaskedLinear
    monkeypatch.setattr(_Reads, "project", lambda self, x: F.linear(x, self.fc.weight))
    assert type(convert(_Reads()).fc) is ReadThroughLinear
    monkeypatch.undo()
    assert type(convert(_Reads()).fc) is MaskedLinear


def test_names_and_classes_by_many_threads():
    """Each is computed from its key alone, so that whoever comes first does not matter."""
    names = [f"{index}.ä" for index in range(500)]
    kinds = [type(f"Own{index}", (nn.Linear,), {}) for index in range(20)]
    found = []

    def run():
        assert [unescape(escape(name)) for name in names] == names
        found.append([per_task_type(kind) for kind in kinds])

    together(*[run] * 6)
    assert all(each == found[0] for each in found)
    assert [per_task_type(kind).plain_type for kind in kinds] == kinds
