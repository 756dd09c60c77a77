"""conversion_report, and convert where a model holds subclasses of layers: those of timm have forwards of their own."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.models import masks_on, randomize_masks
from torch import fx, nn
from torch.nn.utils import parametrizations, prune

import metamask_ext
from metamask_ext import MaskBank, add_task, conversion_report, convert, merge, tasks, using_task
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedLayer, TaskBatchNorm2d
from metamask_ext.nn.per_task import PerTask
from metamask_ext.optim import FusedMaskedSGD


class _Casting(nn.Linear):
    """As timm's Linear."""

    def forward(self, input):
        bias = self.bias.to(dtype=input.dtype) if self.bias is not None else None
        return F.linear(input, self.weight.to(dtype=input.dtype), bias=bias)


class _Twice(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


class _Same(nn.Conv2d):
    """As timm's Conv2dSame."""

    def forward(self, x):
        x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class _Standardised(nn.Conv2d):
    """As timm's ScaledStdConv2d, with a parameter of its own."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 0.7))

    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, weight=self.gain.view(-1), training=True, momentum=0.0
        )
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class _OwnConv(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight / 2, bias)


class _Inherited(nn.Linear):
    """A subclass with torch's forward."""


class _NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.act = nn.LeakyReLU(inplace=True)

    def forward(self, x):
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps)
        return self.act(x)


class _Replacing(nn.BatchNorm2d):
    """Assigns its statistics instead of writing to them."""

    def forward(self, x):
        if self.training:
            mean = x.mean((0, 2, 3)).detach()
            self.running_mean = 0.5 * self.running_mean + 0.5 * mean
        return (x - self.running_mean[:, None, None]) * self.weight[:, None, None] + self.bias[:, None, None]


SUBCLASSES = {
    "casting": (lambda: _Casting(4, 3), (4,)),
    "casting-no-bias": (lambda: _Casting(4, 3, bias=False), (4,)),
    "twice": (lambda: _Twice(4, 3), (4,)),
    "same": (lambda: _Same(2, 3, 2, stride=2), (2, 4, 4)),
    "standardised": (lambda: _Standardised(2, 3, 2), (2, 4, 4)),
    "own-conv": (lambda: _OwnConv(2, 3, 2, padding=1, padding_mode="reflect"), (2, 4, 4)),
    "inherited": (lambda: _Inherited(4, 3), (4,)),
}


def _weight_of(layer):
    return layer._parameters["weight"]


def _linear(forward, **members):
    return type("_PastAttribute", (nn.Linear,), {"forward": forward, **members})(4, 3)


def _past_super(self, x):
    return nn.Linear.forward(self, x) + F.linear(x, self._parameters["weight"])


PAST_ATTRIBUTES = {
    "parameters-dict": lambda self, x: F.linear(x, self._parameters["weight"], self.bias),
    "bias-only": lambda self, x: F.linear(x, self.weight, self._parameters["bias"]),
    "get": lambda self, x: F.linear(x, self._parameters.get("weight")),
    "named": lambda self, x: F.linear(x, dict(self.named_parameters())["weight"]),
    "parameters": lambda self, x: F.linear(x, *self.parameters()),
    "next": lambda self, x: F.linear(x, next(self.parameters())),
    "comprehension": lambda self, x: F.linear(x, next(p for n, p in self.named_parameters() if n == "weight")),
    "get-parameter": lambda self, x: F.linear(x, self.get_parameter("weight")),
    "state-dict": lambda self, x: F.linear(x, self.state_dict()["weight"]),
    "vars": lambda self, x: F.linear(x, vars(self)["_parameters"]["weight"]),
    "dict": lambda self, x: F.linear(x, self.__dict__["_parameters"]["weight"]),
    "getattr": lambda self, x: F.linear(x, getattr(self, "_parameters")["weight"]),  # noqa: B009  # as a user may write it
    "module-getattr": lambda self, x: F.linear(x, nn.Module.__getattr__(self, "weight")),
    "helper": lambda self, x: F.linear(x, _weight_of(self)),
    "beside-super": _past_super,
    "never": lambda self, x: F.linear(x, self.other),
}


@pytest.mark.parametrize("name", PAST_ATTRIBUTES)
def test_a_forward_that_takes_its_parameters_past_the_attributes_is_left(name):
    model = convert(nn.Sequential(nn.Linear(4, 4), _linear(PAST_ATTRIBUTES[name])))
    report = conversion_report(model)
    assert [left.name for left in report.left] == ["1"]
    assert report.masked == 20
    assert "its forward" in report.left[0].reason


def test_methods_and_properties_are_followed_to_the_parameters():
    kinds = [
        _linear(lambda self, x: F.linear(x, self.kept()), kept=lambda self: self._parameters["weight"]),
        _linear(lambda self, x: F.linear(x, self.kept), kept=property(lambda self: self._parameters["weight"])),
    ]
    assert len(conversion_report(convert(nn.Sequential(*kinds))).left) == 2


