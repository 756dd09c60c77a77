"""Banks of which a part is in memory: tasks that leave it and come back, pinned ones, and those read in the background."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from metamask_ext import MaskBank, using_task
from metamask_ext.bank import BankError
from metamask_ext.bank import mappings as mappings_module
from metamask_ext.nn import MaskedLinear, TaskBatchNorm2d

TASKS = "abcdef"


def mlp() -> nn.Sequential:
    return nn.Sequential(MaskedLinear(9, 5), nn.Tanh(), MaskedLinear(5, 3))


def saved(folder, tasks: Iterable[str] = TASKS, logits: Iterable[str] = ()) -> MaskBank:
    bank = MaskBank(mlp())
    for task in tasks:
        bank.add_task(task)
        if task not in logits:
            bank.pack(task)
    bank.remove_task("default")
    bank.save(folder)
    return bank


def resident(model: nn.Module) -> set[str]:
    """The tasks of which any layer has a tensor in memory."""
    dicts = [tensors for layer in model.modules() if isinstance(layer, MaskedLinear) for tensors in layer._dicts().values()]
    return {name for tensors in dicts for name in tensors if name not in tensors._waiting}


def run(bank: MaskBank, names: str | list[str], x: Tensor | None = None) -> Tensor:
    names = [*names]
    with torch.no_grad(), using_task(bank.model, names):
        return bank.model(torch.ones(len(names), 9) if x is None else x)


class TestLeaving:
    def test_the_tasks_used_longest_ago_leave(self, tmp_path):
        saved(tmp_path)
        bank = MaskBank.load(tmp_path, mlp(), max_resident=3)
        for names, expected in (("ab", "ab"), ("c", "abc"), ("a", "abc"), ("d", "acd"), ("ef", "def"), ("d", "def"), ("a", "adf")):
            run(bank, names)
            assert resident(bank.model) == set(expected), names
        assert bank.tasks == list(TASKS) and bank.slots == [None, *TASKS]

    def test_what_left_computes_the_same_when_it_comes_back(self, tmp_path):
        whole = saved(tmp_path)
        bank = MaskBank.load(tmp_path, mlp(), max_resident=1)
        x = torch.randn(4, 9)
        for names in ("abcd", "dcba", "eeff", "aaaa", "fbfb"):
            torch.testing.assert_close(run(bank, names, x), run(whole, names, x), rtol=0, atol=0)
        for name in TASKS:
            with torch.no_grad(), using_task(bank.model, name), using_task(whole.model, name):
                torch.testing.assert_close(bank.model(x), whole.model(x), rtol=0, atol=0)
        assert resident(bank.model) == {"f"}

    def test_a_block_of_more_tasks_than_may_stay_has_all_of_them_while_it_runs(self, tmp_path):
        whole = saved(tmp_path)
        bank = MaskBank.load(tmp_path, mlp(), max_resident=2)
        x = torch.randn(6, 9)
        torch.testing.assert_close(run(bank, TASKS, x), run(whole, TASKS, x), rtol=0, atol=0)
        assert resident(bank.model) == set(TASKS)
        run(bank, "a")
        assert len(resident(bank.model)) == 2
        zero = MaskBank.load(tmp_path, mlp(), max_resident=0)
        run(zero, "ab")
        run(zero, "c")
        assert resident(zero.model) == {"c"}

    def test_their_memory_is_given_back(self, tmp_path):
        saved(tmp_path)
        bank = MaskBank.load(tmp_path, mlp(), max_resident=1)
        run(bank, "a")
        gone = weakref.ref(bank.model[0].masks["a"])
        run(bank, "b")
        gc.collect()
        assert gone() is None

    def test_mapped_files_are_as_many(self, tmp_path, monkeypatch):
        monkeypatch.setattr(mappings_module, "COPIED", 0)
        whole = saved(tmp_path)
        bank = MaskBank.load(tmp_path, mlp(), max_resident=2)
        for names in ("ab", "cd", "ef", "ab"):
            torch.testing.assert_close(run(bank, names), run(whole, names), rtol=0, atol=0)
        with open("/proc/self/maps") as maps:
            assert sum(str(tmp_path) in line for line in maps) <= 2

    def test_pinned_ones_are_read_at_once_and_stay(self, tmp_path):
        saved(tmp_path)
        bank = MaskBank.load(tmp_path, mlp(), max_resident=1, pin=("b", "e"))
        assert resident(bank.model) == {"b", "e"}
        for names in ("a", "c", "b", "d"):
            run(bank, names)
        assert resident(bank.model) == {"b", "e", "d"}
        assert resident(MaskBank.load(tmp_path, mlp(), pin="c").model) == {"c"}

    def test_state_dicts_and_copies_have_every_task(self, tmp_path):
        whole = saved(tmp_path)
        bank = MaskBank.load(tmp_path, mlp(), max_resident=1)
        run(bank, "a")
        wanted = whole.model.state_dict()
        for state in (bank.model.state_dict(), copy.deepcopy(bank.model).state_dict()):
            assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)
        run(bank, "b")
        assert resident(bank.model) == {"b"}
        assert bank.infer_task(torch.ones(2, 9)) == whole.infer_task(torch.ones(2, 9))

    def test_a_copy_keeps_what_it_uses_and_leaves_the_original_alone(self, tmp_path):
        saved(tmp_path)
        bank = MaskBank.load(tmp_path, mlp(), max_resident=1)
        run(bank, "a")
        twin = copy.deepcopy(bank.model)
        for name in "bc":
            with using_task(twin, name):
                twin(torch.ones(1, 9))
        assert resident(twin) == set("abc") and resident(bank.model) == {"a"}
        twin.state_dict()
        pickle.loads(pickle.dumps(twin))

    def test_after_the_model_moved_they_come_back_where_it_is(self, tmp_path):
        whole = saved(tmp_path)
        bank = MaskBank.load(tmp_path, mlp(), max_resident=1)
        bank.model.to("meta")
        run(bank, "a", torch.ones(1, 9, device="meta"))
        run(bank, "b", torch.ones(1, 9, device="meta"))
        assert {tensor.device.type for tensor in bank.model.state_dict().values() if tensor.dtype == torch.uint8} == {"meta"}
        other = MaskBank.load(tmp_path, mlp(), max_resident=1)
        other.model.double(), whole.model.double()
        for names in ("ab", "c", "ab"):
            x = torch.randn(len(names), 9, dtype=torch.float64)
            torch.testing.assert_close(run(other, names, x), run(whole, names, x), rtol=0, atol=0)

    def test_gradients_through_a_task_that_has_left_meanwhile(self, tmp_path):
        whole = saved(tmp_path)
        bank = MaskBank.load(tmp_path, mlp(), max_resident=1)
        x = torch.randn(2, 9)
        grads = []
        for each in (bank, whole):
            with using_task(each.model, ["a", "b"]):
                y = each.model(x)
            run(each, "cd")
            y.square().sum().backward()
            grads.append([parameter.grad for parameter in each.model.parameters()])
        for ours, theirs in zip(*grads):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    def test_several_threads(self, tmp_path):
        whole = saved(tmp_path)
        bank = MaskBank.load(tmp_path, mlp(), max_resident=1)
        x = torch.randn(3, 9)
        wanted = {names: run(whole, names, x) for names in ("abc", "def", "fab", "cde")}
        failures: list[BaseException] = []

        def serve(names):
            try:
                for _ in range(30):
                    torch.testing.assert_close(run(bank, names, x), wanted[names], rtol=0, atol=0)
                    bank.model.state_dict()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=serve, args=(names,)) for names in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]


class TestStaying:
    """Tasks that are in no file stay in memory, whatever the bound."""

    def bank(self, folder, **options) -> MaskBank:
        saved(folder, logits="c")
        return MaskBank.load(folder, mlp(), max_resident=1, **options)

    def test_logits(self, tmp_path):
        bank = self.bank(tmp_path)
        for name in TASKS:
            run(bank, name)
        assert resident(bank.model) == {"c", "f"}

    @pytest.mark.parametrize("change", ["in-place", "data", "numpy", "replaced"])
    def test_bits_that_were_changed_and_they_are_saved(self, tmp_path, change):
        bank = self.bank(tmp_path)
        run(bank, "a")
        masks = bank.model[0].masks
        if change == "in-place":
            masks["a"].zero_()
        elif change == "data":
            masks["a"].data.fill_(0)
        elif change == "numpy":
            masks["a"].numpy()[:] = 0
        else:
            masks["a"] = torch.zeros_like(masks["a"])
        for names in ("b", "d", "e"):
            run(bank, names)
        assert resident(bank.model) == {"a", "c", "e"} and not masks["a"].any()
        bank.save(tmp_path)
        run(bank, "b")  # now it is in a file
        run(bank, "d")
        assert resident(bank.model) == {"c", "d"}
        assert not MaskBank.load(tmp_path, mlp()).model[0].masks["a"].any() and not masks["a"].any()

    def test_bits_that_someone_holds_are_not_taken_from_them(self, tmp_path):
        bank = self.bank(tmp_path)
        run(bank, "a")
        held = bank.model[0].masks["a"]
        run(bank, "b")
        run(bank, "d")
        held.zero_()
        assert not bank.model[0].masks["a"].any()
        del held

    def test_tasks_that_were_never_saved_and_then_were(self, tmp_path):
        bank = self.bank(tmp_path)
        for name in "xyz":
            bank.add_task(name)
            bank.pack(name)
        run(bank, "a")
        run(bank, "xb")
        assert resident(bank.model) == set("bcxyz")
        bank.save(tmp_path)
        run(bank, "d")
        assert resident(bank.model) == set("cd")
        own = MaskBank(mlp(), max_resident=1)
        for name in "xyz":
            own.add_task(name)
            own.pack(name)
        own.save(tmp_path / "own")
        run(own, "x")
        assert resident(own.model) == {"default", "x"}

    def test_a_task_whose_file_is_gone_or_damaged_stays(self, tmp_path):
        bank = self.bank(tmp_path)
        run(bank, "a")
        run(bank, "b")
        whole = run(bank, "b")
        (path,) = tmp_path.glob("tasks/b-*")
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        run(bank, "d")
        assert "b" in resident(bank.model)
        torch.testing.assert_close(run(bank, "b"), whole, rtol=0, atol=0)
        with pytest.raises(BankError, match="damaged"):
            bank.verify()

    def test_heads_and_statistics(self, tmp_path):
        def net() -> nn.Module:
            return nn.Sequential(nn.Unflatten(1, (1, 3, 3)), TaskBatchNorm2d(1), nn.Flatten(), MaskedLinear(9, 5), nn.Linear(5, 2))

        bank = MaskBank(net(), per_task="4.*")
        for name in "ab":
            bank.add_task(name)
        bank.pack("a"), bank.pack("b"), bank.pack("default")
        bank.save(tmp_path)
        loaded = MaskBank.load(tmp_path, net(), max_resident=1)
        heads = dict(loaded.model[4].named_parameters())
        loaded.model.train(), bank.model.train()
        x = torch.randn(4, 9)
        for names in ("abab", "dd", "bb", "abab"):
            given = ["default" if name == "d" else name for name in names]
            torch.testing.assert_close(run(loaded, given, x[: len(given)]), run(bank, given, x[: len(given)]), rtol=0, atol=0)
        assert all(parameter is heads[name] for name, parameter in loaded.model[4].named_parameters())
        for name, tensor in bank.model.state_dict().items():
            torch.testing.assert_close(loaded.model.state_dict()[name], tensor, rtol=0, atol=0)


class TestRefused:
    @pytest.mark.parametrize(("pin", "error"), [("x", ValueError), (["a", "x"], ValueError), ([1], TypeError), ([None], TypeError)])
    def test_pins(self, tmp_path, pin, error):
        saved(tmp_path)
        model = mlp()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match="pin must name tasks"):
            MaskBank.load(tmp_path, model, pin=pin)
        assert before.keys() == model.state_dict().keys() and all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    @pytest.mark.parametrize(("device", "error"), [("nowhere", ValueError), ("cuda:99", ValueError), (3, TypeError)])
    def test_devices(self, tmp_path, device, error):
        saved(tmp_path)
        model = mlp()
        with pytest.raises(error, match="device must be"):
            MaskBank.load(tmp_path, model, device=device)
        assert MaskBank(model).tasks == ["default"]

    def test_a_damaged_pinned_task(self, tmp_path):
        saved(tmp_path)
        (path,) = tmp_path.glob("tasks/b-*")
        path.write_bytes(b"?")
        model = mlp()
        with pytest.raises(BankError, match="damaged"):
            MaskBank.load(tmp_path, model, pin="b")
        assert MaskBank(model).tasks == ["default"]


def test_the_device_is_where_the_model_goes(tmp_path):
    saved(tmp_path)
    for device in ("cpu", torch.device("cpu")):
        bank = MaskBank.load(tmp_path, mlp(), device=device)
        assert run(bank, "ab").device.type == "cpu"


class TestPrefetch:
    def test_tasks_are_there_before_their_first_use(self, tmp_path):
        whole = saved(tmp_path)
        bank = MaskBank.load(tmp_path, mlp())
        assert bank.prefetch("a").result(60) is None
        assert bank.prefetch(["b", "c", "a"]).result(60) is None
        assert resident(bank.model) == set("abc")
        torch.testing.assert_close(run(bank, "abcd"), run(whole, "abcd"), rtol=0, atol=0)
        assert bank.prefetch([]).result(60) is None

    def test_errors_surface_in_the_future_and_at_the_use_and_the_others_are_read(self, tmp_path):
        saved(tmp_path)
        bank = MaskBank.load(tmp_path, mlp())
        (path,) = tmp_path.glob("tasks/b-*")
        data = path.read_bytes()
        path.write_bytes(data[:-1] + b"?")
        future = bank.prefetch(list("abc"))
        with pytest.raises(BankError, match="damaged"):
            future.result(60)
        assert resident(bank.model) == set("ac")
        with pytest.raises(BankError, match="damaged"):
            run(bank, "b")
        path.write_bytes(data)
        run(bank, "b")

    @pytest.mark.parametrize(("given", "error"), [("x", ValueError), (["a", "x"], ValueError), ([1], TypeError)])
    def test_refused_at_once(self, tmp_path, given, error):
        saved(tmp_path)
        bank = MaskBank.load(tmp_path, mlp())
        with pytest.raises(error, match="tasks must be"):
            bank.prefetch(given)
        assert resident(bank.model) == set()

    def test_while_other_threads_use_the_same_tasks(self, tmp_path):
        whole = saved(tmp_path)
        wanted = run(whole, TASKS)
        for _ in range(10):
            bank = MaskBank.load(tmp_path, mlp(), max_resident=2)
            futures = [bank.prefetch(list(TASKS)), bank.prefetch(list(TASKS[::-1]))]
            torch.testing.assert_close(run(bank, TASKS), wanted, rtol=0, atol=0)
            assert [future.result(60) for future in futures] == [None, None]
