"""The report of examples/sentence_tasks.py: accuracy, bytes and speed by method, and which of the claims hold."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import Any

import numpy as np

METHODS = ("words", "probe", "masks", "lora", "full")
NAMES = {
    "words": "bag of words, logistic regression",
    "probe": "linear probe on frozen embeddings",
    "masks": "metamask, one bit a weight",
    "lora": "LoRA (peft)",
    "full": "full fine-tuning",
}


TRIVIAL = 0.98
"""A task counts unless both baselines are better than this."""

T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Two-sided 95 % points of Student's t for so many draws."""

Run = dict[str, Any]


def report(settings: dict[str, Any], runs: list[Run], served: dict[str, float], about: str = "") -> str:
    """Markdown. Counted are the draws of a task that every method has finished.

    Args:
        settings: of the run.
        runs: a method on a draw of a task each: ``task, seed, method, tested, accuracy, bytes, seconds``.
        served: milliseconds for a batch, by method.
        about: a sentence on the machine.
    """
    found = _by_draw(runs)
    counted = {
        draw: methods for draw, methods in found.items() if min(methods[name]["accuracy"] for name in METHODS[:2]) <= TRIVIAL
    }
    tasks = sorted({task for task, _ in counted})
    seeds = sorted({seed for _, seed in counted})
    lines = [
        f"{len(tasks)} tasks, {len(seeds)} {_plural('draw', len(seeds))} of the training sentences, {settings['steps']} steps of "
        f"{settings['batch']} sentences, {settings['threads']} {_plural('thread', settings['threads'])}. {about}".rstrip(),
        "",
    ]
    trivial = len(found) - len(counted)
    if trivial:
        lines += [f"Left out: {trivial} {_plural('draw', trivial)} of tasks that both baselines solve to {TRIVIAL:.0%}.", ""]
    if not counted:
        return "\n".join([*lines, "No task counts.", ""])
    lines += ["| method | accuracy | 95 % interval over draws | bytes a task | seconds a task |", "|---|---|---|---|---|"]
    for method in METHODS:
        mean, half = _mean_over_draws(counted, method, seeds)
        interval = "one draw" if half is None else f"± {100 * half:.2f}"
        size, seconds = (statistics.mean(one[method][what] for one in counted.values()) for what in ("bytes", "seconds"))
        lines.append(f"| {NAMES[method]} | {100 * mean:.2f} % | {interval} | {size:,.0f} | {seconds:.1f} |")
    lines += [
        "",
        *_serving_lines(settings, served),
        "",
        "| claim | measured | |",
        "|---|---|---|",
        *_claims(counted, tasks, served),
        "",
    ]
    return "\n".join([*lines, *_table(counted, tasks)])


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _by_draw(runs: list[Run]) -> dict[tuple[str, int], dict[str, Run]]:
    found: dict[tuple[str, int], dict[str, Run]] = defaultdict(dict)
    for run in runs:
        found[run["task"], run["seed"]][run["method"]] = run
    return {draw: methods for draw, methods in found.items() if methods.keys() >= set(METHODS)}


def _mean_over_draws(counted: dict[tuple[str, int], dict[str, Run]], method: str, seeds: list[int]) -> tuple[float, float | None]:
    """The mean accuracy over tasks, and half of the interval of its mean over draws; None with one draw."""
    means = [statistics.mean(one[method]["accuracy"] for (_, of), one in counted.items() if of == seed) for seed in seeds]
    half = T[len(means)] * statistics.stdev(means) / math.sqrt(len(means)) if len(means) in T else None
    return statistics.mean(means), half


def difference(counted: dict[tuple[str, int], dict[str, Run]], tasks: list[str]) -> tuple[float, float, float]:
    """Masks less LoRA: the mean over tasks, and the 95 % interval of 10,000 samples of the tasks with replacement."""
    each = np.array(
        [
            statistics.mean(
                one["masks"]["accuracy"] - one["lora"]["accuracy"] for (task, _), one in counted.items() if task == name
            )
            for name in tasks
        ]
    )
    samples = each[np.random.default_rng(0).integers(len(each), size=(10_000, len(each)))].mean(1)
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(each.mean()), float(low), float(high)


def _serving_lines(settings: dict[str, Any], served: dict[str, float]) -> list[str]:
    count = settings["served"]
    rates = ", ".join(
        f"{name} {milliseconds:.0f} ms ({1000 * count / milliseconds:.0f} sentences a second)"
        for name, milliseconds in (
            ("the plain encoder, one task,", served["plain"]),
            ("metamask", served["masks"]),
            ("peft with `adapter_names=`", served["lora"]),
        )
    )
    return [f"A batch of {count} sentences, each of its own task; medians of {settings['rounds']} rounds in turns: {rates}."]


def _claims(counted: dict[tuple[str, int], dict[str, Run]], tasks: list[str], served: dict[str, float]) -> list[str]:
    mean, low, high = difference(counted, tasks)
    size = {method: statistics.mean(one[method]["bytes"] for one in counted.values()) for method in ("masks", "lora")}
    faster, slower = served["lora"] / served["masks"], served["masks"] / served["plain"]
    found = [
        ("40 tasks or more count", f"{len(tasks)}", len(tasks) >= 40),
        ("mean accuracy at most 1 point below LoRA", f"{100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]", mean >= -0.01),
        ("bytes a task, of LoRA's", f"{size['masks'] / size['lora']:.2f}", None),
        ("at least 3 times peft's throughput", f"{faster:.2f}", faster >= 3),
        ("at most 1.3 times the plain encoder's time", f"{slower:.2f}", slower <= 1.3),
    ]
    return [
        f"| {claim} | {value} | {'' if holds is None else 'holds' if holds else 'does not hold'} |" for claim, value, holds in found
    ]


def _table(counted: dict[tuple[str, int], dict[str, Run]], tasks: list[str]) -> list[str]:
    lines = ["| task | test sentences | words | probe | masks | LoRA | full |", "|---|---|---|---|---|---|---|"]
    for name in tasks:
        draws = [one for (task, _), one in counted.items() if task == name]
        cells = [f"{100 * statistics.mean(one[method]['accuracy'] for one in draws):.1f}" for method in METHODS]
        lines.append(f"| {name} | {draws[0]['masks']['tested']} | {' | '.join(cells)} |")
    return [*lines, ""]
