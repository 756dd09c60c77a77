"""The training loop: what it trains, that it can be repeated, and that a kill at any moment loses nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metamask_ext import add_task
from metamask_ext import tasks as model_tasks
from metamask_ext.continual import CheckpointError, OutputError, TaskLoop, read_metrics
from metamask_ext.continual.files import load_checkpoint, locked
from metamask_ext.nn import MaskedLinear

# Also the program of the processes that are killed: SIGKILL can be aimed at the n-th call of a function that writes.
PROGRAM = """
import os, signal, sys
import torch, torch.nn.functional as F
from torch import nn
from metamask_ext.continual import TaskLoop, files
from metamask_ext.nn import MaskedLinear

out, rounds, victim, nth = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(MaskedLinear(3, 16), nn.Dropout(0.2), MaskedLinear(16, 1))
generator = torch.Generator().manual_seed(1)
tasks = {f"t.{k}": (torch.randn(32, 3, generator=generator), torch.randn(32, 1, generator=generator)) for k in range(4)}

calls = 0
def deadly(function, before):
    def call(*arguments):
        global calls
        calls += 1
        if before and calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments)
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
if victim == "fsync":
    os.fsync = deadly(os.fsync, False)
elif victim == "replace-before":
    os.replace = deadly(os.replace, True)
elif victim == "replace-after":
    os.replace = deadly(os.replace, False)
elif victim == "write":  # half of a checkpoint is in the temporary file
    whole = files.write_atomic
    def half(path, *parts):
        global calls
        calls += 1
        if calls == nth:
            with open(path.with_name(path.name + ".tmp"), "wb") as file:
                file.write(b"".join(parts)[:200])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        whole(path, *parts)
    files.write_atomic = half

