"""Sums over tasks are in float32 or float64 where weights and masks have 16 bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from metamask_ext import MaskBank, using_task
from metamask_ext.meta import MAML
from metamask_ext.nn import MaskedConv2d, MaskedLinear, TaskBatchNorm2d

each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
TASKS = 600


def bank_of(*layers, dtype, tasks=TASKS, per_task=(), packed=()):
    """Every task as the first."""
    bank = MaskBank(nn.Sequential(*layers).to(dtype).eval(), per_task)
    for number in range(1, tasks):
        bank.add_task(str(number), init="copy:default")
    for task in packed:
        bank.pack(task)
    return bank


def ulp(tensor):
    return torch.finfo(tensor.dtype).eps * tensor.float().abs().max().item()


@each_dtype
@pytest.mark.parametrize("gate", ["sigmoid", "hard"])
@pytest.mark.parametrize("packed", [(), "half", "all"], ids=["logits", "half-packed", "packed"])
def test_a_mixture_of_equal_tasks_is_any_of_them(dtype, gate, packed):
    bank = bank_of(MaskedConv2d(2, 3, 3, gate=gate), nn.Flatten(), MaskedLinear(12, 4, gate=gate), dtype=dtype)
    if packed == "all" or (packed and gate == "hard"):  # with the sigmoid gate bits are other gates
        for task in bank.tasks[:: 1 if packed == "all" else 2]:
            bank.pack(task)
    elif packed:
        pytest.skip("bits of a sigmoid gate are another mask")
    x = torch.randn(3, 2, 4, 4).to(dtype)
    with torch.no_grad(), using_task(bank.model, "default"):
        wanted = bank.model(x)
        thetas = [(layer._read("weight", "default"), layer._read("bias", "default")) for layer in (bank.model[0], bank.model[2])]
    alphas = dict.fromkeys(bank.tasks, 1 / TASKS)
    for given in (alphas, {task: torch.tensor(alpha) for task, alpha in alphas.items()}):
        with torch.no_grad(), bank.superpose(given) as model:
            for layer, theta in zip((model[0], model[2]), thetas):
                for what, one in zip(("weight", "bias"), theta):
                    got = layer._read(what, layer._selected())
                    assert got.dtype == dtype
                    torch.testing.assert_close(got.float(), one.float(), rtol=0, atol=ulp(one))
            torch.testing.assert_close(model(x).float(), wanted.float(), rtol=0, atol=8 * ulp(wanted))


@each_dtype
@pytest.mark.parametrize("masks", ["float32", "16 bits"])
def test_means_and_combinations_that_begin_a_task(dtype, masks):
    mask_dtype = torch.float32 if masks == "float32" else dtype
    layers = MaskedLinear(8, 4, mask_init=4.0, dtype=dtype, mask_dtype=mask_dtype), nn.Linear(4, 3)
    bank = bank_of(*layers, dtype=dtype, per_task="1.*")
    bank.add_task("mean", init="mean")
    bank.add_task("mix", init=dict.fromkeys(bank.tasks[:TASKS], 1 / TASKS))
    bank.add_task("packed"), bank.model[0].masks["packed"].data.fill_(1), bank.pack("packed")
    bank.add_task("of bits", init={"packed": 1.0})
    layer, head = bank.model[0], bank.model[1].per_task
    assert layer.masks["mean"].dtype == mask_dtype and (layer.masks["mean"] == 4).all()
    for logits in (layer.masks["mean"], layer.masks["mix"], layer.masks["of bits"], layer.bias_masks["mix"]):
        assert logits.dtype == mask_dtype
        torch.testing.assert_close(logits.float(), torch.full_like(logits, 4.0).float(), rtol=0, atol=1e-3)
    for name in ("weight", "bias"):
        one = head[name]["default"].float()
        for task in ("mean", "mix"):
            torch.testing.assert_close(head[name][task].float(), one, rtol=0, atol=ulp(head[name]["default"]))


@each_dtype
def test_a_sum_that_16_bits_would_swallow(dtype):
    """1 and many small amounts: each alone is below half a unit of the last place."""
    bank = MaskBank(nn.Sequential(MaskedLinear(4, 4, bias=False, gate="hard")).to(dtype).eval())
    for number in range(512):
        bank.add_task(str(number))
    with torch.no_grad():
        bank.model[0].weight.fill_(1)
        for _, mask in bank.model[0].masks.items():
            mask.fill_(1)
    amounts = {task: 1.0 if task == "default" else 2.0**-13 for task in bank.tasks}
    with torch.no_grad(), bank.superpose(amounts) as model:
        assert (model(torch.eye(4, dtype=dtype)) == 1 + 2.0**-4).all()
    for task in bank.tasks[1::2]:
        bank.pack(task)
    with torch.no_grad(), bank.superpose(amounts) as model:
        assert (model(torch.eye(4, dtype=dtype)) == 1 + 2.0**-4).all()


@each_dtype
def test_statistics_and_counts_of_tasks(dtype):
    model = nn.Sequential(MaskedConv2d(1, 3, 1), TaskBatchNorm2d(3)).to(dtype).eval()
    bank = MaskBank(model)
    for number in range(1, TASKS):
        bank.add_task(str(number), init="copy:default")
    norm = model[1]
    for number, task in enumerate(bank.tasks):
        norm.per_task["running_mean"][task].fill_(3.0), norm.per_task["running_var"][task].fill_(2.0)
        norm.per_task["num_batches_tracked"][task].fill_(number)
    with torch.no_grad(), bank.superpose(dict.fromkeys(bank.tasks, 1 / TASKS)):
        assert norm.running_mean.dtype == dtype
        torch.testing.assert_close(norm.running_mean.float(), torch.full((3,), 3.0), rtol=0, atol=0.016)
        torch.testing.assert_close(norm.running_var.float(), torch.full((3,), 2.0), rtol=0, atol=0.016)
        assert norm.num_batches_tracked.dtype == torch.int64 and norm.num_batches_tracked == round((TASKS - 1) / 2)
        model(torch.randn(2, 1, 4, 4).to(dtype))
    bank.add_task("mean", init="mean"), bank.add_task("mix", init=dict.fromkeys(bank.tasks, 1 / len(bank.tasks)))
    for task in ("mean", "mix"):
        torch.testing.assert_close(norm.per_task["running_mean"][task].float(), torch.full((3,), 3.0), rtol=0, atol=0.016)
        assert norm.per_task["num_batches_tracked"][task] == 0


@each_dtype
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_a_mixed_task_batch_updates_statistics_as_float32_does_and_rounds_once(dtype, momentum):
    norm = TaskBatchNorm2d(3, momentum=momentum).to(dtype)
    norm._new_task("b")
    exact = copy.deepcopy(norm).float()
    for step in range(3):
        x = (torch.randn(6, 3, 4, 4) * 3 + 1).to(dtype)
        for each in (norm, exact):
            for name in ("running_mean", "running_var"):
                for task in ("default", "b"):
                    each.per_task[name][task].copy_(exact.per_task[name][task].to(dtype))
        with using_task(norm, ["default", "b"] * 3), using_task(exact, ["default", "b"] * 3):
            got, wanted = norm(x), exact(x.float())
        torch.testing.assert_close(got.float(), wanted, rtol=0, atol=2 * ulp(got))
        for name in ("running_mean", "running_var"):
            for task in ("default", "b"):
                rounded = exact.per_task[name][task].to(dtype)
                assert torch.equal(norm.per_task[name][task], rounded), (step, name)
    norm.eval(), exact.eval()
    for name in ("running_mean", "running_var"):
        for task in ("default", "b"):
            exact.per_task[name][task].copy_(norm.per_task[name][task])
    with using_task(norm, ["default", "b"] * 3), using_task(exact, ["default", "b"] * 3):
        torch.testing.assert_close(norm(x).float(), exact(x.float()), rtol=0, atol=2 * ulp(norm(x)))


@each_dtype
def test_a_meta_learner_that_starts_from_many_tasks(dtype):
    bank = bank_of(MaskedLinear(8, 4, mask_init=2.0, dtype=dtype, mask_dtype=dtype), dtype=dtype)
    maml = MAML(bank.model, 0.1, start=dict.fromkeys(bank.tasks, 1 / TASKS))
    for tensor in maml._adapted.first():
        torch.testing.assert_close(tensor.float(), torch.full_like(tensor, 2.0).float(), rtol=0, atol=1e-3)


def test_float64_stays_float64():
    bank = bank_of(MaskedLinear(8, 4), dtype=torch.float64, tasks=50)
    x = torch.randn(3, 8, dtype=torch.float64)
    with using_task(bank.model, "default"):
        wanted = bank.model(x)
    with bank.superpose(dict.fromkeys(bank.tasks, 0.02)) as model:
        torch.testing.assert_close(model(x), wanted, rtol=1e-13, atol=1e-13)
    bank.add_task("mean", init="mean")
    torch.testing.assert_close(bank.model[0].masks["mean"], bank.model[0].masks["default"], rtol=1e-13, atol=0)


def test_gradients_go_through_the_sums():
    bank = bank_of(MaskedLinear(6, 3, dtype=torch.bfloat16, mask_dtype=torch.bfloat16), dtype=torch.bfloat16, tasks=8)
    alphas = {task: torch.tensor(1 / 8, requires_grad=True) for task in bank.tasks}
    with bank.superpose(alphas) as model:
        model(torch.randn(4, 6).bfloat16()).float().square().sum().backward()
    assert all(alpha.grad is not None and alpha.grad.dtype == torch.float32 for alpha in alphas.values())
    assert len({round(alpha.grad.item(), 4) for alpha in alphas.values()}) == 1, "equal tasks, equal derivatives"
    layer = bank.model[0]
    assert all(mask.grad is not None and mask.grad.dtype == torch.bfloat16 for _, mask in layer.masks.items())
