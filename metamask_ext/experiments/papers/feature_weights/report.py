"""The figures of ``feature-weights``, and its answers to the homework's questions, worded from the measured numbers."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping
from functools import partial
from typing import Any

from metamask_ext.experiments.engine.claims import Claim
from metamask_ext.experiments.engine.run_folder import STYLES, bands, cell, new_figure, plot_seeds

Metrics = Mapping[str, Any]
KINDS = ("regression", "classification")
"""Of the baselines."""
GROUPS = {
    "true": ("oracle", "true features"),
    "aliases": ("shared", "their aliases on the grid"),
    "others": ("independent", "others"),
}


def shown_sizes(settings: Mapping[str, Any]) -> tuple[int, int, int]:
    """Numbers of training points in the tables: that of meta-training, and its neighbours."""
    points = settings["support_points"]
    return points - 1, points, points + 1


def tables(metrics: Metrics) -> list[tuple[str, list[list[str]]]]:
    """One table for regression and one for classification, whose numbers have other units."""
    made = []
    for unit, title in (("test MSE", "Regression"), ("wrong labels (%)", "Classification")):
        head = [f"{unit}, n = {size}" for size in shown_sizes(metrics["settings"])]
        methods = {**metrics["results"], **metrics["baselines"]}
        rows = [[method, *(cell(its[key]) for key in head)] for method, its in methods.items() if head[0] in its]
        made.append((title, [["method", *head], *rows]))
    return made


def figures(metrics: Metrics) -> dict[str, Any]:
    """A figure for each part, by its letter."""
    made = {"d": _toy_figure(metrics["toy"])}
    for letter in "efgh":
        parts = [part for part in metrics["settings"]["parts"] if part.startswith(letter)]
        figure, axes = new_figure(3, rows=len(parts))
        for row, part in enumerate(parts):
            loss, evolution, weights = axes[3 * row : 3 * row + 3]
            _plot_loss(loss, part, metrics)
            _plot_weights(evolution, weights, part, metrics)
        made[letter] = figure
    return made


def _toy_figure(toy: Mapping[str, Any]) -> Any:
    figure, axes = new_figure(2)
    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    for path, color in zip(toy["paths"], colors):
        norm = path["norm of the start"]
        label = f"start ({path['c0'][0]:g}, {path['c1'][0]:g}), norm {norm:.3f}; end ({path['c0'][-1]:.3f}, {path['c1'][-1]:.4f})"
        axes[0].plot(path["iteration"], [value / norm for value in path["c0"]], color=color, label=label)
        axes[0].plot(path["iteration"], [value / norm for value in path["c1"]], color=color, linestyle="--")
        axes[1].plot(path["c0"], path["c1"], color=color, marker=".", markersize=3)
        axes[1].plot(norm, 0, "*", color=color, markersize=10)
    axes[0].set(xscale="symlog", xlabel=f"iterations of gradient descent (rate {toy['rate']:g})", ylim=(-1.1, 2.6))
    axes[0].set_ylabel(r"$c_0$ (solid), $c_1$ (dashed), over the norm of the start")
    axes[0].legend(fontsize=7, loc="upper left")
    axes[1].set(xlabel=r"$c_0$, weight of the true feature", ylabel=r"$c_1$, weight of the alias", aspect="equal")
    axes[1].set_title(r"paths; star: ($\|c^{(0)}\|$, 0)", fontsize=10)
    return figure


def _plot_loss(axes: Any, part: str, metrics: Metrics) -> None:
    settings, curves = metrics["settings"], metrics["curves"]
    labels = settings["parts"][part]["labels"]
    sizes, base = settings["sizes"], curves["classification" if labels else "regression"]
    for solver in curves[part][0]:
        steps = "step" in solver
        suffix = f", {solver}" if part.startswith("f") else ""
        lines = [
            ("both" if steps else "masked", f"meta-learned{suffix}", [run[solver] for run in curves[part]]),
            ("weights" if steps else "shared", f"weights of one{suffix}", [run[f"ones, {solver}"] for run in base]),
        ]
        if not steps:
            lines.append(("oracle", "oracle: true features only", [run[f"oracle, {solver}"] for run in base]))
        for style, label, values in lines:
            plot_seeds(axes, style, label, sizes, values)
    if labels:
        axes.axhline(50, color="#999999", linewidth=1, label="chance")
        axes.set(ylabel="wrong labels of new tasks (%)")
    else:
        zero = statistics.fmean(run["zero"][0] for run in base)
        axes.axhline(zero, color="#999999", linewidth=1, label="zero predictor")
        axes.axhline(settings["noise"] ** 2, color="#999999", linewidth=1, linestyle=":", label="noise variance")
        axes.set(ylabel="test MSE of new tasks (signal variance: 1)", ylim=(1e-4, 10))
    axes.axvline(settings["support_points"], color="#CCCCCC", linewidth=4, zorder=0)
    axes.set(xscale="log", yscale="log", xlabel=f"training points n (bar: {settings['support_points']}, as in meta-training)")
    axes.set_title(f"part {part}: {settings['parts'][part]['solver']}", fontsize=10)
    axes.legend(fontsize=7, title=bands(len(base)), title_fontsize=7)


def _plot_weights(evolution: Any, weights: Any, part: str, metrics: Metrics) -> None:
    settings = metrics["settings"]
    for group, (style, label) in GROUPS.items():
        values = [run[group] for run in metrics["weights"][part]]
        updates = [settings["evolution_every"] * point for point in range(len(values[0]))]
        plot_seeds(evolution, style, label, updates, values)
    evolution.set(xlabel="meta-updates", ylabel="mean |c| of the group", yscale="log")
    evolution.set_title("weights during meta-training", fontsize=10)
    evolution.legend(fontsize=7)
    final = [abs(value) for value in metrics["weights of the first seed"][part]]
    for group, (style, label) in GROUPS.items():
        members = members_of(group, settings)
        frequencies = [(index + 1) // 2 for index in members]
        heights = [final[index] for index in members]
        weights.plot(frequencies, heights, ".", markersize=4, color=STYLES[style]["color"], label=label, linestyle="none")
    weights.set(xlabel="frequency of the feature (periods in [-1, 1))", ylabel=f"|c| at the end, seed {metrics['seeds'][0]}")
    weights.set_title("weights at the end", fontsize=10)
    weights.legend(fontsize=7)


def members_of(group: str, settings: Mapping[str, Any]) -> list[int]:
    """The features of a group: ``"true"``; ``"aliases"`` of these on the grid of the support set; ``"others"``."""
    true, points = settings["true_features"], settings["support_points"]

    def kind(index: int) -> str:
        frequency = (index + 1) // 2
        of = min(frequency % points, -frequency % points)
        # On the grid a cosine of frequency jn is the constant, a sine is zero and nobody's alias.
        aliased = of <= true // 2 and not (of == 0 and index % 2 == 1)
        return "true" if index < true else "aliases" if aliased else "others"

    return [index for index in range(settings["features"]) if kind(index) == group]


def documents(metrics: Metrics) -> dict[str, str]:
    """Further files of the experiment, made from its metrics."""
    return {"answers.md": answers(metrics)}


def answers(metrics: Mapping[str, Any]) -> str:
    """The homework's written questions, parts a to h, answered from ``metrics`` in Markdown."""
    at = _Measured(metrics)
    seeds = metrics["seeds"]
    numbers = f"means over seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"of seed {seeds[0]}"
    source = _paragraph(
        "Questions: EECS 182 (Berkeley, fall 2022), homework 9, problem 2. `metamask run feature-weights` makes this text from",
        f"`metrics.json`; numbers are {numbers}.",
    )
    parts = [*_theory(metrics["toy"]), *_part_e(at), *_part_f(at), *_classification(at, "g"), *_classification(at, "h")]
    return "\n\n".join(["# feature-weights: the homework's questions", source, *parts]) + "\n"


