"""The answers of ``feature-weights`` to the homework's questions, worded from the measured numbers."""

from __future__ import annotations

import statistics
import textwrap

from ...engine.claims import Metrics
from .findings import Measured


def documents(metrics: Metrics) -> dict[str, str]:
    """Further files of the experiment, made from its metrics."""
    return {"answers.md": answers(metrics)}


def answers(metrics: Metrics) -> str:
    """The homework's written questions, parts a to h, answered from ``metrics`` in Markdown."""
    at = Measured(metrics)
    seeds = metrics["seeds"]
    numbers = f"means over seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"of seed {seeds[0]}"
    source = _paragraph(
        "Questions: EECS 182 (Berkeley, fall 2022), homework 9, problem 2. `metamask run feature-weights` makes this text from",
        f"`metrics.json`; numbers are {numbers}.",
    )
    parts = [*_theory(metrics["toy"]), *_part_e(at), *_part_f(at), *_classification(at, "g"), *_classification(at, "h")]
    return "\n\n".join(["# feature-weights: the homework's questions", source, *parts]) + "\n"


def _paragraph(*sentences: str) -> str:
    return textwrap.fill(" ".join(sentences), 130, break_long_words=False, break_on_hyphens=False)


def _theory(toy: Metrics) -> list[str]:
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


def _part_e(at: Measured) -> list[str]:
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


def _part_f(at: Measured) -> list[str]:
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


def _classification(at: Measured, part: str) -> list[str]:
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
