"""Neural ordinary differential equations, the points of a quiz each measured, and many systems in one masked field.

Source: Chen et al., Neural Ordinary Differential Equations, arXiv:1806.07366; Lam, ECE472 quiz 6 (2020), question 2.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from statistics import fmean
from typing import TYPE_CHECKING

from ...engine.claims import Claim, Metrics, Numbers, mean
from ...engine.figures import Figures, new_figure
from ...engine.jobs import Job, Json, Key
from ...engine.run_folder import RunFolder, Scores
from ...engine.settings import Changes
from ...engine.tables import Rows, Tables, table_of
from .settings import Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUICK: Changes = {
    "seeds": 1,
    "lengths": [10, 500],
    "flow": {"steps": 80, "batch": 128, "parts": 8},
    "spirals": {"spirals": 40, "steps": 60},
    "systems": {"systems": 3, "trajectories": 8, "width": 32, "steps": 40},
}
LABELS = {
    "masked": "one masked field, all systems in one solve (ours)",
    "shared": "one field that all systems share",
    "new, mask": "new system, its mask alone (ours)",
    "new, scratch": "new system, a field from scratch",
    "latent": "latent ODE",
    "recurrent": "recurrent net",
    "flow": "continuous normalizing flow",
    "gaussian": "Gaussian",
}
BASELINES = ["shared", "new, scratch", "recurrent", "gaussian"]
ERROR, RMSE, NATS = "trajectories: test MSE", "spirals, extrapolated: RMSE", "circles: log density (nats)"
COLUMNS = {
    ERROR: ("systems", ("masked", "shared", "new, mask", "new, scratch")),
    RMSE: ("spirals", ("latent", "recurrent")),
    NATS: ("flow", ("flow", "gaussian")),
}
PAPER: Rows = [
    ["spirals, RMSE", "30 of 100 points", "50", "100"],
    ["recurrent net", "0.394", "0.320", "0.181"],
    ["latent ODE", "0.164", "0.150", "0.135"],
]
"""arXiv:1806.07366, table 2: 1,000 spirals of 100 points."""

QUESTION = """What are the benefits and weaknesses of neural ODEs (Chen et al., arXiv:1806.07366)? Question 2 of a quiz (Lam,
ECE472,
2020) names memory, solvers as black boxes, precision that can be chosen, invertible flows and arbitrary times, against
non-uniqueness and minibatches; here is a number for each. Ours: a field with a mask for each of several systems, every trajectory
its own task in one solve, by the mixed-task kernels, in the adjoint's backward too."""


def _quiz(metrics: Metrics, part: str) -> list[Json]:
    return [run[part] for run in metrics["quiz"]]


def _memory(metrics: Metrics) -> Numbers:
    growth = {kind: fmean(run[kind][-1] / run[kind][0] for run in _quiz(metrics, "memory")) for kind in ("adjoint", "backprop")}
    lengths = metrics["settings"]["lengths"]
    return {**growth, "few": lengths[0], "many": lengths[-1]}


def _solvers(metrics: Metrics) -> Numbers:
    runs = _quiz(metrics, "solvers")
    worst = max(error / run["scale"] for run in runs for error in run["by solver"].values())
    gains = [run["errors"][0] / run["errors"][-1] for run in runs]
    counts = {key: fmean(run["evaluations"][place] for run in runs) for key, place in (("first", 0), ("last", -1))}
    return {"worst": worst / 1e-6, "count": len(runs[0]["by solver"]), "gain": min(gains), **counts}


def _gradient(metrics: Metrics) -> Numbers:
    return {"difference": max(run["difference"] for run in _quiz(metrics, "gradient"))}


def _batch(metrics: Metrics) -> Numbers:
    runs = _quiz(metrics, "batch")
    found = {key.replace(" ", "_"): fmean(run[key] for run in runs) for key in runs[0]}
    return {**found, "ratio": max(run["together"] / run["largest alone"] for run in runs)}