class _Measured:
    """Means over seeds."""

    def __init__(self, metrics: Mapping[str, Any]):
        self.metrics, self.settings = metrics, metrics["settings"]
        self.n = self.settings["support_points"]

    def curve(self, part: str, name: str) -> list[float]:
        return [statistics.fmean(values) for values in zip(*(run[name] for run in self.metrics["curves"][part]))]

    def __call__(self, part: str, name: str, size: int | None = None) -> float:
        return self.curve(part, name)[self.settings["sizes"].index(size or self.n)]

    def weights(self, part: str) -> tuple[str, str, str]:
        """The mean |c| of the true features, of their aliases and of the others at the end."""
        runs = self.metrics["weights"][part]
        true, aliases, others = (f"{statistics.fmean(run[group][-1] for run in runs):.2f}" for group in GROUPS)
        return true, aliases, others

    def better(self, part: str, name: str, other: str) -> str:
        """At how many numbers of points the first curve, of a part, is below the second, of a baseline."""
        base = "classification" if self.settings["parts"][part]["labels"] else "regression"
        pairs = zip(self.settings["sizes"], self.curve(part, name), self.curve(base, other))
        below = [first < second for size, first, second in pairs if size < self.settings["features"]]
        return f"{sum(below)} of the {len(below)} tested numbers of points below {self.settings['features']}"