class _OwnConvPast(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, self._parameters["weight"], bias)


def test_a_conv_forward_past_the_attribute_is_left():
    assert [left.name for left in conversion_report(convert(nn.Sequential(nn.Linear(2, 2), _OwnConvPast(2, 3, 2)))).left] == ["1"]


def _apply_layer(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def _decorated(function):
    def call(self, *inputs):
        return function(self, *inputs)

    return call


THROUGH_ATTRIBUTES = {
    "dtype": lambda self, x: F.linear(x.to(next(self.parameters()).dtype), self.weight, self.bias),
    "dict-dtype": lambda self, x: F.linear(x.to(self._parameters["weight"].dtype), self.weight, self.bias),
    "is-none": lambda self, x: F.linear(x, self.weight, None if self._parameters["bias"] is None else self.bias),
    "cache": lambda self, x: F.linear(x, self.weight, self.bias) * self.__dict__.get("scale", 1),
    "getattr": lambda self, x: F.linear(x, getattr(self, "weight"), self.bias),  # noqa: B009  # as a user may write it
    "helper": lambda self, x: _apply_layer(self, x),
    "torch": lambda self, x: nn.Linear.forward(self, x),
    "decorated": _decorated(lambda self, x: F.linear(x, self.weight, self.bias)),
    "no-grad": torch.no_grad()(lambda self, x: F.linear(x, self.weight, self.bias)),
}


@pytest.mark.parametrize("name", THROUGH_ATTRIBUTES)
def test_a_forward_that_reads_its_attributes_is_masked(name):
    layer = convert(nn.Sequential(_linear(THROUGH_ATTRIBUTES[name]).double()))
    assert conversion_report(layer).left == ()
    x = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), merge(layer, "default")(x))


MIXED = ["b", "default", "p", "b"]


def _three_tasks(make):
    model = convert(nn.Sequential(make().double()))
    bank = MaskBank(model)
    add_task(model, "b")
    add_task(model, "p")
    randomize_masks(model)
    bank.pack("p")
    return model, bank


@pytest.mark.parametrize("name", SUBCLASSES)
class TestOwnForwards:
    def test_the_forward_runs_with_the_masked_weight(self, name):
        make, shape = SUBCLASSES[name]
        plain, x = nn.Sequential(make()), torch.randn(5, *shape)
        model = convert(copy.deepcopy(plain))
        assert isinstance(model[0], MaskedLayer) and (name == "inherited" or isinstance(model[0], type(plain[0])))
        assert model[0]._parameters.keys() == plain[0]._parameters.keys()
        torch.testing.assert_close(masks_on(model)(x), plain(x))
        randomize_masks(model)
        merged = merge(model, "default")
        assert type(merged[0]) is type(plain[0])
        torch.testing.assert_close(model(x), merged(x))
        model(x).square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())

    def test_mixed_batches_are_each_sample_alone(self, name):
        make, shape = SUBCLASSES[name]
        model, _ = _three_tasks(make)
        x = torch.randn(4, *shape, dtype=torch.float64)
        grads, outputs = [], []
        for together in (True, False):
            model.zero_grad()
            if together:
                with using_task(model, MIXED):
                    y = model(x)
            else:
                y = []
                for task, one in zip(MIXED, x):
                    with using_task(model, task):
                        y.append(model(one[None]))
                y = torch.cat(y)
            y.square().sum().backward()
            outputs.append(y)
            grads.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(*grads)
        with using_task(model, ["b"] * 3), pytest.raises(RuntimeError, match=r"names a task for each of 3"):
            model(x)
        with pytest.raises(RuntimeError, match="none is active"):
            model(x)

    def test_it_is_copied_pickled_saved_traced_and_printed(self, name):
        make, shape = SUBCLASSES[name]
        model, bank = _three_tasks(make)
        x = torch.randn(4, *shape, dtype=torch.float64)
        loaded = convert(nn.Sequential(make().double()))
        loaded.load_state_dict(model.state_dict())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded, fx.symbolic_trace(model)):
            for task in ("b", "p", MIXED):
                with using_task(model, task), using_task(other, task):
                    torch.testing.assert_close(other(x), model(x))
            assert tasks(other) == ["default", "b", "p"] and type(other.get_submodule("0")) is type(model[0])
        assert "tasks=3" in repr(model) and model[0].reset_parameters() is None
        with bank.superpose({"b": 0.5, "p": 0.5}):
            assert model(x).shape[0] == 4

    def test_training(self, name):
        make, shape = SUBCLASSES[name]
        x = torch.randn(4, *shape, dtype=torch.float64)
        models = [_three_tasks(make)[0]]
        models.append(copy.deepcopy(models[0]))
        fused = FusedMaskedSGD(models[0], lr=0.1)
        plain = torch.optim.SGD(models[1].parameters(), lr=0.1)
        for _ in range(2):
            with using_task(models[0], "b"), using_task(models[1], "b"):
                fused.backward(models[0](x).square().mean())
                plain.zero_grad()
                models[1](x).square().mean().backward()
                plain.step()
        torch.testing.assert_close(dict(models[0].named_parameters()), dict(models[1].named_parameters()))


