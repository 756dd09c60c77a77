"""The experiments, one file each, run by ``metamask run NAME --out DIR --seed S``: of the proposal (Blum and Law, EE5239, 2020)
and of papers around it."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

EXPERIMENTS = {
    "linear": "linear regression whose weights are on or off in each task (section 3.1)",
    "logistic": "the same tasks with binary labels (section 3.5)",
    "mnist": "a masked and a plain CNN on handwritten digits (section 3.6)",
    "supsup": "hundreds of tasks in one bank, named or inferred (Wortsman et al., arXiv:2006.14769)",
    "maml-sine": "MAML on sine waves, adapting masks, weights or both (arXiv:1703.03400, section 5.1)",
    "fewshot": "MAML on images of characters, a few of each class (arXiv:1703.03400, section 5.2)",
    "feature-weights": "weights of features learned through regression and classification (EECS 182, homework 9)",
    "universality": "MAML beside a recurrent meta-learner, and the construction of the proof (arXiv:1710.11622)",
    "navigation-2d": "policies that learn the way to a goal in one or a few updates (arXiv:1703.03400, section 5.3)",
}
"""What there is to run, with a line about each. The modules are imported when they are run: they need matplotlib."""


class OptionError(ValueError):
    """An option that the experiment does not have, or a value that it cannot take."""


def run(name: str, out: str | Path, seed: int = 0, quick: bool = False, **options: Any) -> dict[str, Any]:
    """Run an experiment; what it writes is described in :class:`metamask_ext.experiments.output.Output`.

    Args:
        name: one of ``EXPERIMENTS``.
        out: folder of the run. A run that was killed there continues; one that is finished is shown again, not repeated; one of
            another experiment, seed or setting is refused.
        seed: the first seed; a full run repeats the experiment with the next four.
        quick: one seed instead of five (of ``maml-sine`` also fewer steps); of ``supsup``, which always has one, 5 tasks; of
            ``fewshot``, which always has one, 5-way 1-shot only.
        options: of this experiment: the keyword arguments of its module's ``run``.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ValueError: the experiment is unknown.
        OptionError: the experiment does not have an option, or the value is none; nothing was written.
        ImportError: an optional package is missing; says what to install.
        metamask_ext.continual.OutputError: ``out`` cannot be used.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {name!r}, known are: {', '.join(EXPERIMENTS)}")
    function = import_module(f".{name.replace('-', '_')}", __name__).run
    known = [parameter.name for parameter in signature(function).parameters.values() if parameter.kind is parameter.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise OptionError(f"experiment {name!r} has no option {option!r}, its options are: {', '.join(known) or 'none'}")
    return function(Path(out), seed, quick, **options)
