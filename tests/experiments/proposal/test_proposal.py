"""The experiments of the proposal's sections 2.1, 3.2, 3.3, 3.4 and 3.7: what they measure, by hand, and their quick runs."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.experiments import check_claims, check_resumes, check_written, no_downloads, quick_run
from torch import nn
from torch.func import functional_call

from metamask_ext.data import ColoredImages, sinusoid_tasks
from metamask_ext.experiments.catalogue import OptionError, module_of, run, settings_of
from metamask_ext.experiments.proposal import colored_mnist, saturation, sine_cosine, sine_of_linear, sinusoid
from metamask_ext.experiments.study.networks import Nets
from metamask_ext.experiments.study.settings import NewTaskSettings

# A job of each that a killed run computes once more
LOST = {
    "saturation": "no-L2-temperature-1-spread-1.json",
    "sine-of-linear": "masks-random-at-first-L2-0-on-M.json",
    "sinusoid": "masked-1-tasks.json",
    "sine-cosine": "unrelated-masked.json",
    "colored-mnist": "shared.json",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in LOST])
def test_quick_run(tmp_path, name, capsys):
    metrics = quick_run(name, tmp_path)
    counted = [tuple(map(int, found)) for found in re.findall(r"^(\d+) of (\d+) jobs", capsys.readouterr().out, re.MULTILINE)]
    assert counted == [(number, len(counted)) for number in range(1, len(counted) + 1)], "the remaining time counts every job"
    figures = [f"{name}-{key}.png" if key else f"{name}.png" for key in module_of(name).figures(metrics)]
    check_written(tmp_path / name, metrics, figures)
    check_claims(metrics)
    with no_downloads(tmp_path / "data"):
        check_resumes(tmp_path / name, metrics, LOST[name])


SMALL_STUDY = "[study]\ncost_rounds = 1\n[study.new]\nsamples = [2, 5]\nsteps = 2\n"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("saturation", "steps = 40\npoints = 2\n"),
        (
            "sine-of-linear",
            'tasks = 2\nsteps = 200\n[sharing]\nmask_weight_decay = [0.0, 0.1]\nbegin = ["alike", "random"]\n' + SMALL_STUDY,
        ),
        ("sinusoid", "tasks = 2\nsteps = 200\nnumbers_of_tasks = [1]\n" + SMALL_STUDY),
        ("sine-cosine", "tasks = 6\nsteps = 400\n" + SMALL_STUDY),
    ],
)
def test_results_do_not_depend_on_workers(tmp_path, name, config):
    (tmp_path / "small.toml").write_text(config)
    one, two = (run(name, tmp_path / str(each), quick=True, config=tmp_path / "small.toml", workers=each) for each in (1, 2))
    for kind in ("results", "baselines"):
        assert one[kind] == two[kind]
    assert [claim.text.format(**claim.numbers(one)) for claim in module_of(name).CLAIMS]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("saturation", "weight_decay = []", "weight_decay must have at least one item, got none"),
        ("saturation", "temperatures = [[1.0, 0.0]]", r"temperatures must be pairs of positive numbers, .* got \[1\.0, 0\.0\]"),
        ("sine-of-linear", '[sharing]\nbegin = ["equal"]', "sharing.begin must be one of alike, random, got 'equal'"),
        ("sine-of-linear", "[sharing]\nmask_weight_decay = []", "sharing.mask_weight_decay must have at least one item, got none"),
    ],
)
def test_refused_settings(tmp_path, name, config, message):
    (tmp_path / "file.toml").write_text(config)
    with pytest.raises(OptionError, match=message):
        run(name, tmp_path / "out", quick=True, config=tmp_path / "file.toml")


# saturation


def test_saturation_without_learning():
    """With rates of 0 the gates stay as they are drawn, and what is counted is theirs."""
    settings = replace(settings_of("saturation", quick=True), tasks=30, steps=40, points=2, lr=0.0, mask_lr=0.0)
    found = saturation.measure(3, settings, ("", 0.0), (1.0, 1.0), 6.0)
    numbers = found["numbers"]
    assert found["steps"] == [0, 20, 40] and len(found["gates"]) == 2 and found["gates"][0] == found["gates"][1]
    for shares in found["gates"]:
        assert len(shares) == saturation.BINS and abs(sum(shares) - 1) < 1e-5
    # Half the 180 gates are wrong, and 62 % of those beyond logits of 2.94 = 0.49 standard deviations; four standard deviations
    assert numbers[saturation.TURNED] == 0 and abs(numbers[saturation.WRONG] - 0.31 * 180) < 25
    assert abs(numbers[saturation.NEAR_END] - 62) < 15 and abs(numbers[saturation.RIGHT] - 50) < 15
    shares = found["gates"][0]
    assert abs(100 * (shares[0] + shares[-1]) - numbers[saturation.NEAR_END]) < 1e-4
    cooled = saturation.measure(3, settings, ("", 0.0), (8.0, 0.1), 6.0)
    assert cooled["gates"][0] != cooled["gates"][1] and cooled["numbers"][saturation.NEAR_END] > 95
    assert cooled["numbers"][saturation.WRONG] == numbers[saturation.WRONG], "told by the logits alone"


def test_saturation_penalties():
    settings = settings_of("saturation")
    names = [saturation.condition_name(each, (1.0, 0.1), 6.0) for each in saturation.penalties(settings)]
    assert names[0] == "no L2, temperature 1 to 0.1, spread 6" and "L2 0.01 on M, temperature 1 to 0.1, spread 6" in names
    assert len(set(names)) == 1 + len(settings.weight_decay) + len(settings.mask_weight_decay)


def test_saturation_penalties_act_where_they_say():
    """Without data to speak of, L2 on W shrinks W only, and on M the logits only."""
    settings = replace(settings_of("saturation", quick=True), steps=400, points=1)
    free, weights, masks = (
        saturation.measure(0, settings, penalty, (1.0, 1.0), 6.0)["numbers"] for penalty in (("", 0.0), ("W", 1.0), ("M", 1.0))
    )
    assert masks[saturation.NEAR_END] < free[saturation.NEAR_END] - 20 and weights[saturation.NEAR_END] > masks[saturation.NEAR_END]
    assert weights[saturation.MSE] != free[saturation.MSE]


# sine-of-linear


def test_swapped_masks_one_pair_after_the_other():
    settings = replace(settings_of("sine-of-linear", quick=True), tasks=4, test_samples=7, hidden=3)
    made, weight, support = sine_of_linear._problem(1, settings)
    support[2] = support[0]
    assert weight.shape == (4, 5) and support.shape == (4, 6)
    plain = made.plain()
    shared = {name: parameter.detach() for name, parameter in plain.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    gates = {name: torch.rand(4, *parameter.shape, generator=generator) for name, parameter in shared.items()}

    def error(task: int, first: int, later: int) -> float:
        own = {name: shared[name] * gates[name][first if name.startswith("0.") else later] for name in shared}
        with torch.no_grad():
            return float(F.mse_loss(functional_call(plain, own, (made.test.x[task],)), made.test.y[task]))

    pairs = list(itertools.permutations(range(4), 2))
    different = [(a, b) for a, b in pairs if {a, b} != {0, 2}]
    got = sine_of_linear._swapped(made, shared, gates, support)
    assert got[sine_of_linear.OWN] == pytest.approx(sum(error(a, a, a) for a in range(4)) / 4, rel=1e-4)
    assert got[sine_of_linear.LATER] == pytest.approx(sum(error(a, a, b) for a, b in pairs) / 12, rel=1e-4)
    assert got[sine_of_linear.FIRST] == pytest.approx(sum(error(a, b, a) for a, b in different) / len(different), rel=1e-4)


def test_differences_of_gates_by_hand():
    shared = {"0.weight": torch.tensor([[1.0, -3.0]]), "0.bias": torch.tensor([0.0]), "2.weight": torch.tensor([[2.0]])}
    gates = {
        "0.weight": torch.tensor([[[0.0, 0.5]], [[1.0, 0.5]], [[1.0, 1.0]]]),
        "0.bias": torch.rand(3, 1),
        "2.weight": torch.full((3, 1, 1), 0.3),
    }
    # |g_a - g_b| of the pairs 12, 13, 23: 1, 1, 0 for the weight of 1 and 0, 1/2, 1/2 for that of 3.
    first, later = sine_of_linear._differences(shared, gates)
    assert first == pytest.approx((1 * 2 / 3 + 3 * 1 / 3) / 4) and later == 0


# sinusoid and sine-cosine


def test_split_of_samples():
    quick = settings_of("sinusoid", quick=True)
    study = replace(quick.study, new=NewTaskSettings(samples=(2, 40)))
    settings = replace(quick, tasks=3, new_tasks=2, train_samples=20, test_samples=30, study=study)
    made = sinusoid.problem(0, settings)
    assert [tuple(data.x.shape) for data in (made.train, made.test, made.new_train, made.new_test)] == [
        (3, 20, 5),
        (3, 30, 5),
        (2, 40, 5),
        (2, 30, 5),
    ]
    rows = torch.cat(
        [made.train.x.flatten(0, 1), made.test.x.flatten(0, 1), made.new_train.x.flatten(0, 1), made.new_test.x.flatten(0, 1)]
    )
    assert len(rows.unique(dim=0)) == len(rows), "no sample is in two of them"


@pytest.mark.parametrize("related", [True, False])
def test_the_unit_can_be_right(related):
    """With the true parameters the net of sine-cosine is without error."""
    settings = replace(settings_of("sine-cosine", quick=True), tasks=6, test_samples=20)
    made = sine_cosine._problem(related, 0, settings)
    count = settings.tasks + settings.new_tasks
    options = {"magnitudes": settings.magnitudes, "cosine": settings.cosine}
    drawn = sinusoid_tasks(count, torch.Generator().manual_seed(0), related=related, **options)
    phase = drawn.phase + math.pi / 2 * drawn.cosine
    parameters = {"0.weight": drawn.weight[:, None], "0.bias": phase[:, None]}
    if not related:
        parameters |= {"2.weight": torch.ones(count, 1, 1), "2.bias": drawn.offset[:, None]}
    known = {name: stack[:6] for name, stack in parameters.items()}
    torch.testing.assert_close(Nets(made)(known, made.test.x), made.test.y, rtol=0, atol=1e-5)


def test_both_kinds_of_task_are_needed():
    settings = replace(settings_of("sine-cosine", quick=True), cosine=0.0)
    with pytest.raises(OptionError, match=r"tasks must be enough for sines and cosines, got 8: 0 of 8 are cosines \(seed 3\)"):
        sine_cosine.problem(3, settings)


def test_phase_is_an_angle():
    examined = {"gates": [1.0, 1.0, 0.0, 0.9], "cosine": [True, True, False, False], "bias": 2.5 * math.pi}
    got = sine_cosine._measured(examined)
    assert got[sine_cosine.PHASE] == pytest.approx(math.pi / 2) and got[sine_cosine.RIGHT] == 75
    assert got[sine_cosine.COSINE] == 1 and got[sine_cosine.SINE] == pytest.approx(0.45)
    # 0.1 before and 0.3 behind the full turn
    turned = {"gates": [1.0, -0.05], "cosine": [True, True], "bias": 2 * math.pi - 0.1}
    assert 0 <= sine_cosine._measured(turned)[sine_cosine.PHASE] < 2 * math.pi


# colored-mnist


def test_colored_digits(tmp_path):
    quick = settings_of("colored-mnist", quick=True)
    study = replace(quick.study, new=NewTaskSettings(samples=(1, 6)))
    settings = replace(quick, tasks=3, new_tasks=2, train_samples=10, test_samples=8, study=study)
    with no_downloads(tmp_path):
        made = colored_mnist.problem(5, settings)
    colors = ColoredImages(5, seed=5).colors
    for data, first, samples in ((made.train, 0, 10), (made.test, 0, 8), (made.new_train, 3, 6), (made.new_test, 3, 8)):
        assert data.x.shape[1:] == (samples, 3, 14, 14) and data.y.shape == data.x.shape[:2] and data.y.dtype == torch.int64
        for task in range(len(data.x)):
            # The corners of a digit are paper.
            corner = data.x[task, :, :, 0, 0]
            torch.testing.assert_close(corner, colors[first + task].expand_as(corner))
    assert not torch.equal(made.train.y[0], made.train.y[1]), "each task has its own digits"
    net = made.network(nn.Linear, nn.Conv2d)
    assert net(made.train.x[0]).shape == (10, 10)