@pytest.mark.parametrize("name", ["casting", "standardised", "inherited"])
def test_a_meta_learner_adapts_masks_of_own_forwards(name):
    make, shape = SUBCLASSES[name]
    models = [nn.Sequential(make().double(), nn.Flatten()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    convert(models[0], mask_init="normal")
    convert(models[1], mask_init="normal")
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(3, 2, *shape, dtype=torch.float64)
    y = torch.randn(3, 2, *models[0](x[0]).shape[1:], dtype=torch.float64)
    together = MAML(models[0], 0.1)(F.mse_loss, (x, y), (x, y))
    alone = torch.stack([MAML(models[1], 0.1)(F.mse_loss, (a[None], b[None]), (a[None], b[None])) for a, b in zip(x, y)]).mean()
    torch.testing.assert_close(together, alone)
    together.backward()
    alone.backward()
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(one.grad, other.grad)


def test_tasks_are_inferred_through_own_forwards():
    torch.manual_seed(0)
    found = []
    for kind in (_Casting, nn.Linear):
        torch.manual_seed(0)
        model = convert(nn.Sequential(kind(4, 6), nn.ReLU(), kind(6, 3)), mask_init="normal")
        bank = MaskBank(model)
        for task in "abc":
            add_task(model, task)
        bank.pack("b")
        found.append([bank.infer_task(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)))])
        found[-1].append(bank.infer_task(torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), per_sample=False))
    assert found[0] == found[1]


class TestNorms:
    @pytest.mark.parametrize("kind", [_NormAct, _Replacing])
    @pytest.mark.parametrize("train", [True, False])
    def test_statistics_of_each_task_in_a_norm_with_a_forward_of_its_own(self, kind, train):
        model = convert(nn.Sequential(nn.Conv2d(2, 3, 1), kind(3)), batch_norm="task").train(train)
        assert isinstance(model[1], PerTask) and isinstance(model[1], kind)
        add_task(model, "b", init="copy:default")
        alone = {task: copy.deepcopy(model) for task in ("b", "default")}
        names, x = ["b", "default", "default", "b"], torch.randn(4, 2, 3, 3)
        with using_task(model, names):
            y = model(x)
        for task, other in alone.items():
            rows = [index for index, name in enumerate(names) if name == task]
            with using_task(other, task):
                torch.testing.assert_close(y[rows], other(x[rows]))
            with using_task(model, task), using_task(other, task):
                torch.testing.assert_close(model[1].running_mean, other[1].running_mean)
                assert bool(model[1].running_mean.any()) == train
        y.sum().backward()
        merged = merge(model.eval(), "b")
        assert type(merged[1]) is kind
        with using_task(model, "b"):
            torch.testing.assert_close(merged(x), model(x))

    def test_a_norm_that_cannot_is_left_and_reported(self):
        model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, affine=False, track_running_stats=False), nn.BatchNorm2d(3))
        model[2].forward = lambda x: x
        with pytest.raises(ValueError, match=r"cannot mask '2', a BatchNorm2d: its forward was replaced on the object"):
            convert(model, batch_norm="task", on_unsupported="error", exclude="1")
        convert(model, batch_norm="task")
        assert [entry.name for entry in conversion_report(model).left] == ["2"]

    def test_what_belongs_to_tasks_is_replaced_for_one_task_only(self):
        norm = TaskBatchNorm2d(2)
        add_task(norm, "b")
        with using_task(norm, "b"):
            norm.running_mean = torch.ones(2)
        assert norm.per_task["running_mean"]["b"].tolist() == [1, 1] and not norm.per_task["running_mean"]["default"].any()
        with (
            using_task(norm, ["b", "default"]),
            pytest.raises(RuntimeError, match="running_mean of TaskBatchNorm2d belongs to tasks"),
        ):
            norm.running_mean = torch.ones(2)


