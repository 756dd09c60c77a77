"""TaskBatchNorm2d: a BatchNorm2d for each task, alone and in mixed-task batches."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support.models import assert_same_gradients, gradients
from torch import nn

from metamask_ext import MaskBank, add_task, convert, merge, remove_task, slots, tasks, using_task
from metamask_ext.nn import MaskedConv2d, TaskBatchNorm2d

NAMES = ["b", "a", "b", "b", "a"]
OPTIONS = [
    {},
    {"per_task_affine": False},
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": None},
    {"momentum": 0.3, "eps": 0.1},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def make(dtype=torch.float64, **options):
    """Two tasks, whose tensors all differ."""
    layer = TaskBatchNorm2d(3, dtype=dtype, **options)
    for task in ("a", "b"):
        add_task(layer, task)
    remove_task(layer, "default")
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return layer


def plain_of(layer):
    """torch's layer for each task, with that task's tensors."""
    return {task: merge(layer, task) for task in tasks(layer)}


def statistics(layer, task):
    return {name: tensors[task].clone() for name, tensors in layer.per_task.items() if name.startswith(("running", "num"))}


def assert_same_statistics(layer, plain):
    for task, module in plain.items():
        for name, got in statistics(layer, task).items():
            torch.testing.assert_close(
                got, getattr(module, name), msg=lambda text, name=name, task=task: f"{name} of {task}: {text}"
            )


@each_option
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_one_task_is_torchs_layer_and_leaves_the_other_alone(options, training):
    layer = make(**options).train(training)
    plain = {task: module.train(training) for task, module in plain_of(layer).items()}
    x = torch.randn(5, 3, 4, 2, dtype=torch.float64)
    for _ in range(3):
        with using_task(layer, "a"):
            got = layer(x)
        torch.testing.assert_close(got, plain["a"](x), rtol=0, atol=0)
    assert_same_statistics(layer, plain)


@each_option
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("names", [NAMES, ["a"] * 5], ids=["mixed", "one-task"])
def test_a_mixed_batch_is_each_tasks_samples_alone(options, training, names):
    layer = make(**options).train(training)
    plain = {task: module.train(training) for task, module in plain_of(layer).items()}
    for _ in range(3):
        x = torch.randn(5, 3, 4, 2, dtype=torch.float64).requires_grad_()
        with using_task(layer, names):
            got = layer(x)
        wanted = torch.empty_like(got)
        for task in set(names):
            rows = [row for row, name in enumerate(names) if name == task]
            wanted[rows] = plain[task](x[rows])
        torch.testing.assert_close(got, wanted)
        weights = torch.randn_like(got)
        leaves = [x, *layer.parameters()]
        grads = torch.autograd.grad((got * weights).sum(), leaves, allow_unused=True)
        (wanted_dx,) = torch.autograd.grad((wanted * weights).sum(), [x], retain_graph=True)
        torch.testing.assert_close(grads[0], wanted_dx)
        for (name, parameter), grad in zip(layer.named_parameters(), grads[1:]):
            if ".per_task" in f".{name}":
                _, kind, task = name.rsplit(".", 2)
                if task not in names:
                    assert grad is None
                    continue
                own = getattr(plain[task], kind)
                torch.testing.assert_close(grad, torch.autograd.grad((wanted * weights).sum(), own, retain_graph=True)[0])
            assert grad.shape == parameter.shape
    assert_same_statistics(layer, plain)


def test_the_formula_worked_out_by_hand():
    # Task a: values 1 and 3, mean 2, biased variance 1; task b: 10 and 20, mean 15, variance 25. eps = 0.
    layer = TaskBatchNorm2d(1, eps=0.0, momentum=0.5)
    add_task(layer, "b")
    x = torch.tensor([1.0, 10.0, 3.0, 20.0]).reshape(4, 1, 1, 1)
    with using_task(layer, ["default", "b", "default", "b"]):
        assert layer(x).flatten().tolist() == [-1.0, -1.0, 1.0, 1.0]
    assert layer.per_task["running_mean"]["default"].item() == 1.0  # half of 0 and 2
    assert layer.per_task["running_mean"]["b"].item() == 7.5
    assert layer.per_task["running_var"]["default"].item() == 1.5  # half of 1 and the unbiased 2
    assert layer.per_task["running_var"]["b"].item() == 25.5
    assert layer.per_task["num_batches_tracked"]["b"].item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs_are_computed_in_float32(dtype):
    layer = make(torch.float32)
    x = torch.randn(5, 3, 4, 4).to(dtype)
    twin = copy.deepcopy(layer)
    with using_task(layer, NAMES):
        got = layer(x)
    with using_task(twin, NAMES):
        wanted = twin(x.float())
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted.to(dtype), rtol=0, atol=0)


def test_a_task_with_one_value_per_channel_is_refused_when_training_only():
    layer = make()
    x = torch.randn(3, 3, 1, 1, dtype=torch.float64)
    with using_task(layer, ["a", "b", "a"]):
        with pytest.raises(ValueError, match="more than one value per channel .* one for 'b'"):
            layer(x)
        assert layer.eval()(x).shape == x.shape


def test_other_inputs_are_refused_as_by_torch():
    layer = make()
    with using_task(layer, NAMES):
        with pytest.raises(ValueError, match="4D"):
            layer(torch.randn(5, 3, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="4 samples .* for each of 5"):
            layer(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="none is active"):
        layer(torch.randn(5, 3, 2, 2, dtype=torch.float64))


def test_nothing_left_for_a_task_is_refused():
    for options in ({"affine": False}, {"per_task_affine": False}):
        with pytest.raises(ValueError, match="for each task"):
            TaskBatchNorm2d(3, track_running_stats=False, **options)


def test_a_batch_of_no_sample_is_empty_and_moves_no_statistic():
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    with using_task(layer, []):
        assert layer(torch.randn(0, 3, 4, 2, dtype=torch.float64)).shape == (0, 3, 4, 2)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


class TestTasks:
    def test_it_follows_the_tasks_of_its_model(self):
        model = nn.Sequential(MaskedConv2d(2, 3, 3), TaskBatchNorm2d(3))
        add_task(model, "a")
        assert tasks(model) == tasks(model[1]) == ["default", "a"]
        remove_task(model, "default")
        assert slots(model) == slots(model[1]) == [None, "a"]

    def test_a_new_task_begins_as_torchs_layer_or_as_init_says(self):
        layer = make()
        add_task(layer, "new")
        add_task(layer, "copy", init="copy:b")
        add_task(layer, "mixed", init={"a": 0.25, "b": 0.75})
        fresh = nn.BatchNorm2d(3, dtype=torch.float64)
        for name, tensors in layer.per_task.items():
            assert torch.equal(tensors["new"], getattr(fresh, name))
            assert torch.equal(tensors["copy"], tensors["b"])
            if tensors["a"].is_floating_point():
                torch.testing.assert_close(tensors["mixed"], 0.25 * tensors["a"] + 0.75 * tensors["b"])

    def test_reset_parameters_resets_every_task(self):
        layer = make()
        layer.reset_parameters()
        fresh = nn.BatchNorm2d(3, dtype=torch.float64)
        for name, tensors in layer.per_task.items():
            for task in tasks(layer):
                assert torch.equal(tensors[task], getattr(fresh, name))


class TestStateDict:
    def test_round_trip_into_a_layer_that_lacks_the_tasks(self):
        layer = make()
        buffer = io.BytesIO()
        torch.save(layer.state_dict(), buffer)
        buffer.seek(0)
        other = TaskBatchNorm2d(3, dtype=torch.float64)
        other.load_state_dict(torch.load(buffer, weights_only=True), strict=False)
        remove_task(other, "default")
        state = other.state_dict()
        for name, tensor in layer.state_dict().items():
            assert torch.equal(state[name], tensor), name

    @pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
    def test_a_plain_state_gives_every_task_its_values(self, assign):
        plain = nn.BatchNorm2d(3, dtype=torch.float64)
        with torch.no_grad():
            for tensor in plain.state_dict().values():
                tensor.copy_(torch.rand_like(tensor.double()))
        layer = make()
        layer.load_state_dict(plain.state_dict(), assign=assign)
        tensors = [tensors for _, tensors in sorted(layer.per_task.items())]
        for name, own in zip(sorted(layer.per_task), tensors):
            for task in tasks(layer):
                assert torch.equal(own[task], getattr(plain, name))
        assert layer.per_task["weight"]["a"].data_ptr() != layer.per_task["weight"]["b"].data_ptr()

    def test_missing_entries_are_named(self):
        layer = make()
        state = layer.state_dict()
        del state["per_task.weight.a"]
        with pytest.raises(RuntimeError, match=r"Missing key.*per_task\.weight\.a"):
            layer.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"Missing key.*per_task\.running_mean\.b"):
            layer.load_state_dict({})

    def test_copies_and_pickles_work(self):
        layer = make().eval()
        x = torch.randn(5, 3, 4, 2, dtype=torch.float64)
        with using_task(layer, NAMES):
            wanted = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(twin) is TaskBatchNorm2d
            with using_task(twin, NAMES):
                assert torch.equal(twin(x), wanted)


class TestConvert:
    def model(self):
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 2)).double()

    def test_batch_norm_stays_what_it_is_by_default(self):
        assert type(convert(self.model())[1]) is nn.BatchNorm2d

    def test_task_makes_it_a_task_batch_norm_that_keeps_its_tensors(self):
        model = self.model()
        weight, mean = model[1].weight, model[1].running_mean
        convert(model, batch_norm="task")
        assert type(model[1]) is TaskBatchNorm2d
        assert model[1].weight is weight and model[1].running_mean is mean
        add_task(model, "b")
        x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
        with using_task(model, "b"):
            model(x)
        assert torch.equal(model[1].per_task["running_mean"]["default"], torch.zeros(3).double())
        model.eval()
        with using_task(model, ["b", "default", "b", "default"]):
            got = model(x)
        for row, task in enumerate(["b", "default", "b", "default"]):
            torch.testing.assert_close(got[row : row + 1], merge(model, task)(x[row : row + 1]))

    def test_layers_that_are_converted_later_get_the_models_tasks_and_slots(self):
        model = convert(self.model(), include="0")
        for task in ("a", "b"):
            add_task(model, task)
        remove_task(model, "a")
        convert(model, batch_norm="task")
        assert slots(model) == slots(model[1]) == slots(model[3]) == ["default", None, "b"]
        assert model[1].per_task["weight"]["b"] is not model[1].per_task["weight"]["default"]

    def test_patterns_choose_batch_norms_too(self):
        assert type(convert(self.model(), exclude="1", batch_norm="task")[1]) is nn.BatchNorm2d
        with pytest.raises(ValueError, match="batch_norm must be 'shared' or 'task', got 'tasks'"):
            convert(self.model(), batch_norm="tasks")

    def test_merge_gives_torchs_layer_back(self):
        model = convert(self.model(), batch_norm="task").eval()
        merged = merge(model, "default")
        assert type(merged[1]) is nn.BatchNorm2d
        assert list(merged.state_dict()) == list(self.model().state_dict())
        x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
        torch.testing.assert_close(merged(x), model(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_are_right_for_one_task_and_for_many(backend):
    model = convert(TestConvert().model(), batch_norm="task")
    add_task(model, "b")
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    for given in ("b", "default", ["b", "b", "default", "default"], ["b"] * 4):
        results = []
        for call, target in ((compiled, model), (copy.deepcopy(model), None)):
            target = call if target is None else target
            with using_task(target, given):
                output = call(x)
            output.square().sum().backward()
            results.append((output.detach(), gradients(target)))
        (got, got_gradients), (wanted, wanted_gradients) = results
        torch.testing.assert_close(got, wanted)
        assert_same_gradients(got_gradients, wanted_gradients)


def test_a_mixed_batch_trains_statistics_that_tasks_share():
    """With weight and bias alone of each task, a mixed-task batch is its tasks one after another."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(MaskedConv2d(1, 2, 3), torch.nn.BatchNorm2d(2)).double()
    MaskBank(model, per_task=["1.weight", "1.bias"]).add_task("b")
    torch.nn.init.normal_(model[1].per_task["weight"]["b"])
    other, x = copy.deepcopy(model), torch.randn(4, 1, 5, 5, dtype=torch.float64)
    with using_task(model, ["default", "b", "default", "b"]):
        y = model(x)
    for first, task in enumerate(("default", "b")):
        with using_task(other, task):
            torch.testing.assert_close(y[first::2], other(x[first::2]), rtol=1e-10, atol=1e-12)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(model[1], name), getattr(other[1], name))
    assert model[1].num_batches_tracked == 2
