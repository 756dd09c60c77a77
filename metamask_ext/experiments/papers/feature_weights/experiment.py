"""Meta-learned weights of features: EECS 182 (Berkeley, fall 2022), homework 9, problem 2, parts a to h."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext.data.fourier import fourier_features, fourier_tasks, grid
from metamask_ext.files.atomic import write_atomic
from metamask_ext.meta import MAML

from ...engine.jobs import Json
from ...engine.run_folder import RunFolder, Scores
from ...engine.settings import Changes, OptionError
from ...engine.tracking import track
from .answers import documents
from .claims import CLAIMS
from .findings import GROUPS, KINDS, members_of
from .report import figures, tables
from .settings import PartSettings, Settings, StepsSettings
from .theory import aliased_pair, min_norm

__all__ = ["CLAIMS", "QUESTION", "QUICK", "Settings", "documents", "figures", "run", "tables"]

QUICK: Changes = {"seeds": 1, "sizes": [8, 16, 31, 32, 33, 64]}

QUESTION = """Can weights of features be meta-learned so that 32 points are enough where there are 501 features, many of them
aliases of the ones that matter? This is a homework on meta-learning (EECS 182, Berkeley, fall 2022, homework 9, problem 2): the
weights of the features are shared by all tasks, as W is; its questions are answered one by one in `answers.md`."""


def run(folder: RunFolder, settings: Settings) -> Json:
    """Weights ``c`` of 501 Fourier features, learned so that regression or classification on 32 grid points generalises: through
    the minimum-norm solution, or through gradient steps. Measured: test loss (or error) on new tasks over the number of training
    points, against weights of one, an oracle that has only the true features, and the zero predictor. ``answers.md`` in the
    folder of the run answers the homework's questions from these numbers."""
    for size in settings.shown_sizes:
        if size not in settings.sizes:
            raise OptionError(f"experiment 'feature-weights': 'sizes' must include {size}, got {list(settings.sizes)}")
    data = (
        f"drawn: signals of the first {settings.true_features} of {settings.features} Fourier features, mean square 1, noise "
        f"{settings.noise}; training on a grid of [-1, 1), meta-updates and tests at uniform x; labels: the sign"
    )
    metrics = folder.begin(data) or _work(folder, settings)
    # Also where the run was killed before it: the answers follow from the metrics.
    for name, text in documents(metrics).items():
        if not (folder.path / name).exists():
            write_atomic(folder.path / name, text.encode())
    return metrics


def _work(folder: RunFolder, settings: Settings) -> Json:
    measures = {part: _meta_learned for part in settings.parts} | {kind: _baselines for kind in KINDS}
    made = folder.compute(
        {(seed, part): partial(measure, part, seed, settings) for seed in folder.seeds for part, measure in measures.items()}
    )
    found = {part: [made[seed, part] for seed in folder.seeds] for part in measures}
    more = {
        "toy": aliased_pair(),
        "curves": {part: [run["curves"] for run in runs] for part, runs in found.items()},
        "weights": {part: [run["weights"]["evolution"] for run in found[part]] for part in settings.parts},
        "weights of the first seed": {part: found[part][0]["weights"]["final"] for part in settings.parts},
    }
    scores, baselines = _scores(found, settings)
    budget = (
        f"{settings.steps} steps of SGD on {settings.tasks} tasks of {settings.support_points} + "
        f"{settings.query_points} "
        f"points for each part; tests on {settings.test.tasks} tasks for each number of points."
    )
    return folder.finish(scores, baselines, budget, figures, more)


