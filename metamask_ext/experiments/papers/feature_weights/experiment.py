"""Meta-learned weights of features: EECS 182 (Berkeley, fall 2022), homework 9, problem 2, parts a to h."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext.data.fourier import fourier_features, fourier_tasks, grid
from metamask_ext.experiments.engine.run_folder import Output, Scores
from metamask_ext.experiments.engine.settings import OptionError
from metamask_ext.experiments.engine.tracking import track
from metamask_ext.files.atomic import write_atomic
from metamask_ext.meta import MAML

from .report import CLAIMS, GROUPS, KINDS, documents, figures, members_of, shown_sizes, tables
from .theory import aliased_pair, min_norm

__all__ = ["CLAIMS", "QUESTION", "QUICK", "SETTINGS", "documents", "figures", "run", "tables"]

SETTINGS: dict[str, Any] = {
    "seeds": 5,
    "tasks": 5,
    "steps": 100,
    "lr": 1e-2,
    # The weighted features, and how many of them the signals use: the constant and five frequencies.
    "features": 501,
    "true_features": 11,
    "support_points": 32,
    "query_points": 64,
    "noise": 0.1,
    # Numbers of training points in the tests: 20 on a log scale from 1 to three times the features, and those of interest.
    "sizes": [1, 2, 3, 5, 7, 10, 11, 12, 15, 22, 31, 32, 33, 47, 69, 102, 149, 219, 322, 474, 696, 1023, 1503],
    # The solver of the inner problem; "labels": the sign of the noisy signal is what is learned.
    "parts": {
        "e": {"labels": False, "solver": "min norm"},
        "f, 5 steps": {"labels": False, "solver": "gradient descent", "inner_steps": 5, "inner_lr": 0.01},
        "f, 1 step": {"labels": False, "solver": "gradient descent", "inner_steps": 1, "inner_lr": 0.01},
        "g": {"labels": True, "solver": "min norm"},
        "h": {"labels": True, "solver": "logistic, gradient descent", "inner_steps": 5, "inner_lr": 0.3},
    },
    "logistic_C": 1e6,
    "evolution_every": 5,
    "test": {"tasks": 10, "points": 1000},
}
QUICK: dict[str, Any] = {"seeds": 1, "sizes": [8, 16, 31, 32, 33, 64]}

QUESTION = """Can weights of features be meta-learned so that 32 points are enough where there are 501 features, many of them
aliases of the ones that matter? This is the homework on meta-learning among the seeds (EECS 182, Berkeley, fall 2022, homework
9, problem 2): the weights of the features are shared by all tasks, as W is; its questions are answered one by one in
`answers.md`."""


def run(output: Output, settings: dict[str, Any]) -> dict[str, Any]:
    """Weights ``c`` of 501 Fourier features, learned so that regression or classification on 32 grid points generalises: through
    the minimum-norm solution, or through gradient steps. Measured: test loss (or error) on new tasks over the number of training
    points, against weights of one, an oracle that has only the true features, and the zero predictor. ``answers.md`` in the
    folder of the run answers the homework's questions from these numbers."""
    for size in shown_sizes(settings):
        if size not in settings["sizes"]:
            raise OptionError(f"experiment 'feature-weights': 'sizes' must have {size} among them, got {settings['sizes']}")
    data = (
        f"drawn: signals of the first {settings['true_features']} of {settings['features']} Fourier features, mean square 1, noise "
        f"{settings['noise']}; training on a grid of [-1, 1), meta-updates and tests at uniform x; labels: the sign"
    )
    metrics = output.begin(data) or _work(output, settings)
    # Also where the run was killed before it: the answers follow from the metrics.
    for name, text in documents(metrics).items():
        if not (output.folder / name).exists():
            write_atomic(output.folder / name, text.encode())
    return metrics


