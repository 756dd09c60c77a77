"""The common study: its nets, methods and ways against what they are, written plainly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from metamask_ext import using_task
from metamask_ext.experiments.catalogue import OptionError
from metamask_ext.experiments.engine.training import seeded
from metamask_ext.experiments.proposal import linear
from metamask_ext.experiments.study.methods import METHODS, Independent, Loop, Meta, fresh, method
from metamask_ext.experiments.study.networks import Nets, gates, shared_parameters
from metamask_ext.experiments.study.new_tasks import Masks, Way, _fit, _inner_steps, _look_up, new_task_scores
from metamask_ext.experiments.study.problem import Problem, Score, TaskData
from metamask_ext.experiments.study.settings import (
    FrozenConfig,
    MaskedConfig,
    MetaConfig,
    NewTaskSettings,
    PlainConfig,
    StudySettings,
    even_grid,
    grid,
)

TASKS, NEW = 3, 2


def small_net(linear, conv):
    return nn.Sequential(linear(4, 3), nn.Tanh(), linear(3, 1))


def small_cnn(linear, conv):
    return nn.Sequential(conv(1, 2, 2), nn.Flatten(), linear(2, 1))


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small_problem(network=small_net, tasks=TASKS) -> Problem:
    generator = torch.Generator().manual_seed(0)
    shape = [4] if network is small_net else [1, 2, 2]
    weights = torch.randn(tasks + NEW, 4, generator=generator)

    def data(chosen: slice, samples: int) -> TaskData:
        own = weights[chosen]
        x = torch.randn(len(own), samples, *shape, generator=generator)
        return TaskData(x, torch.einsum("tnk,tk->tn", x.flatten(2), own)[..., None])

    known, new = slice(tasks), slice(tasks, None)
    return Problem(data(known, 20), data(known, 30), data(new, 12), data(new, 30), network, F.mse_loss, F.mse_loss)


CONFIG = {
    "masked": MaskedConfig(0.05, 0.1),
    "hard": MaskedConfig(0.05, 0.1),
    "lottery": FrozenConfig(0.1, 2.0),
    "shared": PlainConfig(0.05),
    "independent": PlainConfig(0.05),
    "maml": MetaConfig(0.05, 0.1),
    "sequence": PlainConfig(0.05),
}


@dataclass(frozen=True)
class Settings:
    tasks: int
    steps: int
    study: StudySettings


def small_settings(**changes):
    new = NewTaskSettings(samples=(1, 5, 12), steps=4, batch=3)
    grid = {name: (config,) for name, config in CONFIG.items()}
    return Settings(TASKS, 60, StudySettings(grid=grid, round_steps=5, batch=4, new=new, **changes))


def trained(name, problem=None, **changes):
    problem = problem or small_problem()
    made = method(name, problem, small_settings(**changes), CONFIG[name], 0)
    made.train()
    return made


@pytest.mark.parametrize("network", [small_net, small_cnn])
def test_nets(network):
    problem = small_problem(network)
    nets, parameters = Nets(problem), fresh(problem, 0, 3)
    x = torch.randn(3, 5, *problem.train.x.shape[2:])
    found = nets(parameters, x)
    for row in range(3):
        alone = problem.plain()
        alone.load_state_dict({name: stack[row] for name, stack in parameters.items()})
        torch.testing.assert_close(found[row], alone(x[row]))
        torch.testing.assert_close(nets.one(parameters, row, x[row]), alone(x[row]))
    assert not torch.equal(parameters["0.weight" if network is small_net else "2.weight"][0], found.new_zeros(()))
    assert len({tuple(stack.flatten().tolist()) for stack in parameters["0.weight"]}) == 3, "each net begins by itself"


@pytest.mark.parametrize("name", ["masked", "hard", "lottery"])
@pytest.mark.parametrize("network", [small_net, small_cnn])
def test_masks_as_plain_nets(name, network):
    problem = small_problem(network)
    made = trained(name, problem)
    masks = Masks(made.model, problem.names)
    theta = masks.theta(masks.masks, {key: tensor[None] for key, tensor in masks.shared.items()})
    x = problem.test.x[0]
    for task, known in enumerate(problem.names):
        with using_task(made.model, known), torch.no_grad():
            torch.testing.assert_close(Nets(problem).one(theta, task, x), made.model(x))


def test_methods_train_what_they_say():
    problem = small_problem()
    start = seeded(0, problem.plain).state_dict()
    frozen = shared_parameters(trained("lottery").model)
    drawn = shared_parameters(method("lottery", problem, small_settings(), CONFIG["lottery"], 0).model)
    assert all(torch.equal(frozen[name], drawn[name]) for name in start)
    plainly = method("lottery", problem, small_settings(), FrozenConfig(0.1, 1.0), 0).model
    assert all(torch.equal(frozen[name], 2 * tensor) for name, tensor in shared_parameters(plainly).items())
    assert all(set(gate.unique().tolist()) <= {0.0, 1.0} for gate in gates(trained("hard").model, problem.names).values())
    soft = gates(trained("masked").model, problem.names)
    assert all(float(gate.min()) > 0 and float(gate.max()) < 1 for gate in soft.values())
    for name in ("shared", "sequence", "maml"):
        model = trained(name).model
        assert list(model.state_dict()) == list(start) and not torch.equal(model.state_dict()["0.weight"], start["0.weight"])


def test_sequence_and_order():
    """Tasks one after another: as many rounds for each, and the scores after each are those of a run that ends there."""
    problem = small_problem()
    sequence = trained("sequence", problem)
    assert sequence.loop._order == [name for name in problem.names for _ in range(4)]
    assert list(sequence.loop.steps_of.values()) == [20, 20, 20]
    made, seen = method("masked", problem, small_settings(), CONFIG["masked"], 0), []
    made.train(lambda learned: seen.append((learned, list(made.loop.steps_of), made.scores(range(learned)))))
    assert [(learned, names) for learned, names, _ in seen] == [(k, problem.names[:k]) for k in (1, 2, 3)]
    assert seen[-1][2] == made.scores(range(3)) and len(seen[0][2]) == 1
    maml, scores = method("maml", problem, small_settings(), CONFIG["maml"], 0), []
    maml.train(lambda learned: scores.append(maml.scores(range(learned))))
    assert [len(each) for each in scores] == [1, 2, 3]


def test_independent_nets_do_not_meet():
    """A net is what it would be without the others: their data do not matter to it."""
    problem = small_problem()
    other = TaskData(problem.train.x.clone(), problem.train.y.clone())
    other.y[1:] += 5
    changed = Problem(other, *(getattr(problem, key) for key in ("test", "new_train", "new_test", "network", "loss", "score")))
    first, second = trained("independent", problem), trained("independent", changed)
    for name, stack in first.parameters.items():
        torch.testing.assert_close(stack[0], second.parameters[name][0])
        assert not torch.allclose(stack[1], second.parameters[name][1])
    before = method("independent", problem, small_settings(), CONFIG["independent"], 0)
    assert sum(first.scores(range(TASKS))) < sum(before.scores(range(TASKS)))


def test_few_steps_are_refused():
    settings = replace(small_settings(), steps=10)
    with pytest.raises(OptionError, match="steps must be at least 15 for 3 tasks, got 10"):
        method("masked", small_problem(), settings, CONFIG["masked"], 0).train()


@pytest.mark.parametrize("masked", [False, True])
def test_fit_is_adam_with_each_rate(masked):
    """Rows of several rates and numbers of samples are what Adam gives for each alone."""
    problem, settings = small_problem(), small_settings()
    new, counts, rates = settings.study.new, [1, 5, 12], [[0.1, 0.03, 0.01], [0.3, 0.1, 0.02]]
    if masked:
        masks = Masks(trained("masked", problem).model, problem.names)
        way = masks.ways()["everything"]
    else:
        way = Way(fresh(problem, 3, NEW), lambda learned: learned)
    found = _fit(problem, Nets(problem), way, counts, rates, new, "loss")
    for row, of_row in enumerate(rates):
        for column, (count, rate) in enumerate(zip(counts, of_row)):
            scores = []
            for task in range(NEW):
                learned = {key: stack[task if len(stack) > 1 else 0].clone()[None] for key, stack in way.start.items()}
                leaves = {key: tensor.requires_grad_() for key, tensor in learned.items()}
                optimizer = torch.optim.Adam(leaves.values(), rate, eps=1e-8 / rate)
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, new.steps)
                x, y = problem.new_train.x[task], problem.new_train.y[task]
                for step in range(new.steps):
                    chosen = [(new.batch * step + place) % count for place in range(new.batch)]
                    theta = {key: stack[0] for key, stack in way.theta(leaves).items()}
                    optimizer.zero_grad()
                    F.mse_loss(functional_call(problem.plain(), theta, (x[chosen],)), y[chosen]).backward()
                    optimizer.step()
                    schedule.step()
                theta = {key: stack[0].detach() for key, stack in way.theta(leaves).items()}
                prediction = functional_call(problem.plain(), theta, (problem.new_test.x[task],))
                scores.append(float(F.mse_loss(prediction, problem.new_test.y[task])))
            assert found[row][column] == pytest.approx(sum(scores) / NEW, rel=1e-9), (row, column)


def test_ways_begin_at_the_masks():
    """Superposition at the mean of the gates, mask only at the mean of the masks, everything there with the weights."""
    problem = small_problem()
    model = trained("masked", problem).model
    masks = Masks(model, problem.names)
    ways = masks.ways()
    logits = {name: sum(dict(model.named_parameters())[key] for key in keys) / TASKS for name, keys in _mask_keys(model).items()}
    for name, weight in shared_parameters(model).items():
        gate = sum(torch.sigmoid(dict(model.named_parameters())[key]) for key in _mask_keys(model)[name]) / TASKS
        theta = {way: ways[way].theta(ways[way].start)[name][0] for way in ways}
        torch.testing.assert_close(theta["superposition"], weight * gate)
        torch.testing.assert_close(theta["mask only"], weight * torch.sigmoid(logits[name]))
        torch.testing.assert_close(theta["everything"], theta["mask only"])
    assert set(ways["mask only"].start) == {f"mask of {name}" for name in shared_parameters(model)}


def _mask_keys(model):
    """The names of the masks of each weight and bias."""
    found = {}
    for key in dict(model.named_parameters()):
        head, _, _ = key.rpartition(".")
        if head.endswith("masks"):
            layer, _, masks = head.rpartition(".")
            found.setdefault(f"{layer}.{'bias' if masks == 'bias_masks' else 'weight'}", []).append(key)
    assert all(len(keys) == TASKS for keys in found.values())
    return found


def test_look_up_finds_the_task():
    """New tasks that are the trained ones get these tasks' masks as soon as there are samples enough to tell them apart."""
    problem = small_problem()
    order = [2, 0]
    made = trained("masked", problem)
    known = Problem(
        problem.train,
        problem.test,
        TaskData(problem.train.x[order], problem.train.y[order]),
        TaskData(problem.test.x[order], problem.test.y[order]),
        *(problem.network, problem.loss, problem.score),
    )
    ((few, many),) = _look_up(known, Nets(known), Masks(made.model, problem.names), [1, 20])
    each = made.scores(range(TASKS))
    assert many == pytest.approx((each[2] + each[0]) / 2) and few >= many


