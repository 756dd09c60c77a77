"""FusedMaskedAdamW: many steps, its state, and torch's kernels for the parameters that take an ordinary step."""

from __future__ import annotations

import copy
import random
from collections import Counter

import pytest
import torch
from support.fused_steps import ADAMW, SGD, assert_equal_models, batch, cnn, error, mask_names, mlp, ops_of, torch_adamw
from torch import nn
from torch.profiler import ProfilerActivity, profile

from metamask_ext import add_task, using_task
from metamask_ext.nn import MaskedConv2d, MaskedLinear
from metamask_ext.optim import FusedMaskedAdamW


def assert_equal_state(ours, theirs, tolerance=1e-10):
    """Those of the same parameters of two models; theirs is torch's own."""
    for a, b in zip(ours.model.parameters(), theirs.model.parameters()):
        mine, others = ours.state.get(a, {}), theirs.state.get(b, {})
        assert set(mine) == set(others)
        for name in others:
            torch.testing.assert_close(mine[name], others[name], rtol=tolerance, atol=tolerance, check_dtype=False)


def pair(make, settings=ADAMW.settings):
    ours, theirs = make(), make()
    fused, plain = FusedMaskedAdamW(ours, **settings), torch_adamw(theirs, **settings)
    plain.model = theirs
    return fused, plain


def step(optimizer, loss):
    if isinstance(optimizer, FusedMaskedAdamW):
        optimizer.backward(loss)
    else:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("settings", [ADAMW.settings, {"betas": (0.0, 0.999)}, {"lr": 1e-2, "weight_decay": 0.0}], ids=str)
def test_a_long_training_of_three_tasks(settings):
    """Some are skipped, one is added amid the training, rates follow a schedule."""
    chance, taken = random.Random(0), Counter()
    optimizers = pair(lambda: add_tasks(mlp(), "second"), settings)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60) for optimizer in optimizers]
    for seed in range(100):
        if seed == 30:
            for optimizer in optimizers:
                add_tasks(optimizer.model, "third")
            masks = mask_names(optimizers[1].model)
            optimizers[1].param_groups[1]["params"].extend(
                p for name, p in optimizers[1].model.named_parameters() if name in masks and "third" in name
            )
        task = chance.choice(("default", "second") if seed < 30 else ("default", "second", "third", "third"))
        taken[task] += 1
        for optimizer, schedule in zip(optimizers, schedules):
            with using_task(optimizer.model, task):
                step(optimizer, error(optimizer.model, *batch(optimizer.model, seed)))
            schedule.step()
    assert_equal_models(optimizers[0].model, optimizers[1].model, 1e-10)
    assert_equal_state(*optimizers)
    assert {float(state["step"]) for state in optimizers[0].state.values()} == {100.0, *taken.values()} and len(taken) == 3


def add_tasks(model, *names):
    for name in names:
        add_task(model, name, init="copy:default")
    return model


def test_a_task_that_no_loss_used_has_no_state():
    model = add_tasks(mlp(), "second")
    optimizer = FusedMaskedAdamW(model)
    with using_task(model, "default"):
        optimizer.backward(error(model, *batch(model, 0)))
    names = {name for name, parameter in model.named_parameters() if parameter in optimizer.state}
    assert names == {name for name, _ in model.named_parameters() if "second" not in name}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_float32_masks_beside_16_bit_weights(dtype):
    """Each tensor of a state has the dtype of its parameter, as torch's; a step is rounded once."""
    torch.manual_seed(0)
    model = nn.Sequential(MaskedLinear(5, 6), nn.Tanh(), MaskedLinear(6, 3)).to(dtype)
    optimizer = FusedMaskedAdamW(model, lr=1e-4, eps=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for seed in range(3):
        optimizer.backward(error(model, *batch(model, seed)))
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert (
            state["exp_avg"].dtype == state["exp_avg_sq"].dtype == parameter.dtype == (torch.float32 if "mask" in name else dtype)
        )
        assert state["step"].dtype == torch.float32 and state["step"] == 3
    # 16 bits would round such a step away
    assert all((model.get_parameter(name) != start).float().mean() > 0.9 for name, start in before.items() if "mask" in name)


# --- State dicts, from and to torch.optim.AdamW.


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"amsgrad": True}], ids=str)
def test_a_state_of_torchs_adamw_is_continued(options):
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # torch counts steps in it
    try:
        ours, theirs = mlp(), mlp()
        fused, plain = FusedMaskedAdamW(ours, **ADAMW.settings), torch_adamw(theirs, **ADAMW.settings)
        for group in plain.param_groups:
            group.update(options)
        for seed in range(3):
            step(plain, error(theirs, *batch(theirs, seed)))
        ours.load_state_dict(theirs.state_dict())
        fused.load_state_dict(copy.deepcopy(plain.state_dict()))
        fused.model, plain.model = ours, theirs
        for seed in range(3, 6):
            ops = ops_of(lambda seed=seed: step(fused, error(ours, *batch(ours, seed))))
            assert set(ops) & set(ADAMW.ops) == (set() if "amsgrad" in options else {ADAMW.ops[0]})
            step(plain, error(theirs, *batch(theirs, seed)))
        assert_equal_models(ours, theirs, 1e-10)
        assert_equal_state(fused, plain)
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_torchs_adamw_continues_ours(options):
    fused, plain = pair(mlp)
    for seed in range(3):
        for optimizer in (fused, plain):
            step(optimizer, error(optimizer.model, *batch(optimizer.model, seed)))
    state = copy.deepcopy(fused.state_dict())
    for group in state["param_groups"]:
        del group["param_names"]
        group.update({"fused": None, "foreach": None, **options})
    other = mlp()
    other.load_state_dict(fused.model.state_dict())
    continued = torch_adamw(other, **ADAMW.settings)
    continued.load_state_dict(state)
    for optimizer, model in ((continued, other), (plain, plain.model)):
        step(optimizer, error(model, *batch(model, 3)))
    assert_equal_models(other, plain.model, 1e-10)


