"""Elastic weight consolidation: the Fisher information of single samples, and the penalty."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metamask_ext import add_task, using_task
from metamask_ext.continual import EWC, fisher_diagonal
from metamask_ext.nn import MaskedConv2d, MaskedLinear


def samples(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def one_by_one(model: nn.Module, x: torch.Tensor, likelihood: str) -> dict[str, torch.Tensor]:
    """The definition, with autograd, sample by sample and label by label."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if "masks" not in name}
    found = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for sample in x:
        output = model(sample[None]).flatten()
        if likelihood == "categorical":
            logs = F.log_softmax(output, 0)
            cases = [(logs[label].exp().detach(), logs[label]) for label in range(len(output))]
        elif likelihood == "gaussian":
            # d log p / d f = y - f, of variance 1 and independent.
            cases = [(1.0, entry) for entry in output]
        else:
            on = torch.sigmoid(output)
            cases = []
            for labels in itertools.product((0.0, 1.0), repeat=len(output)):
                y = torch.tensor(labels, dtype=output.dtype)
                chance = torch.where(y == 1, on, 1 - on).prod().detach()
                cases.append((chance, -F.binary_cross_entropy_with_logits(output, y, reduction="sum")))
        for weight, value in cases:
            gradients = torch.autograd.grad(value, list(parameters.values()), retain_graph=True)
            for name, gradient in zip(parameters, gradients):
                found[name] += weight * gradient.square() / len(x)
    return found


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_fisher_is_its_definition(likelihood):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = samples(7, 4)
    found, wanted = fisher_diagonal(model, x, likelihood), one_by_one(model, x, likelihood)
    assert list(found) == list(wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-12, atol=1e-14)