def _paragraph(*sentences: str) -> str:
    return textwrap.fill(" ".join(sentences), 130, break_long_words=False, break_on_hyphens=False)


def _theory(toy: Mapping[str, Any]) -> list[str]:
    of_a, of_b = toy["difference from the pseudo-inverse (a)"], toy["difference from the formula (b)"]
    rows = [
        f"| ({path['c0'][0]:g}, {path['c1'][0]:g}) | {path['norm of the start']:.4f} | {path['iteration'][-1]:,} "
        f"| ({path['c0'][-1]:.4f}, {path['c1'][-1]:.4f}) | ({path['beta'][0]:.4f}, {path['beta'][1]:.4f}) "
        f"| {1 / path['norm of the start']:.4f} |"
        for path in toy["paths"]
    ]
    return [
        "## Parts a to d",
        _paragraph(f"**a.** `beta = A^T (A A^T)^-1 y`. From the pseudo-inverse it differs by {of_a:.1e} at most."),
        _paragraph(
            "**b.** With `A = phi(x) (c_0, c_1)` and `y = phi(x)`, `A A^T = phi(x)^2 (c_0^2 + c_1^2)`, so",
            f"`beta = (c_0, c_1) / (c_0^2 + c_1^2)`. The solver differs from it by {of_b:.1e} at most.",
        ),
        _paragraph(
            "**c.** The features are orthonormal: the error is `((1 - c_0^2/s)^2 + (c_1^2/s)^2) / 2 = c_1^4 / s^2` with",
            "`s = c_0^2 + c_1^2`, and its gradient `4 c_0 c_1^3 / s^3 (-c_1, c_0)`. Relative difference from autograd at 100",
            f"random `c`: {toy['relative difference of the gradient from autograd (c)']:.1e} at most.",
        ),
        _paragraph(
            "**d.** The gradient is orthogonal to `c`. Gradient descent with small steps stays near the circle through the start",
            f"and ends where the alias is off: `c -> (|c(0)|, 0)` and `beta -> (1 / |c(0)|, 0)`. At rate {toy['rate']:g}:",
        ),
        "| start | its norm | iterations | c | beta | 1 / norm |\n|---|---|---|---|---|---|\n" + "\n".join(rows),
        "![part d](feature-weights-d.png)",
    ]