@pytest.mark.parametrize(("ours", "other"), [(ADAMW, SGD), (SGD, ADAMW)], ids=lambda kind: kind.name)
def test_a_state_of_another_optimiser_is_refused(ours, other):
    model = mlp()
    optimizer = ours.ours(model, **ours.settings)
    optimizer.backward(error(model, *batch(model, 0)))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=f"state_dict must be that of a FusedMasked{ours.name}, got one whose group 0 has no "):
        optimizer.load_state_dict(other.ours(mlp(), **other.settings).state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"] and set(after["state"]) == set(before["state"])


def test_a_step_that_a_backward_took_before_it_failed_is_counted():
    model = mlp()
    optimizer = FusedMaskedAdamW(model)
    x, y = batch(model, 0)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no")

    hidden = Fails.apply(model[:2](x))
    with pytest.raises(RuntimeError, match="no"):
        optimizer.backward((model[2](hidden) - y).square().mean())
    assert optimizer.state[model[2].weight]["step"] == 1 and optimizer.state[model[2].weight]["exp_avg"].any()
    assert optimizer.state[model[0].weight]["step"] == 0 and not optimizer.state[model[0].weight]["exp_avg"].any()


# --- Ordinary steps.


def kernels_of(function):
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    names = [event.name for event in profiler.events()]
    return names.count("aten::_fused_adamw_"), sum(name.startswith(("aten::_foreach_lerp", "aten::lerp")) for name in names)


def ordinary(optimizer, seed=0):
    """A loss whose graph keeps every parameter out of the backward."""
    value = error(optimizer.model, *batch(optimizer.model, seed))
    value.backward()
    return value


def test_one_call_of_torchs_fused_kernel_for_each_group():
    fused, plain = pair(cnn)
    for seed in range(3):
        ordinary(fused, seed)
        assert kernels_of(fused.step) == (2, 0)
        fused.zero_grad()
        step(plain, error(plain.model, *batch(plain.model, seed)))
    assert_equal_models(fused.model, plain.model, 1e-10)
    # What is left over by the backward, here the plain layers, is one call too
    value = error(fused.model, *batch(fused.model, 3))
    assert kernels_of(lambda: fused.backward(value)) == (1, 0)


def test_where_the_kernels_have_no_step_of_adamw(monkeypatch):
    """As on CUDA."""
    monkeypatch.setattr(FusedMaskedAdamW, "_can_update", lambda *_: False)
    fused, plain = pair(mlp)
    for seed in range(3):
        value = error(fused.model, *batch(fused.model, seed))
        assert not set(ops_of(lambda value=value: fused.backward(value))) & set(ADAMW.ops)
        step(plain, error(plain.model, *batch(plain.model, seed)))
    assert_equal_models(fused.model, plain.model, 1e-10)
    assert_equal_state(fused, plain)


def transposed_gradient(p):
    return p.grad.mT.contiguous().mT if p.dim() > 1 else p.grad


def test_gradients_in_another_order_of_memory():
    """torch's fused kernel would take the numbers as they lie there."""
    fused, plain = pair(mlp)
    for seed in range(3):
        for optimizer in (fused, plain):
            ordinary(optimizer, seed)
            for p in optimizer.model.parameters():
                p.grad = transposed_gradient(p)
        assert kernels_of(fused.step)[0] == 0
        plain.step()
        fused.zero_grad(), plain.zero_grad()
    assert_equal_models(fused.model, plain.model, 1e-10)
    # Once they lie as the parameters do, the fused kernel takes over
    ordinary(fused, 3)
    assert kernels_of(fused.step) == (2, 0)


def test_the_stride_of_a_size_of_1_says_nothing():
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    fused, plain = pair(lambda: (torch.manual_seed(0), nn.Sequential(MaskedConv2d(3, 4, 1, dtype=torch.float64)))[1])
    for optimizer in (fused, plain):
        optimizer.model(x).square().mean().backward()
        for p in optimizer.model.parameters():
            if p.dim() == 4:
                p.grad = p.grad.clone(memory_format=torch.channels_last)
                assert p.grad.stride() != p.stride()
    assert kernels_of(fused.step) == (2, 0)
    plain.step()
    assert_equal_models(fused.model, plain.model, 1e-10)


def test_a_complex_parameter_takes_torchs_other_step():
    fused, plain = pair(mlp)
    for optimizer in (fused, plain):
        optimizer.phase = nn.Parameter(torch.tensor([1 + 2j, -1j]))
        optimizer.add_param_group({"params": [("phase", optimizer.phase)] if optimizer is fused else [optimizer.phase]})
        for seed in range(2):
            step(optimizer, error(optimizer.model, *batch(optimizer.model, seed)) * optimizer.phase.abs().sum())
    torch.testing.assert_close(fused.phase, plain.phase)
    assert_equal_models(fused.model, plain.model, 1e-6)


def test_a_schedule_of_the_betas():
    optimizers = pair(mlp)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=12) for optimizer in optimizers]
    for seed in range(12):
        for optimizer, schedule in zip(optimizers, schedules):
            step(optimizer, error(optimizer.model, *batch(optimizer.model, seed)))
            schedule.step()
    assert optimizers[0].param_groups[0]["betas"] == optimizers[1].param_groups[0]["betas"] != ADAMW.settings["betas"]
    assert_equal_models(optimizers[0].model, optimizers[1].model, 1e-10)
    assert_equal_state(*optimizers)


