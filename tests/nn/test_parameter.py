"""mask_parameter: any parameter of any module; what it refuses, and what stays as it was then."""

from __future__ import annotations

import inspect

import pytest
import torch
from support.masked_kinds import Conv1D, Experts, Mixture, Positions
from support.models import kinds, masks_on, randomize_masks
from torch import nn
from torch.nn.utils import parametrizations

import metamask_ext as mm
from metamask_ext.nn import MaskedLinear


class Scaled(nn.Module):
    """Two parameters, one of which it reads twice, and a child."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(2, 3, 1))
        self.register_parameter("none", None)
        self.count = nn.Parameter(torch.tensor(2.0))
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return self.inner(x * self.scale + self.shift.sum((0, 2))) * self.scale * self.count


class TestNames:
    def test_the_attribute_is_masked_and_the_parameter_stays(self):
        module = Scaled()
        parameters = dict(module.named_parameters())
        assert mm.mask_parameter(module, "scale", mask_init=0.0) is module
        assert isinstance(module, Scaled) and type(module) is not Scaled
        after = dict(module.named_parameters())
        assert after.keys() - parameters.keys() == {"scale_masks.default"}
        assert all(after[name] is parameter for name, parameter in parameters.items())
        torch.testing.assert_close(module.scale, torch.full((3,), 0.5))
        with pytest.raises(RuntimeError, match="scale of MaskedScaled is computed"):
            module.scale.add_(1)
        assert "tasks=1" in repr(module)

    def test_several_parameters_one_after_another_and_in_models_with_tasks(self):
        model = nn.Sequential(MaskedLinear(3, 3), Scaled())
        mm.add_task(model, "b")
        mm.remove_task(model, "default")
        mm.add_task(model, "c")
        mm.mask_parameter(model, "1.shift")
        mm.mask_parameter(model, "1.inner.weight", gate="hard")
        mm.mask_parameter(model, "1.scale", mask_init=None)
        assert mm.tasks(model) == ["b", "c"] and mm.slots(model) == [None, "b", "c"]
        assert [name for name, _ in model.named_parameters() if name.endswith(".c")] == [
            "0.masks.c",
            "0.bias_masks.c",
            "1.inner.masks.c",
            "1.shift_masks.c",
            "1.scale_masks.c",
        ]
        assert model[1].shift_masks["b"].unique().tolist() == [4.0]
        x = torch.randn(2, 3)
        with mm.using_task(model, ["c", "b"]):
            y = model(x)
        with mm.using_task(model, "b"):
            torch.testing.assert_close(y[1:], model(x[1:]))

    def test_a_mask_trains_alone(self):
        module = mm.mask_parameter(Scaled().requires_grad_(False), "shift", mask_init=0.0)
        with torch.no_grad():
            dict(module.named_parameters())["shift"].fill_(1.0)
        module(torch.randn(4, 3)).square().sum().backward()
        assert [name for name, parameter in module.named_parameters() if parameter.grad is not None] == ["shift_masks.default"]

    def test_a_parameter_of_a_subclass_with_a_forward_of_its_own(self):
        class Gained(nn.Linear):
            def __init__(self):
                super().__init__(3, 2)
                self.gain = nn.Parameter(torch.ones(2, 1))

            def forward(self, x):
                return nn.functional.linear(x, self.weight * self.gain, self.bias)

        model = randomize_masks(mm.mask_parameter(mm.convert(nn.Sequential(Gained())), "0.gain"))
        assert [name for name, _ in model[0].named_parameters()][3:] == [
            "masks.default",
            "bias_masks.default",
            "gain_masks.default",
        ]
        report = mm.conversion_report(model)
        assert report.left == () and report.masked == report.total
        x = torch.randn(4, 3)
        torch.testing.assert_close(mm.merge(model, "default")(x), model(x))

    def test_it_is_public(self):
        assert mm.mask_parameter.__module__ == "metamask_ext.nn.parameter"
        assert list(inspect.signature(mm.mask_parameter).parameters) == ["module", "name", "mask_init", "mask_dtype", "options"]


class _Property(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_parameter("scale_", nn.Parameter(torch.ones(1)))
        self._parameters["scale"] = nn.Parameter(torch.ones(1))

    @property
    def scale(self):
        return self._parameters["scale"]

    def forward(self, x):
        return x * self.scale


class _Extra(Scaled):
    def get_extra_state(self):
        return torch.ones(1)

    def set_extra_state(self, state):
        pass


class _Gate(Scaled):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(3, 3)


class _Past(Scaled):
    def forward(self, x):
        return x * self._parameters["scale"]


class _Unread(Scaled):
    def forward(self, x):
        return x


def _replaced():
    module = Scaled()
    module.forward = lambda x: x * module.scale
    return module


REFUSED = {
    "no-such-name": (Scaled, "other", "name must be a parameter of Scaled"),
    "none": (Scaled, "none", "it is no parameter"),
    "a-module": (Scaled, "inner", "name must be a parameter"),
    "no-such-path": (Scaled, "outer.weight", "name must be a parameter"),
    "empty": (Scaled, "", "name must be a parameter"),
    "scalar": (Scaled, "count", "it is a scalar"),
    "integers": (lambda: _with(Scaled(), torch.ones(3, dtype=torch.int64)), "scale", "torch.int64"),
    "complex": (lambda: Scaled().to(torch.complex64), "scale", "torch.complex64"),
    "lazy": (lambda: nn.LazyLinear(2), "weight", "it is lazy"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(3, 2)), "weight", "name must be a parameter"),
    "of-a-parametrization": (
        lambda: parametrizations.weight_norm(nn.Linear(3, 2)),
        "parametrizations.weight.original0",
        "not a parameter of the module's own",
    ),
    "masked-already": (lambda: mm.mask_parameter(Scaled(), "scale"), "scale", "it is masked already"),
    "of-a-masked-layer": (lambda: MaskedLinear(3, 2), "weight", "it is masked already"),
    "a-mask": (lambda: MaskedLinear(3, 2), "masks.default", "not a parameter of the module's own"),
    "per-task": (lambda: mm.nn.TaskBatchNorm2d(3, per_task_affine=False), "weight", "whose other"),
    "property": (_Property, "scale", "in a way of its own"),
    "extra-state": (_Extra, "scale", "extra state of its own"),
    "attribute-of-ours": (_Gate, "scale", "an attribute 'gate' of its own"),
    "past-the-attribute": (_Past, "scale", "takes parameters from _parameters"),
    "unread": (_Unread, "scale", "does not read its attribute scale"),
    "replaced-forward": (_replaced, "scale", "replaced on the object"),
    "recurrent": (lambda: nn.LSTM(3, 3), "weight_ih_l0", "does not read its attribute weight_ih_l0"),
    "parameter-list": (lambda: nn.ParameterList([torch.ones(2)]), "0", "in a way of its own"),
}


def _with(module, tensor):
    module._parameters["scale"] = nn.Parameter(tensor, requires_grad=False)
    return module


class TestRefuses:
    @pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:Complex modules")
    @pytest.mark.parametrize("case", REFUSED)
    def test_what_it_could_not_mask_rightly(self, case):
        make, name, words = REFUSED[case]
        module = make()
        before = kinds(module)
        with pytest.raises(ValueError, match=words):
            mm.mask_parameter(module, name)
        assert kinds(module) == before

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"gate": "soft"}, ValueError),
            ({"temperature": 0.0}, ValueError),
            ({"mask_init": "uniform"}, ValueError),
            ({"mask_dtype": torch.float64}, TypeError),
            ({"bias": True}, TypeError),
        ],
    )
    def test_wrong_options_change_nothing(self, options, error):
        module = Scaled()
        before = kinds(module)
        with pytest.raises(error):
            mm.mask_parameter(module, "scale", **options)
        assert kinds(module) == before

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
    def test_a_script(self):
        with pytest.raises(ValueError, match="not a Python function"):
            mm.mask_parameter(torch.jit.script(nn.LayerNorm(3)), "weight")

    def test_no_module_and_no_name(self):
        with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module"):
            mm.mask_parameter([Scaled()], "scale")
        with pytest.raises(TypeError, match="name must be a string"):
            mm.mask_parameter(Scaled(), 3)

    def test_other_options_beside_masks_that_are_there(self):
        module = mm.mask_parameter(Scaled(), "scale", gate="hard", threshold=0.5, mask_init=1.0)
        for options in ({"gate": "sigmoid"}, {"threshold": 0.0}, {"mask_init": 2.0}, {"mask_dtype": torch.float32}):
            with pytest.raises(ValueError, match="which all have its options"):
                mm.mask_parameter(module, "shift", **options)
        mm.mask_parameter(module, "shift", gate="hard")
        assert (module.gate, module.threshold, module.shift_masks["default"].unique().tolist()) == ("hard", 0.5, [1.0])

    def test_a_batch_of_several_tasks_whose_samples_nothing_tells(self):
        class Two(Scaled):
            def forward(self, x, other, scale=1.0):
                return super().forward(x) + other * scale

        model = mm.mask_parameter(Two(), "scale")
        mm.add_task(model, "b")
        x = torch.randn(2, 3)
        with mm.using_task(model, ["b", "default"]), pytest.raises(RuntimeError, match="must be called with one tensor"):
            model(x, x)
        with mm.using_task(model, ["b", "b"]), pytest.raises(RuntimeError, match="must be called with one tensor"):
            model(x, other=x)
        with mm.using_task(model, "b"):
            assert model(x, x, scale=2.0).shape == (2, 3)

    def test_an_output_without_samples(self):
        class Sums(Scaled):
            def forward(self, x):
                return {"y": super().forward(x), "sum": (x * self.scale).sum()}

        model = mm.mask_parameter(Sums(), "scale")
        mm.add_task(model, "b")
        with mm.using_task(model, ["b", "default"]), pytest.raises(RuntimeError, match="dimension 0 must be theirs"):
            model(torch.randn(2, 3))
        with mm.using_task(model, "b"):
            assert set(model(torch.randn(2, 3))) == {"y", "sum"}


class TestMixtures:
    def test_convert_masks_experts_and_their_router(self):
        model = mm.convert(nn.Sequential(nn.Linear(4, 4), Mixture()), on_unsupported="error")
        assert {name.rpartition(".")[0] for name, _ in model.named_parameters() if name.endswith("default")} == {
            *("0.masks", "0.bias_masks", "1.gate.masks", "1.experts.gate_up_proj_masks", "1.experts.down_proj_masks"),
        }

    def test_experts_by_themselves_refuse_rows_of_which_they_do_not_know_the_sample(self):
        model = Mixture()
        for name in ("gate_up_proj", "down_proj"):
            mm.mask_parameter(model, f"experts.{name}")
        mm.add_task(model, "b")
        with mm.using_task(model, ["b", "default"]), pytest.raises(RuntimeError, match="whose token a row is"):
            model(torch.randn(2, 3, 4))
        with mm.using_task(model, ["b", "default"]):
            assert model(torch.randn(2, 1, 4)).shape == (2, 1, 4)  # a token is a sample
        x = torch.randn(2, 3, 4)
        mm.nn.split_by_task(model)
        with mm.using_task(model, ["b", "default"]):
            y = model(x)
        with mm.using_task(model, "b"):
            torch.testing.assert_close(model(x[:1]), y[:1])

    def test_each_weight_is_masked_once_a_forward(self, monkeypatch):
        model = masks_on(mm.convert(Mixture()))
        reads = []
        from metamask_ext.nn import read_through

        original = read_through.masked_value
        monkeypatch.setattr(read_through, "masked_value", lambda layer, what: reads.append(what) or original(layer, what))
        x = torch.randn(2, 3, 4)
        model(x)
        assert sorted(reads) == ["down_proj", "gate_up_proj", "weight"]
        before = model(x)
        with torch.no_grad():
            model.experts._parameters["down_proj"].mul_(2)
        torch.testing.assert_close(model(x), before * 2)

    def test_what_a_forward_has_read_is_computed_again_where_it_changed(self):
        class Writes(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(2))
                self.held = [self.scale]

            def forward(self, x):
                first = x * self.scale
                with torch.no_grad():
                    self.held[0].mul_(3)
                return first, x * self.scale

        model = masks_on(mm.mask_parameter(Writes(), "scale"))
        with torch.no_grad():
            first, second = model(torch.ones(2))
        assert first.tolist() == [1.0, 1.0] and second.tolist() == [3.0, 3.0]


def test_convert_reaches_conv1d_of_transformers_and_positions_stay_for_mask_parameter():
    model = mm.convert(nn.Sequential(Conv1D(6, 4), nn.GELU(), Conv1D(4, 6), Positions()))
    report = mm.conversion_report(model)
    assert [(left.name, left.parameters) for left in report.left] == [("3", 12)]
    mm.mask_parameter(model, "3.position_embeddings")
    assert mm.conversion_report(model).left == ()
    assert isinstance(Experts(), nn.Module)