class WeightedFeatures(nn.Module):
    """``sum_k beta_k c_k phi_k``: ``weights`` ``c`` start at one, ``coefficients`` ``beta`` at zero, which MAML adapts."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(features, dtype=torch.float64))
        self.coefficients = nn.Parameter(torch.zeros(features, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        return features @ (self.weights * self.coefficients)


def _loss(chosen: PartSettings) -> Callable[[Tensor, Tensor], Tensor]:
    # Labels are -1 and 1: the logistic loss is log(1 + exp(-y f)).
    logistic = chosen.solver.startswith("logistic")
    return (lambda f, y: F.softplus(-y * f).mean()) if logistic else F.mse_loss


def _maml(model: WeightedFeatures, chosen: PartSettings) -> MAML:
    if not isinstance(chosen, StepsSettings):
        raise OptionError(f"solver {chosen.solver!r} needs inner_steps and inner_lr")
    return MAML(model, chosen.inner_lr, chosen.inner_steps, adapt=lambda name: name == "coefficients")


def _meta_learned(part: str, seed: int, settings: Settings) -> Json:
    """Learn the weights of one part and test them."""
    chosen, total = settings.parts[part], settings.features
    generator = torch.Generator().manual_seed(seed)
    model = WeightedFeatures(total)
    optimizer = torch.optim.SGD([model.weights], settings.lr)
    features = fourier_features(grid(settings.support_points), total)
    groups = {group: members_of(group, settings) for group in GROUPS}
    evolution: dict[str, list[float]] = {name: [] for name in groups}
    for step in range(settings.steps + 1):
        if step % settings.evolution_every == 0:
            for name, members in groups.items():
                evolution[name].append(float(model.weights.detach()[members].abs().mean()))
        if step == settings.steps:
            break
        coefficients = fourier_tasks(settings.tasks, total, settings.true_features, generator)
        y = _targets(features.expand(settings.tasks, -1, -1), coefficients, chosen.labels, settings.noise, generator)
        x = 2 * torch.rand(settings.tasks, settings.query_points, dtype=torch.float64, generator=generator) - 1
        query = fourier_features(x, total)
        y_query = _targets(query, coefficients, chosen.labels, settings.noise, generator)
        optimizer.zero_grad()
        loss = _meta_loss(chosen, model, (features, y), (query, y_query))
        loss.backward()
        optimizer.step()
        track(step + 1, loss=loss.detach())
    weights = model.weights.detach()
    return {
        "curves": _test(chosen, model, seed, settings),
        "weights": {"evolution": evolution, "final": [round(value, 5) for value in weights.tolist()]},
    }


def _meta_loss(
    chosen: PartSettings, model: WeightedFeatures, support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor]
) -> Tensor:
    """The loss of the query set after the inner problem: the sum over points and tasks, as in the homework, whose rate belongs to
    it."""
    (features, y), (x_query, y_query) = support, query
    if chosen.solver == "min norm":
        solution = model.weights[:, None] * min_norm(features * model.weights, y.T)
        return F.mse_loss((x_query @ solution.T[:, :, None])[..., 0], y_query, reduction="sum")
    maml = _maml(model, chosen)
    return y_query.numel() * maml(_loss(chosen), (features.expand(len(y), -1, -1), y), query)


def _targets(features: Tensor, coefficients: Tensor, labels: bool, noise: float, generator: torch.Generator) -> Tensor:
    """Noisy signals ``[T, n]`` at the points of ``features`` ``[T, n, d]``, or their signs."""
    y = (features @ coefficients[:, :, None])[..., 0]
    y = y + noise * torch.randn(y.shape, generator=generator, dtype=y.dtype)
    return y.sign() if labels else y


def _baselines(kind: str, seed: int, settings: Settings) -> Json:
    """Weights of one, the oracle and the zero predictor, in the tests that the parts take."""
    ones, oracle = (WeightedFeatures(settings.features) for _ in range(2))
    with torch.no_grad():
        oracle.weights[settings.true_features :] = 0
    curves = {}
    for part in ("f, 5 steps", "f, 1 step") if kind == "regression" else ("g", "h"):
        for name, model in (("ones", ones), ("oracle", oracle)):
            for solver, values in _test(settings.parts[part], model, seed, settings).items():
                if name == "ones" or "step" not in solver:
                    curves[f"{name}, {solver}"] = values
    if kind == "regression":
        _, y, _ = next(_test_sets(False, seed, settings))
        curves["zero"] = [float(y.square().mean())]
    return {"curves": curves}


def _test_sets(labels: bool, seed: int, settings: Settings) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor]]]:
    """For each size test features and signals, training features and targets: the same for all parts of a kind."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    total, tasks = settings.features, settings.test.tasks
    coefficients = fourier_tasks(tasks, total, settings.true_features, generator)
    x = 2 * torch.rand(settings.test.points, dtype=torch.float64, generator=generator) - 1
    test = fourier_features(x, total)
    for size in settings.sizes:
        features = fourier_features(grid(size), total)
        y = _targets(features.expand(tasks, -1, -1), coefficients, labels, settings.noise, generator)
        yield test, coefficients @ test.T, (features, y)


@torch.no_grad()
def _test(chosen: PartSettings, model: WeightedFeatures, seed: int, settings: Settings) -> dict[str, list[float]]:
    """Curves over ``sizes`` of the mean test loss of new tasks (MSE, or the share of wrong labels in %), by solver: the best one
    that the homework takes for the part, and for part f also the part's own gradient steps."""
    curves: dict[str, list[float]] = {}
    for test, y_test, (features, y) in _test_sets(chosen.labels, seed, settings):
        predictions = {}
        if chosen.solver.startswith("logistic"):
            predictions["logistic"] = _logistic(features * model.weights, y, test * model.weights, settings.logistic_C)
        else:
            predictions["min norm"] = _least_squares(features * model.weights, y, test * model.weights)
        if chosen.solver == "gradient descent":
            maml = _maml(model, chosen)
            parameters = maml.adapt(_loss(chosen), (features.expand(len(y), -1, -1), y))
            assert isinstance(chosen, StepsSettings)
            predictions[chosen.steps_text] = maml.predict(parameters, test.expand(len(y), -1, -1))
        for name, prediction in predictions.items():
            wrong = 100 * (prediction.sign() != y_test.sign()).double() if chosen.labels else (prediction - y_test).square()
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


def _scores(found: dict[str, list[Json]], settings: Settings) -> tuple[Scores, list[str]]:
    scores: Scores = {}
    baselines = []
    for part, runs in found.items():
        for curve in runs[0]["curves"]:
            method = f"{part}: {curve}"
            if part in KINDS:
                method = curve if curve == "zero" or part == "regression" else f"{curve}, labels"
                baselines.append(method)
            labels = part == "classification" if part in KINDS else settings.parts[part].labels
            unit = "wrong labels (%)" if labels else "test MSE"
            for size in settings.shown_sizes:
                at = settings.sizes.index(size)
                scores.setdefault(method, {})[f"{unit}, n = {size}"] = [
                    run["curves"][curve][at if len(run["curves"][curve]) > 1 else 0] for run in runs
                ]
    return scores, baselines