def _unique(metrics: Metrics) -> Numbers:
    run = _quiz(metrics, "uniqueness")[0]
    return {key.replace(" ", "_"): value for key, value in run.items()}


def _flow(metrics: Metrics) -> Numbers:
    runs = metrics["flow"]
    worst = max(runs, key=lambda run: abs(run["integral"] - 1))
    return {
        "flow": mean(metrics, "flow", NATS),
        "gaussian": mean(metrics, "gaussian", NATS),
        "trip": max(run["round trip"] for run in runs),
        "integral": worst["integral"],
    }


def _spirals(metrics: Metrics) -> Numbers:
    runs = metrics["spirals"]
    found = {key: fmean(run[name] for run in runs) for key, name in (("seen", "seen times"), ("between", "times between"))}
    return {**found, "latent": mean(metrics, "latent", RMSE), "recurrent": mean(metrics, "recurrent", RMSE)}


def _systems(metrics: Metrics) -> Numbers:
    runs = metrics["systems"]
    found = {name.replace(", ", "_"): mean(metrics, name, ERROR) for name in COLUMNS[ERROR][1]}
    counts = {key: fmean(run["evaluations"][key] for run in runs) for key in ("together", "apart")}
    number = metrics["settings"]["systems"]["systems"]
    return {**found, **counts, "systems": number, "gradients": max(run["gradients"] for run in runs)}


def _is_full(metrics: Metrics) -> bool:
    """The few steps of a quick run train next to nothing."""
    return not metrics["quick"]


CLAIMS = [
    Claim(
        "Memory: from {few} to {many:,} steps of the solver what autograd holds grows by a factor of {adjoint:.2f} with "
        "the adjoint "
        "method, of {backprop:.0f} through the solver's steps.",
        _memory,
        lambda n: n["adjoint"] <= 1.05 and n["backprop"] >= 0.5 * n["many"] / n["few"],
    ),
    Claim(
        "Solvers are black boxes: {count} of them agree within {worst:.1f} tolerances of 1e-6, at most ten.",
        _solvers,
        lambda n: n["worst"] <= 10,
    ),
    Claim(
        "Precision can be chosen: a tolerance of 1e-7 in the place of 1e-1 divides the error by {gain:.1e}, for {last:.0f} "
        "evaluations "
        "in the place of {first:.0f}.",
        _solvers,
        lambda n: n["gain"] >= 1e4 and n["last"] > n["first"],
    ),
    Claim(
        "The adjoint's gradient is that through the solver up to {difference:.1e}, relatively, in float64.",
        _gradient,
        lambda n: n["difference"] <= 1e-4,
    ),
    Claim(
        "Minibatches: one solve of all starts takes {together:.0f} evaluations of the field, {ratio:.2f} times the most "
        "that a start "
        "takes alone, {largest_alone:.0f} (on average {mean_alone:.0f}).",
        _batch,
        lambda n: n["ratio"] <= 2,
    ),
    Claim(
        "Non-uniqueness: y' = sqrt|y| has the solutions 0 and t^2/4 from y(0) = 0; the solver finds {from_zero:.2g} at t = 4, and "
        "{from_nearly_zero:.3g} from 1e-20. Two solutions of a tanh net that begin 1e-8 apart end {tanh:.1e} apart.",
        _unique,
        lambda n: n["from_zero"] == 0 and abs(n["from_nearly_zero"] - 4) < 0.1 and n["residual"] < 1e-12 and n["tanh"] < 1e-5,
    ),
    Claim(
        "Scalable and invertible flows: on two circles a continuous normalizing flow gives test points {flow:.2f} nats, a Gaussian "
        "{gaussian:.2f}, 0.3 or more below.",
        _flow,
        lambda n: n["flow"] >= n["gaussian"] + 0.3,
        _is_full,
    ),
    Claim(
        "The flow is inverted by solving backwards, to {trip:.1e}, and its density integrates to {integral:.3f}.",
        _flow,
        lambda n: n["trip"] <= 1e-3 and abs(n["integral"] - 1) <= 0.02,
    ),
    Claim(
        "Extrapolation: the latent ODE's RMSE beyond the times that were seen is {latent:.3f}, at most 0.8 of the recurrent net's, "
        "{recurrent:.3f}.",
        _spirals,
        lambda n: n["latent"] <= 0.8 * n["recurrent"],
        _is_full,
    ),
    Claim(
        "Arbitrary times: between the times that were seen its RMSE is {between:.3f}, at these {seen:.3f}.",
        _spirals,
        lambda n: n["between"] <= 1.1 * n["seen"],
    ),
    Claim(
        "Ours: one masked field learns {systems} systems, every trajectory its own task in one solve: test MSE "
        "{masked:.2e}, a field "
        "that all share {shared:.2e}.",
        _systems,
        lambda n: n["masked"] < n["shared"],
        _is_full,
    ),
    Claim(
        "Ours: that solve with its adjoint takes {together:.0f} evaluations of the field, separate solves {apart:.0f}; the "
        "gradients "
        "differ by at most {gradients:.1e} in float64.",
        _systems,
        lambda n: n["together"] < n["apart"] and n["gradients"] <= 1e-10,
    ),
    Claim(
        "Ours: a new system by its mask alone, W frozen, is no worse than a field from scratch with as many steps: test MSE "
        "{new_mask:.2e} and {new_scratch:.2e}.",
        _systems,
        lambda n: n["new_mask"] <= n["new_scratch"],
        _is_full,
    ),
]