def _part_e(at: _Measured) -> list[str]:
    n, solver = at.n, "min norm"
    ones, oracle = f"ones, {solver}", f"oracle, {solver}"
    learned, fewer, more = (at("e", solver, size) for size in (n, n - 1, n + 1))
    zero = statistics.fmean(run["zero"][0] for run in at.metrics["curves"]["regression"])
    worst, best = at("regression", ones), at("regression", oracle)
    true, aliases, others = at.weights("e")
    return [
        "## Part e: regression, closed form",
        _paragraph(
            f"**1.** With {n} training points the test MSE is {learned:.4f} with meta-learned weights,",
            f"{worst:.3f} with weights of one (the zero predictor has {zero:.3f}) and {best:.4f} for the oracle:",
            f"{100 * (worst - learned) / (worst - best):.1f} % of the way from the one to the other. Meta-learned weights are",
            f"better than weights of one at {at.better('e', solver, ones)}, and",
            f"better than the oracle at {at.better('e', solver, oracle)}.",
        ),
        _paragraph(
            f"With {n - 1} points the MSE is {fewer:.3f}, with {n + 1} {more:.3f}: there is",
            f"{'a' if learned < 0.5 * min(fewer, more) else 'no'} downward spike at {n}. On a grid of n points a feature of",
            "frequency k cannot be told from its aliases, those of frequencies jn - k and jn + k. Meta-training saw the grid of",
            f"{n} only and weighs down the aliases on that one. On another grid the aliases are other features, most of them with",
            "their first weights.",
        ),
        _paragraph(
            f"**2.** The mean |c| went from 1 to {true} for the true features, to {aliases} for their aliases on the grid of {n},",
            f"and to {others} for the others. The minimum-norm solution shares a coefficient among a feature and its aliases in",
            "proportion to c^2; what an alias gets is missing in the true feature, and is an error of its own away from the grid.",
            "That is why weights of aliases are sent towards zero. On this grid the others are orthogonal to the signals: they",
            "take up noise only, and their weights have almost no gradient.",
        ),
        "![part e](feature-weights-e.png)",
    ]


def _part_f(at: _Measured) -> list[str]:
    lines = ["## Part f: gradient descent inside"]
    ones = at("regression", "ones, min norm")
    for part, name in (("f, 5 steps", "5 steps"), ("f, 1 step", "1 step")):
        learned, own, own_ones = at(part, "min norm"), at(part, name), at("regression", f"ones, {name}")
        true, aliases, _ = at.weights(part)
        verdict = "helps" if learned < 0.5 * ones else "helps a little" if learned < 0.95 * ones else "does not help"
        lines.append(
            _paragraph(
                f"**{name.capitalize()}.** Meta-learning {verdict}: with {at.n} points and the minimum-norm solution at test time",
                f"the MSE is {learned:.4f}; with weights of one {ones:.3f}; with those learned through the closed form",
                f"{at('e', 'min norm'):.4f}. With {name} of gradient descent at test time too it is {own:.3f}, with weights of one",
                f"{own_ones:.3f}. The mean |c| went to {true} for the true features and to {aliases} for their aliases.",
            )
        )
    lines.append(
        _paragraph(
            "A gradient step moves the prediction along a feature by c^2 times the rate: large weights of the true features let",
            "few steps reach the signal. In the first step every coefficient starts at zero and none competes with another, so",
            "that with a single step an alias only adds its own error; further steps also take away what the alias explains from",
            "the true feature, as the closed form does.",
        )
    )
    return [*lines, "![part f](feature-weights-f.png)"]


def _classification(at: _Measured, part: str) -> list[str]:
    solver, title = ("min norm", "regression code") if part == "g" else ("logistic", "logistic regression")
    ones, oracle = f"ones, {solver}", f"oracle, {solver}"
    learned, best = at(part, solver), at("classification", oracle)
    true, aliases, others = at.weights(part)
    return [
        f"## Part {part}: classification with {title}",
        _paragraph(
            f"**1.** With {at.n} training points {learned:.1f} % of the labels are wrong with meta-learned weights,",
            f"{at('classification', ones):.1f} % with weights of one and {best:.1f} % for the oracle. Meta-learned weights are",
            f"better than weights of one at {at.better(part, solver, ones)}, and better than the oracle at",
            f"{at.better(part, solver, oracle)}.",
        ),
        _paragraph(
            f"**2.** The mean |c| went from 1 to {true} for the true features, to {aliases} for their aliases and to {others} for",
            "the others. The aliases are sent down for the reason of part e: on the grid they carry the same labels as the true",
            "features, elsewhere other ones. The sign of a signal also has frequencies that the signal lacks, so labels are no",
            "combination of the true features alone.",
        ),
        f"![part {part}](feature-weights-{part}.png)",
    ]


