"""MaskBank.refresh: what others have saved into the folder, and what of this bank they must not replace."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn

from metamask_ext import MaskBank, slots, using_task
from metamask_ext.bank import BankError, Store, save
from metamask_ext.nn import MaskedLinear
from metamask_ext.optim import FusedMaskedSGD


def mlp() -> nn.Sequential:
    return nn.Sequential(MaskedLinear(9, 5), nn.Tanh(), MaskedLinear(5, 3), nn.Linear(3, 2))


def saved(folder, tasks="abc", logits="c", **options) -> MaskBank:
    bank = MaskBank(mlp(), **options)
    for task in tasks:
        bank.add_task(task)
        if task not in logits:
            bank.pack(task)
    bank.remove_task("default")
    bank.save(folder)
    return bank


def two(folder, **options) -> tuple[MaskBank, MaskBank]:
    """A bank that others write with, and one that sees it."""
    other = saved(folder, **options)
    return other, MaskBank.load(folder, mlp())


def same(bank: MaskBank, other: MaskBank) -> None:
    ours, theirs = bank.model.state_dict(), other.model.state_dict()
    assert bank.slots == other.slots and ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert bank.tasks == other.tasks


def unchanged(bank: MaskBank):
    state, by_slot = copy.deepcopy(bank.model.state_dict()), slots(bank.model)

    def check() -> None:
        now = bank.model.state_dict()
        assert now.keys() == state.keys() and all(torch.equal(now[name], state[name]) for name in state)
        assert slots(bank.model) == by_slot

    return check


CHANGES = {
    "nothing": (lambda other: None, []),
    "added bits": (lambda other: (other.add_task("d"), other.pack("d")), ["d"]),
    "added logits": (lambda other: other.add_task("d"), ["d"]),
    "added several": (lambda other: [other.add_task(name) for name in "dEf"] and other.pack("E"), ["d", "E", "f"]),
    "removed bits": (lambda other: other.remove_task("a"), ["a"]),
    "removed logits": (lambda other: other.remove_task("c"), ["c"]),
    "changed bits": (lambda other: other.model[0].masks["b"].zero_(), ["b"]),
    "changed logits": (lambda other: other.model[0].masks["c"].data.add_(1), ["c"]),
    "packed": (lambda other: other.pack("c"), ["c"]),
    "removed and added again": (lambda other: (other.remove_task("a"), other.add_task("a")), ["a"]),
    "all at once": (
        lambda other: (other.remove_task("a"), other.pack("c"), other.add_task("d"), other.model[2].masks["b"].zero_()),
        ["a", "b", "c", "d"],
    ),
    "all replaced": (lambda other: [(other.add_task(name.upper()), other.remove_task(name)) for name in "abc"], list("abcABC")),
    "added and removed": (lambda other: (other.add_task("d"), other.remove_task("d"), other.add_task("e")), ["e"]),
}


@pytest.mark.parametrize("used", ["none", "some", "all"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_model_is_then_what_the_folder_holds(tmp_path, change, used):
    other, bank = two(tmp_path)
    act, expected = CHANGES[change]
    if used != "none":
        with using_task(bank.model, ["a", "b"] if used == "some" else ["a", "b", "c"]):
            (bank.model if used == "all" else bank.model[0])(torch.ones(2 if used == "some" else 3, 9))
    act(other)
    other.save(tmp_path)
    assert sorted(bank.refresh()) == sorted(expected)
    assert bank.refresh() == []
    same(bank, other)
    x = torch.randn(len(bank.tasks), 9)
    with using_task(bank.model, bank.tasks), using_task(other.model, bank.tasks):
        torch.testing.assert_close(bank.model(x), other.model(x), rtol=0, atol=0)
    bank.add_task("later")
    bank.save(tmp_path)  # it has seen the folder's state
    bank.verify()
    same(MaskBank.load(tmp_path, mlp()), bank)


def test_several_times_in_turns(tmp_path):
    first, second = two(tmp_path)
    for number, (writer, reader) in enumerate([(first, second), (second, first)] * 3):
        writer.add_task(f"task {number}")
        writer.pack(f"task {number}")
        writer.save(tmp_path)
        assert reader.refresh() == [f"task {number}"]
        same(reader, writer)


def test_with_a_bound_and_pins(tmp_path):
    other = saved(tmp_path)
    bank = MaskBank.load(tmp_path, mlp(), max_resident=1, pin="b")
    other.model[0].masks["b"].zero_()
    other.add_task("d"), other.pack("d")
    other.save(tmp_path)
    assert bank.refresh() == ["b", "d"]
    assert "b" not in bank.model[0].masks._waiting and not bank.model[0].masks["b"].any()
    for names in ("a", "d", "b", "a"):
        with using_task(bank.model, names):
            bank.model(torch.ones(1, 9))
    same(bank, other)


def test_optimisers_hold_logits_that_are_filled_in_place(tmp_path):
    other, bank = two(tmp_path)
    optimizer = FusedMaskedSGD(bank.model, 0.1)
    before = bank.model[0].masks["c"]
    with torch.no_grad():
        other.model[0].masks["c"].add_(1.0)
    other.save(tmp_path)
    assert bank.refresh() == ["c"]
    assert bank.model[0].masks["c"] is before and torch.equal(before, other.model[0].masks["c"])
    with using_task(bank.model, "c"):
        optimizer.backward(bank.model(torch.ones(1, 9)).sum())
    assert not torch.equal(before, other.model[0].masks["c"])


def test_tasks_of_its_own_that_nobody_else_touched_stay(tmp_path):
    other, bank = two(tmp_path)
    with torch.no_grad():
        bank.model[0].masks["c"].add_(1.0)
    trained = bank.model[0].masks["c"].detach().clone()
    other.model[0].masks["b"].zero_()
    other.save(tmp_path)
    assert bank.refresh() == ["b"]
    assert torch.equal(bank.model[0].masks["c"], trained) and not bank.model[0].masks["b"].any()
    bank.add_task("own")
    other.model[0].masks["a"].zero_()
    other.save(tmp_path)
    assert bank.refresh() == ["a"] and bank.tasks == ["a", "b", "c", "own"]
    bank.save(tmp_path)
    assert other.refresh() == ["c", "own"]
    same(other, bank)


class TestRefused:
    """Before anything has changed."""

    def check(self, bank, match):
        check = unchanged(bank)
        for _ in range(2):
            with pytest.raises(BankError, match=match):
                bank.refresh()
            check()

    @pytest.mark.parametrize("theirs", ["changed", "removed"])
    @pytest.mark.parametrize("task", ["b", "c"])
    def test_a_task_that_both_have_changed(self, tmp_path, task, theirs):
        other, bank = two(tmp_path)
        with torch.no_grad():
            bank.model[0].masks[task].fill_(1)
            other.model[0].masks[task].fill_(0)
        if theirs == "removed":
            other.remove_task(task)
        other.save(tmp_path)
        self.check(bank, f"changed or removed '{task}', and so has this bank")
        bank.save(tmp_path, overwrite=True)
        same(MaskBank.load(tmp_path, mlp()), bank)

    def test_a_task_that_was_removed_here_and_changed_there(self, tmp_path):
        other, bank = two(tmp_path)
        bank.remove_task("b")
        other.model[0].masks["b"].zero_()
        other.save(tmp_path)
        self.check(bank, "changed or removed 'b', and so has this bank")

    def test_slots_that_both_have_given_out(self, tmp_path):
        other, bank = two(tmp_path)
        bank.add_task("mine")
        other.add_task("theirs")
        other.save(tmp_path)
        self.check(bank, "added 'theirs' in slots .* 'mine' of this bank were never saved")
        bank.remove_task("mine")  # whoever has its number must not get theirs
        self.check(bank, "added 'theirs' in slots .* had others there")

    def test_one_name_that_both_have_added(self, tmp_path):
        other, bank = two(tmp_path)
        bank.add_task("x")
        other.add_task("y"), other.remove_task("y"), other.add_task("x")
        other.save(tmp_path)
        self.check(bank, "added 'x'")

    def test_other_weights_settings_and_no_bank(self, tmp_path):
        other, bank = two(tmp_path)
        store = Store.open(tmp_path)
        other.model[0].temperature = 0.5
        other.save(tmp_path)
        self.check(bank, r"other settings \(meta\)")
        other.model[0].temperature = 1.0
        with torch.no_grad():
            other.model[0].weight.add_(1.0)
        other.save(tmp_path)
        self.check(bank, "other shared weights")
        save(tmp_path, store.meta, other.model.state_dict(), [])
        self.check(bank, "other shared weights")
        (tmp_path / "bank.json").unlink()
        self.check(bank, "no bank here")
        (tmp_path / "bank.json").write_bytes(b"?")
        self.check(bank, "damaged")
        with pytest.raises(RuntimeError, match="no folder to refresh from"):
            MaskBank(mlp()).refresh()

    def test_a_new_task_that_is_damaged(self, tmp_path):
        other, bank = two(tmp_path)
        other.add_task("d")
        other.save(tmp_path)
        (path,) = tmp_path.glob("tasks/d-*")
        path.write_bytes(b"?")
        self.check(bank, "damaged")


def test_per_task_heads(tmp_path):
    other = saved(tmp_path, per_task="3.*")
    bank = MaskBank.load(tmp_path, mlp())
    head = bank.model[3].per_task["weight"]["a"]
    other.add_task("d"), other.pack("d")
    with torch.no_grad(), using_task(other.model, "a"):
        other.model[3].weight.fill_(2.0)
    other.save(tmp_path)
    assert bank.refresh() == ["a", "d"]
    same(bank, other)
    assert bank.model[3].per_task["weight"]["a"] is head


def test_metrics_alone(tmp_path):
    other, bank = two(tmp_path)
    store = Store.open(tmp_path)
    tasks = [
        None if name is None else (name, (store.exactly(name), {"packed": name != "c", "accuracy": 0.5})) for name in store.tasks
    ]
    save(tmp_path, store.meta, store.shared(), tasks)
    assert bank.refresh() == ["a", "b", "c"]
    same(bank, other)


def test_an_interruption_amid_the_layers_ends_in_one_state(tmp_path, monkeypatch):
    from metamask_ext.nn.task_dict import TaskDict

    other, bank = two(tmp_path)
    other.remove_task("a"), other.add_task("d"), other.pack("d"), other.pack("c")
    other.save(tmp_path)
    calls = iter(range(100))
    real = TaskDict._expect

    def interrupted(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(TaskDict, "_expect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bank.refresh()
    same(bank, other)


def test_nothing_new_takes_no_time(tmp_path):
    bank = saved(tmp_path, tasks=[f"task {number}" for number in range(300)], logits=())
    bank = MaskBank.load(tmp_path, mlp())
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        assert bank.refresh() == []
        took.append(time.perf_counter() - begin)
    assert min(took) < 0.010
