"""Checkpoints with a right checksum and contents that no run wrote: refused as one kind of error, and nothing has changed."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.loops import assert_same, new_data, new_loop
from torch import nn

from metamask_ext.continual import CheckpointError, OutputError, TaskLoop
from metamask_ext.files.checkpoint import MAGIC, load_checkpoint
from metamask_ext.nn import MaskedLinear, TaskBatchNorm2d

OPTIMIZERS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}, "adam": {"optimizer": "adam"}}
"""Settings of loops by their optimiser."""


def forge(folder: Path, payload: bytes) -> None:
    (folder / "checkpoint.pt").write_bytes(MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)


def dumped(state: object, **options: Any) -> bytes:
    payload = io.BytesIO()
    torch.save(state, payload, **options)
    return payload.getvalue()


def snapshot(loop: TaskLoop) -> dict[str, Any]:
    """All that a refusal must not change."""
    return {
        "model": {name: tensor.clone() for name, tensor in loop.model.state_dict().items()},
        "parameters": [id(parameter) for parameter in loop.model.parameters()],
        "optimizer": repr(loop._optimizer.state_dict()),
        "masks": sorted(loop._mask_optimizers),
        "generator": loop._generator.get_state(),
        "global generator": torch.get_rng_state(),
        "numbers": [loop.round, loop.step, dict(loop.steps_of), loop.seconds, loop.resumed],
    }


def assert_refused(folder: Path, message: str = "checkpoint", **options: Any) -> None:
    loop = new_loop(folder, **options)
    before, metrics = snapshot(loop), (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=message) as refused:
        loop.run(6)
    assert "\n" not in str(refused.value)
    assert_same(snapshot(loop), before)
    assert (folder / "metrics.jsonl").read_bytes() == metrics


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


PAYLOADS = {
    "pickle": pickle.dumps(Evil(), 2),
    "empty": b"",
    "garbage": bytes(range(256)),
    "zip": b"PK\x03\x04" + bytes(100),
    "code": dumped(Evil()),
    "old format": dumped(Evil(), _use_new_zipfile_serialization=False),
    "list": dumped([1]),
    "numbers as keys": dumped({1: 2}),
    "tensor": dumped(torch.ones(2)),
    "nothing": dumped({}),
}


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_payloads_of_no_run(tmp_path, monkeypatch, payload):
    monkeypatch.chdir(tmp_path)
    new_loop(tmp_path).run(1)
    forge(tmp_path, payload)
    assert_refused(tmp_path, "checkpoint.pt")
    assert not (tmp_path / "pwned").exists()


def ring() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


def each(change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda given: {key: change(value) for key, value in given.items()}


def of_state(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Change the buffers of an optimiser's first parameter, not its step."""

    def changed(given: dict[str, Any]) -> dict[str, Any]:
        entries = given["state"][0]
        return {**given, "state": {0: {key: value if key == "step" else change(value) for key, value in entries.items()}}}

    return changed


