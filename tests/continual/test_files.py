"""The training loop's files: a kill, an exception or a damaged byte at any moment loses nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support import loop_processes
from support.loops import assert_same, new_data, new_loop, new_model, state
from support.paths import TESTS
from torch import nn

from metamask_ext.continual import CheckpointError, OutputError, TaskLoop, read_metrics
from metamask_ext.files.lock import locked_run
from metamask_ext.nn import MaskedLinear


def test_killed_at_any_moment_ends_as_if_not_killed(tmp_path):
    """SIGKILL between and amid writes, then at random moments; the run that survives all of it equals one left alone."""
    command = [sys.executable, "-m", "support.loop_processes", str(tmp_path)]
    ran = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    left_alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert_same(state(killed), state(left_alone))
    assert (killed / "metrics.jsonl").read_bytes() == (left_alone / "metrics.jsonl").read_bytes()
    assert len(read_metrics(killed)) == loop_processes.ROUNDS
    assert sorted(path.name for path in killed.iterdir()) == ["checkpoint.pt", "metrics.jsonl"], "no temporary file is left"


def test_run_can_be_extended(tmp_path):
    whole = new_loop(tmp_path / "whole").run(12)
    new_loop(tmp_path / "parts").run(5)
    parts = new_loop(tmp_path / "parts").run(12)
    assert (whole.resumed, parts.resumed) == (None, 5)
    assert_same(state(tmp_path / "parts"), state(tmp_path / "whole"))
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="rounds must be at least the 12 that are done, got 11"):
        new_loop(tmp_path / "parts").run(11)


def test_metrics_lines(tmp_path):
    new_loop(tmp_path, evaluate=lambda loop: {"rounds seen": float(loop.round)}, evaluate_every=2).run(4)
    lines = read_metrics(tmp_path)
    assert [line["round"] for line in lines] == [1, 2, 3, 4] and [line["step"] for line in lines] == [2, 4, 6, 8]
    assert ["rounds seen" in line for line in lines] == [False, True, False, True]
    assert all(line["task"] in "ab" and line["loss"] > 0 for line in lines)


def test_metrics_refuse_what_json_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="score must be finite"):
        new_loop(tmp_path, evaluate=lambda loop: {"score": float("nan")}).run(1)


def test_every_damaged_byte_is_noticed(tmp_path):
    new_loop(tmp_path).run(2)
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    places = [0, 10, 30, 60, 89, 90, 91, 92, *range(100, len(whole), 97), len(whole) - 1]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="checkpoint.pt.*damaged"):
            new_loop(tmp_path).run(3)
    for length in (0, 50, 91, 200, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="checkpoint.pt.*damaged"):
            new_loop(tmp_path).run(3)
    path.write_bytes(whole)
    assert new_loop(tmp_path).run(3).resumed == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.02}, "lr was 0.01, now 0.02"),
        ({"seed": 1}, "seed was 0, now 1"),
        ({"optimizer": "adam"}, "optimizer was 'sgd', now 'adam'"),
        ({"tasks": new_data("ba")}, r"tasks was \['a', 'b'\], now \['b', 'a'\]"),
        ({"tasks": {name: (x + 1, y) for name, (x, y) in new_data("ab").items()}}, "data of task 'a' was"),
        ({"tasks": {"a": lambda generator: None, "b": new_data("b")["b"]}}, "data of task 'a' was .*, now 'a function, <lambda>'"),
        ({"loss": F.l1_loss}, "loss was 'mse_loss', now 'l1_loss'"),
        ({"loss": partial(F.mse_loss, reduction="sum"), "lr": 0.02}, "lr was"),
        ({"loss": nn.MSELoss()}, "loss was 'mse_loss', now 'MSELoss'"),
        ({"model": MaskedLinear(3, 1, temperature=0.5)}, "gate of the model was 'sigmoid, 1, 0', now 'sigmoid, 0.5, 0'"),
        ({"model": MaskedLinear(3, 1, gate="hard")}, "gate of the model was 'sigmoid, 1, 0', now 'hard, 1, 0'"),
        ({"settings": {"note": 1}}, "note was absent, now 1"),
        ({"model": MaskedLinear(3, 2)}, "shape of weight was .*1, 3.*, now .*2, 3"),
    ],
)
def test_checkpoint_of_other_settings(tmp_path, options, message):
    new_loop(tmp_path).run(2)
    arguments = {
        "model": new_model(),
        "tasks": new_data("ab"),
        "loss": F.mse_loss,
        "steps": 2,
        "lr": 0.01,
        "out": tmp_path,
        **options,
    }
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        TaskLoop(**arguments).run(3)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_model_that_does_not_fit(tmp_path):
    class WithBuffer(MaskedLinear):
        def __init__(self):
            super().__init__(3, 1)
            self.register_buffer("extra", torch.zeros(1))

    new_loop(tmp_path).run(2)
    with pytest.raises(CheckpointError, match="does not fit the checkpoint.*extra"):
        TaskLoop(WithBuffer(), new_data("ab"), F.mse_loss, steps=2, lr=0.01, out=tmp_path).run(3)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="out must be a folder that can be written, got .*file/run"):
        new_loop(tmp_path / "file" / "run").run(1)


def test_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    new_loop(tmp_path).run(2)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    loop = new_loop(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="cannot write .*No space left on device"):
        loop.run(3)
    monkeypatch.undo()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert new_loop(tmp_path).run(3).resumed == 2


class Stop(BaseException):
    """As KeyboardInterrupt is, not an Exception."""


def stopping(calls):
    """A loss that fails at its nth call, for each n of ``calls``."""
    count = 0

    def loss(x, y):
        nonlocal count
        count += 1
        if count in calls:
            raise Stop
        return F.mse_loss(x, y)

    return loss


@pytest.mark.parametrize("seconds", [0.0, 1000.0], ids=["checkpoints", "first checkpoint only"])
def test_a_loop_goes_on_after_exceptions_as_if_there_had_been_none(tmp_path, seconds):
    options = {"momentum": 0.9, "checkpoint_seconds": seconds, "evaluate": lambda loop: {"noise": float(torch.rand(()))}}
    whole = new_loop(tmp_path / "whole", loss=stopping(()), **options).run(12)
    # Two calls a round: in the first round, before any task's mask is trained; in the middle of later ones
    parts = new_loop(tmp_path / "parts", loss=stopping((2, 10, 15)), **options)
    for _ in range(3):
        with pytest.raises(Stop):
            parts.run(12)
    parts.run(12)
    assert (whole.resumed is None, parts.resumed is None) == (True, False)
    assert_same(state(tmp_path / "parts"), state(tmp_path / "whole"))
    assert_same(dict(parts.model.state_dict()), dict(whole.model.state_dict()))
    assert (tmp_path / "parts" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_a_loop_without_files_does_not_go_on_from_half_a_round():
    loop = new_loop(None, loss=stopping((4,)))
    with pytest.raises(Stop):
        loop.run(3)
    with pytest.raises(RuntimeError, match="ended an earlier run within round 2.*out=None.*make a new TaskLoop"):
        loop.run(3)
    between = new_loop(None).run(1)
    assert between.run(2).round == 2


def test_what_is_annealed_during_a_run_is_no_other_setting(tmp_path):
    def anneal(loop):
        loop.model.temperature = 1.0 / (1 + loop.round)
        return {}

    loop = new_loop(tmp_path, loss=stopping((8,)), evaluate=anneal)
    with pytest.raises(Stop):
        loop.run(6)
    assert loop.run(6).resumed == 0
    with pytest.raises(CheckpointError, match="gate of the model was"):
        arguments = {"steps": 2, "lr": 0.01, "out": tmp_path, "evaluate": anneal}
        TaskLoop(loop.model, new_data("ab"), stopping(()), **arguments).run(7)


def test_metrics_that_are_not_ours_or_not_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(OutputError, match=r"metrics\.jsonl.*without a checkpoint"):
        new_loop(tmp_path).run(1)
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"

    new_loop(tmp_path / "run").run(2)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl.*lines are missing"):
        new_loop(tmp_path / "run").run(3)
    with pytest.raises(OutputError, match="cannot read"):
        read_metrics(tmp_path / "nowhere")


def test_two_runs_in_one_folder(tmp_path):
    with locked_run(tmp_path), pytest.raises(OutputError, match="another run is writing to"):
        new_loop(tmp_path).run(1)
    assert new_loop(tmp_path).run(1).round == 1


def test_a_file_system_without_locks_and_syncs_of_folders(tmp_path, monkeypatch):
    """As Lustre and FUSE file systems are: the run works, and a second one is refused, which names the file to delete."""

    def missing(*given):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    fsync = os.fsync
    monkeypatch.setattr(fcntl, "flock", missing)
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: missing() if os.path.isdir(f"/proc/self/fd/{descriptor}") else fsync(descriptor)
    )
    whole = new_loop(tmp_path / "run", tensorboard=False).run(2)
    with locked_run(tmp_path / "run"), pytest.raises(OutputError, match="cannot lock .*lock.held' was made by process .*delete it"):
        new_loop(tmp_path / "run", tensorboard=False).run(4)
    assert whole.run(4).round == 4 and new_loop(tmp_path / "run", tensorboard=False).run(5).resumed == 4
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint.pt", "metrics.jsonl"]


def test_links_are_replaced_and_not_written_through(tmp_path):
    """A run in a folder of links to an archived one."""
    new_loop(tmp_path / "archive", tensorboard=False).run(2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "archive").iterdir()}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").symlink_to(tmp_path / "archive" / "checkpoint.pt")
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "archive" / "metrics.jsonl")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl' is a symbolic link"):
        new_loop(tmp_path / "run", tensorboard=False).run(4)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").write_bytes(before["metrics.jsonl"])
    assert new_loop(tmp_path / "run", tensorboard=False).run(4).resumed == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "archive").iterdir()} == before


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    new_loop(tmp_path / "off", tensorboard=False).run(1)
    assert not (tmp_path / "off" / "tensorboard").exists()
    new_loop(tmp_path, evaluate=lambda loop: {"score": 0.5}).run(3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("score")] == [1, 2, 3]
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("loss/")]
    losses = {event.step: event.value for tag in tags for event in events.Scalars(tag)}
    written = {line["round"]: line["loss"] for line in read_metrics(tmp_path)}
    assert losses == pytest.approx(written, rel=1e-6)  # TensorBoard stores float32


def test_progress_is_quiet_without_a_terminal(tmp_path, capfd):
    new_loop(tmp_path).run(3)
    assert capfd.readouterr() == ("", "")
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["round"] == 1


def test_progress_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    TaskLoop(new_model(), new_data("a"), F.mse_loss, steps=1, lr=0.01, label="this run").run(3)
    assert "this run" in capsys.readouterr().err
