"""universality: the construction is exact, and the quick run shows what the paper claims."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.experiments import check_claims, check_resumes, check_written, quick_run

from metamask_ext.experiments.papers.universality import learners, one_step_learner
from metamask_ext.experiments.papers.universality.one_step_learner import OneStepLearner
from metamask_ext.meta import MAML

# The quick run is made once, so by one worker.
pytestmark = pytest.mark.xdist_group("universality")

BINS, VALUES, LR = 4, torch.tensor([0.5, 0.8, 2.0], dtype=torch.float64), 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("universality")


@pytest.fixture(scope="module")
def metrics(folder):
    return quick_run("universality", folder)


@pytest.fixture(scope="module")
def built():
    table = torch.randn(BINS, BINS, len(VALUES), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return table, OneStepLearner(table, VALUES, LR)


def _adapted(model: OneStepLearner, x: float, y: float, lr: float = LR) -> torch.nn.Module:
    """The model after one step of torch's SGD: not by way of the library."""
    copy = OneStepLearner(torch.zeros(BINS, BINS, len(VALUES)), VALUES, LR)
    copy.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(copy.parameters(), lr)
    F.mse_loss(copy(torch.tensor([[x]], dtype=torch.float64)), torch.tensor([[y]], dtype=torch.float64)).backward()
    optimizer.step()
    return copy


def test_one_step_computes_the_table(built):
    table, model = built
    centres = (torch.arange(BINS).double() + 0.5) / BINS
    for j, x in enumerate(centres):
        for m, y in enumerate(VALUES):
            learned = _adapted(model, float(x), float(y))
            torch.testing.assert_close(learned(centres[:, None])[:, 0], table[j, :, m], rtol=0, atol=1e-12)


def test_anywhere_in_a_bin_and_between_values(built):
    table, model = built
    learned = _adapted(model, 0.27, 1.4)
    expected = 0.5 * (table[1, 3, 1] + table[1, 3, 2])
    made = learned(torch.tensor([[0.99]], dtype=torch.float64)).detach()
    assert abs(float(made) - float(expected)) < 1e-12


def test_before_the_step(built):
    _, model = built
    assert bool((model(torch.rand(20, 1).double()) == 0).all())


def test_another_rate_is_not_enough(built):
    """The step is what computes: with half of it the output is that of half of y."""
    table, model = built
    learned = _adapted(model, 0.1, 1.0, 0.5 * LR)
    made = learned(torch.tensor([[0.6]], dtype=torch.float64)).detach()
    assert abs(float(made) - float(table[0, 2, 0])) < 1e-12


def test_activations_stay_nonnegative(built, monkeypatch):
    """Appendix A: then ReLUs act as if they were not there."""
    _, model = built
    lowest = []

    def relu(z):
        lowest.append(float(z.detach().min()))
        return torch.where(z >= 0, z, 0)

    monkeypatch.setattr(one_step_learner, "_relu", relu)
    learned = _adapted(model, 0.3, 2.0)
    before = len(lowest)
    learned(torch.linspace(0, 0.99, 50)[:, None].double())
    assert before == len(lowest) - before == len(model.layers) == BINS**2 + 2
    assert min(lowest) > -1e-14


def test_with_maml(built):
    table, model = built
    maml = MAML(model, LR, adapt="weights")
    x, y = torch.tensor([[[0.1]], [[0.9]]]).double(), torch.tensor([[[0.5]], [[2.0]]]).double()
    with torch.no_grad():
        made = maml.predict(maml.adapt(F.mse_loss, (x, y)), torch.tensor([0.4, 0.6])[None, :, None].expand(2, 2, 1).double())
    torch.testing.assert_close(made[..., 0], torch.stack([table[0, 1:3, 0], table[3, 1:3, 2]]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("table", "values", "message"),
    [
        (torch.zeros(3, 2, 1), torch.ones(1), r"table must be \[bins, bins, 1\], got shape \[3, 2, 1\]"),
        (torch.zeros(3, 3, 2), torch.ones(3), r"table must be \[bins, bins, 3\], got shape \[3, 3, 2\]"),
        (torch.zeros(3, 3, 2), torch.tensor([0.0, 1.0]), "values must be positive and ascending"),
        (torch.zeros(3, 3, 2), torch.tensor([2.0, 1.0]), "values must be positive and ascending"),
    ],
)
def test_refused(table, values, message):
    with pytest.raises(ValueError, match=message):
        OneStepLearner(table, values, LR)


def test_claims(metrics):
    check_claims(metrics)


def test_construction(metrics):
    assert len(metrics["construction"]) == 3
    for learner in metrics["construction"].values():
        assert learner["largest error"] < 1e-12 < 0.5 < learner["largest value"]
        assert learner["largest output before the step"] == 0


def test_more_gradient_steps(metrics):
    steps = metrics["settings"]["test"]["steps"]
    for method in ("maml", "masks"):
        (run,) = metrics["curves"][method]
        errors = dict(zip(steps, run["mse"]))
        # One step in training; many more at test time still help, on ten samples.
        assert errors[100] < 0.8 * errors[10] < 0.8 * errors[1] < 0.4 * errors[0]
        assert errors[100] < metrics["curves"]["pretrained"][0]["mse"][-1] < metrics["curves"]["random"][0]["mse"][-1]


def test_outside_of_the_training_distribution(metrics):
    lstm = metrics["curves"]["lstm"][0]
    # Inside, the recurrent learner is the better one after as many steps as in training.
    assert lstm["mse"][0] < metrics["curves"]["maml"][0]["mse"][1]
    for method in ("maml", "masks"):
        assert metrics["curves"][method][0]["outside"][-1] < 0.5 * lstm["outside"][-1]
        assert metrics["curves"][method][0]["outside, diverged (%)"][-1] < 5


def test_depth(metrics):
    (one,), (two,) = metrics["curves"]["depth 1"], metrics["curves"]["depth 2"]
    # A single hidden layer cannot do it, though with amplitude and phase at hand it represents the waves.
    assert two["after"] < 0.7 * one["after"] and one["told"] < 0.7 * one["after"]
    for depth in range(1, 6):
        (run,) = metrics["curves"][f"depth {depth}"]
        assert abs(run["parameters"] - 1750) < 100


def test_diverged_tasks_are_counted():
    tasks = learners.sine_tasks(4, torch.Generator().manual_seed(0))
    bad = [float("nan"), float("inf"), 1e6, 0.0]

    def learner(tasks, support, x):
        return [torch.zeros_like(x) + torch.tensor(bad)[:, None, None]]

    (errors,) = learners._errors(tasks, learner, torch.Generator(), 5)
    relative = errors / learners._power(tasks)
    torch.testing.assert_close(relative[:3], torch.full((3,), learners.DIVERGED).double())
    assert 0.5 < float(relative[3]) < 1.5


def test_written(metrics, folder):
    check_written(folder / "universality", metrics, ["universality.png"])


def test_killed_run_continues(metrics, folder):
    check_resumes(folder / "universality", metrics, "random.json")
