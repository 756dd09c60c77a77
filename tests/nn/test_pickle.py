"""Models, layers, banks and what belongs to them pickle and copy, or say what to do instead."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support.attention_net import AttentionNet
from support.models import randomize_masks

from metamask_ext import MaskBank, add_task, convert, using_task
from metamask_ext.meta import MAML
from metamask_ext.optim import FusedMaskedAdamW, FusedMaskedSGD


def _bank(**options):
    model = convert(AttentionNet(), batch_norm="task", mask_init="normal", exclude=("head", "conv") if options else None).eval()
    bank = MaskBank(model, **options)
    for task in ("b", "a.name", "p"):
        add_task(model, task)
    randomize_masks(model)
    bank.pack("p")
    return bank


def _saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "deepcopy": copy.deepcopy, "torch.save": _saved}
X = torch.randn(3, 2, 2, 2)


def _assert_same(model, other):
    assert other is not model
    for task in ("default", "b", "a.name", "p"):
        with using_task(model, task), using_task(other, task):
            torch.testing.assert_close(other(X), model(X), rtol=0, atol=0)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("options", [{}, {"per_task": "head.*"}], ids=["bank", "heads"])
def test_a_bank_is_whole_and_independent_afterwards(copied, options):
    bank = _bank(**options)
    wanted = bank.infer_task(X, per_sample=False)
    other = copied(bank)
    _assert_same(bank.model, other.model)
    assert (other.tasks, other.slots, other.per_task) == (bank.tasks, bank.slots, bank.per_task)
    assert other.is_packed("p") and other.infer_task(X, per_sample=False) == wanted
    other.remove_task("b")
    other.pack("default")
    assert "b" in bank.tasks and not bank.is_packed("default")


def test_a_copy_is_a_bank_of_the_same_model():
    bank = _bank()
    other = copy.copy(bank)
    assert other.model is bank.model
    other.add_task("later")
    assert "later" in bank.tasks
    together = pickle.loads(pickle.dumps((bank, bank.model)))
    assert together[0].model is together[1]


def test_a_bank_whose_tasks_wait_in_a_folder_says_what_to_do(tmp_path):
    bank = _bank()
    bank.save(tmp_path)
    loaded = MaskBank.load(tmp_path, convert(AttentionNet(), batch_norm="task").eval())
    for thing in (loaded, loaded.model):
        with pytest.raises(TypeError, match="cannot be pickled: save its state_dict, or MaskBank.save"):
            pickle.dumps(thing)
    _assert_same(bank.model, loaded.model)  # fetches all


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_layers_optimisers_blocks_and_learners(copied):
    bank = _bank()
    model = bank.model
    for name, layer in model.named_children():
        other = copied(layer)
        assert type(other) is type(layer) and repr(other) == repr(layer), name
        for one, its in zip(layer.parameters(), other.parameters()):
            assert torch.equal(one, its)
    with using_task(model, ["b", "default"]):
        _assert_same(model, copied(model))
    for make in (FusedMaskedSGD, FusedMaskedAdamW):
        optimizer = copied(make(model, lr=0.1))
        with using_task(optimizer.model, "b"):
            optimizer.backward(optimizer.model(X).sum())
    assert isinstance(copied(MAML(model, 0.1, start="b")), MAML)
    copied(using_task(model, "b"))


@pytest.mark.parametrize(
    "copied", [*COPIES.values(), lambda w: torch.load(_file_of(w), weights_only=True)], ids=[*COPIES, "weights"]
)
def test_a_computed_weight_is_copied_as_a_tensor_like_any_other(copied):
    attention = _bank().model.attention
    with using_task(attention, "b"):
        weight = attention.out_proj.weight.detach()
        other = copied(weight)
    assert type(other) is torch.Tensor and torch.equal(other, weight)
    other.zero_()


def _file_of(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return file