def test_fisher_by_hand():
    """One weight, two classes: ``F = p (1 - p) x^2``, here with ``x`` 1 and 3 and ``p`` 1/2."""
    model = nn.Linear(1, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    found = fisher_diagonal(model, torch.tensor([[1.0], [3.0]], dtype=torch.float64))
    torch.testing.assert_close(found["weight"], torch.full((2, 1), 0.25 * (1 + 9) / 2, dtype=torch.float64))


def test_fisher_of_a_linear_layer_is_a_product():
    """Squares of single samples' gradients of a linear layer are ``(delta^2)^T (a^2)``, and the Hessian of the loss."""
    torch.manual_seed(1)
    model, x = nn.Linear(6, 4).double(), samples(11, 6)
    shares = torch.softmax(model(x), 1).detach()
    squares = shares * (1 - shares)
    found = fisher_diagonal(model, x)
    torch.testing.assert_close(found["weight"], squares.T @ x.square() / 11)
    torch.testing.assert_close(found["bias"], squares.mean(0))
    labels = torch.arange(11) % 4
    hessian = torch.func.hessian(lambda weight: F.cross_entropy(F.linear(x, weight, model.bias), labels))(model.weight.detach())
    torch.testing.assert_close(found["weight"].flatten(), hessian.reshape(24, 24).diagonal())


def test_draws_estimate_it():
    torch.manual_seed(2)
    model, x = nn.Linear(3, 4).double(), samples(5, 3)
    exact = fisher_diagonal(model, x)
    drawn = fisher_diagonal(model, x, draws=4000, generator=torch.Generator().manual_seed(0))
    again = fisher_diagonal(model, x, draws=4000, generator=torch.Generator().manual_seed(0))
    for name in exact:
        # Of 4,000 draws: a standard deviation of at most sqrt(2 / 4000) = 2.2 % in each entry
        torch.testing.assert_close(drawn[name], exact[name], rtol=0.12, atol=0)
        assert torch.equal(drawn[name], again[name])


def test_fisher_in_parts(monkeypatch):
    """Results do not depend on how many samples are held at once."""
    torch.manual_seed(3)
    model, x = nn.Linear(3, 4).double(), samples(5, 3)
    whole = fisher_diagonal(model, x)
    monkeypatch.setattr("metamask_ext.continual.ewc.CHUNK_NUMBERS", 1)
    for name, part in fisher_diagonal(model, x).items():
        torch.testing.assert_close(part, whole[name])


@pytest.mark.parametrize("gate", ["sigmoid", "hard"])
def test_fisher_of_what_tasks_share(gate):
    """In a masked model W has importance, under the mask of the active task; masks have none and get no gradient."""
    torch.manual_seed(4)
    model = nn.Sequential(MaskedConv2d(1, 2, 3, gate=gate), nn.ReLU(), nn.Flatten(), MaskedLinear(8, 3, gate=gate)).double()
    add_task(model, "b")
    x, found = samples(4, 1, 4, 4), {}
    for task in ("default", "b"):
        with using_task(model, task):
            found[task] = fisher_diagonal(model, x)
            wanted = one_by_one(model, x, "categorical")
        assert list(found[task]) == ["0.weight", "0.bias", "3.weight", "3.bias"]
        for name in wanted:
            torch.testing.assert_close(found[task][name], wanted[name], rtol=1e-10, atol=1e-13)
    assert not torch.allclose(found["default"]["3.weight"], found["b"]["3.weight"])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_stay():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fisher_diagonal(model, samples(4, 3).float())
    assert model.training and not model[1].training and model[2].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_16_bits_are_summed_in_32():
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    found = fisher_diagonal(model, samples(4, 3).bfloat16())
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    ewc = EWC(model, 1.0)
    ewc.remember(found)
    with torch.no_grad():
        model.weight.add_(1)
    assert ewc.penalty().dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"likelihood": "poisson"}, "likelihood must be one of categorical, gaussian, bernoulli, got 'poisson'"),
        ({"x": torch.zeros(0, 3)}, r"x must be \[n, ...\] with at least one sample, got shape \[0, 3\]"),
        ({"draws": 0}, "draws must be None or at least 1, got 0"),
        ({"parameters": ["weigth"]}, "parameters must name parameters of the model, got 'weigth'"),
        ({"parameters": []}, "parameters must be at least one"),
        ({"x": torch.zeros(2, 5, 3)}, "for likelihood='categorical' the model must give"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fisher_diagonal(nn.Linear(3, 2), **{"x": torch.zeros(4, 3), **arguments})


def test_penalty_is_the_sum_over_tasks():
    """Any number of tasks, in one quadratic: value and gradient are those of the sum."""
    model = nn.Linear(3, 2).double()
    ewc, kept = EWC(model, 3.0), []
    assert float(ewc.penalty()) == 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        importance = {name: torch.rand(p.shape, generator=generator).double() for name, p in model.named_parameters()}
        importance["weight"][0, 0] = 0  # an entry that no task needs stays free
        ewc.remember(importance)
        kept.append((importance, {name: p.detach().clone() for name, p in model.named_parameters()}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    wanted = sum(
        (importance[name] * (parameter - then[name]).square()).sum()
        for importance, then in kept
        for name, parameter in model.named_parameters()
    )
    torch.testing.assert_close(ewc.penalty(), 1.5 * wanted)
    parameters = list(model.parameters())
    for found, expected in zip(torch.autograd.grad(ewc.penalty(), parameters), torch.autograd.grad(1.5 * wanted, parameters)):
        torch.testing.assert_close(found, expected)
    assert ewc.tasks == 4 and torch.autograd.grad(ewc.penalty(), parameters)[0][0, 0] == 0


def test_penalty_leaves_masks_alone():
    model = MaskedLinear(3, 2)
    ewc = EWC(model, 1.0)
    assert list(ewc.parameters) == ["weight", "bias"]
    ewc.remember({name: torch.ones_like(tensor) for name, tensor in ewc.parameters.items()})
    with torch.no_grad():
        model.weight.add_(2)
    ewc.penalty().backward()
    torch.testing.assert_close(model.weight.grad, torch.full((2, 3), 2.0))
    assert model.masks["default"].grad is None


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        ({"weight": torch.ones(2, 3)}, "importance must have 'bias' and 'weight'|importance must have .*bias"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, r"importance\['weight'\] must be \[2, 3\], got \[3, 2\]"),
        ({"weight": torch.ones(2, 3), "bias": -torch.ones(2)}, r"importance\['bias'\] must be finite and at least 0"),
        ({"weight": torch.full((2, 3), float("nan")), "bias": torch.ones(2)}, r"importance\['weight'\] must be finite"),
    ],
)
def test_refused_importance_changes_nothing(importance, message):
    ewc = EWC(nn.Linear(3, 2), 1.0)
    with pytest.raises(ValueError, match=message):
        ewc.remember(importance)
    assert ewc.tasks == 0 and float(ewc.penalty()) == 0


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_refused_strength(strength):
    with pytest.raises(ValueError, match="strength must be finite and at least 0"):
        EWC(nn.Linear(3, 2), strength)
