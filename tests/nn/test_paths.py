"""Names without wrappers' prefixes: banks, reports, optimisers and errors of a wrapped model are those of the plain one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

import metamask_ext
from metamask_ext import MaskBank, add_task, tasks, using_task
from metamask_ext.bank.export import task_state
from metamask_ext.bank.store import Store
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d
from metamask_ext.nn.paths import own_state, plain_path, plain_state
from metamask_ext.optim import FusedMaskedSGD


class _Named(nn.Module):
    """A model whose own modules have the names that wrappers use."""

    def __init__(self):
        super().__init__()
        self.module = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
        self._orig_mod = nn.Flatten()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self._orig_mod(self.module(x)))


def _net():
    model = metamask_ext.convert(_Named(), batch_norm="task")
    add_task(model, "b")
    return model.eval()


def _inside(wrap):
    def make(model):
        model.module[0] = wrap(model.module[0])
        model.module = wrap(model.module)
        return model

    return make


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPS = {
    "compile": compiled,
    "DataParallel": DataParallel,
    "AveragedModel": AveragedModel,
    "activation checkpoints": checkpoint_wrapper,
    "offloading": offload_wrapper,
    "several": lambda model: DataParallel(compiled(checkpoint_wrapper(model))),
    "compile, inside": _inside(compiled),
    "DataParallel, inside": _inside(DataParallel),
    "activation checkpoints, inside": _inside(checkpoint_wrapper),
    "in and around": lambda model: compiled(_inside(checkpoint_wrapper)(model)),
}
every_wrap = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
X = torch.randn(2, 2, 2, 2)


def _output(model, name):
    with using_task(model, name):
        return model(X)


@every_wrap
def test_a_bank_of_a_wrapped_model_loads_in_a_plain_one_and_the_other_way_round(wrap, tmp_path):
    plain = _net()
    MaskBank(wrap(copy.deepcopy(plain))).save(tmp_path / "wrapped")
    MaskBank(plain).save(tmp_path / "plain")
    for name in ("wrapped", "plain"):
        for model in (_net(), wrap(_net()).eval()):
            MaskBank.load(tmp_path / name, model)
            for task in ("default", "b"):
                torch.testing.assert_close(_output(model, task), _output(plain, task))
    files = [Store.open(tmp_path / name) for name in ("wrapped", "plain")]
    assert files[0].meta == files[1].meta and files[0].shared_sha256 == files[1].shared_sha256
    assert task_state(files[0], "b").keys() == task_state(files[1], "b").keys()
    # One that was loaded into a wrapped model is saved into the folder of a plain one without writing a tensor anew.
    bank = MaskBank.load(tmp_path / "plain", wrap(_net()))
    bank.save(tmp_path / "plain")
    assert Store.open(tmp_path / "plain").meta == files[1].meta


@every_wrap
def test_parameters_that_a_bank_keeps_per_task_have_plain_names(wrap, tmp_path):
    model = wrap(_net())
    bank = MaskBank(wrap(metamask_ext.convert(_Named(), exclude="head")), per_task="head.*")
    bank.add_task("b")
    assert bank.per_task == ["head.weight", "head.bias"]
    bank.save(tmp_path)
    loaded = MaskBank.load(tmp_path, metamask_ext.convert(_Named(), exclude="head"))
    assert loaded.per_task == ["head.weight", "head.bias"] and loaded.tasks == ["default", "b"]
    assert MaskBank(model).per_task == [
        f"module.1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]


@every_wrap
def test_conversion_chooses_by_plain_names_and_errors_name_them(wrap):
    model = metamask_ext.convert(wrap(_Named()), include="module.*")
    found = [plain_path(model, path) for path, module in model.named_modules() if isinstance(module, MaskedConv2d)]
    assert found == ["module.0"]
    with pytest.raises(ValueError, match="pattern '_orig_mod.head' matches no"):
        metamask_ext.convert(model, exclude="_orig_mod.head")
    lazy = _Named()
    lazy.head = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="cannot mask 'head'"):
        metamask_ext.convert(wrap(lazy), on_unsupported="error")
    del next(module for module in model.modules() if isinstance(module, MaskedConv2d)).bias_masks["default"]
    with pytest.raises(ValueError, match=r"those of 'module\.0'"):
        tasks(model)


@every_wrap
def test_an_optimisers_state_goes_from_a_wrapped_model_to_a_plain_one(wrap):
    plain, wrapped = _net(), wrap(_net())
    states = [FusedMaskedSGD(model, 0.1).state_dict() for model in (plain, wrapped)]
    names = [[group["param_names"] for group in state["param_groups"]] for state in states]
    assert names[0] == names[1]
    FusedMaskedSGD(plain, 0.1).load_state_dict(states[1])


@pytest.mark.parametrize(
    "adapt", ["masks", "weights", "all", lambda name: name.startswith("1.")], ids=["masks", "weights", "all", "a function"]
)
def test_a_meta_learners_names_are_plain(adapt):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(MaskedLinear(3, 4), nn.Linear(4, 1))

    plain, wrapped = MAML(net(), 0.1, adapt=adapt), MAML(compiled(net()), 0.1, adapt=adapt)
    assert plain.adapted_names == wrapped.adapted_names
    x, y = torch.randn(2, 5, 3), torch.randn(2, 5, 1)
    adapted = wrapped.adapt(nn.functional.mse_loss, (x, y))
    torch.testing.assert_close(plain.predict(adapted, x), wrapped.predict(adapted, x))


@every_wrap
def test_a_state_by_plain_paths_loads_in_any_wrapper(wrap):
    plain, wrapped = _net(), wrap(_net()).eval()
    metamask_ext.remove_task(plain, "default")
    add_task(plain, "c")
    for model in (plain, wrapped):
        if "c" not in tasks(model):
            metamask_ext.remove_task(model, "default")
            add_task(model, "c")
    state = {key: value for key, value in plain_state(wrapped).items() if key != "n_averaged"}
    assert state.keys() == plain.state_dict().keys()
    saved = plain_state(plain)
    if isinstance(wrapped, AveragedModel):
        saved["n_averaged"] = torch.tensor(3)
    wrapped.load_state_dict(own_state(wrapped, saved))
    wrapped.load_state_dict(own_state(wrapped, wrapped.state_dict()))
    torch.testing.assert_close(_output(wrapped, "c"), _output(plain, "c"))
    assert metamask_ext.slots(wrapped) == metamask_ext.slots(plain) == [None, "b", "c"]


def test_a_module_of_a_user_keeps_its_name():
    model = _net()
    for path in ("module.0.weight", "_orig_mod", "module.0.masks.default", "module.nothing.module"):
        assert plain_path(model, path) == path
    assert plain_path(DataParallel(model), "module.module.0.weight") == "module.0.weight"
    assert plain_path(compiled(model), "_orig_mod._orig_mod") == "_orig_mod"


def test_a_wrapper_around_one_layer():
    layer = compiled(MaskedLinear(3, 2))
    bank = MaskBank(layer)
    assert bank.tasks == ["default"]
    model = nn.ModuleList([compiled(TaskBatchNorm2d(2)), MaskedLinear(2, 2)])
    assert [name for name, _ in metamask_ext.nn.task_layer.task_layers(model)] == ["0", "1"]
