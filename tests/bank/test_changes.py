"""A bank saves what has changed, however it was changed, and undoes nobody's save unasked."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter

import pytest
import torch
from support.bank_changes import CHANGES, INPUT, assert_same_values, net, new_bank, tensor_of, values
from support.paths import TESTS

from metamask_ext import MaskBank, using_task
from metamask_ext.bank import BankError, Store, save

each_change = pytest.mark.parametrize("change", CHANGES)
KEYS = {
    "bits of a convolution": "0.masks.a",
    "bits of a bias": "4.bias_masks.b",
    "bits with padding": "4.masks.a",
    "logits": "4.masks.c",
    "a packed task's running mean": "1.per_task.running_mean.a",
    "a packed task's scale": "1.per_task.weight.b",
    "a count": "1.per_task.num_batches_tracked.a",
    "shared weights": "0.weight",
}


def load(folder):
    return MaskBank.load(folder, net().eval())


def inodes(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*.safetensors")}


class TestWhatChanged:
    @pytest.mark.parametrize("loaded", [False, True], ids=["made", "loaded"])
    @pytest.mark.parametrize("key", KEYS.values(), ids=list(KEYS))
    @each_change
    def test_is_saved(self, tmp_path, change, key, loaded):
        bank = new_bank()
        bank.save(tmp_path)
        bank = load(tmp_path) if loaded else bank
        before = values(bank.model)
        CHANGES[change](bank.model, key, tensor_of(bank.model, key))
        changed = [name for name, value in values(bank.model).items() if not torch.equal(value, before[name])]
        assert changed == [key]
        bank.save(tmp_path)
        assert_same_values(load(tmp_path).model, bank.model)
        bank.verify()

    @each_change
    def test_a_second_change_back_is_saved_too(self, tmp_path, change):
        bank = new_bank()
        bank.save(tmp_path)
        first = values(bank.model)
        CHANGES[change](bank.model, "4.masks.a", tensor_of(bank.model, "4.masks.a"))
        bank.save(tmp_path)
        bank.model.load_state_dict(first)
        bank.save(tmp_path)
        assert_same_values(load(tmp_path).model, bank.model)

    def test_the_bits_of_two_tasks_that_change_places(self, tmp_path):
        bank = new_bank()
        bank.save(tmp_path)
        for layer in (bank.model[0], bank.model[4]):
            a, b = layer.masks["a"].clone(), layer.masks["b"].clone()
            layer.masks["a"].copy_(b), layer.masks["b"].copy_(a)
        bank.save(tmp_path)
        assert_same_values(load(tmp_path).model, bank.model)

    def test_is_written_and_nothing_else(self, tmp_path):
        bank = new_bank()
        bank.save(tmp_path)
        before = inodes(tmp_path)
        bank.save(tmp_path)
        assert inodes(tmp_path) == before
        bank.model[4].masks["a"].data ^= 1
        bank.save(tmp_path)
        after = inodes(tmp_path)
        assert len(after) == len(before) and len(after.items() & before.items()) == len(before) - 1

    def test_through_another_bank_of_the_model(self, tmp_path):
        one = new_bank()
        two = MaskBank(one.model)
        one.save(tmp_path / "one"), two.save(tmp_path / "two")
        two.model[4].masks["b"].data ^= 1
        one.save(tmp_path / "one"), two.save(tmp_path / "two")
        for folder in ("one", "two"):
            assert_same_values(load(tmp_path / folder).model, one.model)

    def test_tasks_that_were_repacked_removed_added_and_renumbered(self, tmp_path):
        bank = new_bank()
        bank.save(tmp_path)
        bank.model[4].masks["a"] = torch.nn.Parameter(torch.randn(5, 48))  # logits again
        bank.model[4].bias_masks["a"] = torch.nn.Parameter(torch.randn(5))
        bank.save(tmp_path)
        assert not load(tmp_path).is_packed("a")
        assert_same_values(load(tmp_path).model, bank.model)
        bank.pack("a"), bank.pack("c"), bank.remove_task("b"), bank.add_task("b")
        bank.save(tmp_path)
        again = load(tmp_path)
        assert again.slots == bank.slots and [again.is_packed(task) for task in again.tasks] == [True, True, False]
        assert_same_values(again.model, bank.model)

    def test_while_some_layers_still_wait(self, tmp_path):
        new_bank().save(tmp_path)
        bank = load(tmp_path)
        bank.model[4].masks["a"].data ^= 1  # the convolution's stay in the file
        assert "a" in bank.model[0].masks._waiting
        bank.save(tmp_path)
        assert_same_values(load(tmp_path).model, bank.model)

    def test_a_part_of_a_model_that_waits_is_saved_as_that_part(self, tmp_path):
        new_bank().save(tmp_path / "whole")
        bank = load(tmp_path / "whole")
        part = MaskBank(bank.model[:4])
        part.save(tmp_path / "part")
        store = Store.open(tmp_path / "part")
        assert {key.split("/")[1].split(".")[0] for key in store.task("a")} == {"0", "1"}
        assert_same_values(MaskBank.load(tmp_path / "part", net()[:4]).model, bank.model[:4])

    def test_the_export_of_nan_is_refused(self, tmp_path):
        from metamask_ext.bank.export import task_state

        bank = new_bank()
        with torch.no_grad():
            bank.model[4].masks["c"][0, 0] = torch.nan
        bank.save(tmp_path)  # as it is: a checkpoint of a training that diverged
        with pytest.raises(BankError, match=r"4.weight: .* NaN"):
            task_state(Store.open(tmp_path), "c")


class TestUnseenSaves:
    def test_two_banks_of_one_folder(self, tmp_path):
        new_bank().save(tmp_path)
        one, two = load(tmp_path), load(tmp_path)
        one.add_task("r"), one.save(tmp_path)
        two.add_task("s")
        before = inodes(tmp_path)
        with pytest.raises(BankError, match="holds commit 1, which this bank has not seen"):
            two.save(tmp_path)
        assert inodes(tmp_path) == before and load(tmp_path).tasks == ["a", "b", "c", "r"]
        two.save(tmp_path, overwrite=True)
        assert load(tmp_path).tasks == ["a", "b", "c", "s"]
        with pytest.raises(BankError, match="not seen"):
            one.save(tmp_path)
        two.add_task("t"), two.save(tmp_path), two.save(tmp_path)
        assert load(tmp_path).tasks == ["a", "b", "c", "s", "t"]
        load(tmp_path).verify()

    def test_a_bank_that_was_never_there(self, tmp_path):
        new_bank().save(tmp_path)
        stranger = new_bank("xyz", "x")
        with pytest.raises(BankError, match="overwrite=True"):
            stranger.save(tmp_path)
        assert load(tmp_path).tasks == ["a", "b", "c"]
        stranger.save(tmp_path, overwrite=True)
        stranger.add_task("w"), stranger.save(tmp_path)
        assert load(tmp_path).tasks == ["x", "y", "z", "w"]

    def test_the_state_matters_not_the_number(self, tmp_path):
        """Two first saves have the same number."""
        one, two = new_bank("ab", ""), new_bank("xy", "")
        one.save(tmp_path)
        for path in tmp_path.glob("bank.json"):
            path.unlink()
        two.save(tmp_path)
        with pytest.raises(BankError, match="holds commit 0, which"):
            one.save(tmp_path)

    def test_what_was_seen(self, tmp_path):
        """Missing and empty folders, several folders in turn, copies of folders and of banks, links, the same save again."""
        bank = new_bank()
        (tmp_path / "two").mkdir()
        for folder in ("one", "two", "one", "two", "one"):
            bank.save(tmp_path / folder)
        os.symlink(tmp_path / "one", tmp_path / "link")
        bank.save(str(tmp_path / "link"))
        bank.save(tmp_path / "one")
        subprocess.run(["cp", "-r", tmp_path / "one", tmp_path / "copy"], check=True)
        bank.save(tmp_path / "copy")
        twin = copy.deepcopy(bank)
        twin.add_task("t"), twin.save(tmp_path / "one")
        with pytest.raises(BankError, match="not seen"):
            bank.save(tmp_path / "one")
        for path in sorted((tmp_path / "two").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        bank.save(tmp_path / "two")
        assert load(tmp_path / "two").tasks == ["a", "b", "c"] and load(tmp_path / "one").tasks == ["a", "b", "c", "t"]

    def test_overwriting_with_tasks_that_still_wait_in_the_folder(self, tmp_path):
        new_bank().save(tmp_path)
        one, two = load(tmp_path), load(tmp_path)
        wanted = values(load(tmp_path).model)
        two.remove_task("c"), two.save(tmp_path)
        one.save(tmp_path, overwrite=True)
        got = values(load(tmp_path).model)
        assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in got)
        three = load(tmp_path)
        one.remove_task("a"), one.save(tmp_path)
        with pytest.raises(BankError, match="task 'a' is no longer in slot 1"):
            three.save(tmp_path, overwrite=True)
        assert load(tmp_path).tasks == ["b", "c"]

    def test_a_failed_save_has_seen_nothing(self, tmp_path):
        bank, other_bank = new_bank(), new_bank("x", "")
        other_bank.save(tmp_path)
        for _ in range(2):
            with pytest.raises(BankError, match="not seen"):
                bank.save(tmp_path)
        bank.model.register_buffer("complex", torch.zeros(1, dtype=torch.complex128))
        with pytest.raises(TypeError, match="safetensors"):
            bank.save(tmp_path, overwrite=True)
        del bank.model.complex
        with pytest.raises(BankError, match="not seen"):
            bank.save(tmp_path)
        assert load(tmp_path).tasks == ["x"]

    def test_the_function_compares_under_the_lock_of_its_commit(self, tmp_path):
        store = save(tmp_path, {}, {}, [])
        newer = save(tmp_path, {}, {}, [None], seen={store.state})
        with pytest.raises(BankError, match="commit 1"):
            save(tmp_path, {}, {}, [], seen={store.state})
        save(tmp_path, {}, {}, [], seen={store.state, newer.state})
        with pytest.raises(BankError, match="commit 2"):
            save(tmp_path, {}, {}, [], seen=())
        save(tmp_path, {}, {}, [])

    def test_two_processes_lose_no_task(self, tmp_path):
        """Each adds tasks, and loads again where it is refused."""
        new_bank("a", "").save(tmp_path)
        program = """
