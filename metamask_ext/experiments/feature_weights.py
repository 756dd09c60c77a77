"""Meta-learned weights of features: EECS 182 (Berkeley, fall 2022), homework 9, problem 2, parts a to h."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..continual.files import write_atomic
from ..meta import MAML
from ..tasks.fourier import fourier_features, fourier_tasks, grid
from .feature_weights_report import GROUPS, answers, figures, members_of
from .feature_weights_theory import aliased_pair, min_norm
from .output import Output, Scores, first_seeds, one_thread

FEATURES, TRUE = 501, 11
"""The weighted features, and how many of them the signals use: the constant and five frequencies."""
SUPPORT, QUERY, TASKS, NOISE = 32, 64, 5, 0.1
TEST_TASKS, TEST_POINTS = 10, 1000
EVOLUTION_EVERY = 5
SHOWN_SIZES = (32, 33)
"""Numbers of training points in the table; the first is that of meta-training."""
OPTIONS: dict[str, Any] = {"lr": 1e-2, "iterations": 100}
QUICK: dict[str, Any] = {"sizes": [8, 16, 31, 32, 33, 64]}
# The solver of the inner problem; "labels": the sign of the noisy signal is what is learned.
PARTS: dict[str, dict[str, Any]] = {
    "e": {"labels": False, "solver": "min norm"},
    "f, 5 steps": {"labels": False, "solver": "gradient descent", "inner_steps": 5, "inner_lr": 0.01},
    "f, 1 step": {"labels": False, "solver": "gradient descent", "inner_steps": 1, "inner_lr": 0.01},
    "g": {"labels": True, "solver": "min norm"},
    "h": {"labels": True, "solver": "logistic, gradient descent", "inner_steps": 5, "inner_lr": 0.3},
}
LOGISTIC_C = 1e6


@one_thread()
def run(out: Path, seed: int, quick: bool) -> dict[str, Any]:
    """Weights ``c`` of 501 Fourier features, learned so that regression or classification on 32 grid points generalises: through
    the minimum-norm solution, or through gradient steps. Measured: test loss (or error) on new tasks over the number of training
    points, against weights of one, an oracle that has only the true features, and the zero predictor. ``answers.md`` in ``out``
    answers the homework's questions from these numbers. See :func:`metamask_ext.experiments.run`.
    """
    seeds = first_seeds(seed, quick)
    output = Output("feature-weights", out, seed, quick)
    settings = {
        "seeds": seeds,
        **OPTIONS,
        "sizes": QUICK["sizes"] if quick else _sizes(),
        "optimizer": "sgd",
        "init": "weights of one",
        "features": FEATURES,
        "true_features": TRUE,
        "support_points": SUPPORT,
        "query_points": QUERY,
        "tasks": TASKS,
        "noise": NOISE,
        "parts": PARTS,
        "logistic_C": LOGISTIC_C,
        "evolution_every": EVOLUTION_EVERY,
        "test_tasks": TEST_TASKS,
        "test_points": TEST_POINTS,
    }
    data = (
        f"drawn: signals of the first {TRUE} of {FEATURES} Fourier features, mean square 1, noise {NOISE}; training on a grid of "
        f"[-1, 1), meta-updates and tests at uniform x; labels: the sign"
    )
    metrics = output.begin(settings, data) or _work(output, seeds, settings)
    # Also where the run was killed before it: the answers follow from the metrics.
    if not (out / "answers.md").exists():
        write_atomic(out / "answers.md", answers(metrics).encode())
    return metrics


def _work(output: Output, seeds: Sequence[int], settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in (*PARTS, "regression", "classification")}
    for number in seeds:
        for part in found:
            measure = _meta_learned if part in PARTS else _baselines
            found[part].append(output.piece(number, part, partial(measure, part, number, settings)))

    toy = aliased_pair()
    more = {"toy": toy, "curves": {part: [run["curves"] for run in runs] for part, runs in found.items()}}
    more["weights"] = {part: [run["weights"]["evolution"] for run in found[part]] for part in PARTS}
    scores, baselines = _scores(found, settings["sizes"])
    drawn = figures(toy, found, settings)
    budget = (
        f"{OPTIONS['iterations']} steps of SGD on {TASKS} tasks of {SUPPORT} + {QUERY} points for each part; tests on {TEST_TASKS} "
        f"tasks for each number of points."
    )
    return output.finish(scores, baselines, budget, drawn, more)


class WeightedFeatures(nn.Module):
    """``sum_k beta_k c_k phi_k``: ``weights`` ``c`` start at one, ``coefficients`` ``beta`` at zero, which MAML adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(FEATURES, dtype=torch.float64))
        self.coefficients = nn.Parameter(torch.zeros(FEATURES, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        return features @ (self.weights * self.coefficients)


def _loss(part: str) -> Any:
    # Labels are -1 and 1: the logistic loss is log(1 + exp(-y f)).
    logistic = PARTS[part]["solver"].startswith("logistic")
    return (lambda f, y: F.softplus(-y * f).mean()) if logistic else F.mse_loss


def _maml(model: WeightedFeatures, part: str) -> MAML:
    chosen = PARTS[part]
    return MAML(model, chosen["inner_lr"], chosen["inner_steps"], adapt=lambda name: name == "coefficients")


def _meta_learned(part: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Learn the weights of one part and test them."""
    generator = torch.Generator().manual_seed(seed)
    model = WeightedFeatures()
    optimizer = torch.optim.SGD([model.weights], settings["lr"])
    features = fourier_features(grid(SUPPORT), FEATURES)
    groups = {group: members_of(group, settings) for group in GROUPS}
    evolution: dict[str, list[float]] = {name: [] for name in groups}
    for iteration in range(settings["iterations"] + 1):
        if iteration % EVOLUTION_EVERY == 0:
            for name, members in groups.items():
                evolution[name].append(float(model.weights.detach()[members].abs().mean()))
        if iteration == settings["iterations"]:
            break
        coefficients = fourier_tasks(TASKS, FEATURES, TRUE, generator)
        y = _targets(features.expand(TASKS, -1, -1), coefficients, part, generator)
        x = 2 * torch.rand(TASKS, QUERY, dtype=torch.float64, generator=generator) - 1
        query = fourier_features(x, FEATURES)
        y_query = _targets(query, coefficients, part, generator)
        optimizer.zero_grad()
        # The sum over points and tasks, as in the homework: the rate belongs to it.
        if PARTS[part]["solver"] == "min norm":
            solution = model.weights[:, None] * min_norm(features * model.weights, y.T)
            loss = F.mse_loss((query @ solution.T[:, :, None])[..., 0], y_query, reduction="sum")
        else:
            support = features.expand(TASKS, -1, -1), y
            loss = TASKS * QUERY * _maml(model, part)(_loss(part), support, (query, y_query))
        loss.backward()
        optimizer.step()
    weights = model.weights.detach()
    return {
        "curves": _test(part, model, seed, settings["sizes"]),
        "weights": {"evolution": evolution, "final": [round(value, 5) for value in weights.tolist()]},
    }


def _targets(features: Tensor, coefficients: Tensor, part: str, generator: torch.Generator) -> Tensor:
    """Noisy signals ``[T, n]`` at the points of ``features`` ``[T, n, d]``, or their signs."""
    y = (features @ coefficients[:, :, None])[..., 0]
    y = y + NOISE * torch.randn(y.shape, generator=generator, dtype=y.dtype)
    return y.sign() if PARTS[part]["labels"] else y


def _baselines(kind: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Weights of one, the oracle and the zero predictor, in the tests that the parts take."""
    ones, oracle = WeightedFeatures(), WeightedFeatures()
    with torch.no_grad():
        oracle.weights[TRUE:] = 0
    curves = {}
    for part in ("f, 5 steps", "f, 1 step") if kind == "regression" else ("g", "h"):
        for name, model in (("ones", ones), ("oracle", oracle)):
            for solver, values in _test(part, model, seed, settings["sizes"]).items():
                if name == "ones" or "step" not in solver:
                    curves[f"{name}, {solver}"] = values
    if kind == "regression":
        _, y, _ = next(_test_sets("e", seed, [1]))
        curves["zero"] = [float(y.square().mean())]
    return {"curves": curves}


def _test_sets(part: str, seed: int, sizes: Sequence[int]) -> Any:
    """For each size test features and signals, training features and targets: the same for all parts of a kind."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    coefficients = fourier_tasks(TEST_TASKS, FEATURES, TRUE, generator)
    x = 2 * torch.rand(TEST_POINTS, dtype=torch.float64, generator=generator) - 1
    test = fourier_features(x, FEATURES)
    for size in sizes:
        features = fourier_features(grid(size), FEATURES)
        y = _targets(features.expand(TEST_TASKS, -1, -1), coefficients, part, generator)
        yield test, coefficients @ test.T, (features, y)


@torch.no_grad()
def _test(part: str, model: WeightedFeatures, seed: int, sizes: Sequence[int]) -> dict[str, list[float]]:
    """Curves over ``sizes`` of the mean test loss of new tasks (MSE, or the share of wrong labels in %), by solver: the best one
    that the homework takes for the part, and for part f also the part's own gradient steps."""
    chosen = PARTS[part]
    curves: dict[str, list[float]] = {}
    for test, y_test, (features, y) in _test_sets(part, seed, sizes):
        predictions = {}
        if chosen["solver"].startswith("logistic"):
            predictions["logistic"] = _logistic(features * model.weights, y, test * model.weights)
        else:
            predictions["min norm"] = _least_squares(features * model.weights, y, test * model.weights)
        if chosen["solver"] == "gradient descent":
            maml = _maml(model, part)
            parameters = maml.adapt(_loss(part), (features.expand(TEST_TASKS, -1, -1), y))
            name = f"{chosen['inner_steps']} step{'s' if chosen['inner_steps'] > 1 else ''}"
            predictions[name] = maml.predict(parameters, test.expand(TEST_TASKS, -1, -1))
        for name, prediction in predictions.items():
            wrong = 100 * (prediction.sign() != y_test.sign()).double() if chosen["labels"] else (prediction - y_test).square()
            curves.setdefault(name, []).append(float(wrong.mean()))
    return curves


def _least_squares(features: Tensor, y: Tensor, test: Tensor) -> Tensor:
    """Predictions ``[T, tests]`` of the least-squares solution of least norm."""
    # torch.linalg.lstsq (torch 2.13) is not up to these grids: gelsy gave solutions that were far off, gelsd did not converge.
    wide = len(features) < features.shape[1]
    values, vectors = torch.linalg.eigh(features @ features.mT if wide else features.mT @ features)
    inverse = torch.where(values > 1e-12 * values[-1], 1 / values, 0)
    solution = vectors @ (inverse[:, None] * (vectors.mT @ (y.T if wide else features.mT @ y.T)))
    return (test @ (features.mT @ solution if wide else solution)).T


def _logistic(features: Tensor, y: Tensor, test: Tensor) -> Tensor:
    """The same of logistic regression without intercept. Labels that are all the same are predicted everywhere."""
    from sklearn.linear_model import LogisticRegression

    used = features.abs().amax(0) > 0
    features, test = features[:, used], test[:, used]
    if len(features) < features.shape[1]:
        # The solution lies in the span of the rows: in an orthonormal basis of it the problem is no larger than the data.
        basis = torch.linalg.qr(features.mT).Q
        features, test = features @ basis, test @ basis
    made = []
    for labels in y:
        if labels.unique().numel() == 1:
            made.append(labels[:1].expand(len(test)))
            continue
        model = LogisticRegression(C=LOGISTIC_C, fit_intercept=False, max_iter=1000)
        made.append(torch.from_numpy(model.fit(features.numpy(), labels.numpy()).decision_function(test.numpy())))
    return torch.stack(made)


def _sizes() -> list[int]:
    """Numbers of training points: 20 on a log scale from 1 to three times the features, and those of interest."""
    spread = torch.logspace(0, torch.log10(torch.tensor(3.0 * FEATURES)), 20).round().int().tolist()
    return sorted({*spread, SUPPORT - 1, SUPPORT, SUPPORT + 1, TRUE - 1, TRUE, TRUE + 1})


def _scores(found: dict[str, list[dict[str, Any]]], sizes: Sequence[int]) -> tuple[Scores, list[str]]:
    scores: Scores = {}
    baselines = []
    for part, runs in found.items():
        for curve in runs[0]["curves"]:
            method = f"{part}: {curve}" if part in PARTS else curve
            if part not in PARTS:
                method = curve if curve == "zero" or part == "regression" else f"{curve}, labels"
                baselines.append(method)
            labels = PARTS[part]["labels"] if part in PARTS else part == "classification"
            unit = "wrong labels (%)" if labels else "test MSE"
            for size in SHOWN_SIZES:
                at = sizes.index(size)
                scores.setdefault(method, {})[f"{unit}, n = {size}"] = [
                    run["curves"][curve][at if len(run["curves"][curve]) > 1 else 0] for run in runs
                ]
    return scores, baselines
