"""The claims of ``feature-weights``."""

from __future__ import annotations

import statistics
from functools import partial

from ...engine.claims import Claim, Metrics, Numbers
from .findings import GROUPS, Measured


def _e(metrics: Metrics) -> Numbers:
    at = Measured(metrics)
    learned, fewer, more = (at("e", "min norm", size) for size in (at.n, at.n - 1, at.n + 1))
    evolution = metrics["weights"]["e"]
    ends = {group: statistics.fmean(run[group][-1] for run in evolution) for group in GROUPS}
    worst, best = at("regression", "ones, min norm"), at("regression", "oracle, min norm")
    return {"n": at.n, "learned": learned, "beside": min(fewer, more), "worst": worst, "best": best, **ends}


def _f(metrics: Metrics) -> Numbers:
    at = Measured(metrics)
    five, one = ("f, 5 steps", "5 steps"), ("f, 1 step", "1 step")
    aliases = (statistics.fmean(run["aliases"][-1] for run in metrics["weights"][part]) for part, _ in (five, one))
    numbers = {"five": at(*five), "one": at(*one), "ones_five": at("regression", "ones, 5 steps")}
    return numbers | {"ones_one": at("regression", "ones, 1 step")} | dict(zip(("aliases_five", "aliases_one"), aliases))


def _labels(metrics: Metrics, part: str, solver: str) -> Numbers:
    at = Measured(metrics)
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