import sys, torch
from support.bank_changes import net
from metamask_ext import MaskBank
from metamask_ext.bank import BankError
torch.set_num_threads(1)
refused = 0
for number in range(8):
    while True:
        bank = MaskBank.load(sys.argv[1], net())
        bank.add_task(sys.argv[2] + str(number))
        try:
            bank.save(sys.argv[1])
            break
        except BankError as error:
            assert "not seen" in str(error) or "another process is writing" in str(error), error
            refused += 1
print(refused)
"""
        children = [
            subprocess.Popen([sys.executable, "-c", program, tmp_path, name], cwd=TESTS, stdout=subprocess.PIPE, text=True)
            for name in "pq"
        ]
        assert [child.wait(120) for child in children] == [0, 0]
        assert sorted(load(tmp_path).tasks) == sorted(["a", *(f"{name}{number}" for name in "pq" for number in range(8))])


class TestThreads:
    def run(self, *functions):
        """Run all at once; return their errors."""
        errors, barrier = [], threading.Barrier(len(functions))

        def guarded(function):
            barrier.wait()
            try:
                function()
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return errors

    def test_saves_while_others_add_pack_use_and_remove_tasks(self, tmp_path):
        bank = new_bank()
        bank.save(tmp_path)
        done = threading.Event()
        states = []

        def change(letter):
            def run():
                for number in range(25):
                    bank.add_task(f"{letter}{number}")
                    bank.pack(f"{letter}{number}")
                    if number % 2:
                        bank.remove_task(f"{letter}{number - 1}")

            return run

        def use():
            while not done.is_set():
                with torch.no_grad(), using_task(bank.model, ["a", "b", "c"]):
                    bank.model(torch.randn(3, *INPUT))

        def keep():
            try:
                for _ in range(20):
                    bank.save(tmp_path)
                    loaded = load(tmp_path)
                    assert loaded.tasks[:3] == ["a", "b", "c"]
                    loaded.verify()
                    states.append(len(loaded.tasks))
            finally:
                done.set()

        assert self.run(keep, use, change("x"), change("y")) == []
        assert len(states) == 20
        bank.save(tmp_path)
        assert_same_values(load(tmp_path).model, bank.model)

    def test_one_bank_saved_by_several_threads(self, tmp_path):
        bank = new_bank()
        assert self.run(*[lambda: [bank.save(tmp_path) for _ in range(10)]] * 4) == []
        assert_same_values(load(tmp_path).model, bank.model)

    def test_several_banks_of_one_folder_are_refused_in_words(self, tmp_path):
        new_bank().save(tmp_path)
        counts = Counter()

        def append(letter):
            def run():
                for number in range(8):
                    while True:
                        bank = load(tmp_path)
                        bank.add_task(f"{letter}{number}")
                        try:
                            bank.save(tmp_path)
                            break
                        except BankError as error:
                            assert "not seen" in str(error) or "another process is writing" in str(error), error
                            counts["refused"] += 1

            return run

        assert self.run(append("p"), append("q")) == []
        assert sorted(load(tmp_path).tasks[3:]) == sorted(f"{letter}{number}" for letter in "pq" for number in range(8))

    def test_a_task_fetched_by_many_threads_is_one_tensor(self, tmp_path):
        new_bank("abcdefgh", "abcdefgh").save(tmp_path)
        for _ in range(5):
            bank = load(tmp_path)
            found = []
            assert (
                self.run(*[lambda found=found, bank=bank: found.append([bank.model[4].masks[task] for task in bank.tasks])] * 6)
                == []
            )
            assert all(one is first for each in found for one, first in zip(each, found[0], strict=True))

    def test_a_task_removed_while_it_is_fetched_leaves_nothing(self, tmp_path):
        new_bank("abcdefgh", "abcdefgh").save(tmp_path)
        for _ in range(5):
            bank = load(tmp_path)

            def fetch(bank=bank):
                for task in "abcdefg":
                    try:
                        bank.model[4].masks[task]
                    except (KeyError, RuntimeError) as error:
                        assert isinstance(error, KeyError) or "removed" in str(error)

            assert self.run(fetch, fetch, lambda bank=bank: [bank.remove_task(task) for task in "abcdefg"]) == []
            assert (
                bank.tasks == ["h"]
                and [name for name in bank.model.state_dict() if name.endswith(tuple(f".{task}" for task in "abcdefg"))] == []
            )


def test_a_forked_process_does_not_wait_for_the_lock_of_another_thread():
    """The thread that holds it does not exist there."""
    program = """
import os, sys, threading
from support.bank_changes import new_bank
from metamask_ext.nn.structure import structure
bank, held, done = new_bank(), threading.Event(), threading.Event()
def hold():
    with structure():
        held.set(), done.wait()
thread = threading.Thread(target=hold)
thread.start(), held.wait()
child = os.fork()
if child == 0:
    bank.add_task("z"), bank.pack("z")
    os._exit(7)
done.set(), thread.join()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=TESTS, timeout=60).returncode == 7


def test_a_bank_is_copied_and_pickled_with_what_it_has_seen(tmp_path):
    bank = new_bank()
    bank.save(tmp_path)
    bank.infer_task(torch.randn(2, *INPUT))
    loaded = load(tmp_path)
    loaded.model.state_dict()  # no task waits any more
    for twin in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert_same_values(twin.model, bank.model)
        x = torch.randn(2, *INPUT)
        assert twin.infer_task(x) == bank.infer_task(x)
    twin.add_task("t"), twin.save(tmp_path)
    assert load(tmp_path).tasks[-1] == "t"