def _e(metrics: Metrics) -> dict[str, float]:
    at = _Measured(metrics)
    learned, fewer, more = (at("e", "min norm", size) for size in (at.n, at.n - 1, at.n + 1))
    evolution = metrics["weights"]["e"]
    ends = {group: statistics.fmean(run[group][-1] for run in evolution) for group in GROUPS}
    worst, best = at("regression", "ones, min norm"), at("regression", "oracle, min norm")
    return {"n": at.n, "learned": learned, "beside": min(fewer, more), "worst": worst, "best": best, **ends}


def _f(metrics: Metrics) -> dict[str, float]:
    at = _Measured(metrics)
    five, one = ("f, 5 steps", "5 steps"), ("f, 1 step", "1 step")
    aliases = (statistics.fmean(run["aliases"][-1] for run in metrics["weights"][part]) for part, _ in (five, one))
    numbers = {"five": at(*five), "one": at(*one), "ones_five": at("regression", "ones, 5 steps")}
    return numbers | {"ones_one": at("regression", "ones, 1 step")} | dict(zip(("aliases_five", "aliases_one"), aliases))


def _labels(metrics: Metrics, part: str, solver: str) -> dict[str, float]:
    at = _Measured(metrics)
    names = {"ones": f"ones, {solver}", "oracle": f"oracle, {solver}"}
    return {"learned": at(part, solver), **{key: at("classification", name) for key, name in names.items()}}


CLAIMS = [
    Claim(
        "Regression (part e): with {n} points the test MSE is {learned:.4f} with meta-learned weights, {worst:.3f} with weights of "
        "one, {best:.4f} for an oracle that has only the true features.",
        _e,
        lambda numbers: numbers["best"] < numbers["learned"] < 0.02 < 0.8 < numbers["worst"],
    ),
    Claim(
        "The weights fit the grid that they were learned on: with one point more or less the MSE is at least {beside:.3f}.",
        _e,
        lambda numbers: numbers["beside"] > 5 * numbers["learned"],
    ),
    Claim(
        "What falls are the aliases: mean |c| goes from 1 to {true:.2f} for the true features, {aliases:.2f} for their aliases and "
        "{others:.2f} for the others.",
        _e,
        lambda numbers: numbers["true"] > 3 and numbers["aliases"] < 0.5 and 0.99 < numbers["others"] < 1.01,
    ),
    Claim(
        "Gradient steps inside also do (part f): {five:.3f} with five steps, {one:.3f} with one, where weights of one have "
        "{ones_five:.3f} and {ones_one:.3f}.",
        _f,
        lambda numbers: numbers["five"] < 0.05 and numbers["one"] < 0.2 and min(numbers["ones_five"], numbers["ones_one"]) > 0.8,
    ),
    Claim(
        "A single step gives the aliases no reason to fall: |c| {aliases_one:.2f}, with five steps {aliases_five:.2f}.",
        _f,
        lambda numbers: numbers["aliases_one"] > 0.9 > 0.6 > numbers["aliases_five"],
    ),
    *(
        Claim(
            f"Classification with {title} (part {part}): {{learned:.1f}} % of the labels are wrong with meta-learned weights, "
            "{oracle:.1f} % for the oracle, {ones:.1f} % with weights of one.",
            partial(_labels, part=part, solver=solver),
            lambda numbers: abs(numbers["learned"] - numbers["oracle"]) < 2 and numbers["ones"] > 40,
        )
        for part, solver, title in (("g", "min norm", "regression code"), ("h", "logistic", "logistic regression"))
    ),
]
