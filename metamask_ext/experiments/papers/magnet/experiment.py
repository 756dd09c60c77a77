"""Magnet loss: clusters within classes, without further labels; and clusters of tasks.

Source: Rippel, Paluri, Dollar and Bourdev, Metric Learning with Adaptive Density Discrimination, arXiv:1511.05939; Lam, ECE472
quiz 6 (2020), question 3.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module

from metamask_ext.data import load_digits

from ...engine.claims import Claim, Metrics, Numbers, mean
from ...engine.figures import Figures, new_figure
from ...engine.jobs import Job, Json, Key
from ...engine.run_folder import RunFolder, Scores
from ...engine.settings import Changes, OptionError
from ...engine.tables import Rows, Tables, table_of
from .settings import Settings
from .training import even_odd, rotations

METHODS = ("magnet", "softmax", "triplet")
LABELS = {
    "magnet": "magnet loss",
    "softmax": "softmax, cross-entropy",
    "triplet": "triplet loss",
    "clusters": "magnet clusters of tasks (ours)",
    "chance": "chance",
}
BASELINES = ["softmax", "triplet", "chance"]
PARITY, DIGIT = "even or odd: test error (%)", "digit by nearest neighbours: test accuracy (%)"
TASK = "rotation from one image: right (%)"
ENTROPY = 10.6
"""By entropy, as ``supsup-rotated`` infers it; percent of 36 rotations, from masks of a net that was not told them."""
PAPER: Rows = [
    ["test error (%)", "magnet", "softmax", "triplet"],
    ["Stanford Dogs", "24.9", "26.6", "35.8"],
    ["Oxford Flowers 102", "8.6", "-", "-"],
    ["Oxford-IIIT Pet", "10.6", "-", "-"],
]
"""arXiv:1511.05939, table 1."""
QUICK: Changes = {
    "seeds": 1,
    "filters": 8,
    "steps": 200,
    "tasks": 8,
    "task_loss": {"k": 3, "m": 6, "refresh": 100},
    "task_steps": 150,
    "task_samples": 60,
}

QUESTION = """Does magnet loss need more labels for each sample than softmax cross-entropy? No, says a quiz (Lam, ECE472, 2020,
question 3): the loss (Rippel et al., arXiv:1511.05939) sees classes only, and finds clusters within them by itself. Here nets learn
even and odd; then the embedding is asked for the digit. Ours: clusters of tasks, by which a single image names its rotation, and so
its mask, where masks alone cannot tell; unlike inference from masks it needs the tasks' names while it learns."""


def _numbers(metrics: Metrics) -> Numbers:
    found = {}
    for method in METHODS:
        found[f"{method}_error"], found[f"{method}_digit"] = mean(metrics, method, PARITY), mean(metrics, method, DIGIT)
    return found


def _tasks(metrics: Metrics) -> Numbers:
    runs = metrics["rotations"]
    near = sum(run["neighbours"] for run in runs) / len(runs)
    tasks = metrics["settings"]["tasks"]
    found = {"right": mean(metrics, "clusters", TASK), "near": near, "tasks": tasks}
    return {**found, "chance": 100 / tasks, "entropy": ENTROPY}


def _is_full(metrics: Metrics) -> bool:
    """A quick run has too few steps for more than the first signs."""
    return not metrics["quick"]


CLAIMS = [
    Claim(
        "No label is added: from even and odd alone magnet loss has an error of {magnet_error:.1f} % on these, softmax "
        "{softmax_error:.1f} % (at most 0.5 points less), triplet loss {triplet_error:.1f} % (more).",
        _numbers,
        lambda n: n["magnet_error"] <= n["softmax_error"] + 0.5 and n["magnet_error"] < n["triplet_error"],
        _is_full,
    ),
    Claim(
        "And finds what it was not told: the nearest neighbours of its embedding name the digit for {magnet_digit:.1f} % "
        "of the test "
        "digits, those of softmax for {softmax_digit:.1f} %, of triplet loss for {triplet_digit:.1f} %, five points or more below.",
        _numbers,
        lambda n: n["magnet_digit"] >= max(n["softmax_digit"], n["triplet_digit"]) + 5,
        _is_full,
    ),
    Claim(
        "The nearest neighbours of magnet's embedding name the digit for {magnet_digit:.1f} % of the test digits, far more "
        "often than "
        "the 20 % that even and odd would do.",
        _numbers,
        lambda n: n["magnet_digit"] > 40,
    ),
    Claim(
        "Ours: by the clusters of {tasks} rotations a single image names its own in {right:.1f} % of the cases (guessing: "
        "{chance:.2g} %; by entropy, without the tasks' names in learning: {entropy} % of 36), at least 40 %; it or a neighbour in "
        "{near:.1f} %.",
        _tasks,
        lambda n: n["right"] >= 40,
        _is_full,
    ),
    Claim(
        "Ours: by the clusters of {tasks} rotations a single image names its own in {right:.1f} % of the cases (guessing: "
        "{chance:.2g} %).",
        _tasks,
        lambda n: n["right"] > 2 * n["chance"],
    ),
]