def run(folder: RunFolder, settings: Settings) -> Json:
    """The quiz's points, a normalizing flow, spirals, and systems in a masked field, each for every seed.

    Raises:
        ImportError: torchdiffeq or scikit-learn is not installed.
    """
    for name, package in (("torchdiffeq", "torchdiffeq"), ("sklearn", "scikit-learn")):
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(f'{package} is not installed: pip install "metamask_ext[experiments]"') from error
    from . import quiz, systems

    finished = folder.begin("drawn: circles (scikit-learn), noisy spirals, and systems y' = A y^3 with A drawn for each")
    if finished is not None:
        return finished
    parts = {"quiz": quiz.quiz, "flow": quiz.flow, "spirals": systems.spirals, "systems": systems.systems}
    jobs: dict[Key, Job] = {(seed, name): partial(part, seed, settings) for seed in folder.seeds for name, part in parts.items()}
    made = folder.compute(jobs)
    found: Json = {name: [made[seed, name] for seed in folder.seeds] for name in parts}
    scores: Scores = {method: {} for method in LABELS}
    for column, (part, methods) in COLUMNS.items():
        for method in methods:
            scores[method][column] = [run[method] for run in found[part]]
    own = settings.systems
    budget = (
        f"the flow: {settings.flow.steps} steps of {settings.flow.batch} points; spirals: {settings.spirals.steps} steps on "
        f"{settings.spirals.spirals}; systems: {own.steps} steps on {own.systems} x {own.trajectories} trajectories, and as "
        f"many on "
        "those of a new system."
    )
    return folder.finish(scores, BASELINES, budget, figures, {**found, "paper": PAPER})


def tables(metrics: Metrics) -> Tables:
    """The scores, errors by solver, and the paper's numbers."""
    head, rows = table_of(metrics)
    named: Rows = [head, *([LABELS[method], *cells] for method, *cells in rows)]
    solver = _quiz(metrics, "solvers")
    errors: Rows = [["solver, tolerance 1e-6", "largest error over seeds"]]
    errors += [[name, f"{max(run['by solver'][name] for run in solver):.1e}"] for name in solver[0]["by solver"]]
    return [("", named), ("Solvers", errors), ("The paper's spirals (table 2), for comparison", PAPER)]


