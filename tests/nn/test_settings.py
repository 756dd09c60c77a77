"""Gate, temperature and threshold in state dicts: a loaded layer computes what the saved one did."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel

import metamask_ext
from metamask_ext import MaskBank, add_task, merge, tasks, using_task
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d

GATES = {
    "sigmoid": {"gate": "sigmoid", "temperature": 0.02},
    "hard": {"gate": "hard", "threshold": -0.7},
    "hard, infinite": {"gate": "hard", "threshold": float("inf")},
}


class _Attention(nn.Module):
    """A model that reads the weight of its own layer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x)[0]


BUILDS = {
    "linear": (lambda: MaskedLinear(8, 4), (3, 8)),
    "conv2d": (lambda: MaskedConv2d(8, 4, 3), (2, 8, 5, 5)),
    "no bias": (lambda: nn.Sequential(MaskedLinear(8, 4, bias=False)), (3, 8)),
    "converted": (lambda: metamask_ext.convert(nn.Sequential(nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(16, 2))), (2, 8, 2, 2)),
    "read through": (lambda: metamask_ext.convert(_Attention()), (2, 3, 8)),
    "task batch norm": (lambda: nn.Sequential(MaskedConv2d(8, 4, 3), TaskBatchNorm2d(4)).eval(), (2, 8, 5, 5)),
    "meta-learner": (lambda: MAML(nn.Sequential(MaskedLinear(8, 4)), 0.1).model, (3, 8)),
}


def _layers(model):
    return [module for module in model.modules() if hasattr(module, "mask_init")]


def _set(model, settings):
    for layer in _layers(model):
        for name, value in settings.items():
            setattr(layer, name, value)


def _randomise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()


def _file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