loop = TaskLoop(
    model, tasks, F.mse_loss, steps=3, lr=0.02, mask_lr=0.1, momentum=0.9, weight_decay=1e-3, batch_size=8, seed=5, out=out,
    evaluate=lambda loop: {"seen": float(len(loop.steps_of)), "noise": float(torch.rand(()))}, evaluate_every=3,
    checkpoint_seconds=0.0,
)
print("ready", flush=True)
loop.run(rounds)
print(loop.resumed, flush=True)
"""


def _program(out: Path, rounds: int, victim: str = "-", nth: int = 0) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(out), str(rounds), victim, str(nth)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _state(out: Path) -> dict:
    return load_checkpoint(out / "checkpoint.pt")


def _assert_same(a: object, b: object, path: str = "state") -> None:
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            if key != "seconds":
                _assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for index, (left, right) in enumerate(zip(a, b)):
            _assert_same(left, right, f"{path}[{index}]")
    else:
        assert a == b, path


def test_killed_at_any_moment_ends_as_if_not_killed(tmp_path):
    """SIGKILL between and amid writes, then at random moments; the run that survives all of it equals one left alone."""
    rounds = 300
    left_alone, killed = tmp_path / "alone", tmp_path / "killed"
    process = _program(left_alone, rounds)
    assert process.communicate(timeout=300)[0].split()[-1] == "None" and process.returncode == 0

    # Calls of fsync: of a temporary file, of its folder, of the metrics; in this order after the first checkpoint: metrics first.
    fsyncs = [("fsync", 7), ("fsync", 8), ("fsync", 9)]
    for victim, nth in (("write", 1), ("write", 9), *fsyncs, ("replace-before", 9), ("replace-after", 9)):
        process = _program(killed, rounds, victim, nth)
        process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, victim
    reached = _state(killed)["round"]
    assert 0 < reached < rounds, "the kills hit a run in progress"

    chance = random.Random(0)
    for _ in range(3):
        process = _program(killed, rounds)
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0.02, 0.2))
        process.kill()
        process.communicate(timeout=300)
    process = _program(killed, rounds)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert int(output.split()[-1]) >= reached

    _assert_same(_state(killed), _state(left_alone))
    assert (killed / "metrics.jsonl").read_bytes() == (left_alone / "metrics.jsonl").read_bytes()
    assert len(read_metrics(killed)) == rounds
    assert sorted(path.name for path in killed.iterdir()) == ["checkpoint.pt", "metrics.jsonl"], "no temporary file is left"


def _data(names: str, rows: int = 16) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return {name: (torch.randn(rows, 3, generator=generator), torch.randn(rows, 1, generator=generator)) for name in names}


def _model() -> MaskedLinear:
    torch.manual_seed(2)
    return MaskedLinear(3, 1)


def _parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_round_by_hand():
    """One task, plain gradient descent: ``W -= lr * (dL/dW + decay * W)`` and likewise for the mask, twice."""
    x, y = _data("a")["a"]
    model = _model()
    options = {"steps": 1, "lr": 0.05, "mask_lr": 0.3, "weight_decay": 0.1, "mask_weight_decay": 0.2, "seed": 4}
    loop = TaskLoop(model, {"a": (x, y)}, F.mse_loss, **options)
    loop._mask_of("a")  # makes the mask, so that its start can be read
    w, b = model.weight.detach().clone(), model.bias.detach().clone()
    m, mb = model.masks["a"].detach().clone(), model.bias_masks["a"].detach().clone()
    for _ in range(2):
        leaves = [tensor.requires_grad_() for tensor in (w, b, m, mb)]
        loss = F.mse_loss(x @ (w * torch.sigmoid(m)).T + b * torch.sigmoid(mb), y)
        grads = torch.autograd.grad(loss, leaves)
        rates, decays = (0.05, 0.05, 0.3, 0.3), (0.1, 0.1, 0.2, 0.2)
        w, b, m, mb = (
            (leaf - rate * (grad + decay * leaf)).detach() for leaf, grad, rate, decay in zip(leaves, grads, rates, decays)
        )
    loop.run(2)
    for got, wanted in zip((model.weight, model.bias, model.masks["a"], model.bias_masks["a"]), (w, b, m, mb)):
        # float32, two steps of numbers near 1: a few units in the last place
        torch.testing.assert_close(got.detach(), wanted, rtol=1e-5, atol=1e-6)


def test_default_gives_way_to_the_first_task():
    model = _model()
    loop = TaskLoop(model, _data("abc"), F.mse_loss, steps=1, lr=0.01)
    loop.run(1)
    assert model_tasks(model) == list(loop.steps_of) and "default" not in loop.steps_of
    loop.run(40)
    assert model_tasks(model) == list(loop.steps_of) and set(loop.steps_of) == set("abc")
    assert sum(loop.steps_of.values()) == loop.step == 40


def test_existing_masks_of_named_tasks_are_kept():
    model = _model()
    add_task(model, "finished")
    before = _parameters(model)
    TaskLoop(model, {"default": _data("a")["a"]}, F.mse_loss, steps=2, lr=0.01, mask_weight_decay=0.5).run(3)
    assert model_tasks(model) == ["default", "finished"]
    after = _parameters(model)
    assert torch.equal(before["masks.finished"], after["masks.finished"])
    assert not torch.equal(before["masks.default"], after["masks.default"])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_only_the_drawn_task_moves(optimizer):
    """Neither decay nor momentum moves the masks of another task, and they never have a gradient."""
    model = _model()
    momentum = 0.9 if optimizer == "sgd" else 0.0
    loop = TaskLoop(
        model, _data("abcd"), F.mse_loss, steps=2, lr=0.01, mask_weight_decay=0.1, optimizer=optimizer, momentum=momentum
    )
    moved = set()
    for number in range(1, 31):
        before, counts = _parameters(model), dict(loop.steps_of)
        loop.run(number)
        (drawn,) = [name for name in loop.steps_of if loop.steps_of[name] != counts.get(name, 0)]
        moved.add(drawn)
        assert set(loop._mask_optimizers) == set(loop.steps_of), "a task that was not drawn has no optimiser state"
        for name, value in _parameters(model).items():
            if name in before and name not in ("weight", "bias"):
                assert torch.equal(value, before[name]) != name.endswith(f".{drawn}"), name
        assert not torch.equal(model.weight, before["weight"])
        assert all(parameter.grad is None for parameter in model.parameters())
    assert moved == set("abcd")


def test_tasks_are_drawn_uniformly():
    names = "abcde"
    loop = TaskLoop(_model(), _data(names, rows=1), F.mse_loss, steps=1, lr=1e-4, seed=1).run(1000)
    # Binomial(1000, 1/5): standard deviation 12.6; five of them
    assert all(abs(loop.steps_of[name] - 200) < 64 for name in names), loop.steps_of


def test_seed_decides_and_the_global_generator_does_not():
    def train(seed: int, global_seed: int) -> dict[str, torch.Tensor]:
        model = _model()
        torch.manual_seed(global_seed)
        TaskLoop(model, _data("abc"), F.mse_loss, steps=2, lr=0.01, batch_size=4, seed=seed).run(10)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(global_seed))), "given back"
        return _parameters(model)

    first, again, other = train(0, 1), train(0, 2), train(1, 1)
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["weight"], other["weight"])


def test_one_network_for_all_tasks():
    """The baseline: no masks, or one task's masks for everything; both see the draws of the masked loop."""
    plain, single, masked = nn.Linear(3, 1), _model(), _model()
    loops = [
        TaskLoop(plain, _data("abc"), F.mse_loss, steps=1, lr=0.01, per_task_masks=False),
        TaskLoop(single, _data("abc"), F.mse_loss, steps=1, lr=0.01, per_task_masks=False),
        TaskLoop(masked, _data("abc"), F.mse_loss, steps=1, lr=0.01),
    ]
    before = _parameters(single)
    for loop in loops:
        loop.run(12)
    assert loops[0].steps_of == loops[1].steps_of == loops[2].steps_of
    assert model_tasks(single) == ["default"]
    assert all(not torch.equal(value, before[name]) for name, value in _parameters(single).items())
    with loops[0].using("a"):
        assert plain(torch.ones(3)).shape == (1,)


