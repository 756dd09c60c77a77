"""Fused optimisers: the numbers of torch's whatever the graph, without storing gradients where they can."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from support.fused_steps import (
    ADAMW,
    SGD,
    assert_equal_models,
    batch,
    cnn,
    compare,
    each_kind,
    each_setting,
    error,
    mlp,
    ops_of,
    penalty,
    twice,
)
from support.gpu import DEVICES, SECOND
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel
from torch.profiler import ProfilerActivity, profile

import metamask_ext as mm
from metamask_ext import add_task, remove_task, using_task
from metamask_ext.nn import MaskedLinear


@pytest.mark.parametrize("device", [*DEVICES, SECOND])
@each_setting
@pytest.mark.parametrize("make", [mlp, cnn], ids=["mlp", "cnn"])
def test_the_numbers_are_those_of_torch(make, settings, device, kind):
    names = compare(lambda: make(device=device), kind, settings)
    # Every masked layer's parameters were updated inside the backward: no op that gives their gradients ran
    if kind is SGD or device == "cpu":
        assert {name for name in names if "backward" in name} == set(kind.ops[: 1 if make is mlp else 2])


@each_setting
def test_a_channels_last_model(settings, kind):
    names = compare(lambda: cnn().to(memory_format=torch.channels_last), kind, settings)
    assert kind.ops[1] in names and "metamask::masked_weight_backward" not in names


def _steady(kind):
    """Without gradients that 16 bits or a product in bfloat16 leave at chance, but whose size AdamW divides by."""
    return {**kind.settings, "eps": 1e-2} if kind is ADAMW else kind.settings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@each_kind
def test_other_dtypes(dtype, kind):
    """Ours rounds once a step where torch rounds after each operation."""
    tolerance = 50 * torch.finfo(dtype).eps
    assert kind.ops[0] in compare(lambda: mlp(dtype), kind, _steady(kind), tolerance=tolerance)


@each_kind
def test_under_autocast(kind):
    """float32 parameters, products in bfloat16: the steps differ from torch's by the roundings of the gradients' inputs."""

    def loss(model, x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (model(x).float() - y).square().mean()

    assert kind.ops[0] in compare(lambda: mlp(torch.float32), kind, _steady(kind), loss, tolerance=2**-6)


@each_kind
def test_a_scheduler_changes_the_learning_rate(kind):
    schedulers = []

    def prepare(model, optimizer):
        schedulers.append(torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))

    def loss(model, x, y):
        # Called once a step, alternately for ours and theirs
        value = error(model, x, y)
        loss.calls += 1
        if loss.calls > 2:
            schedulers[loss.calls % 2 == 0].step()
        return value

    loss.calls = 0
    names = compare(mlp, kind, kind.settings, loss, prepare=prepare)
    assert kind.ops[0] in names
    assert schedulers[0].optimizer.param_groups[1]["lr"] == pytest.approx(kind.settings["lr"] * 0.5**3)


@each_kind
def test_a_scheduler_sees_that_the_optimiser_stepped(recwarn, kind):
    model = mlp()
    optimizer = kind.ours(model, 0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    optimizer.backward(error(model, *batch(model, 0)))
    scheduler.step()
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


@each_setting
def test_tasks_added_and_removed_later(settings, kind):
    ours, theirs = mlp(), mlp()
    fused, plain = kind.ours(ours, **settings), kind.torchs(theirs, **settings)
    for model in (ours, theirs):
        add_task(model, "second", init="copy:default")
    masks = [p for n, p in theirs.named_parameters() if "second" in n]
    plain.param_groups[1]["params"].extend(masks)
    for seed, task in enumerate(("default", "second", "second", "default")):
        data = batch(ours, seed)
        with using_task(ours, task):
            value = error(ours, *data)
        assert set(ops_of(lambda value=value: fused.backward(value))) == {kind.ops[0]}
        with using_task(theirs, task):
            error(theirs, *data).backward()
        plain.step()
        plain.zero_grad()
    assert_equal_models(ours, theirs)
    # Its buffers go with a task
    states = len(fused.state)
    remove_task(ours, "second")
    fused.step()
    assert len(fused.state) == states - (0 if settings is SGD.plain else 4)
    assert len(fused.param_groups[1]["params"]) == 4
    assert fused.param_groups[1]["param_names"] == [
        "0.masks.default",
        "0.bias_masks.default",
        "2.masks.default",
        "2.bias_masks.default",
    ]


@each_kind
def test_a_new_task_is_found_by_an_ordinary_step_too(kind):
    model = mlp()
    optimizer = kind.ours(model, 0.1)
    add_task(model, "second")
    before = model[0].masks["second"].detach().clone()
    with using_task(model, "second"):
        error(model, *batch(model, 0)).backward()
    optimizer.step()
    assert not torch.equal(model[0].masks["second"], before)
    optimizer.zero_grad()
    assert model[0].masks["second"].grad is None


@each_kind
def test_masks_of_other_tasks_do_not_move(kind):
    model = mlp()
    add_task(model, "other")
    optimizer = kind.ours(model, **kind.settings)
    before = model[0].masks["other"].detach().clone()
    with using_task(model, "default"):
        optimizer.backward(error(model, *batch(model, 0)))
    assert torch.equal(model[0].masks["other"], before)


@each_kind
def test_the_state_survives_a_change_between_fused_and_ordinary_steps(kind):
    """The two share what torch keeps."""
    ours, theirs = mlp(), mlp()
    fused, plain = kind.ours(ours, **kind.settings), kind.torchs(theirs, **kind.settings)
    for seed, loss in enumerate((error, twice, error, penalty, error)):
        fused.backward(loss(ours, *batch(ours, seed)))
        loss(theirs, *batch(theirs, seed)).backward()
        plain.step()
        plain.zero_grad()
    assert_equal_models(ours, theirs)
    for p in ours.parameters():
        assert all(fused.state[p][name].shape == p.shape for name in kind.state)


@pytest.mark.parametrize(
    ("kind", "option"), [(SGD, "nesterov"), (SGD, "maximize"), (ADAMW, "amsgrad"), (ADAMW, "maximize")], ids=lambda it: str(it)[:9]
)
def test_options_that_the_fused_step_does_not_know_are_taken_by_the_ordinary_one(kind, option):
    def prepare(model, optimizer):
        for group in optimizer.param_groups:
            group[option] = True

    assert not set(compare(mlp, kind, kind.settings, prepare=prepare)) & set(kind.ops)


@each_kind
def test_a_parameter_group_of_the_users(kind):
    ours, theirs = mlp(), mlp()
    extra, other = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    fused, plain = kind.ours(ours, 0.1), kind.torchs(theirs, 0.1)
    fused.add_param_group({"params": [("extra", extra)], "lr": 0.5})
    plain.add_param_group({"params": [other], "lr": 0.5})
    add_task(ours, "second", init="copy:default")
    remove_task(ours, "second")
    for seed in range(2):
        fused.backward((extra * error(ours, *batch(ours, seed))).sum())
        (other * error(theirs, *batch(theirs, seed))).sum().backward()
        plain.step()
        plain.zero_grad()
    assert_equal_models(ours, theirs)
    assert torch.equal(extra, other) and not torch.equal(extra, torch.ones_like(extra))


@each_kind
def test_state_dict_continues_where_it_was_and_refuses_another_order(kind):
    def run(model, optimizer, seeds):
        for seed in seeds:
            with using_task(model, "second" if seed % 2 else "default"):
                optimizer.backward(error(model, *batch(model, seed)))

    def make(names):
        model = mlp()
        for name in names:
            add_task(model, name, init="copy:default")
        return model

    whole = make(["second"])
    optimizer = kind.ours(whole, **kind.settings)
    run(whole, optimizer, range(6))

    # The task is added after the optimiser was made: its state must still meet that of a model that has it from the beginning
    half = mlp()
    first = kind.ours(half, **kind.settings)
    add_task(half, "second", init="copy:default")
    run(half, first, range(3))
    other = make(["second"])
    other.load_state_dict(half.state_dict())
    second = kind.ours(other, lr=1.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(other, second, range(3, 6))
    assert_equal_models(other, whole, tolerance=0.0)

    with pytest.raises(ValueError, match=r"state_dict must have the model's parameters in group 1, .*masks\.third"):
        kind.ours(make(["third"]), 0.1).load_state_dict(first.state_dict())


def _checkpointed(model):
    for name, layer in list(model.named_children()):
        setattr(model, name, checkpoint_wrapper(layer))
    return model


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, AveragedModel, _checkpointed, lambda model: nn.DataParallel(_checkpointed(model))]
)
@each_kind
def test_a_state_with_the_names_of_a_wrapped_model_is_loaded(wrap, kind):
    model = wrap(mlp())
    optimizer = kind.ours(model, **kind.settings)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    of_torch = {parameter: name for name, parameter in model.named_parameters()}
    for group, kept in zip(optimizer.param_groups, saved["param_groups"]):
        kept["param_names"] = [of_torch[parameter] for parameter in group["params"]]
        assert kept["param_names"] != group["param_names"]
    given = copy.deepcopy(saved)

    other = kind.ours(model, lr=1.0)
    other.load_state_dict(given)
    assert given["param_groups"] == saved["param_groups"]
    assert [group["param_names"] for group in other.param_groups] == [group["param_names"] for group in optimizer.param_groups]
    for parameter, state in optimizer.state.items():
        assert all(torch.equal(other.state[parameter][name], tensor) for name, tensor in state.items())

    given["param_groups"][0]["param_names"].reverse()
    with pytest.raises(ValueError, match="the model's parameters in group 0, got others"):
        kind.ours(model, lr=1.0).load_state_dict(given)


@each_kind
def test_a_copy_of_model_and_optimiser_goes_on_alone(kind):
    model = mlp()
    optimizer = kind.ours(model, **kind.settings)
    optimizer.backward(error(model, *batch(model, 0)))
    twin, other = copy.deepcopy((model, optimizer))
    assert other.model is twin
    before = copy.deepcopy(model)
    add_task(twin, "second", init="copy:default")
    with using_task(twin, "second"):
        assert set(ops_of(lambda: other.backward(error(twin, *batch(twin, 1))))) & set(kind.ops)
    assert_equal_models(model, before, tolerance=0.0)
    assert not torch.equal(twin[0].weight, model[0].weight)


@each_kind
def test_two_optimisers_in_two_threads(kind):
    """The steps are on the nodes: one optimiser's do not reach the other's backward."""
    models = [mlp() for _ in range(2)]
    optimizers = [kind.ours(model, lr) for model, lr in zip(models, (0.1, 0.01))]

    def train(model, optimizer):
        for seed in range(50):
            optimizer.backward(error(model, *batch(model, seed)))

    threads = [threading.Thread(target=train, args=pair) for pair in zip(models, optimizers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, lr in zip(models, (0.1, 0.01)):
        alone = mlp()
        plain = kind.torchs(alone, lr)
        for seed in range(50):
            plain.zero_grad()
            error(alone, *batch(alone, seed)).backward()
            plain.step()
        assert_equal_models(model, alone, tolerance=1e-10)


@each_kind
def test_a_failed_backward_leaves_no_steps_behind(kind):
    """A graph that is used again by an ordinary backward gives ordinary gradients."""
    model = mlp()
    optimizer = kind.ours(model, 0.1)
    x, y = batch(model, 0)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if Fails.armed:
                raise RuntimeError("no")
            return grad

    Fails.armed = True
    value = Fails.apply(error(model, x, y))
    with pytest.raises(RuntimeError, match="no"):
        optimizer.backward(value)
    Fails.armed = False
    before = copy.deepcopy(model)
    value.backward()
    assert_equal_models(model, before, tolerance=0.0)
    assert model[0].weight.grad is not None


@each_kind
def test_a_fused_step_allocates_nothing_of_the_weights_size(kind):
    torch.manual_seed(0)
    model = nn.Sequential(MaskedLinear(1024, 4096), MaskedLinear(4096, 8))
    optimizer = kind.ours(model, 0.1)
    x = torch.randn(4, 1024)
    size = model[0].weight.numel() * 4

    def largest(function):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
        return max(event.cpu_memory_usage for event in profiler.events())

    optimizer.backward(model(x).square().mean())  # what is kept of a parameter is allocated once
    assert largest(lambda: optimizer.backward(model(x).square().mean())) < size / 8
    plain = kind.torchs(model, 0.1)

    def ordinary():
        model(x).square().mean().backward()
        plain.step()

    assert largest(ordinary) >= size, "the measurement sees what an ordinary step stores"


REFUSED = {
    "a list": (TypeError, "model must be a torch.nn.Module, got list", lambda make, m: make([m], 0.1)),
    "a plain model": (ValueError, "model must have a masked layer", lambda make, m: make(nn.Linear(2, 2), 0.1)),
    "lr": (ValueError, "lr must be at least 0, got -1", lambda make, m: make(m, -1)),
    "weight_decay": (
        ValueError,
        "weight_decay must be at least 0, got nan",
        lambda make, m: make(m, 0.1, weight_decay=float("nan")),
    ),
    "mask_weight_decay": (
        ValueError,
        "mask_weight_decay must be at least 0, got -0.5",
        lambda make, m: make(m, 0.1, mask_weight_decay=-0.5),
    ),
    "a number": (TypeError, "loss must be a tensor, got float", lambda make, m: make(m, 0.1).backward(1.0)),
    "no graph": (ValueError, "loss must depend on a parameter", lambda make, m: make(m, 0.1).backward(torch.ones(()))),
    "no scalar": (
        ValueError,
        r"loss must be a scalar .*got shape \[4, 3\]",
        lambda make, m: make(m, 0.1).backward(m(batch(m, 0)[0])),
    ),
}
OF_SGD = {"momentum": (ValueError, "momentum must be at least 0, got -0.1", lambda make, m: make(m, 0.1, momentum=-0.1))}
OF_ADAMW = {
    "eps": (ValueError, "eps must be at least 0, got -1", lambda make, m: make(m, eps=-1)),
    "beta": (
        ValueError,
        r"betas must be two numbers from 0 to below 1, got \(0.9, 1.0\)",
        lambda make, m: make(m, betas=(0.9, 1.0)),
    ),
    "one beta": (ValueError, r"betas must be two numbers from 0 to below 1, got \(0.9,\)", lambda make, m: make(m, betas=(0.9,))),
    "nan": (ValueError, r"betas must be two numbers .*nan", lambda make, m: make(m, betas=(float("nan"), 0.9))),
}


@pytest.mark.parametrize(
    ("kind", "refused"),
    [
        pytest.param(kind, each, id=f"{kind.name}-{name}")
        for kind, more in ((SGD, OF_SGD), (ADAMW, OF_ADAMW))
        for name, each in {**REFUSED, **more}.items()
    ],
)
def test_bad_arguments(kind, refused):
    error_type, message, call = refused
    model = mlp()
    before = copy.deepcopy(model)
    with pytest.raises(error_type, match=message):
        call(kind.ours, model)
    assert_equal_models(model, before, tolerance=0.0)


@each_kind
def test_the_state_follows_the_memory_order_of_its_parameter(kind):
    """A model that takes another memory format, and a checkpoint whose state has one."""

    def change(model, fused):
        model.to(memory_format=torch.channels_last)

    def load(model, fused):
        state = fused.state_dict()
        for of in state["state"].values():
            for name in kind.state:
                of[name] = of[name].mT.contiguous().mT if of[name].dim() > 1 else of[name]
        fused.load_state_dict(state)

    for make, between in ((cnn, change), (mlp, load)):
        ours, theirs = make(), make()
        fused, plain = kind.ours(ours, **kind.settings), kind.torchs(theirs, **kind.settings)
        for seed in range(3):
            data = batch(ours, seed)
            fused.backward(error(ours, *data))
            plain.zero_grad()
            error(theirs, *data).backward()
            plain.step()
            between(ours, fused)
        assert_equal_models(ours, theirs)


@each_kind
def test_a_gradient_instead_of_a_scalar(kind):
    ours, theirs = mlp(), mlp()
    x, y = batch(ours, 0)
    kind.ours(ours, 0.1).backward(ours(x), y)
    theirs(x).backward(y)
    kind.torchs(theirs, 0.1).step()
    assert_equal_models(ours, theirs)


@each_kind
def test_distributed_data_parallel_is_refused(monkeypatch, kind):
    model = mlp()

    class Wrapper(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    with pytest.raises(ValueError, match="DistributedDataParallel"):
        kind.ours(Wrapper(model), 0.1)


def test_public_names():
    assert [mm.optim.FusedMaskedSGD, mm.optim.FusedMaskedAdamW] == [SGD.ours, ADAMW.ours]
