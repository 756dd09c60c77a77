"""A masked and a plain CNN on handwritten digits: Blum and Law, EE5239 project proposal (2020), section 3.6."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metamask_ext.data import load_digits

from ..engine import data
from ..engine.claims import Claim, Metrics
from ..engine.figures import Figures, new_figure
from ..engine.jobs import Json
from ..engine.run_folder import RunFolder
from ..engine.settings import Changes, OptionError, RunSettings
from ..study import comparison, findings, report
from ..study.networks import gates
from ..study.problem import Layer, Problem, Score, TaskData
from ..study.settings import (
    FrozenConfig,
    MaskedConfig,
    MetaConfig,
    MetaSettings,
    NewTaskSettings,
    PlainConfig,
    StudySettings,
    even_grid,
    grid,
    image_rates,
)

METHODS = ("masked", "hard", "lottery", "shared", "maml")

STUDY = StudySettings(
    batch=64,
    weight_decay=1e-4,
    round_steps=10,
    cost_rounds=7,
    maml=MetaSettings(tasks=2, inner_steps=1),
    new=NewTaskSettings(steps=100, rates=image_rates()),
    grid=even_grid(
        masked=grid(MaskedConfig, lr=[3e-3, 1e-3], mask_lr=[3e-3, 3e-2]),
        hard=grid(MaskedConfig, lr=[3e-3, 1e-3], mask_lr=[3e-3, 3e-2]),
        lottery=grid(FrozenConfig, mask_lr=[1e-2, 1e-1], scale=[1.0, 3.0]),
        shared=grid(PlainConfig, lr=[3e-3, 1e-3, 3e-4, 1e-2]),
        maml=grid(MetaConfig, lr=[3e-3, 1e-3], inner_lr=[0.1, 0.01]),
    ),
)


@dataclass(frozen=True)
class Settings(RunSettings):
    """The settings of the experiment.

    Attributes:
        tasks: 1.
        steps: of training.
        new_test_samples: turned digits of the test.
        study: of the common study.
    """

    tasks: int = 1
    steps: int = 1000
    new_test_samples: int = 1000
    study: StudySettings = STUDY


QUICK: Changes = {
    "seeds": 1,
    "steps": 250,
    "study": {"tuning": False, "cost_rounds": 1, "new": {"samples": [1, 30, 1000], "steps": 20}},
}
ACCURACY = "test accuracy (%)"
SCORE = Score(ACCURACY, "%", higher_is_better=True, margin=1.0)
QUESTION = """\
Section 3.6: with a single task, does a masked CNN classify black and white images of digits as well as the same CNN without masks?
With one task, the shared net, the net of the task alone and the net trained in sequence are the same plain net. The new task of
question 2 is ours: the digits turned by 90 degrees."""
tables = report.tables
CLAIMS = [
    Claim(
        "A masked CNN performs as the CNN without masks does (section 3.6): test accuracy {masked:.2f} %, plain {plain:.2f} %; "
        "with a hard gate it does too, {hard:.2f} % (margin {margin} points).",
        lambda metrics: {
            "masked": findings.trained(metrics, "masked"),
            "plain": findings.trained(metrics, "shared"),
            "hard": findings.trained(metrics, "hard"),
            # Between seeds the difference has a standard deviation of about 0.3, and of 0.6 in the few steps of a quick run.
            "margin": 0.8 if len(metrics["seeds"]) > 1 else 2.0,
        },
        lambda numbers: min(numbers["masked"], numbers["hard"]) >= numbers["plain"] - numbers["margin"],
    ),
    Claim(
        "Masks on random weights that are never trained (section 2) get {lottery:.1f} %: far above chance, and below trained "
        "weights, {plain:.1f} %, in as many steps.",
        lambda metrics: {"lottery": findings.trained(metrics, "lottery"), "plain": findings.trained(metrics, "shared")},
        lambda numbers: 30 < numbers["lottery"] < numbers["plain"],
    ),
    Claim(
        "Digits turned by 90 degrees, from 1,000 of them: mask only {mask:.1f} %, the mask and W {everything:.1f} %, a fresh net "
        "{fresh:.1f} %: with one task to come from, a mask alone does not do it.",
        lambda metrics: {
            "mask": findings.new_tasks(metrics, "masked", "mask only", 1000),
            "everything": findings.new_tasks(metrics, "masked", "everything", 1000),
            "fresh": findings.new_tasks(metrics, "shared", "from scratch", 1000),
        },
        lambda numbers: numbers["mask"] < numbers["fresh"],
    ),
    report.cost_claim(),
]
BINS = 40


def network(linear: Layer, conv: Layer) -> nn.Sequential:
    """Two 5x5 convolutions with 2x2 max pooling and a linear layer; ``[n, 1, 28, 28]`` to ``[n, 10]``."""
    return nn.Sequential(
        conv(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), conv(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), linear(512, 10)
    )


def problem(seed: int, settings: Settings) -> Problem:
    digits, generator = data.digits(), torch.Generator().manual_seed(seed)
    train, test = (TaskData(images[None], labels[None]) for images, labels in (digits.train, digits.test))
    chosen = torch.randperm(len(digits.train[0]), generator=generator)[: settings.study.new.samples[-1]]
    new_train = TaskData(train.x[:, chosen].rot90(1, (-2, -1)), train.y[:, chosen])
    count = settings.new_test_samples
    new_test = TaskData(test.x[:, :count].rot90(1, (-2, -1)), test.y[:, :count])

    def examine(method: str, model: nn.Module) -> Json:
        if method != "masked":
            return {}
        found = torch.cat([stack.flatten() for name, stack in gates(model, made.names).items() if name.endswith("weight")])
        return {"gates": torch.histc(found, BINS, 0, 1).tolist()}

    made = Problem(train, test, new_train, new_test, network, F.cross_entropy, accuracy, examine)
    return made


def run(folder: RunFolder, settings: Settings) -> Json:
    """One task: the same network, data and steps with and without masks. See :func:`metamask_ext.experiments.run`."""
    if settings.tasks != 1:
        raise OptionError(f"experiment 'mnist': 'tasks' must be 1, got {settings.tasks}")
    digits = load_digits()
    finished = folder.begin(digits.source, digits.note)
    if finished is not None:
        return finished
    found = comparison.run(folder, settings, problem, SCORE, METHODS)
    histograms = [examined["gates"] for examined in found.examined["masked"]]
    return folder.finish(found.scores, found.baselines, found.budget, figures, {**found.more, "gates": histograms})


def figures(metrics: Metrics) -> Figures:
    figure, (axes,) = new_figure(1)
    edges = torch.linspace(0, 1, BINS + 1)
    for values, label, color in (
        (_initial(metrics), "at the start", "#555555"),
        (metrics["gates"][0], "after training", "#0072B2"),
    ):
        axes.stairs(values, edges.tolist(), label=label, color=color, linewidth=1.8)
    axes.set(xlabel="gate, sigmoid(M) (no unit)", ylabel="weights (number)")
    axes.set_title(f"the gates of all weights of the net, seed {metrics['seed']}", fontsize=9)
    axes.legend(fontsize=8, loc="lower center")
    return {"": report.figure(metrics), "gates": figure}


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return 100 * (logits.argmax(-1) == labels).double().mean()


def _initial(metrics: Metrics) -> list[float]:
    """The expected histogram of the gates as they are drawn: ``sigmoid`` of a standard normal."""
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64).logit()
    return (sum(metrics["gates"][0]) * torch.special.ndtr(edges).diff()).tolist()