def test_data_from_a_function():
    seen = []

    def draw(generator):
        x = torch.randn(4, 3, generator=generator)
        seen.append(x)
        return x, x.sum(1, keepdim=True)

    TaskLoop(_model(), {"sum": draw}, F.mse_loss, steps=3, lr=0.01, seed=8).run(2)
    assert len(seen) == 6 and not torch.equal(seen[0], seen[1])


def test_using_refuses_a_task_that_was_not_seen():
    loop = TaskLoop(_model(), _data("ab"), F.mse_loss, steps=1, lr=0.01, seed=0).run(1)
    (unseen,) = set("ab") - set(loop.steps_of)
    with pytest.raises(ValueError, match=f"got '{unseen}'"), loop.using(unseen):
        pass
    with pytest.raises(ValueError, match="one of the loop's.*got 'z'"):
        loop.using("z")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be 'sgd' or 'adam', got 'lion'"),
        ({"optimizer": "adam", "momentum": 0.9}, "momentum=0.9 with optimizer='adam'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"tensorboard": True}, "tensorboard=True needs out"),
        ({"tasks": {}}, "tasks must name at least one task"),
        ({"tasks": {"a": (torch.ones(2, 3), torch.ones(3, 1))}}, r"tasks\['a'\] must have as many x as y"),
        ({"tasks": {"a": lambda generator: None}, "batch_size": 2}, "batch_size must be None for task 'a'"),
        ({"model": nn.Linear(3, 1)}, "has no masked layer"),
    ],
)
def test_wrong_arguments(options, message):
    arguments = {"model": _model(), "tasks": _data("a"), "loss": F.mse_loss, **options}
    with pytest.raises(ValueError, match=message):
        TaskLoop(**arguments)


def test_wrong_types():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        TaskLoop("model", _data("a"), F.mse_loss)
    with pytest.raises(TypeError, match=r"tasks\['a'\] must be a pair of tensors or a function of a generator, got list"):
        TaskLoop(_model(), {"a": [1, 2]}, F.mse_loss)


def test_per_task_masks_off_refuses_several_tasks():
    model = _model()
    add_task(model, "second")
    with pytest.raises(ValueError, match="takes a model with one task at most, got one with 2"):
        TaskLoop(model, _data("a"), F.mse_loss, per_task_masks=False)


def test_divergence_is_an_error():
    with pytest.raises(FloatingPointError, match=r"task 'a', is (inf|nan).*lr=1e\+20"):
        TaskLoop(_model(), _data("a"), F.mse_loss, steps=5, lr=1e20).run(20)


# Files


def _loop(out: Path, **options) -> TaskLoop:
    return TaskLoop(_model(), **{"tasks": _data("ab"), "loss": F.mse_loss, "steps": 2, "lr": 0.01, "out": out, **options})


def test_run_can_be_extended(tmp_path):
    whole = _loop(tmp_path / "whole").run(12)
    _loop(tmp_path / "parts").run(5)
    parts = _loop(tmp_path / "parts").run(12)
    assert (whole.resumed, parts.resumed) == (None, 5)
    _assert_same(_state(tmp_path / "parts"), _state(tmp_path / "whole"))
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="rounds must be at least the 12 that are done, got 11"):
        _loop(tmp_path / "parts").run(11)


