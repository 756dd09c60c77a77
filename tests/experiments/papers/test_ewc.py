"""ewc: the overlap by hand, EWC as a method of the study, and the quick run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from support.experiments import check_claims, check_resumes, check_written, quick_run
from torch import nn

from metamask_ext.experiments.papers.ewc import training
from metamask_ext.experiments.papers.ewc.settings import Settings
from metamask_ext.experiments.study.methods import method
from metamask_ext.experiments.study.problem import Problem, TaskData
from metamask_ext.experiments.study.settings import AnchoredConfig, MaskedAnchoredConfig, StudySettings

# The quick run is made once, so by one worker.
pytestmark = pytest.mark.xdist_group("ewc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ewc")


@pytest.fixture(scope="module")
def metrics(folder):
    return quick_run("ewc", folder)


def test_overlap_by_hand():
    first, second = torch.tensor([1.0, 3.0]), torch.tensor([3.0, 1.0])
    assert training.overlap_of(first, 5 * first) == pytest.approx(1)
    assert training.overlap_of(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 7.0])) == pytest.approx(0)
    # sqrt(1/4 * 3/4), twice
    assert training.overlap_of(first, second) == pytest.approx(2 * 0.1875**0.5)


def test_only_the_square_is_permuted():
    problem = training._square(8, 0)
    plain, shown = (x.view(-1, 28, 28) for x in problem.train.x[:, :50])
    assert not torch.equal(plain, shown)
    for image in (plain, shown):
        image[:, 10:18, 10:18] = 0
    assert torch.equal(plain, shown)


def _problem(likelihood: str | None = "gaussian") -> Problem:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 4, generator=generator)
    weight = torch.randn(3, 4, 1, generator=generator)
    data = TaskData(x, x @ weight)
    return Problem(
        data, data, data, data, lambda linear, conv: nn.Sequential(linear(4, 16), nn.Tanh(), linear(16, 1)), F.mse_loss, F.mse_loss,
        likelihood=likelihood,
    )  # fmt: skip


def _study() -> training.LoopSettings:
    return training.LoopSettings(3, 600, StudySettings(tuning=False, batch=16, grid={}))


@pytest.mark.parametrize("name", ["masked+ewc", "sequence+ewc", "sequence+l2"])
def test_methods_of_the_study(name):
    """W is held for each task that was learned, the more the stronger; without strength it is the method without EWC."""

    def learned(strength: float, name: str = name):
        config = MaskedAnchoredConfig(0.01, 0.05, strength, 20) if name.startswith("masked") else AnchoredConfig(0.01, strength, 20)
        made = method(name, _problem(), _study(), config, 0)
        scores: list[list[float]] = []
        made.train(lambda count: scores.append(made.scores(range(count))))
        return made, scores

    (held, scores), (_, free) = learned(100.0), learned(0.0)
    assert held.anchor.tasks == 3 and [len(each) for each in scores] == [1, 2, 3]
    assert not [key for key in held.anchor.parameters if "masks" in key]
    assert fmean(scores[-1][:2]) < fmean(free[-1][:2])
    assert scores[0] == free[0]  # nothing is held in the first task


def test_without_strength_it_is_plain():
    plain = method("masked", _problem(), _study(), MaskedAnchoredConfig(0.01, 0.05, 0.0), 0)
    plain.anchor = None
    held = method("masked+ewc", _problem(), _study(), MaskedAnchoredConfig(0.01, 0.05, 0.0, 20), 0)
    found = {}
    for name, made in (("plain", plain), ("held", held)):
        made.train(partial(lambda name, count: found.update({name: count}), name))
    assert plain.scores(range(3)) == held.scores(range(3))


def test_a_likelihood_is_needed():
    with pytest.raises(ValueError, match="sequence\\+ewc needs the problem's likelihood, got None"):
        method("sequence+ewc", _problem(None), _study(), AnchoredConfig(0.01, 1.0), 0)


def test_claims(metrics):
    check_claims(metrics)


def test_written(metrics, folder):
    check_written(folder / "ewc", metrics, ["ewc.png", "ewc-curves.png"])


def test_killed_run_continues(metrics, folder):
    check_resumes(folder / "ewc", metrics, "A-sequence.json")


def test_strengths_are_chosen_on_a_further_seed(tmp_path):
    small = {"steps": 10, "points": 1, "curve": {"tasks": 2, "width": 5}, "many": {"tasks": 2, "width": 5}, "samples": 5}
    found = quick_run("ewc", tmp_path, strengths=[1.0, 10.0], overlap={"steps": 10, "depth": 1, "width": 5}, **small)
    assert set(found["strengths"]["A"]) == {"sequence+l2", "sequence+ewc"}
    assert set(found["strengths"]["B"]) == {"sequence+ewc", "masked+ewc"}
    assert len(list((tmp_path / "ewc" / "seed-1").glob("tuning-*.json"))) == 8
    assert replace(Settings()).strengths == (1.0, 10.0, 100.0, 1000.0, 10000.0)