def _work(output: Output, settings: dict[str, Any]) -> dict[str, Any]:
    measures = {part: _meta_learned for part in settings["parts"]} | {kind: _baselines for kind in KINDS}
    made = output.pieces(
        {(seed, part): partial(measure, part, seed, settings) for seed in output.seeds for part, measure in measures.items()}
    )
    found = {part: [made[seed, part] for seed in output.seeds] for part in measures}
    more = {
        "toy": aliased_pair(),
        "curves": {part: [run["curves"] for run in runs] for part, runs in found.items()},
        "weights": {part: [run["weights"]["evolution"] for run in found[part]] for part in settings["parts"]},
        "weights of the first seed": {part: found[part][0]["weights"]["final"] for part in settings["parts"]},
    }
    scores, baselines = _scores(found, settings)
    budget = (
        f"{settings['steps']} steps of SGD on {settings['tasks']} tasks of {settings['support_points']} + "
        f"{settings['query_points']} "
        f"points for each part; tests on {settings['test']['tasks']} tasks for each number of points."
    )
    return output.finish(scores, baselines, budget, figures, more)


class WeightedFeatures(nn.Module):
    """``sum_k beta_k c_k phi_k``: ``weights`` ``c`` start at one, ``coefficients`` ``beta`` at zero, which MAML adapts."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(features, dtype=torch.float64))
        self.coefficients = nn.Parameter(torch.zeros(features, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        return features @ (self.weights * self.coefficients)


def _loss(chosen: Mapping[str, Any]) -> Any:
    # Labels are -1 and 1: the logistic loss is log(1 + exp(-y f)).
    logistic = chosen["solver"].startswith("logistic")
    return (lambda f, y: F.softplus(-y * f).mean()) if logistic else F.mse_loss


def _maml(model: WeightedFeatures, chosen: Mapping[str, Any]) -> MAML:
    return MAML(model, chosen["inner_lr"], chosen["inner_steps"], adapt=lambda name: name == "coefficients")


def _meta_learned(part: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Learn the weights of one part and test them."""
    chosen, total, tasks = settings["parts"][part], settings["features"], settings["tasks"]
    generator = torch.Generator().manual_seed(seed)
    model = WeightedFeatures(total)
    optimizer = torch.optim.SGD([model.weights], settings["lr"])
    features = fourier_features(grid(settings["support_points"]), total)
    groups = {group: members_of(group, settings) for group in GROUPS}
    evolution: dict[str, list[float]] = {name: [] for name in groups}
    for step in range(settings["steps"] + 1):
        if step % settings["evolution_every"] == 0:
            for name, members in groups.items():
                evolution[name].append(float(model.weights.detach()[members].abs().mean()))
        if step == settings["steps"]:
            break
        coefficients = fourier_tasks(tasks, total, settings["true_features"], generator)
        y = _targets(features.expand(tasks, -1, -1), coefficients, chosen["labels"], settings["noise"], generator)
        x = 2 * torch.rand(tasks, settings["query_points"], dtype=torch.float64, generator=generator) - 1
        query = fourier_features(x, total)
        y_query = _targets(query, coefficients, chosen["labels"], settings["noise"], generator)
        optimizer.zero_grad()
        # The sum over points and tasks, as in the homework: the rate belongs to it.
        if chosen["solver"] == "min norm":
            solution = model.weights[:, None] * min_norm(features * model.weights, y.T)
            loss = F.mse_loss((query @ solution.T[:, :, None])[..., 0], y_query, reduction="sum")
        else:
            support = features.expand(tasks, -1, -1), y
            loss = y_query.numel() * _maml(model, chosen)(_loss(chosen), support, (query, y_query))
        loss.backward()
        optimizer.step()
        track(step + 1, loss=loss.detach())
    weights = model.weights.detach()
    return {
        "curves": _test(chosen, model, seed, settings),
        "weights": {"evolution": evolution, "final": [round(value, 5) for value in weights.tolist()]},
    }


def _targets(features: Tensor, coefficients: Tensor, labels: bool, noise: float, generator: torch.Generator) -> Tensor:
    """Noisy signals ``[T, n]`` at the points of ``features`` ``[T, n, d]``, or their signs."""
    y = (features @ coefficients[:, :, None])[..., 0]
    y = y + noise * torch.randn(y.shape, generator=generator, dtype=y.dtype)
    return y.sign() if labels else y