class _Conv1D(nn.Module):
    """As GPT-2's linear layer in transformers."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.zeros(6))


class _Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.embed = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.conv1d = _Conv1D()
        self.norm = nn.LayerNorm(4)
        self.batch_norm = nn.BatchNorm2d(4)
        self.kept = nn.Linear(4, 4)
        self.lazy = nn.LazyLinear(3)
        self.tags = nn.Sequential(_Casting(4, 2), _Inherited(2, 2))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


class TestReport:
    @pytest.mark.filterwarnings("ignore:Lazy modules")
    def test_it_lists_what_was_left_with_its_type_and_the_reason(self):
        model = convert(_Everything(), exclude="kept")
        report = conversion_report(model)
        assert report.masked == (3 * 16 + 12) + 4 * 4 + 4 + (4 * 2 + 2) + (2 * 2 + 2) + 7 * 4
        assert report.total == report.masked + 4 + (24 + 6) + 8 + 8 + 20
        assert report.share == report.masked / report.total and report.per_task == 0
        found = {entry.name: (entry.type, entry.parameters, entry.reason) for entry in report.left}
        assert found == {
            "": ("_Everything", 4, "token: neither Linear nor Conv2d"),
            "embed": ("Embedding", 28, "it shares its parameter with 'head', which masks it; here it is used as it is"),
            "conv1d": ("_Conv1D", 30, "weight, bias: neither Linear nor Conv2d"),
            "norm": ("LayerNorm", 8, "a normalisation, shared by all tasks"),
            "batch_norm": (
                "BatchNorm2d",
                8,
                "a normalisation, shared by all tasks: batch_norm='task' gives each its own",
            ),
            "kept": ("Linear", 20, "convert can mask it, and was not asked to"),
            "lazy": ("LazyLinear", 0, "it is lazy: run the model once first"),
        }

    def test_it_is_frozen_and_prints_as_a_table(self):
        report = conversion_report(convert(nn.Sequential(nn.Linear(4, 2), nn.Embedding(3, 2), nn.BatchNorm2d(2))))
        assert str(report).splitlines() == [
            "10 of 20 parameters are masked (50.0%)",
            "left  type         parameters  reason",
            "1     Embedding             6  weight: an embedding, which convert masks where include= names it",
            "2     BatchNorm2d           4  a normalisation, shared by all tasks: batch_norm='task' gives each its own",
        ]
        with pytest.raises(dataclasses.FrozenInstanceError):
            report.masked = 1
        assert pickle.loads(pickle.dumps(report)) == report

    def test_statistics_and_heads_of_tasks_and_models_without_masks(self):
        model = convert(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)), batch_norm="task")
        for task in ("b", "c"):
            report = conversion_report(model)
            assert (report.masked, report.per_task, report.total, report.left) == (9, 6, 15, ())
            assert str(report) == "9 of 15 parameters are masked (60.0%), 6 of each task. Nothing was left."
            add_task(model, task)
        plain = conversion_report(nn.Linear(2, 2))
        assert (plain.masked, plain.total, plain.share) == (0, 6, 0.0) and plain.left[0].name == ""
        assert conversion_report(nn.ReLU()).share == 0.0
        with pytest.raises(TypeError, match="Module"):
            conversion_report([nn.Linear(2, 2)])
        assert metamask_ext.conversion_report is conversion_report

    def test_shared_and_used_twice_parameters_count_once(self):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        model[1].weight = model[0].weight
        model.append(model[0])
        report = conversion_report(convert(model))
        assert (report.masked, report.total) == (4, 4)


class TestOnUnsupported:
    def test_an_error_names_everything_that_would_be_left_and_changes_nothing(self):
        model = _Everything()
        before = [type(module) for module in model.modules()]
        with pytest.raises(
            ValueError, match=r"cannot mask 'the model', a _Everything: .*; 'conv1d', .*exclude=\['', 'embed', 'conv"
        ):
            convert(model, on_unsupported="error")
        assert [type(module) for module in model.modules()] == before
        left = ["", "embed", "conv1d", "lazy"]
        convert(model, on_unsupported="error", exclude=left)
        assert {entry.name for entry in conversion_report(model).left} - set(left) == {"norm", "batch_norm"}

    def test_an_error_is_of_what_was_asked_for(self):
        model = convert(_Everything(), include="tags.*", on_unsupported="error")
        assert isinstance(model.tags[0], MaskedLayer) and not isinstance(model.kept, MaskedLayer)
        convert(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.BatchNorm2d(2)), on_unsupported="error")
        convert(convert(nn.Sequential(nn.Linear(2, 2))), on_unsupported="error")


REPARAMETRISED = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "bias-pruned": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
    "weight-norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "old-spectral-norm": nn.utils.spectral_norm,
    "old-weight-norm": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", REPARAMETRISED)
def test_the_originals_of_a_masked_weight_are_not_left(name):
    model = convert(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    REPARAMETRISED[name](model[0])
    report = conversion_report(model)
    assert (report.masked, report.total, report.left) == (212, 212, ())


def test_the_originals_of_another_parameter_of_a_masked_layer_are_left():
    model = convert(nn.Sequential(_Standardised(2, 3, 2)))
    prune.l1_unstructured(model[0], "gain", 0.5)
    assert [(left.name, left.parameters) for left in conversion_report(model).left] == [("0", 3)]