CHANGES: dict[str, dict[str, Any]] = {
    "round": {
        "is none": None,
        "a string": "x",
        "negative": -3,
        "a bool": True,
        "huge": 2**80,
        "one more": lambda n: n + 1,
        "a float": 4.0,
    },
    "step": {"negative": -1, "one less": lambda n: n - 1, "a list": []},
    "steps_of": {
        "a list": ["a"],
        "unknown": {"zz": 8},
        "negative": lambda steps: {**steps, "a": -2},
        "too many": {"a": 80},
        "empty": {},
    },
    "seconds": {"a string": "x", "negative": -1.0, "nan": float("nan"), "infinite": float("inf"), "none": None},
    "metrics_length": {"negative": -1, "a string": "x", "huge": 2**70, "too long": lambda n: n + 1},
    "metrics_sha256": {"another": "0" * 64, "a number": 3},
    "products": {"a number": 3, "a list": ["0" * 16], "ring": ring()},
    "generator": {
        "short": torch.zeros(3, dtype=torch.uint8),
        "floats": torch.zeros(5056),
        "none": None,
        "zeros": torch.zeros(5056, dtype=torch.uint8),
    },
    "tasks": {
        "a string": "ab",
        "none": [],
        "more": ["a", "b", "zz"],
        "less": ["a"],
        "twice": ["a", "b", "b"],
        "numbers": [1, 2],
        "empty": ["a", ""],
    },
    "settings": {"a list": [], "none": None, "ring": lambda given: {**given, "note": ring()}, "less": {}},
    "model": {
        "empty": {},
        "a list": [],
        "other": {"x": torch.ones(2)},
        "more": lambda given: {**given, "x": torch.ones(2)},
        "shapes": each(lambda tensor: tensor[..., :1].repeat(*[1] * (tensor.dim() - 1), 5)),
        "dtypes": each(torch.Tensor.double),
        "sparse": each(torch.Tensor.to_sparse),
        "numbers": each(lambda tensor: 3.0),
        "meta": each(lambda tensor: tensor.to("meta")),
        "overlapping": lambda given: {**given, "masks.a": given["masks.a"][:1, :1].expand_as(given["masks.a"])},
        "nan": each(lambda tensor: tensor * float("nan")),
        "nan in one mask": lambda given: {**given, "masks.a": given["masks.a"].clone().fill_(float("nan"))},
        "endless": each(lambda tensor: torch.zeros(1).expand(2**40)),
        "numbers as keys": lambda given: {**given, 1: torch.ones(1)},
    },
    "optimizer": {
        "empty": {},
        "none": None,
        "no groups": {"state": {}, "param_groups": []},
        "another rate": lambda given: {**given, "param_groups": [{**given["param_groups"][0], "lr": 1e9}]},
        "maximising": lambda given: {**given, "param_groups": [{**given["param_groups"][0], "maximize": True}]},
        "a tensor as rate": lambda given: {**given, "param_groups": [{**given["param_groups"][0], "lr": torch.ones(3)}]},
        "other parameters": lambda given: {**given, "param_groups": [{**given["param_groups"][0], "params": [0, 9]}]},
        "state of none": lambda given: {**given, "state": {7: given["state"][0]}},
        "state by name": lambda given: {**given, "state": {"0": given["state"][0]}},
        "no buffers": lambda given: {**given, "state": {0: {}}},
        "numbers": lambda given: {**given, "state": {0: dict.fromkeys(given["state"][0], 1.0)}},
        "shapes": lambda given: {**given, "state": {0: dict.fromkeys(given["state"][0], torch.ones(7))}},
        "more": lambda given: {**given, "state": {0: {**given["state"][0], "x": torch.ones(1)}}},
        "meta": of_state(lambda tensor: tensor.to("meta")),
        "sparse": of_state(torch.Tensor.to_sparse),
        "overlapping": of_state(lambda tensor: tensor.flatten()[:1].expand(tensor.shape)),
        "nan": of_state(lambda tensor: tensor * float("nan")),
        "infinite": of_state(lambda tensor: tensor + float("inf")),
    },
    "mask_optimizers": {
        "empty": {},
        "unknown task": {"zz": {}},
        "a list": [],
        "empty states": each(lambda given: {}),
        "another rate": each(lambda given: {**given, "param_groups": [{**given["param_groups"][0], "lr": 1e9}]}),
        "shapes": each(lambda given: {**given, "state": {0: dict.fromkeys(given["state"][0], torch.ones(7))}}),
    },
}


@pytest.fixture(scope="module", params=OPTIMIZERS)
def whole(request, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A folder with a checkpoint, and the loop's options."""
    folder = tmp_path_factory.mktemp(request.param)
    new_loop(folder, **OPTIMIZERS[request.param]).run(4)
    return folder, OPTIMIZERS[request.param]


@pytest.mark.parametrize("key", CHANGES)
def test_forged_entries(whole, key):
    folder, options = whole
    path = folder / "checkpoint.pt"
    data = path.read_bytes()
    state = load_checkpoint(path)
    assert set(CHANGES) == set(state)
    try:
        forge(folder, dumped({name: value for name, value in state.items() if name != key}))
        if key not in ("metrics_sha256", "products"):  # earlier versions wrote none
            assert_refused(folder, "lacks|cannot be", **options)
        for name, change in CHANGES[key].items():
            value = change(state[key]) if callable(change) else change
            forge(folder, dumped({**state, key: value}))
            try:
                assert_refused(folder, **options)
            except pytest.fail.Exception:
                pytest.fail(f"{key}, {name}: accepted")
    finally:
        path.write_bytes(data)


def test_steps_of_adam_that_cannot_be(tmp_path):
    new_loop(tmp_path, optimizer="adam").run(4)
    for step in (float("nan"), -1.0, float("inf")):
        state = load_checkpoint(tmp_path / "checkpoint.pt")
        state["optimizer"]["state"][0]["step"] = torch.tensor(step)
        forge(tmp_path, dumped(state))
        assert_refused(tmp_path, "step must be a number of steps", optimizer="adam")


def test_squares_of_adam_that_are_negative(tmp_path):
    new_loop(tmp_path, optimizer="adam").run(4)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    state["optimizer"]["state"][0]["exp_avg_sq"].sub_(1e3)
    forge(tmp_path, dumped(state))
    assert_refused(tmp_path, "exp_avg_sq must hold finite numbers, at least 0", optimizer="adam")


def test_nan_in_what_is_not_trained_is_taken_over(tmp_path):
    """A mask of a task that the loop has not, and a frozen parameter."""

    def loop() -> TaskLoop:
        torch.manual_seed(1)
        model = nn.Sequential(MaskedLinear(3, 1), nn.Linear(1, 1))
        model[1].bias.requires_grad_(False)
        model[0].masks["old"] = torch.full((1, 3), float("nan"))
        model[0].bias_masks["old"] = torch.zeros(1)
        model.register_parameter("unused", nn.Parameter(torch.full((2,), float("nan")), requires_grad=False))
        return TaskLoop(model, new_data("ab"), F.mse_loss, steps=2, lr=0.01, out=tmp_path, tensorboard=False)

    loop().run(2)
    assert loop().run(4).resumed == 2


def test_a_checkpoint_without_the_checksum_of_its_metrics(tmp_path):
    """As earlier versions wrote them."""
    new_loop(tmp_path / "whole").run(6)
    new_loop(tmp_path / "old").run(4)
    state = load_checkpoint(tmp_path / "old" / "checkpoint.pt")
    del state["metrics_sha256"]
    forge(tmp_path / "old", dumped(state))
    new_loop(tmp_path / "old").run(6)
    states = [load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "old")]
    assert_same(states[1], states[0])


