"""feature-weights: the homework's formulas, its claims on the quick run, and the committed answers."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path

import pytest
import torch
from support.experiments import check_claims, check_resumes, check_written, quick_run

from metamask_ext.data.fourier import fourier_features, fourier_tasks, grid
from metamask_ext.experiments.papers.feature_weights import experiment
from metamask_ext.experiments.papers.feature_weights.answers import answers
from metamask_ext.experiments.papers.feature_weights.findings import members_of
from metamask_ext.experiments.papers.feature_weights.settings import Settings
from metamask_ext.experiments.papers.feature_weights.theory import aliased_error, aliased_gradient, min_norm

# The quick run is made once, so by one worker.
pytestmark = pytest.mark.xdist_group("feature-weights")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("feature-weights")


@pytest.fixture(scope="module")
def metrics(folder):
    return quick_run("feature-weights", folder)


def test_features_are_orthonormal():
    # 64 points add up products of frequencies below 32 exactly.
    features = fourier_features(grid(64), 31)
    torch.testing.assert_close(features.T @ features / 64, torch.eye(31).double(), rtol=0, atol=1e-13)


def test_aliases():
    settings = Settings(features=501, true_features=11, support_points=32)
    features = fourier_features(grid(32), 501)
    true = features[:, :11]
    groups = {group: members_of(group, settings) for group in ("true", "aliases", "others")}
    assert sorted(chain(*groups.values())) == list(range(501)) and groups["true"] == list(range(11))
    # An alias is in the span of the true features on the grid, the others are orthogonal to it.
    inside = true @ torch.linalg.pinv(true) @ features
    torch.testing.assert_close(inside[:, groups["aliases"]], features[:, groups["aliases"]], rtol=0, atol=1e-11)
    assert float(features[:, groups["aliases"]].norm(dim=0).min()) > 1
    assert float(inside[:, groups["others"]].abs().max()) < 1e-11


def test_tasks():
    drawn = fourier_tasks(1000, 21, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(1000).double())
    assert bool((drawn[:, 5:] == 0).all()) and bool((drawn[:, :5] != 0).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fourier_features(torch.zeros(3), 4), "count must be odd, 1 .* got 4"),
        (lambda: fourier_tasks(0, 5, 1, torch.Generator()), "tasks must be at least 1, got 0"),
        (lambda: fourier_tasks(1, 5, 6, torch.Generator()), r"true must be between 1 and count \(5\), got 6"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_min_norm_is_the_shortest_solution():
    generator = torch.Generator().manual_seed(0)
    features, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6, 15), (6, 2)))
    solution = min_norm(features, y)
    torch.testing.assert_close(features @ solution, y)
    kernel = torch.linalg.svd(features).Vh[6:]
    torch.testing.assert_close(kernel @ solution, torch.zeros(9, 2).double(), rtol=0, atol=1e-13)


def test_gradient_of_part_c():
    for weights in ((1.0, 1.0), (0.3, -2.0), (-1.5, 0.7)):
        leaf = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(aliased_error(leaf), leaf)
        torch.testing.assert_close(torch.tensor(aliased_gradient(*weights)).double(), grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("points", [5, 32, 60, 90])
@pytest.mark.parametrize("zeros", [0, 40])
def test_least_squares(points, zeros):
    """The solution of least norm, whatever the rank."""
    generator = torch.Generator().manual_seed(0)
    weights = 0.1 + torch.rand(61, generator=generator, dtype=torch.float64)
    weights[:zeros] = 0
    features, y = fourier_features(grid(points), 61) * weights, torch.randn(3, points, generator=generator, dtype=torch.float64)
    test = torch.randn(7, 61, generator=generator, dtype=torch.float64)
    expected = (test @ torch.linalg.pinv(features) @ y.T).T
    torch.testing.assert_close(experiment._least_squares(features, y, test), expected, rtol=1e-9, atol=1e-9)


def test_logistic_in_a_basis_of_the_rows():
    """With fewer points than features the problem is solved in the span of the rows: the same predictions."""
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    features, test = (torch.randn(rows, 30, generator=generator, dtype=torch.float64) for rows in (12, 50))
    y = torch.stack([features[:, 0].sign(), torch.ones(12).double()])
    c = Settings().logistic_C
    made = experiment._logistic(features, y, test, c)
    whole = LogisticRegression(C=c, fit_intercept=False, max_iter=1000).fit(features.numpy(), y[0].numpy())
    assert float((made[0].sign() == torch.from_numpy(whole.decision_function(test.numpy())).sign()).double().mean()) > 0.95
    assert bool((made[1] == 1).all())


def test_parts_a_to_d(metrics):
    toy = metrics["toy"]
    assert toy["difference from the pseudo-inverse (a)"] < 1e-13 and toy["difference from the formula (b)"] < 1e-13
    assert toy["relative difference of the gradient from autograd (c)"] < 1e-10
    for path in toy["paths"]:
        norm = path["norm of the start"]
        assert norm == math.hypot(path["c0"][0], path["c1"][0])
        assert abs(path["c0"][-1] - norm) < 0.01 * norm and abs(path["c1"][-1]) < 0.01 * norm
        assert abs(path["beta"][0] - 1 / norm) < 0.01 / norm and abs(path["beta"][1]) < 0.01
        assert abs(path["c1"][0]) > 0.3 * norm


def test_claims(metrics):
    check_claims(metrics)


def test_evolution(metrics):
    (evolution,) = metrics["weights"]["e"]
    assert all(group[0] == 1 and len(group) == 21 for group in evolution.values())
    assert len(metrics["weights of the first seed"]["e"]) == 501


def test_written(metrics, folder):
    check_written(folder / "feature-weights", metrics, [f"feature-weights-{part}.png" for part in "defgh"])
    page = folder / "feature-weights" / "answers.md"
    text = page.read_text()
    assert text == answers(metrics) and "there is a downward spike at 32" in text
    page.unlink()
    assert quick_run("feature-weights", folder) == metrics
    assert page.read_text() == text


def test_killed_run_continues(metrics, folder):
    check_resumes(folder / "feature-weights", metrics, "regression.json")
