"""The experiments by name, and their runs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from .engine.executors import one_thread
from .engine.jobs import JobError, Json
from .engine.run_folder import RunFolder
from .engine.settings import Changes, OptionError, RunSettings, Value, read_toml, resolve


class Entry(NamedTuple):
    """An experiment.

    Attributes:
        module: its name; it is imported when the experiment is run, so that the command starts soon. It has ``Settings`` (a
            frozen dataclass), ``QUICK`` (changes of it), ``QUESTION``, ``CLAIMS``, ``figures(metrics)`` and
            ``run(folder, settings)``. It may have ``tables(metrics)``, ``LABELS`` of the methods, ``documents(metrics)``, further
            files by name, and ``ROTATED``, the changes of a second run.
        summary: of what it does, in a line.
    """

    module: str
    summary: str


EXPERIMENTS: dict[str, Entry] = {
    "linear": Entry(
        "metamask_ext.experiments.proposal.linear",
        "linear regression whose weights are on or off in each task (section 3.1)",
    ),
    "sine-of-linear": Entry(
        "metamask_ext.experiments.proposal.sine_of_linear",
        "the sine of such a linear function: which layers' masks do the tasks share (section 3.2)",
    ),
    "sinusoid": Entry(
        "metamask_ext.experiments.proposal.sinusoid",
        "sinusoids that share nothing: can masks be dynamic weights (section 3.3)",
    ),
    "sine-cosine": Entry(
        "metamask_ext.experiments.proposal.sine_cosine",
        "a sine that is sometimes a cosine: a bias of pi/2 behind a gate (section 3.4)",
    ),
    "logistic": Entry(
        "metamask_ext.experiments.proposal.logistic",
        "the same tasks with binary labels (section 3.5)",
    ),
    "mnist": Entry(
        "metamask_ext.experiments.proposal.mnist",
        "a masked and a plain CNN on handwritten digits (section 3.6)",
    ),
    "colored-mnist": Entry(
        "metamask_ext.experiments.proposal.colored_mnist",
        "digits on backgrounds of many colours, a mask for each (section 3.7)",
    ),
    "saturation": Entry(
        "metamask_ext.experiments.proposal.saturation",
        "gates near 0 and 1, L2 terms on W and on the masks, and cooled gates (section 2.1)",
    ),
    "supsup": Entry(
        "metamask_ext.experiments.papers.supsup.experiment",
        "hundreds of tasks in one bank, named or inferred (Wortsman et al., arXiv:2006.14769)",
    ),
    "maml-sine": Entry(
        "metamask_ext.experiments.papers.maml_sine",
        "MAML on sine waves, adapting masks, weights or both (arXiv:1703.03400, section 5.1)",
    ),
    "fewshot": Entry(
        "metamask_ext.experiments.papers.fewshot",
        "MAML on images of characters, a few of each class (arXiv:1703.03400, section 5.2)",
    ),
    "feature-weights": Entry(
        "metamask_ext.experiments.papers.feature_weights.experiment",
        "weights of features learned through regression and classification (EECS 182, homework 9)",
    ),
    "universality": Entry(
        "metamask_ext.experiments.papers.universality.experiment",
        "MAML beside a recurrent meta-learner, and the construction of the proof (arXiv:1710.11622)",
    ),
    "navigation-2d": Entry(
        "metamask_ext.experiments.papers.navigation_2d.experiment",
        "policies that learn the way to a goal in one or a few updates (arXiv:1703.03400, section 5.3)",
    ),
}

__all__ = ["EXPERIMENTS", "Entry", "JobError", "OptionError", "module_of", "run", "settings_of"]


def module_of(name: str) -> ModuleType:
    """The module of an experiment. ValueError if it is unknown."""
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    return import_module(EXPERIMENTS[name].module)


def settings_of(name: str, quick: bool = False, config: str | Path | None = None, changes: Changes | None = None) -> RunSettings:
    """All settings of a run: the module's ``Settings``, with ``rotated`` its ``ROTATED`` in them, then its ``QUICK`` if asked for,
    then the TOML file ``config``, then ``changes``.

    Raises:
        ValueError: the experiment is unknown.
        OptionError: the file cannot be read; a setting is unknown, or of another type.
    """
    module, changes = module_of(name), changes or {}
    variant: Changes = getattr(module, "ROTATED", {}) if changes.get("rotated") else {}
    of_file = {} if config is None else read_toml(Path(config))
    settings: RunSettings = module.Settings()
    return resolve(name, settings, variant, module.QUICK if quick else {}, of_file, changes)


def run(
    name: str,
    out: str | Path,
    seed: int = 0,
    quick: bool = False,
    *,
    config: str | Path | None = None,
    workers: int | None = None,
    tracking: str | None = None,
    **changes: Value,
) -> Json:
    """Run an experiment; :class:`metamask_ext.experiments.engine.run_folder.RunFolder` describes what it writes.

    Args:
        name: one of ``EXPERIMENTS``.
        out: folder of the run. A run that was killed there resumes; one that is finished is shown again, not repeated; one of
            another experiment, seed or setting is refused.
        seed: the first seed; the run repeats the experiment with the next ones, ``settings.seeds`` in all.
        quick: one seed, and what else the module's ``QUICK`` makes smaller.
        config: a TOML file with settings; ``metamask run NAME --print-config`` prints all there are.
        workers: how many processes compute the jobs; None: the cores. More than one are started anew, by the method spawn: a
            script that calls this then needs ``if __name__ == "__main__":``.
        tracking: ``"csv"`` or ``"tensorboard"``: also write down numbers during training.
        changes: settings by their top-level name, such as ``tasks``, ``steps`` or ``seeds``.

    Returns:
        The content of ``metrics.json``.

    Raises:
        ValueError: the experiment is unknown.
        OptionError: a setting is unknown, or its value cannot be, or that of ``workers`` or ``tracking``; nothing was written.
        ImportError: an optional package is missing; says what to install.
        metamask_ext.continual.OutputError: ``out`` cannot be used.
        JobError: a job failed.
    """
    settings = settings_of(name, quick, config, changes)
    if settings.seeds < 1:
        raise OptionError(f"experiment {name!r}: 'seeds' must be at least 1, got {settings.seeds}")
    command = [f"metamask run {name} --seed {seed}", *(["--quick"] if quick else []), *(["--config FILE"] if config else [])]
    command += [f"--{key}" if value is True else f"--{key} {value}" for key, value in changes.items()]
    with RunFolder(name, Path(out), seed, quick, settings, workers, tracking, " ".join(command)) as folder, one_thread():
        return module_of(name).run(folder, settings)
