"""MaskBank on disk: what a model and its folder give each other. The folder itself: test_store.py, test_faults.py."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.gpu import DEVICES
from support.mixed_task_models import alone, cnn
from support.models import assert_same_gradients, gradients, randomize_masks
from torch import nn

import metamask_ext
from metamask_ext import MaskBank, using_task
from metamask_ext.bank import BankError, Store
from metamask_ext.nn import MaskedLayer, MaskedLinear, TaskBatchNorm2d
from metamask_ext.optim import FusedMaskedSGD

NAMES = ["b", "a/é", "c", "b", "b"]


def mlp(gate="sigmoid", width=6, bias=True, **options):
    return nn.Sequential(
        MaskedLinear(9, width, bias, gate=gate, **options), nn.Tanh(), MaskedLinear(width, 3, gate=gate, **options)
    )


def new_bank(model=None, packed=("a/é", "b"), tasks=("a/é", "b", "c")):
    bank = MaskBank(mlp() if model is None else model)
    for task in tasks:
        bank.add_task(task)
    bank.remove_task("default")
    for task in packed:
        bank.pack(task)
    return bank


def mixed(bank, x, names=NAMES):
    with using_task(bank.model, names):
        return bank.model(x)


def waiting(bank):
    """The tasks of each TaskDict that nobody has used."""
    return [
        list(tensors._waiting) for module in bank.model.modules() if isinstance(module, MaskedLayer) for tensors in [module.masks]
    ]


def files(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted((folder / "tasks").iterdir())}


def unchanged(model):
    """A function that asserts that nothing of the model has changed since."""
    before = copy.deepcopy(model.state_dict())
    slots = metamask_ext.slots(model)

    def check():
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert metamask_ext.slots(model) == slots

    return check


class TestRoundTrip:
    @pytest.mark.parametrize("device", DEVICES)
    def test_a_model_of_the_same_layers_computes_the_same(self, tmp_path, device):
        bank = new_bank(mlp().to(device))
        bank.save(tmp_path)
        loaded = MaskBank.load(tmp_path, mlp().to(device))
        assert loaded.tasks == ["a/é", "b", "c"] and loaded.slots == bank.slots == [None, "a/é", "b", "c"]
        assert [loaded.is_packed(task) for task in loaded.tasks] == [True, True, False]
        x = torch.randn(5, 9).to(device)
        torch.testing.assert_close(mixed(loaded, x), mixed(bank, x), rtol=0, atol=0)
        assert loaded.infer_task(x) == bank.infer_task(x)
        loaded.verify()

    def test_a_cnn_in_double_precision(self, tmp_path):
        bank = MaskBank(cnn("hard"))
        bank.pack("b")
        bank.save(tmp_path)
        loaded = MaskBank.load(tmp_path, cnn("hard"))
        x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
        torch.testing.assert_close(mixed(loaded, x, list("bacba")), mixed(bank, x, list("bacba")), rtol=0, atol=0)

    def test_packed_tasks_wait_until_they_are_used(self, tmp_path):
        new_bank().save(tmp_path)
        loaded = MaskBank.load(tmp_path, mlp())
        assert waiting(loaded) == [["a/é", "b"]] * 2
        with using_task(loaded.model, "b"):
            loaded.model(torch.randn(1, 9))
        assert waiting(loaded) == [["a/é"]] * 2
        assert set(loaded.model.state_dict()) >= {"0.masks.b", "0.masks.a%2F%C3%A9", "0.masks.c"}

    def test_temperature_and_threshold_are_the_banks(self, tmp_path):
        new_bank(mlp(temperature=0.25)).save(tmp_path)
        loaded = MaskBank.load(tmp_path, mlp(temperature=2.0))
        assert loaded.model[0].temperature == 0.25

    def test_trained_tasks_go_on_training_and_the_file_stays(self, tmp_path):
        new_bank().save(tmp_path)
        loaded = MaskBank.load(tmp_path, mlp())
        optimizer = FusedMaskedSGD(loaded.model, 0.1)
        before = loaded.model[0].masks["c"].detach().clone()
        with using_task(loaded.model, "c"):
            optimizer.backward(loaded.model(torch.randn(3, 9)).square().sum())
        assert not torch.equal(loaded.model[0].masks["c"], before)
        again = MaskBank.load(tmp_path, mlp())
        assert torch.equal(again.model[0].masks["c"], before)

    def test_gradients_of_a_mixed_batch_of_waiting_tasks_are_those_of_the_samples_alone(self, tmp_path):
        new_bank().save(tmp_path)
        results = []
        x = torch.randn(5, 9)
        for run in (lambda bank: mixed(bank, x), lambda bank: alone(bank.model, x, NAMES)):
            bank = MaskBank.load(tmp_path, mlp())
            output = run(bank)
            output.square().sum().backward()
            results.append((output.detach(), gradients(bank.model)))
        torch.testing.assert_close(results[0][0], results[1][0])
        assert_same_gradients(results[0][1], results[1][1])

    def test_tensors_per_task_and_batch_statistics_come_back(self, tmp_path):
        def build():
            model = nn.ModuleDict({"conv": nn.Conv2d(1, 2, 3), "norm": nn.BatchNorm2d(2), "head": nn.Linear(2, 2)})
            metamask_ext.convert(model, include="conv")
            model.forward = lambda x: model["head"](model["norm"](model["conv"](x)).mean((2, 3)))
            return model

        bank = MaskBank(build(), ["head.*", "norm.*"])
        for task in ("a", "b"):
            bank.add_task(task)
        randomize_masks(bank.model)
        x = torch.randn(4, 1, 5, 5)
        for task in ("a", "b"):
            with using_task(bank.model, task):
                bank.model(x * (1 + len(task)))
        bank.pack("a")
        bank.save(tmp_path)
        assert "state/norm.running_mean" in Store.open(tmp_path).task("a")
        loaded = MaskBank.load(tmp_path, build())
        assert type(loaded.model["norm"]) is TaskBatchNorm2d
        for each in (bank, loaded):
            each.model.eval()
        names = ["a", "b", "default", "a"]
        torch.testing.assert_close(mixed(loaded, x, names), mixed(bank, x, names), rtol=0, atol=0)
        head = loaded.model["head"].per_task["weight"]
        with torch.no_grad():
            head["a"].add_(1.0)  # its own memory, not the file's
        loaded.save(tmp_path)
        again = MaskBank.load(tmp_path, build())
        assert torch.equal(again.model["head"].per_task["weight"]["a"], head["a"])
        loaded.verify()

    def test_saving_a_model_whose_weights_changed_writes_its_tasks_for_them(self, tmp_path):
        bank = new_bank()
        bank.save(tmp_path)
        loaded = MaskBank.load(tmp_path, mlp())
        with torch.no_grad():
            loaded.model[0].weight.mul_(2.0)
        loaded.save(tmp_path)
        again = MaskBank.load(tmp_path, mlp())
        x = torch.randn(5, 9)
        torch.testing.assert_close(mixed(again, x), mixed(loaded, x), rtol=0, atol=0)
        again.verify()


class TestAppending:
    def test_packed_tasks_that_are_there_are_neither_read_nor_written(self, tmp_path):
        new_bank().save(tmp_path)
        before = files(tmp_path)
        loaded = MaskBank.load(tmp_path, mlp())
        loaded.add_task("d")
        loaded.pack("d")
        loaded.remove_task("a/é")
        loaded.save(tmp_path)
        assert waiting(loaded) == [["b"]] * 2
        after = files(tmp_path)
        assert len(after) == 3
        assert {name: after[name] for name in after if name in before} == {
            name: before[name] for name in before if not name.startswith("a")
        }
        again = MaskBank.load(tmp_path, mlp())
        assert again.slots == [None, None, "b", "c", "d"]

    def test_a_bank_made_here_appends_to_what_it_saved(self, tmp_path):
        bank = new_bank(packed=("a/é", "b", "c"))
        bank.save(tmp_path)
        before = files(tmp_path)
        bank.add_task("d")
        bank.save(tmp_path)
        after = files(tmp_path)
        assert len(after) == 4 and before.items() <= after.items()
        bank.verify()

    def test_saving_elsewhere_takes_everything_along(self, tmp_path):
        new_bank().save(tmp_path / "one")
        loaded = MaskBank.load(tmp_path / "one", mlp())
        x = torch.randn(5, 9)
        loaded.save(tmp_path / "two")
        for path in sorted((tmp_path / "one").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        wanted = mixed(MaskBank.load(tmp_path / "two", mlp()), x)
        torch.testing.assert_close(mixed(loaded, x), wanted, rtol=0, atol=0)

    def test_a_task_that_was_replaced_under_its_name_is_written(self, tmp_path):
        bank = new_bank(packed=("b",))
        bank.save(tmp_path)
        bank.remove_task("b")
        bank.add_task("b")
        bank.pack("b")
        bank.save(tmp_path)
        again = MaskBank.load(tmp_path, mlp())
        assert torch.equal(again.model[0].masks["b"], bank.model[0].masks["b"])


class TestRefusals:
    @pytest.mark.parametrize(
        ("build", "words"),
        [
            pytest.param(lambda: mlp("hard"), "'0' has gate 'sigmoid', the model's has 'hard'", id="gate"),
            pytest.param(lambda: mlp(width=7), r"'0' has weight \[6, 9\], the model's has \[7, 9\]", id="shape"),
            pytest.param(lambda: mlp(bias=False), r"'0' has bias \[6\], the model's has None", id="bias"),
            pytest.param(lambda: mlp().double(), "'0' has dtype 'float32', the model's has 'float64'", id="dtype"),
            pytest.param(lambda: mlp()[:1], r"masked layers are \['0', '2'\], the model's are \['0'\]", id="layers"),
            pytest.param(lambda: mlp().append(nn.Linear(3, 1)), "'3.bias', '3.weight'.* are in one only", id="more-weights"),
            pytest.param(lambda: mlp().append(TaskBatchNorm2d(3)), "keeps .* of '3' per task", id="per-task"),
        ],
    )
    def test_a_bank_of_another_model_is_refused_before_the_model_changes(self, tmp_path, build, words):
        new_bank().save(tmp_path)
        model = build()
        check = unchanged(model)
        with pytest.raises(BankError, match=words):
            MaskBank.load(tmp_path, model)
        check()

    @pytest.mark.parametrize("which", ["bank.json", "shared-*", "tasks/c-*"])
    def test_a_damaged_file_is_refused_by_name_before_the_model_changes(self, tmp_path, which):
        new_bank().save(tmp_path)
        (path,) = tmp_path.glob(which)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        model = mlp()
        check = unchanged(model)
        with pytest.raises(BankError, match=path.name.replace(".", r"\.")):
            MaskBank.load(tmp_path, model)
        check()

    def test_a_damaged_packed_task_is_refused_when_it_is_used_and_by_verify(self, tmp_path):
        new_bank().save(tmp_path)
        (path,) = tmp_path.glob("tasks/b-*")
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        loaded = MaskBank.load(tmp_path, mlp())
        x = torch.randn(2, 9)
        assert mixed(loaded, x, ["a/é", "c"]).shape == (2, 3)
        for act in (lambda: mixed(loaded, x, ["a/é", "b"]), loaded.verify, lambda: loaded.model.state_dict()):
            with pytest.raises(BankError, match=path.name.replace(".", r"\.")):
                act()

    def test_a_folder_without_a_bank_and_a_bank_without_a_folder(self, tmp_path):
        with pytest.raises(BankError, match=str(tmp_path)):
            MaskBank.load(tmp_path, mlp())
        with pytest.raises(RuntimeError, match="neither loaded nor saved"):
            new_bank().verify()

    def test_a_model_that_waits_for_a_folder_can_be_copied_and_not_pickled(self, tmp_path):
        new_bank().save(tmp_path)
        loaded = MaskBank.load(tmp_path, mlp())
        twin = copy.deepcopy(loaded.model)
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(loaded.model)
        x = torch.randn(5, 9)
        with using_task(twin, NAMES):
            torch.testing.assert_close(twin(x), mixed(loaded, x), rtol=0, atol=0)


def test_loading_into_a_state_dict_round_trip_keeps_bits_apart_from_the_file(tmp_path):
    new_bank().save(tmp_path)
    loaded, other = MaskBank.load(tmp_path, mlp()), MaskBank.load(tmp_path, mlp())
    state = copy.deepcopy(loaded.model.state_dict())
    for name in state:
        if state[name].dtype == torch.uint8:
            state[name].zero_()
    loaded.model.load_state_dict(state)
    assert not loaded.model[0].masks["b"].any()
    assert other.model[0].masks["b"].any()
    MaskBank.load(tmp_path, mlp()).verify()


def test_a_model_that_moves_to_another_dtype_takes_its_waiting_tasks_along(tmp_path):
    new_bank().save(tmp_path)
    loaded = MaskBank.load(tmp_path, mlp())
    loaded.model.double()
    assert mixed(loaded, torch.randn(5, 9, dtype=torch.float64)).dtype == torch.float64