WAYS = {
    "as it is": lambda state: state,
    "torch.save": _file,
    "clones": lambda state: {key: value.clone() for key, value in state.items()},
    "safetensors": lambda state: safetensors.torch.load(safetensors.torch.save(dict(state))),
    "float32": lambda state: {key: value.float() for key, value in state.items()},
    "mean of two": lambda state: {key: torch.stack([value, value]).mean(0) for key, value in state.items()},
}


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("build", BUILDS)
def test_a_loaded_layer_computes_what_the_saved_one_did(build, gate, assign):
    make, shape = BUILDS[build]
    saved, loaded = make(), make()
    _randomise(saved)
    _set(saved, GATES[gate])
    x = torch.randn(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = loaded.load_state_dict(saved.state_dict(), assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(loaded(x), saved(x))
    for layer in _layers(loaded):
        assert {name: getattr(layer, name) for name in GATES[gate]} == GATES[gate]


@pytest.mark.parametrize("way", WAYS)
def test_the_settings_come_along_in_any_file_of_tensors(way):
    saved, loaded = MaskedLinear(8, 4), MaskedLinear(8, 4, gate="hard", threshold=0.1)
    saved.temperature = 0.02
    loaded.load_state_dict(WAYS[way](saved.state_dict()))
    assert loaded.gate == "sigmoid" and loaded.temperature == pytest.approx(0.02, rel=1e-7)


def test_the_state_has_the_settings_of_the_moment_and_the_files_win():
    annealed, loaded = MaskedLinear(3, 2), MaskedLinear(3, 2, temperature=5.0)
    states = []
    for temperature in (1.0, 0.5, 0.1):
        annealed.temperature = temperature
        states.append(annealed.state_dict())
    for state, temperature in zip(states, (1.0, 0.5, 0.1)):
        loaded.load_state_dict(state)
        assert loaded.temperature == temperature


@pytest.mark.parametrize("name", [torch.tensor(0.25), 0.25])
def test_a_temperature_may_be_any_number(name):
    saved, loaded = MaskedLinear(3, 2), MaskedLinear(3, 2)
    saved.temperature = name
    loaded.load_state_dict(saved.state_dict())
    assert loaded.temperature == 0.25 and type(loaded.temperature) is float


def test_copies_and_averaged_models_keep_them():
    model = nn.Sequential(MaskedLinear(3, 2, gate="hard"))
    model[0].threshold = 0.4
    averaged = AveragedModel(model)
    fresh = AveragedModel(nn.Sequential(MaskedLinear(3, 2)))
    fresh.load_state_dict(averaged.state_dict())
    for each in (copy.deepcopy(model)[0], averaged.module[0], fresh.module[0]):
        assert (each.gate, each.threshold) == ("hard", 0.4)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_averages_of_state_dicts_are_states(decay):
    """An exponential mean, by assignment, in place of what the copy gives, and of what is a floating-point number."""
    model = nn.Sequential(MaskedLinear(3, 2, gate="hard", threshold=0.25), TaskBatchNorm2d(2))
    copied = copy.deepcopy(model)
    averaged = {key: decay * value + (1 - decay) * model.state_dict()[key] for key, value in copied.state_dict().items()}
    copied.load_state_dict(averaged)
    assert copied[0].gate == "hard" and copied[0].threshold == pytest.approx(0.25)
    state = copied.state_dict()
    for key, value in state.items():
        if value.dtype.is_floating_point:
            value *= decay
            value += (1 - decay) * model.state_dict()[key]
    copied.load_state_dict(state)
    assert copied[0].gate == "hard" and copied[0].threshold == pytest.approx(0.25)
    for value, given in zip(copied.state_dict().values(), model.state_dict().values(), strict=True):
        value.copy_(given)
    assert copied[0].gate == "hard"


def test_safetensors_files_of_models(tmp_path):
    saved, loaded = nn.Sequential(MaskedLinear(3, 2, temperature=0.125)), nn.Sequential(MaskedLinear(3, 2))
    safetensors.torch.save_model(saved, str(tmp_path / "model.safetensors"))
    assert safetensors.torch.load_model(loaded, str(tmp_path / "model.safetensors")) == (set(), [])
    assert loaded[0].temperature == 0.125


def test_a_compiled_model_sees_a_loaded_and_a_changed_temperature():
    model = nn.Sequential(MaskedLinear(4, 3))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(2, 4)
    compiled(x)
    for temperature in (0.5, 0.03):
        other = nn.Sequential(MaskedLinear(4, 3, temperature=temperature))
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(compiled(x), other(x))
        model[0].temperature = other[0].temperature = temperature * 2
        torch.testing.assert_close(compiled(x), other(x))


def test_they_take_effect_for_superpositions_merging_and_new_tasks(tmp_path):
    saved, loaded = (nn.Sequential(MaskedLinear(4, 3)) for _ in range(2))
    add_task(saved, "b")
    saved[0].temperature = 0.05
    loaded.load_state_dict(saved.state_dict())
    x = torch.randn(2, 4)
    amounts = {"default": 0.3, "b": 0.7}
    with MaskBank(saved).superpose(amounts), MaskBank(loaded).superpose(amounts):
        assert torch.equal(loaded(x), saved(x))
    assert torch.equal(merge(loaded, "b")(x), merge(saved, "b")(x))
    for model in (saved, loaded):
        add_task(model, "c", init=amounts)
    assert torch.equal(loaded[0].masks["c"], saved[0].masks["c"])
    MaskBank(loaded).save(tmp_path)
    assert MaskBank.load(tmp_path, nn.Sequential(MaskedLinear(4, 3))).model[0].temperature == 0.05


def test_the_state_of_a_meta_learner_brings_them_along():
    saved, loaded = (MAML(nn.Sequential(MaskedLinear(3, 1)), 0.1, learn_inner_lr=True) for _ in range(2))
    saved.model[0].temperature = 0.3
    loaded.load_state_dict(_file(saved.state_dict()))
    x, y = torch.randn(2, 5, 3), torch.randn(2, 5, 1)
    losses = [maml(nn.functional.mse_loss, (x, y), (x, y)) for maml in (saved, loaded)]
    assert torch.equal(*losses)


def _without(state):
    return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("settings", "words"),
    [({"temperature": 0.5}, "gate='sigmoid', temperature=0.5"), ({"gate": "hard", "threshold": 0.2}, "gate='hard', threshold=0.2")],
)
def test_an_old_state_loads_with_a_warning_that_names_what_is_assumed(settings, words, strict):
    saved = nn.Sequential(MaskedLinear(3, 2), MaskedConv2d(2, 2, 1))
    add_task(saved, "b")
    loaded = nn.Sequential(MaskedLinear(3, 2, **settings), MaskedConv2d(2, 2, 1, **settings))
    with pytest.warns(UserWarning, match=words):
        result = loaded.load_state_dict(_without(saved.state_dict()), strict=strict)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert tasks(loaded) == ["default", "b"] and torch.equal(loaded[0].masks["b"], saved[0].masks["b"])
    assert all(getattr(loaded[0], name) == value for name, value in settings.items())


def test_the_state_of_a_plain_model_says_nothing_about_gates():
    masked = nn.Sequential(MaskedLinear(3, 2, temperature=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masked.load_state_dict(nn.Sequential(nn.Linear(3, 2)).state_dict())
    assert masked[0].temperature == 0.5


def test_on_the_meta_device_there_are_no_values_and_real_ones_fill_it():
    saved = MaskedLinear(3, 2, temperature=0.5)
    with torch.device("meta"):
        model = MaskedLinear(3, 2)
    model.load_state_dict({key: value.to("meta") for key, value in saved.state_dict().items()}, assign=True)
    assert model.temperature == 1.0
    model.load_state_dict(saved.state_dict(), assign=True)
    assert model.temperature == 0.5 and torch.equal(model(torch.ones(1, 3)), saved(torch.ones(1, 3)))


@pytest.mark.parametrize(
    "state",
    [
        torch.tensor([0.0, float("nan"), 0.0, 1.0]),
        torch.tensor([0.0, 0.0, 0.0, 1.0]),
        torch.tensor([0.0, float("inf"), 0.0, 1.0]),
        torch.tensor([1.0, 1.0, float("nan"), 1.0]),
        torch.tensor([0.5, 1.0, 0.0, 1.0]),
        torch.tensor([float("nan"), 1.0, 0.0, 1.0]),
        torch.tensor([float("inf"), 1.0, 0.0, 1.0]),
        torch.tensor([7.0, 1.0, 0.0, 1.0]),
        torch.tensor([0.0, 1.0, 0.0, -1.0]),
        torch.tensor([0.0, 1.0, 0.0, float("inf")]),
        torch.tensor([0, 1, 0, 1]),
        torch.tensor([0.0, 1.0]),
        torch.tensor(1.0),
        {"temperature": 0.5},
        "sigmoid",
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_by_their_key(state):
    layer = nn.Sequential(MaskedLinear(3, 2, temperature=0.5))
    with pytest.raises(RuntimeError, match=r"0\._extra_state .*must (be|have)"):
        layer.load_state_dict({**layer.state_dict(), "0._extra_state": state})
    assert (layer[0].gate, layer[0].temperature, layer[0].threshold) == ("sigmoid", 0.5, 0.0)


def test_a_task_of_each_kind_reads_them_anew():
    saved, loaded = (nn.Sequential(MaskedLinear(4, 3)) for _ in range(2))
    add_task(saved, "b")
    saved[0].temperature = 0.05
    loaded.load_state_dict(saved.state_dict())
    x = torch.randn(2, 4)
    with using_task(saved, ["b", "default"]), using_task(loaded, ["b", "default"]):
        assert torch.equal(loaded(x), saved(x))


def test_a_layer_with_extra_state_of_its_own_stays_plain():
    class Counting(nn.Linear):
        def get_extra_state(self):
            return torch.ones(1)

    model = nn.Sequential(Counting(3, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="extra state of its own"):
        metamask_ext.convert(model, on_unsupported="error")
    assert [type(module) for module in model] == [Counting, nn.Linear]
    metamask_ext.convert(model)
    assert [type(module) for module in model] == [Counting, MaskedLinear]
    assert "extra state of its own" in str(metamask_ext.conversion_report(model))


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_a_state_without_values_changes_no_gate_and_warns_of_nothing(kind, recwarn):
    saved, loaded = (nn.Sequential(MaskedLinear(4, 3, temperature=t)) for t in (0.5, 2.0))
    if kind == "meta":
        state = {name: tensor.to("meta") for name, tensor in saved.state_dict().items()}
        loaded.load_state_dict(state, assign=True)
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            loaded = nn.Sequential(MaskedLinear(4, 3, temperature=2.0))
            loaded.load_state_dict(loaded.state_dict())
    assert loaded[0].temperature == 2.0 and not recwarn.list
