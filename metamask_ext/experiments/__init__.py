"""The experiments of the proposal (Blum and Law, EE5239, 2020) and of the papers around it, one file each, run by
``metamask run NAME --out DIR --seed S``."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

EXPERIMENTS = {
    "linear": "linear regression whose weights are on or off in each task (section 3.1)",
    "logistic": "the same tasks with binary labels (section 3.5)",
    "mnist": "a masked and a plain CNN on handwritten digits (section 3.6)",
    "maml-sine": "MAML on sine waves, adapting masks, weights or both (arXiv:1703.03400, section 5.1)",
}
"""What there is to run, with a line about each. The modules are imported when they are run: they need matplotlib."""


def run(name: str, out: str | Path, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Run an experiment; what it writes is described in :class:`metamask_ext.experiments.output.Output`.

    Args:
        name: one of ``EXPERIMENTS``.
        out: folder of the run. A run that was killed there continues; one that is finished is shown again, not repeated; one of
            another experiment, seed or setting is refused.
        seed: the first seed; a full run repeats the experiment with the next four.
        quick: one seed instead of five, and where that takes long, fewer steps.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ValueError: the experiment is unknown.
        ImportError: an optional package is missing; says what to install.
        metamask_ext.continual.OutputError: ``out`` cannot be used.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {name!r}, known are: {', '.join(EXPERIMENTS)}")
    return import_module(f".{name.replace('-', '_')}", __name__).run(Path(out), seed, quick)