def figures(metrics: Metrics) -> Figures:
    """Memory, precision, minibatches, the flow's density, a spiral, and the errors of systems; the first seed where it is one."""
    figure, axes = new_figure(3, rows=2)
    _plot_memory(axes[0], metrics)
    _plot_precision(axes[1], metrics)
    _plot_batch(axes[2], metrics)
    density = axes[3].imshow(list(zip(*metrics["flow"][0]["density"])), extent=(-1.5, 1.5, -1.5, 1.5), origin="lower", cmap="Blues")
    figure.colorbar(density, ax=axes[3], label="density (per unit of area)")
    axes[3].set(xlabel="x (no unit)", ylabel="y (no unit)")
    axes[3].set_title("the flow's density of two circles", fontsize=10)
    _plot_spiral(axes[4], metrics)
    _plot_systems(axes[5], metrics)
    return {"": figure}


def _plot_memory(axes: Axes, metrics: Metrics) -> None:
    lengths, run = metrics["settings"]["lengths"], _quiz(metrics, "memory")[0]
    for kind, label, color in (("backprop", "through the steps", "#D55E00"), ("adjoint", "adjoint method", "#0072B2")):
        axes.plot(lengths, [size / 1024 for size in run[kind]], marker="o", color=color)
        axes.annotate(label, (lengths[0], run[kind][0] / 1024), (8, 10), textcoords="offset points", color=color, fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="steps of the solver (number)", ylabel="held for the backward (KiB)")
    axes.margins(y=0.15)
    axes.set_title("memory", fontsize=10)


def _plot_precision(axes: Axes, metrics: Metrics) -> None:
    for run in _quiz(metrics, "solvers"):
        axes.plot(run["evaluations"], run["errors"], marker="o", color="#0072B2", linewidth=1.2)
    axes.set(yscale="log", xlabel="evaluations of the field (number)", ylabel="largest error (no unit)")
    axes.set_title("tolerances 1e-1 to 1e-7; a line: a seed", fontsize=10)


def _plot_batch(axes: Axes, metrics: Metrics) -> None:
    runs = _quiz(metrics, "batch")
    for place, key in enumerate(("mean alone", "largest alone", "together")):
        value = fmean(run[key] for run in runs)
        axes.barh(place, value, color=("#999999", "#999999", "#0072B2")[place])
        axes.annotate(f"{value:.0f}", (value, place), (4, -3), textcoords="offset points", fontsize=8)
    axes.set_yticks(range(3), ["a start alone, mean", "a start alone, most", "all starts in one solve"])
    axes.set_xlabel("evaluations of the field (number)")
    axes.margins(x=0.12)
    axes.set_title("minibatches of 32 starts", fontsize=10)


def _plot_spiral(axes: Axes, metrics: Metrics) -> None:
    example = metrics["spirals"][0]["example"]
    axes.plot(*zip(*example["true"]), color="#999999", linewidth=4, alpha=0.5, label="true")
    axes.plot(*zip(*example["points"]), "k.", markersize=4, label="points that are seen")
    axes.plot(*zip(*example["latent"]), color="#0072B2", label="latent ODE")
    axes.plot(*zip(*example["recurrent"]), "x--", color="#D55E00", markersize=4, label="recurrent net, extrapolated")
    axes.set(xlabel="x (no unit)", ylabel="y (no unit)")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    axes.set_title("a spiral of the test", fontsize=10)


def _plot_systems(axes: Axes, metrics: Metrics) -> None:
    methods = COLUMNS[ERROR][1]
    for place, method in enumerate(methods):
        values = [run[method] for run in metrics["systems"]]
        axes.plot(values, [place] * len(values), "o", color="#0072B2" if "mask" in method else "#999999")
    axes.set(xscale="log", xlabel=f"{ERROR} (no unit)", ylim=(len(methods) - 0.5, -0.5))
    names = ["masked field (ours)", "shared field", "new: mask alone (ours)", "new: from scratch"]
    axes.set_yticks(range(len(methods)), names)
    axes.set_title("systems; a point: a seed", fontsize=10)