def test_inner_steps():
    """MAML's steps on a new task are gradient descent from the meta-learned net, at the trained rate times the factor."""
    problem = small_problem()
    made = trained("maml", problem)
    ((found,),) = _inner_steps(problem, made, Nets(problem), [5], [[0.5]])
    scores = []
    for task in range(NEW):
        parameters = {name: tensor.detach().clone().requires_grad_() for name, tensor in made.model.named_parameters()}
        for _ in range(3):
            prediction = functional_call(made.model, parameters, (problem.new_train.x[task, :5],))
            grads = torch.autograd.grad(F.mse_loss(prediction, problem.new_train.y[task, :5]), [*parameters.values()])
            parameters = {key: tensor - 0.05 * grad for (key, tensor), grad in zip(parameters.items(), grads)}
        prediction = functional_call(made.model, parameters, (problem.new_test.x[task],))
        scores.append(F.mse_loss(prediction, problem.new_test.y[task]).item())
    assert found == pytest.approx(sum(scores) / NEW)


@pytest.mark.parametrize("network", [small_net, small_cnn])
@pytest.mark.parametrize("name", METHODS)
def test_ways_of_each_method(name, network):
    problem = small_problem(network)
    made = trained(name, problem)
    assert isinstance(made, {"independent": Independent, "maml": Meta}.get(name, Loop))
    found = new_task_scores(name, problem, made, small_settings().study.new)
    masks = ["look-up", "superposition", "mask only"]
    expected = {
        "masked": [*masks, "everything"],
        "lottery": masks,
        "independent": ["from scratch"],
        "maml": ["inner steps", "everything"],
    }
    assert sorted(found) == sorted(expected.get(name, expected["masked"] if name == "hard" else ["everything"]))
    for way, scores in found.items():
        assert [len(row) for row in scores] == [3] * (1 if way == "look-up" else 4)
        assert all(value is None or math.isfinite(value) for row in scores for value in row)


