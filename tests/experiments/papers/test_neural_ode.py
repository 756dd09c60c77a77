"""neural-ode: a masked field under the adjoint method, wherever its backward runs; and the quick run."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch
from support.experiments import check_resumes, check_written, quick_run
from torch import nn

from metamask_ext import add_task, using_task
from metamask_ext.experiments import report
from metamask_ext.experiments.catalogue import module_of
from metamask_ext.nn import MaskedLinear
from metamask_ext.nn.context import AmbiguousTaskError

torchdiffeq = pytest.importorskip("torchdiffeq")
field = pytest.importorskip("metamask_ext.experiments.papers.neural_ode.field")
quiz = pytest.importorskip("metamask_ext.experiments.papers.neural_ode.quiz")
systems = pytest.importorskip("metamask_ext.experiments.papers.neural_ode.systems")

# The quick run is made once, so by one worker.
pytestmark = pytest.mark.xdist_group("neural-ode")

TIMES = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
RK4 = {"method": "rk4", "options": {"step_size": 0.1}}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
TASKS = ["a", "b", "a", "c", "b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("neural-ode")


@pytest.fixture(scope="module")
def metrics(folder):
    return quick_run("neural-ode", folder)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(MaskedLinear(2, 6), nn.Tanh(), MaskedLinear(6, 2)).double()
    for name in "abcd":
        add_task(made, name)
    return made


def starts() -> torch.Tensor:
    return torch.randn(len(TASKS), 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def solved(model: nn.Module, task, y0: torch.Tensor, options=RK4) -> torch.Tensor:
    made = field.TaskField(model, task)
    return torchdiffeq.odeint_adjoint(made, y0, TIMES, adjoint_params=made.adjoint_parameters(), **options)[1:].square().sum()


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def one_by_one(options=RK4) -> dict[str, torch.Tensor | None]:
    """Gradients of a solve for each trajectory, through the solver, without the adjoint method."""
    model, y0 = net(), starts()
    for place, task in enumerate(TASKS):
        with using_task(model, task):
            path = torchdiffeq.odeint(lambda t, y: model(y), y0[place : place + 1], TIMES, **options)
            path[1:].square().sum().backward()
    return gradients(model)


def same(found: dict, wanted: dict, tolerance: float) -> None:
    for name, expected in wanted.items():
        if expected is None:
            assert found[name] is None, name
        else:
            assert float((found[name] - expected).abs().max()) <= tolerance, name


def alone(options=RK4) -> dict[str, torch.Tensor | None]:
    model, y0 = net(), starts()
    for place, task in enumerate(TASKS):
        solved(model, task, y0[place : place + 1], options).backward()
    return gradients(model)


@pytest.mark.parametrize("options", [RK4, CLOSE])
def test_one_solve_is_the_sum_of_separate_ones(options):
    model = net()
    solved(model, TASKS, starts(), options).backward()
    found = gradients(model)
    same(found, alone(options), 1e-10)
    assert [name for name, gradient in found.items() if gradient is None] == [
        name for name, _ in model.named_parameters() if name.endswith(("masks.d", "masks.default"))
    ]


def test_it_is_the_gradient():
    """At a tolerance of 1e-12 the adjoint's gradient is the one through the solver."""
    model = net()
    solved(model, TASKS, starts(), CLOSE).backward()
    same(gradients(model), one_by_one(CLOSE), 1e-9)


@pytest.mark.parametrize("around", ["nothing", "another task", "a mixed batch of others"])
def test_the_backward_may_run_anywhere(around):
    """After the forward's block, or inside the block of another task: the field's own tasks count."""
    wanted, model = alone(), net()
    loss = solved(model, TASKS, starts())
    blocks = {"another task": "d", "a mixed batch of others": ["d", "c", "d", "d", "a"]}
    with using_task(model, blocks[around]) if around in blocks else nullcontext():
        loss.backward()
    same(gradients(model), wanted, 1e-10)


def test_in_another_thread():
    wanted, model = alone(), net()
    loss, failed = solved(model, TASKS, starts()), []

    def backward() -> None:
        try:
            with using_task(model, "d"):
                loss.backward()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert not failed
    same(gradients(model), wanted, 1e-10)


def test_a_block_around_the_solver_alone_is_refused():
    """By the backward it might be another one: no gradient is given."""
    model, y0 = net(), starts()
    parameters = field.TaskField(model, "a").adjoint_parameters()
    plain = field.Counted(lambda t, y: model(y))
    with using_task(model, "a"):
        loss = torchdiffeq.odeint_adjoint(plain, y0, TIMES, adjoint_params=parameters, **RK4).sum()
        with pytest.raises(AmbiguousTaskError, match="was called during a backward, where the task of its first forward"):
            loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_kernels_of_mixed_tasks_run_in_the_backward():
    model = net()
    loss = solved(model, TASKS, starts())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    ran = {event.key: event.count for event in profile.key_averages() if event.key.startswith("metamask::")}
    # Ten steps of four stages, two layers: each forward and backward once.
    assert ran["metamask::task_masked_linear"] == ran["metamask::task_masked_linear_backward"] == 80


def test_adjoint_parameters():
    model = net()
    mine = field.TaskField(model, ["b", "a", "b"]).adjoint_parameters()
    names = [name for name, parameter in model.named_parameters() if any(parameter is each for each in mine)]
    assert sorted(names) == sorted(
        f"{layer}.{name}" for layer in (0, 2) for name in ("weight", "bias", "masks.a", "masks.b", "bias_masks.a", "bias_masks.b")
    )
    model[0].weight.requires_grad_(False)
    assert len(field.TaskField(model, "a").adjoint_parameters()) == 7


def test_evaluations_are_counted():
    model = net()
    made = field.TaskField(model, TASKS)
    path = torchdiffeq.odeint_adjoint(made, starts(), TIMES, adjoint_params=made.adjoint_parameters(), **RK4)
    assert made.evaluations == 40
    path.sum().backward()
    assert made.evaluations == 80


def test_memory_by_hand():
    held = quiz._Held()
    x = torch.ones(100, dtype=torch.float64, requires_grad=True)
    # exp keeps its result for the backward, twice in a row: 1,600 bytes
    assert held.measure(lambda: x.exp().exp().sum().backward()) == 1600 and held.now == 0


def test_trajectories_solve_the_systems():
    generator = torch.Generator().manual_seed(0)
    matrices = systems.dynamics(2, generator)
    times, states = systems.trajectories(matrices, 3, generator)
    assert states.shape == (systems.POINTS, 2, 3, 2)
    slope = (states[1] - states[0]) / (times[1] - times[0])
    middle = (states[1] + states[0]) / 2
    wanted = torch.einsum("kij,knj->kni", matrices, middle**3)
    assert float((slope - wanted).norm() / wanted.norm()) < 0.2


def test_claims(metrics):
    """One does not hold, and is reported as such: three of the solvers are more than ten tolerances off."""
    answers = report.answers(module_of("neural-ode"), metrics)
    assert [text.split(":")[0] for text, holds in answers if not holds] == ["Solvers are black boxes"]
    assert len(answers) == 9 and not any("{" in text or "nan" in text.split() for text, _ in answers)


def test_written(metrics, folder):
    check_written(folder / "neural-ode", metrics, ["neural-ode.png"])


def test_killed_run_continues(metrics, folder):
    check_resumes(folder / "neural-ode", metrics, "quiz.json")