class Strided(nn.Module):
    """A masked layer, and a parameter with gaps in its memory."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = MaskedLinear(5, 3, dtype=torch.float64)
        self.memory = torch.ones(5, 6, dtype=torch.float64)
        self.scale = nn.Parameter(self.memory[:, ::2])

    def forward(self, x):
        return self.layer(x) + (x @ self.scale).tanh()


def test_a_parameter_with_gaps():
    fused, plain = pair(Strided)
    for seed in range(3):
        for optimizer in (fused, plain):
            x, y = (t.double() for t in batch(mlp(), seed))
            step(optimizer, error(optimizer.model, x, y))
    assert_equal_models(fused.model, plain.model, 1e-10)
    assert torch.equal(fused.model.memory[:, 1::2], torch.ones(5, 3, dtype=torch.float64)), "nothing in the gaps has moved"


def test_a_model_that_takes_another_memory_format_between_ordinary_steps():
    fused, plain = pair(cnn)
    for seed in range(4):
        for optimizer in (fused, plain):
            ordinary(optimizer, seed)
            optimizer.step()
            optimizer.zero_grad()
            optimizer.model.to(memory_format=(torch.channels_last, torch.contiguous_format)[seed % 2])
    assert_equal_models(fused.model, plain.model, 1e-10)


def test_a_closure_whose_gradients_lie_in_another_order():
    fused, plain = pair(mlp)

    def closure(optimizer, seed):
        optimizer.zero_grad()
        value = ordinary(optimizer, seed)
        for p in optimizer.model.parameters():
            p.grad = transposed_gradient(p)
        return value

    for seed in range(3):
        losses = [
            optimizer.step(*arguments, **options)
            for optimizer, arguments, options in (
                (fused, (), {"closure": lambda seed=seed: closure(fused, seed)}),
                (plain, (lambda seed=seed: closure(plain, seed),), {}),
            )
        ]
        torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
    fused.step(lambda: closure(fused, 3)), plain.step(lambda: closure(plain, 3))
    assert_equal_models(fused.model, plain.model, 1e-10)


def test_an_ordinary_step_is_seen_by_those_who_saved_the_parameter():
    """torch's fused kernel does not count versions itself: a second backward would silently meet the new weight."""
    model = mlp()
    optimizer = FusedMaskedAdamW(model)
    value = error(model, *batch(model, 0))
    value.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_rate_in_a_tensor():
    fused, plain = pair(mlp)
    for optimizer in (fused, plain):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.05, dtype=torch.float64)
    for seed in range(4):
        if seed % 2:
            step(fused, error(fused.model, *batch(fused.model, seed)))
        else:
            ordinary(fused, seed)
            fused.step()
            fused.zero_grad()
        step(plain, error(plain.model, *batch(plain.model, seed)))
    assert_equal_models(fused.model, plain.model, 1e-10)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(0, 3), (5, 0)], ids=str)
def test_a_layer_without_inputs_or_outputs_counts_its_steps(shape):
    inputs, outputs = shape
    model = nn.Sequential(MaskedLinear(inputs, outputs, dtype=torch.float64, device="meta").to_empty(device="cpu"))
    optimizer = FusedMaskedAdamW(model)
    for _ in range(2):
        optimizer.backward(model(torch.ones(4, inputs, dtype=torch.float64)).sum())
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0} and len(optimizer.state) == 4