def _baselines(kind: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Weights of one, the oracle and the zero predictor, in the tests that the parts take."""
    ones, oracle = (WeightedFeatures(settings["features"]) for _ in range(2))
    with torch.no_grad():
        oracle.weights[settings["true_features"] :] = 0
    curves = {}
    for part in ("f, 5 steps", "f, 1 step") if kind == "regression" else ("g", "h"):
        for name, model in (("ones", ones), ("oracle", oracle)):
            for solver, values in _test(settings["parts"][part], model, seed, settings).items():
                if name == "ones" or "step" not in solver:
                    curves[f"{name}, {solver}"] = values
    if kind == "regression":
        _, y, _ = next(_test_sets(False, seed, settings))
        curves["zero"] = [float(y.square().mean())]
    return {"curves": curves}


def _test_sets(labels: bool, seed: int, settings: dict[str, Any]) -> Any:
    """For each size test features and signals, training features and targets: the same for all parts of a kind."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    total, tasks = settings["features"], settings["test"]["tasks"]
    coefficients = fourier_tasks(tasks, total, settings["true_features"], generator)
    x = 2 * torch.rand(settings["test"]["points"], dtype=torch.float64, generator=generator) - 1
    test = fourier_features(x, total)
    for size in settings["sizes"]:
        features = fourier_features(grid(size), total)
        y = _targets(features.expand(tasks, -1, -1), coefficients, labels, settings["noise"], generator)
        yield test, coefficients @ test.T, (features, y)


@torch.no_grad()
def _test(chosen: Mapping[str, Any], model: WeightedFeatures, seed: int, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Curves over ``sizes`` of the mean test loss of new tasks (MSE, or the share of wrong labels in %), by solver: the best one
    that the homework takes for the part, and for part f also the part's own gradient steps."""
    curves: dict[str, list[float]] = {}
    for test, y_test, (features, y) in _test_sets(chosen["labels"], seed, settings):
        predictions = {}
        if chosen["solver"].startswith("logistic"):
            predictions["logistic"] = _logistic(features * model.weights, y, test * model.weights, settings["logistic_C"])
        else:
            predictions["min norm"] = _least_squares(features * model.weights, y, test * model.weights)
        if chosen["solver"] == "gradient descent":
            maml = _maml(model, chosen)
            parameters = maml.adapt(_loss(chosen), (features.expand(len(y), -1, -1), y))
            name = f"{chosen['inner_steps']} step{'s' if chosen['inner_steps'] > 1 else ''}"
            predictions[name] = maml.predict(parameters, test.expand(len(y), -1, -1))
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


def _logistic(features: Tensor, y: Tensor, test: Tensor, c: float) -> Tensor:
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
        model = LogisticRegression(C=c, fit_intercept=False, max_iter=1000)
        made.append(torch.from_numpy(model.fit(features.numpy(), labels.numpy()).decision_function(test.numpy())))
    return torch.stack(made)


def _scores(found: dict[str, list[dict[str, Any]]], settings: dict[str, Any]) -> tuple[Scores, list[str]]:
    scores: Scores = {}
    baselines = []
    for part, runs in found.items():
        for curve in runs[0]["curves"]:
            method = f"{part}: {curve}"
            if part in KINDS:
                method = curve if curve == "zero" or part == "regression" else f"{curve}, labels"
                baselines.append(method)
            labels = part == "classification" if part in KINDS else settings["parts"][part]["labels"]
            unit = "wrong labels (%)" if labels else "test MSE"
            for size in shown_sizes(settings):
                at = settings["sizes"].index(size)
                scores.setdefault(method, {})[f"{unit}, n = {size}"] = [
                    run["curves"][curve][at if len(run["curves"][curve]) > 1 else 0] for run in runs
                ]
    return scores, baselines
