"""The experiments, one file each, run by ``metamask run NAME --out DIR --seed S``: of the proposal (Blum and Law, EE5239, 2020)
and of papers around it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from .output import Output
from .settings import OptionError, read_toml, resolve
from .workers import PieceError, one_thread

EXPERIMENTS = {
    "linear": "linear regression whose weights are on or off in each task (section 3.1)",
    "sine-of-linear": "the sine of such a linear function: which layers' masks do the tasks share (section 3.2)",
    "sinusoid": "sinusoids that share nothing: can masks be dynamic weights (section 3.3)",
    "sine-cosine": "a sine that is sometimes a cosine: a bias of pi/2 behind a gate (section 3.4)",
    "logistic": "the same tasks with binary labels (section 3.5)",
    "mnist": "a masked and a plain CNN on handwritten digits (section 3.6)",
    "colored-mnist": "digits on backgrounds of many colours, a mask for each (section 3.7)",
    "saturation": "gates near 0 and 1, L2 terms on W and on the masks, and cooled gates (section 2.1)",
    "supsup": "hundreds of tasks in one bank, named or inferred (Wortsman et al., arXiv:2006.14769)",
    "maml-sine": "MAML on sine waves, adapting masks, weights or both (arXiv:1703.03400, section 5.1)",
    "fewshot": "MAML on images of characters, a few of each class (arXiv:1703.03400, section 5.2)",
    "feature-weights": "weights of features learned through regression and classification (EECS 182, homework 9)",
    "universality": "MAML beside a recurrent meta-learner, and the construction of the proof (arXiv:1710.11622)",
    "navigation-2d": "policies that learn the way to a goal in one or a few updates (arXiv:1703.03400, section 5.3)",
}
"""What there is to run, with a line about each. The modules are imported when they are run: they need matplotlib."""

__all__ = ["EXPERIMENTS", "OptionError", "PieceError", "module_of", "run", "settings_of"]


def module_of(name: str) -> ModuleType:
    """The module of an experiment. ValueError if it is unknown."""
    if name not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {name!r}, known are: {', '.join(EXPERIMENTS)}")
    return import_module(f".{name.replace('-', '_')}", __name__)


def settings_of(
    name: str, quick: bool = False, config: str | Path | None = None, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All settings of a run: the module's ``SETTINGS``, with ``rotated`` its ``ROTATED`` in them, then its ``QUICK`` if asked for,
    then the TOML file ``config``, then ``changes``.

    Raises:
        ValueError: the experiment is unknown.
        OptionError: the file cannot be read; a setting is unknown, or of another type.
    """
    module, changes = module_of(name), dict(changes or {})
    variant = getattr(module, "ROTATED", {}) if changes.get("rotated") else {}
    of_file = {} if config is None else read_toml(Path(config))
    return resolve(name, module.SETTINGS, variant, module.QUICK if quick else {}, of_file, changes)


def run(
    name: str,
    out: str | Path,
    seed: int = 0,
    quick: bool = False,
    *,
    config: str | Path | None = None,
    workers: int | None = None,
    tracking: str | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Run an experiment; what it writes is described in :class:`metamask_ext.experiments.output.Output`.

    Args:
        name: one of ``EXPERIMENTS``.
        out: folder of the run. A run that was killed there continues; one that is finished is shown again, not repeated; one of
            another experiment, seed or setting is refused.
        seed: the first seed; the run repeats the experiment with the next ones, ``settings["seeds"]`` in all.
        quick: one seed, and what else the module's ``QUICK`` makes smaller.
        config: a TOML file with settings; ``metamask run NAME --print-config`` prints all there are.
        workers: how many processes compute pieces of the work; None: the cores. More than one are started anew, by the method
            spawn: a script that calls this then needs ``if __name__ == "__main__":``.
        tracking: ``"csv"`` or ``"tensorboard"``: also write down numbers during training.
        changes: settings by their top-level name, such as ``tasks``, ``steps`` or ``seeds``.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        ValueError: the experiment is unknown.
        OptionError: a setting is unknown, or its value cannot be, or that of ``workers`` or ``tracking``; nothing was written.
        ImportError: an optional package is missing; says what to install.
        metamask_ext.continual.OutputError: ``out`` cannot be used.
        PieceError: a piece of the work failed.
    """
    settings = settings_of(name, quick, config, changes)
    if settings["seeds"] < 1:
        raise OptionError(f"experiment {name!r}: 'seeds' must be at least 1, got {settings['seeds']}")
    module = module_of(name)
    command = [f"metamask run {name} --seed {seed}", *(["--quick"] if quick else []), *(["--config FILE"] if config else [])]
    command += [f"--{key}" if value is True else f"--{key} {value}" for key, value in changes.items()]
    with Output(name, Path(out), seed, quick, settings, workers, tracking, " ".join(command)) as output, one_thread():
        return module.run(output, output.settings)