def test_metrics_lines(tmp_path):
    _loop(tmp_path, evaluate=lambda loop: {"rounds seen": float(loop.round)}, evaluate_every=2).run(4)
    lines = read_metrics(tmp_path)
    assert [line["round"] for line in lines] == [1, 2, 3, 4] and [line["step"] for line in lines] == [2, 4, 6, 8]
    assert ["rounds seen" in line for line in lines] == [False, True, False, True]
    assert all(line["task"] in "ab" and line["loss"] > 0 for line in lines)


def test_metrics_refuse_what_json_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="score must be finite"):
        _loop(tmp_path, evaluate=lambda loop: {"score": float("nan")}).run(1)


def test_every_damaged_byte_is_noticed(tmp_path):
    _loop(tmp_path).run(2)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    places = [0, 10, 30, 60, 89, 90, 91, 92, *range(100, len(whole), 97), len(whole) - 1]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="checkpoint.pt.*damaged"):
            _loop(tmp_path).run(3)
    for length in (0, 50, 91, 200, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="checkpoint.pt.*damaged"):
            _loop(tmp_path).run(3)
    path.write_bytes(whole)
    assert _loop(tmp_path).run(3).resumed == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.02}, "lr was 0.01, now 0.02"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"optimizer": "adam"}, "optimizer was 'sgd', now 'adam'"),
        ({"tasks": _data("ba")}, r"tasks was \['a', 'b'\], now \['b', 'a'\]"),
        ({"tasks": {name: (x + 1, y) for name, (x, y) in _data("ab").items()}}, "data of task 'a' was"),
        ({"settings": {"note": 1}}, "note was absent, now 1"),
        ({"model": MaskedLinear(3, 2)}, "shape of weight was .*1, 3.*, now .*2, 3"),
    ],
)
def test_checkpoint_of_other_settings(tmp_path, options, message):
    _loop(tmp_path).run(2)
    arguments = {"model": _model(), "tasks": _data("ab"), "loss": F.mse_loss, "steps": 2, "lr": 0.01, "out": tmp_path, **options}
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        TaskLoop(**arguments).run(3)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_model_that_does_not_fit(tmp_path):
    class WithBuffer(MaskedLinear):
        def __init__(self):
            super().__init__(3, 1)
            self.register_buffer("extra", torch.zeros(1))

    _loop(tmp_path).run(2)
    with pytest.raises(CheckpointError, match="does not fit the checkpoint.*extra"):
        TaskLoop(WithBuffer(), _data("ab"), F.mse_loss, steps=2, lr=0.01, out=tmp_path).run(3)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="out must be a folder that can be written, got .*file/run"):
        _loop(tmp_path / "file" / "run").run(1)


def test_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    _loop(tmp_path).run(2)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    loop = _loop(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="cannot write .*No space left on device"):
        loop.run(3)
    monkeypatch.undo()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert _loop(tmp_path).run(3).resumed == 2


def test_metrics_that_are_not_ours_or_not_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(OutputError, match=r"metrics\.jsonl.*without a checkpoint"):
        _loop(tmp_path).run(1)
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"

    _loop(tmp_path / "run").run(2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl.*lines are missing"):
        _loop(tmp_path / "run").run(3)
    with pytest.raises(OutputError, match="cannot read"):
        read_metrics(tmp_path / "nowhere")


def test_two_runs_in_one_folder(tmp_path):
    with locked(tmp_path), pytest.raises(OutputError, match="another run is writing to"):
        _loop(tmp_path).run(1)
    assert _loop(tmp_path).run(1).round == 1


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _loop(tmp_path, tensorboard=True, evaluate=lambda loop: {"score": 0.5}).run(3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("score")] == [1, 2, 3]
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("loss/")]
    losses = {event.step: event.value for tag in tags for event in events.Scalars(tag)}
    written = {line["round"]: line["loss"] for line in read_metrics(tmp_path)}
    assert losses == pytest.approx(written, rel=1e-6)  # TensorBoard stores float32


def test_progress_is_quiet_without_a_terminal(tmp_path, capfd):
    _loop(tmp_path).run(3)
    assert capfd.readouterr() == ("", "")
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["round"] == 1


def test_progress_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    TaskLoop(_model(), _data("a"), F.mse_loss, steps=1, lr=0.01, label="this run").run(3)
    assert "this run" in capsys.readouterr().err