def test_one_task_has_a_net_from_scratch():
    problem = small_problem(tasks=1)
    found = new_task_scores("shared", problem, trained("shared", problem), small_settings().study.new)
    assert sorted(found) == ["everything", "from scratch"]


def test_best():
    lower, higher = Score("error", "1", False), Score("accuracy", "%", True)
    assert lower.best([None, 3.0, 1.0, 1.0]) == 2 and higher.best([1.0, None, 3.0]) == 2
    with pytest.raises(FloatingPointError, match="no configuration gave a finite error"):
        lower.best([None, None])


def test_scores_must_be_finite():
    problem = small_problem()
    with pytest.raises(FloatingPointError, match="the score of task 1 is nan"):
        problem.scores(problem.test, lambda k, x: torch.full((30, 1), math.nan if k == 1 else 0.0), [0, 1, 2])


def test_grid():
    made = grid(FrozenConfig, mask_lr=[1.0, 2.0], scale=[3.0, 4.0])
    assert made == (FrozenConfig(1.0, 3.0), FrozenConfig(1.0, 4.0), FrozenConfig(2.0, 3.0), FrozenConfig(2.0, 4.0))
    with pytest.raises(ValueError, match=r"as many configurations for each method, got \{'masked': 1, 'shared': 2\}"):
        even_grid(masked=grid(PlainConfig, lr=[1.0]), shared=grid(PlainConfig, lr=[1.0, 2.0]))


def test_gates_that_agree_with_the_truth():
    """``linear`` counts recovered entries rightly on masks that are known."""
    settings = linear.Settings(tasks=3, new_tasks=1, test_samples=5)
    problem = linear.problem(0, settings)
    support = linear.tasks_of(0, settings).support
    for name, wrong in (("masked", 0), ("hard", 2)):
        made = Loop(name, problem, replace(settings, steps=30), MaskedConfig(0.0, 0.0), 0)
        made.loop.run(60)
        with torch.no_grad():
            for task, key in enumerate(problem.names):
                on = support[task].double() * 2 - 1
                on[:wrong] *= -1
                made.model.masks[key].copy_(on[None, :-1])
                made.model.bias_masks[key].copy_(on[-1:])
        found = problem.examine(name, made.model)
        assert found[linear.SUPPORT] == pytest.approx(100 * (1 - wrong / 6)) and len(found["gates"]) == 3
    assert problem.examine("shared", nn.Linear(5, 1)) == {}