def run(folder: RunFolder, settings: Settings) -> Json:
    """Each method's embedding of even and odd digits, and the clusters of rotations, for each seed.

    Raises:
        OptionError: fewer than two tasks, or batches of one cluster.
        ImportError: scikit-learn or pytorch-metric-learning is not installed.
    """
    if settings.tasks < 2 or min(settings.loss.m, settings.task_loss.m) < 2:
        raise OptionError("experiment 'magnet': 'tasks', 'loss.m' and 'task_loss.m' must be at least 2")
    for name, package in (("sklearn", "scikit-learn"), ("pytorch_metric_learning", "pytorch-metric-learning")):
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(f'{package} is not installed: pip install "metamask_ext[experiments]"') from error
    found = load_digits()
    finished = folder.begin(f"{found.source}, at 14x14 pixels; labels: even, odd, or the rotation", found.note)
    if finished is not None:
        return finished
    jobs: dict[Key, Job] = {}
    for seed in folder.seeds:
        jobs |= {(seed, name): partial(even_odd, name, seed, settings) for name in METHODS}
        jobs[seed, "rotations"] = partial(rotations, seed, settings)
    made = folder.compute(jobs)
    scores: Scores = {
        name: {
            PARITY: [made[seed, name]["error"] for seed in folder.seeds],
            DIGIT: [made[seed, name]["digit"] for seed in folder.seeds],
        }
        for name in METHODS
    }
    of_tasks = [made[seed, "rotations"] for seed in folder.seeds]
    scores["clusters"] = {TASK: [run["right"] for run in of_tasks]}
    scores["chance"] = {PARITY: [50.0] * len(of_tasks), DIGIT: [10.0] * len(of_tasks), TASK: [100 / settings.tasks] * len(of_tasks)}
    batch = settings.loss.m * settings.loss.d
    budget = (
        f"{settings.steps} steps of {batch} digits for each method; {settings.task_steps} steps of "
        f"{settings.task_loss.m * settings.task_loss.d} for the rotations of {settings.task_samples} digits."
    )
    pictures = {name: {key: made[folder.seeds[0], name][key] for key in ("picture", "labels")} for name in METHODS}
    return folder.finish(scores, BASELINES, budget, figures, {"rotations": of_tasks, "pictures": pictures, "paper": PAPER})


def tables(metrics: Metrics) -> Tables:
    """The scores, and the paper's."""
    head, rows = table_of(metrics)
    named: Rows = [head, *([LABELS[method], *cells] for method, *cells in rows)]
    return [("", named), ("The paper's test errors (table 1), for comparison", PAPER)]


def figures(metrics: Metrics) -> Figures:
    """Test digits in the plane of each embedding's largest variance: a digit stands where it is, dark if even."""
    figure, axes = new_figure(len(METHODS))
    for panel, name in zip(axes, METHODS):
        picture = metrics["pictures"][name]
        for (x, y), label in zip(picture["picture"], picture["labels"]):
            panel.text(x, y, str(label), fontsize=6, color="#0072B2" if label % 2 == 0 else "#D55E00", ha="center", va="center")
        across, up = zip(*picture["picture"])
        panel.set(xlim=(min(across), max(across)), ylim=(min(up), max(up)))
        panel.margins(0.05)
        panel.set(xlabel="first principal direction (no unit)", ylabel="second (no unit)")
        panel.set_title(f"{LABELS[name]}: digits by nearest neighbours {mean(metrics, name, DIGIT):.1f} %", fontsize=10)
    figure.suptitle(f"test digits; blue: even, orange: odd, which is all that was told; seed {metrics['seed']}", fontsize=9)
    return {"": figure}