def test_metrics_that_were_changed(tmp_path):
    new_loop(tmp_path).run(4)
    metrics = tmp_path / "metrics.jsonl"
    data = metrics.read_bytes()
    for changed in (data[:-3], data.replace(b"1", b"2", 1), bytes(len(data))):
        metrics.write_bytes(changed)
        assert_refused(tmp_path, r"metrics\.jsonl")
    metrics.unlink()
    metrics.symlink_to("/dev/null")
    with pytest.raises(OutputError, match=r"metrics\.jsonl"):
        new_loop(tmp_path).run(6)
    metrics.unlink()
    metrics.write_bytes(data)
    assert new_loop(tmp_path).run(6).resumed == 4


def test_rounds_that_are_done_change_nothing(tmp_path):
    new_loop(tmp_path).run(4)
    loop = new_loop(tmp_path)
    before = snapshot(loop)
    with pytest.raises(CheckpointError, match="rounds must be at least the 4 that are done, got 3"):
        loop.run(3)
    assert_same(snapshot(loop), before)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(MaskedLinear(3, 4), nn.Unflatten(1, (4, 1, 1)), TaskBatchNorm2d(4), nn.Flatten(), MaskedLinear(4, 1))


@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("masked", ["per task", "one", "none"])
def test_what_a_run_wrote_is_taken_over(tmp_path, options, masked):
    """Statistics per task, one mask for all tasks, no masks: nothing of a real run is refused."""

    def loop() -> TaskLoop:
        torch.manual_seed(1)
        model = nn.Linear(3, 1) if masked == "none" else net()
        arguments = {"steps": 2, "lr": 0.01, "per_task_masks": masked == "per task", "tensorboard": False, **options}
        return TaskLoop(model, new_data("abc"), F.mse_loss, out=tmp_path, **arguments)

    for rounds in (1, 3, 8):
        assert loop().run(rounds).resumed == {1: None, 3: 1, 8: 3}[rounds]


def test_bits_of_other_tasks_are_taken_over(tmp_path):
    def loop() -> TaskLoop:
        torch.manual_seed(1)
        model = MaskedLinear(3, 1)
        model.masks["old"] = torch.zeros(1, 1, dtype=torch.uint8)
        model.bias_masks["old"] = torch.ones(1, dtype=torch.uint8)
        return TaskLoop(model, new_data("ab"), F.mse_loss, steps=2, lr=0.01, out=tmp_path, tensorboard=False)

    loop().run(2)
    again = loop().run(4)
    assert again.resumed == 2 and int(again.model.bias_masks["old"]) == 1


def test_a_disk_that_fails_for_good(tmp_path, monkeypatch):
    """Every call from the nth on: the first error is the one that is raised, in the library's words."""
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "replace", "unlink", "close")}
    calls = 0

    def failing(name: str) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= nth:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real[name](*given, **options)

        return call

    for nth in range(1, 200):
        calls = 0
        loop = new_loop(tmp_path / str(nth), checkpoint_seconds=0.0, tensorboard=False)
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, failing(name))
            try:
                loop.run(2)
            except OutputError as error:
                assert "Input/output error" in str(error)
            else:
                break
        assert new_loop(tmp_path / str(nth), tensorboard=False).run(2).round == 2
    assert nth > 20


def test_checkpoints_while_another_thread_adds_tasks(tmp_path):
    loop = new_loop(tmp_path, checkpoint_seconds=0.0, tensorboard=False)
    stop = threading.Event()

    def add_and_remove() -> None:
        from metamask_ext import add_task, remove_task

        while not stop.is_set():
            add_task(loop.model, "other")
            remove_task(loop.model, "other")

    thread = threading.Thread(target=add_and_remove)
    thread.start()
    try:
        loop.run(20)
    finally:
        stop.set()
        thread.join()
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert {key.rpartition(".")[2] for key in state["model"] if "masks" in key} == set(state["tasks"])
