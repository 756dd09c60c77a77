"""Metamask beside Avalanche's EWC on PermutedMNIST of shipped digits; ``make test-engines`` has Avalanche."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("metamask_ext.integrations.avalanche", reason="make test-engines has Avalanche", exc_type=ImportError)
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import EWC
from support.permuted_digits import permuted_digits

import metamask_ext as mm
from metamask_ext.integrations.avalanche import MaskedTasks, Metamask, MetamaskPlugin


@pytest.fixture(scope="module")
def benchmark_of_digits():
    return permuted_digits(3)


def _masked(**options) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(mm.nn.MaskedLinear(784, 100, **options), nn.ReLU(), mm.nn.MaskedLinear(100, 10, **options))


def _options(optimizer, epochs):
    evaluator = EvaluationPlugin(accuracy_metrics(experience=True, stream=True), loggers=[])
    return {
        "optimizer": optimizer,
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": 64,
        "eval_mb_size": 256,
        "train_epochs": epochs,
        "evaluator": evaluator,
    }


def _accuracies(strategy, benchmark) -> list[list[float]]:
    """After the first experience and after the last, the accuracy on each of the experiences so far."""
    found, last = [], len(benchmark.train_stream) - 1
    for number, experience in enumerate(benchmark.train_stream):
        strategy.train(experience)
        if number in (0, last):
            results = strategy.eval(benchmark.test_stream[: number + 1])
            found.append([value for key, value in sorted(results.items()) if "Top1_Acc_Exp" in key])
    return found


def test_beside_ewc(capsys):
    """Both with the best of the settings that were tried, for these tests: see docs/guide/engines.md."""
    benchmark, model = permuted_digits(8), _masked()
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    masked = _accuracies(Metamask(model=model, temperature=(1.0, 0.05), **_options(optimizer, 5)), benchmark)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    ewc = _accuracies(EWC(model=net, ewc_lambda=100.0, **_options(optimizer, 5)), benchmark)
    means = {name: sum(found[-1]) / 8 for name, found in (("metamask", masked), ("EWC", ewc))}
    with capsys.disabled():
        print(f"\npermuted digits, 8 tasks, mean accuracy at the end: {means}; first and last: {masked}, {ewc}")
    assert mm.tasks(model) == [f"task-{label}" for label in range(8)]
    # Frozen weights and masks of their own: the first task gives the same number ever after.
    assert masked[-1][0] == masked[0][0] and ewc[-1][0] < ewc[0][0]
    assert means["metamask"] > 0.87 and 0.85 < means["EWC"] < means["metamask"]


@pytest.mark.parametrize("shared", ["frozen", "first", "trained"])
def test_shared_weights(benchmark_of_digits, shared):
    model = _masked(gate="hard")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    strategy = Metamask(model=model, shared=shared, **_options(optimizer, 1))
    weights, masks = [model[0].weight.detach().clone()], []
    for experience in benchmark_of_digits.train_stream:
        strategy.train(experience)
        weights.append(model[0].weight.detach().clone())
        masks.append({task: model[0].masks[task].detach().clone() for task in mm.tasks(model)})
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(weights)]
    assert moved == {"frozen": [False] * 3, "first": [True, False, False], "trained": [True] * 3}[shared]
    assert torch.equal(masks[0]["task-0"], masks[2]["task-0"])  # No weight decay, no momentum of what is not trained.
    assert not torch.equal(masks[1]["task-1"], masks[0]["task-0"])


def test_samples_of_several_tasks():
    model = MaskedTasks(_masked())
    for task in ("task-0", "task-1"):
        mm.add_task(model.model, task)
    x = torch.randn(4, 784)
    mixed = model(x, torch.tensor([1, 0, 1, 0]))
    torch.testing.assert_close(mixed[::2], model(x[::2], 1))
    torch.testing.assert_close(mixed[1::2], model(x[1::2], torch.tensor([0, 0])))
    with pytest.raises(ValueError, match="task must be one of 'default', 'task-0', 'task-1', got 'task-7'"):
        model(x, 7)


def test_label_that_was_not_trained(benchmark_of_digits):
    model = _masked()
    strategy = Metamask(model=model, **_options(torch.optim.SGD(model.parameters(), 0.1), 1))
    strategy.train(benchmark_of_digits.train_stream[0])
    with pytest.raises(ValueError, match="got 'task-2'"):
        strategy.eval([benchmark_of_digits.test_stream[2]])


def test_refused():
    with pytest.raises(ValueError, match="shared must be one of frozen, first, trained, got 'never'"):
        MetamaskPlugin("never")
    with pytest.raises(ValueError, match="temperature must be positive"):
        MetamaskPlugin(temperature=(1.0, 0.0))
    with pytest.raises(ValueError, match="Linear has no masked layer"):
        MaskedTasks(nn.Linear(2, 2))
