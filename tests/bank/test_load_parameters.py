"""MaskBank.load under an optimiser: what the model has keeps its parameters, and what comes is there for optimisers to find."""

from __future__ import annotations

import pytest
import torch
from support.bank_changes import INPUT, assert_same_values, new_bank, values
from torch import nn

import metamask_ext as mm
from metamask_ext import MaskBank, using_task
from metamask_ext.bank import BankError
from metamask_ext.optim import FusedMaskedAdamW, FusedMaskedSGD

OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
    "fused sgd": lambda model: FusedMaskedSGD(model, lr=1.0),
    "fused adamw": lambda model: FusedMaskedAdamW(model, lr=0.1),
}


def headed():
    model = nn.Sequential(mm.nn.MaskedLinear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return MaskBank(model, per_task="2.*")


def saved(folder, packed="a", tasks="ab"):
    bank = headed()
    for task in tasks:
        bank.add_task(task)
    for task in packed:
        bank.pack(task)
    bank.save(folder)
    return bank


def train(model, optimizer, task):
    with using_task(model, task):
        loss = model(torch.randn(8, 4)).square().sum()
    if isinstance(optimizer, (FusedMaskedSGD, FusedMaskedAdamW)):
        optimizer.backward(loss)
    else:
        optimizer.zero_grad(), loss.backward(), optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("task", ["default", "a", "b"])
def test_an_optimiser_made_before_trains_what_was_loaded(tmp_path, optimizer, task):
    wanted = saved(tmp_path)
    bank = headed()
    for name in "ab":
        bank.add_task(name)
    model = bank.model
    made = OPTIMIZERS[optimizer](model)
    train(model, made, "default")  # with state
    MaskBank.load(tmp_path, model)
    assert_same_values(model, wanted.model)
    before = values(model)
    train(model, made, task)
    changed = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    trained = {f"2.per_task.{part}.{task}" for part in ("weight", "bias")} | {"0.weight", "0.bias"}
    trained |= set() if task == "a" else {f"0.masks.{task}", f"0.bias_masks.{task}"}
    assert changed >= trained, trained - changed


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("task", ["default", "a", "b"])
def test_an_optimiser_made_after_finds_every_parameter(tmp_path, optimizer, task):
    """Also those of packed tasks that nobody has used."""
    saved(tmp_path)
    model = headed().model
    MaskBank.load(tmp_path, model)
    made, before = OPTIMIZERS[optimizer](model), values(model)
    train(model, made, task)
    after = values(model)
    assert not torch.equal(after[f"2.per_task.weight.{task}"], before[f"2.per_task.weight.{task}"])


def test_which_objects_stay(tmp_path):
    saved(tmp_path)
    bank = headed()
    for name in "abz":
        bank.add_task(name)
    bank.pack("b")
    model = bank.model
    kept = dict(model.named_parameters())
    frozen = kept["0.masks.default"].requires_grad_(False)
    grad = kept["0.weight"].grad = torch.ones(6, 4)
    versions = {name: parameter._version for name, parameter in kept.items()}
    MaskBank.load(tmp_path, model)
    now = dict(model.named_parameters())
    gone = {f"{part}.{task}" for part in ("0.masks", "0.bias_masks") for task in "az"}
    gone |= {f"2.per_task.{part}.z" for part in ("weight", "bias")}
    assert kept.keys() - now.keys() == gone, "a is packed in the folder, z is not there"
    new = {"0.masks.b", "0.bias_masks.b"}
    assert now.keys() - kept.keys() == new, "b was packed in the model"
    assert all(now[name] is kept[name] and now[name]._version > versions[name] for name in now if name not in new)
    assert not frozen.requires_grad and kept["0.weight"].grad is grad


def test_statistics_are_filled_too(tmp_path):
    new_bank(packed="").save(tmp_path)
    bank = new_bank(packed="")
    held = bank.model[1].per_task["running_mean"]["b"]
    with torch.no_grad(), using_task(bank.model, "b"):
        bank.model.train()(torch.randn(4, *INPUT))
    assert held.any()
    MaskBank.load(tmp_path, bank.model)
    assert bank.model[1].per_task["running_mean"]["b"] is held and not held.any()


def test_under_no_grad_and_inference_mode(tmp_path):
    saved(tmp_path)

    def build():
        return nn.Sequential(mm.nn.MaskedLinear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    for mode in (torch.no_grad, torch.inference_mode):
        model = build()
        with mode():
            bank = MaskBank.load(tmp_path, model)
            with using_task(model, ["a", "b"]):
                model(torch.randn(2, 4))
        for task in ("a", "b", ["a", "b"]):
            with using_task(bank.model, task):
                bank.model(torch.randn(2, 4)).sum().backward()
    with torch.inference_mode():
        assert_same_values(MaskBank.load(tmp_path, build()).model, bank.model)


def test_a_plain_head_becomes_the_first_tasks(tmp_path):
    saved(tmp_path)
    model = nn.Sequential(mm.nn.MaskedLinear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    head = model[2].weight
    bank = MaskBank.load(tmp_path, model)
    assert model[2].per_task["weight"]["default"] is head and bank.tasks == ["default", "a", "b"]


def test_again_from_a_model_whose_tasks_still_wait(tmp_path):
    wanted = new_bank()
    wanted.save(tmp_path)
    bank = MaskBank.load(tmp_path, new_bank().model)
    logits = bank.model[4].masks["c"]
    wanted.model[4].masks["a"].data ^= 1
    with torch.no_grad():
        wanted.model[4].masks["c"].add_(1)
    wanted.save(tmp_path)
    MaskBank.load(tmp_path, bank.model)
    assert bank.model[4].masks["c"] is logits
    assert_same_values(bank.model, wanted.model)


def test_another_dtype_of_a_mask_is_another_parameter(tmp_path):
    bank = headed()
    bank.save(tmp_path)
    other = headed()
    other.model[0].masks["default"] = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    MaskBank.load(tmp_path, other.model)
    assert_same_values(other.model, bank.model)


def test_different_values_for_what_the_model_ties_are_refused(tmp_path):
    def build(tied):
        model = nn.Sequential(mm.nn.MaskedLinear(3, 3, bias=False), nn.Linear(3, 3, False), nn.Linear(3, 3, False))
        if tied:
            model[2].weight = model[1].weight
        return model

    MaskBank(build(False)).save(tmp_path / "two")
    model = build(True)
    before = values(model)
    with pytest.raises(BankError, match="different values for 1.weight and 2.weight, which are one tensor"):
        MaskBank.load(tmp_path / "two", model)
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    tied = MaskBank(build(True))
    tied.save(tmp_path / "one")
    assert_same_values(MaskBank.load(tmp_path / "one", build(True)).model, tied.model)
    assert_same_values(MaskBank.load(tmp_path / "one", build(False)).model, tied.model)


class TestLoadStateDict:
    """torch's own way keeps and replaces the same: as the docstring of TaskLayer says."""

    def test_logits_stay_the_same_parameters(self):
        model = headed().model
        kept = dict(model.named_parameters())
        model.load_state_dict(headed().model.state_dict())
        assert all(now is kept[name] for name, now in model.named_parameters())

    def test_another_form_is_another_tensor(self):
        bank, packed = new_bank(packed=""), new_bank(packed="a")
        logits = bank.model[4].masks["a"]
        bank.model.load_state_dict(packed.model.state_dict())
        assert bank.is_packed("a") and logits.dtype == torch.float32
        assert_same_values(bank.model, packed.model)


class TestParametersThatWereReplaced:
    """FusedMaskedSGD finds them wherever they stand among the tasks."""

    def bank(self):
        bank = MaskBank(nn.Sequential(mm.nn.MaskedLinear(4, 3, bias=False)))
        for task in "abc":
            bank.add_task(task)
        bank.remove_task("default")
        return bank

    def check(self, model, optimizer, task):
        before = model[0].masks[task].detach().clone()
        with using_task(model, task):
            model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(model[0].masks[task], before)

    def test_by_a_bank(self, tmp_path):
        saved, bank = self.bank(), self.bank()
        saved.pack("a"), saved.save(tmp_path)
        bank.pack("b")
        optimizer = FusedMaskedSGD(bank.model, lr=1.0)
        MaskBank.load(tmp_path, bank.model)  # b for a: as many as before, and the last one is the same
        self.check(bank.model, optimizer, "b"), self.check(bank.model, optimizer, "c")

    def test_by_hand(self):
        bank = self.bank()
        optimizer = FusedMaskedSGD(bank.model, lr=1.0)
        bank.model[0].masks["a"] = nn.Parameter(torch.zeros(3, 4))
        self.check(bank.model, optimizer, "a")
        bank.model[0].masks.b = nn.Parameter(torch.zeros(3, 4))
        self.check(bank.model, optimizer, "b")

    def test_by_a_state_that_is_assigned(self):
        bank = self.bank()
        optimizer = FusedMaskedSGD(bank.model, lr=1.0)
        bank.model[0].masks.load_state_dict({"a": torch.zeros(3, 4)}, strict=False, assign=True)
        self.check(bank.model, optimizer, "a")
