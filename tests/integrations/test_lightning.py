"""MetamaskCallback: the right task around each batch, cooled gates, pictures; ``make test-engines`` has Lightning."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest
import torch
from support.paths import ROOT, TESTS

pytest.importorskip("metamask_ext.integrations.lightning", reason="make test-engines has Lightning", exc_type=ImportError)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from support.lightning_models import Automatic, Manual, by_hand, loader, trainer

import metamask_ext as mm
from metamask_ext.integrations.lightning import MetamaskCallback
from metamask_ext.nn.context import AmbiguousTaskError


def _same(model, expected):
    states = model.state_dict(), expected.state_dict()
    assert [*states[0]] == [*states[1]]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=1e-12, msg=name)


def _closed(model):
    with pytest.raises(AmbiguousTaskError):
        model(torch.randn(1, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("tasks", "every", "chosen"),
    [
        ({0: "a", 1: "default"}, "epoch", ["a"] * 4 + ["default"] * 8),
        (["a", "b"], "epoch", ["a"] * 4 + ["b"] * 4 + ["a"] * 4),
        (["a", "b", "b"], "step", ["a", "b", "b"] * 4),
        (lambda number: ["default", "default", "b", "a"][number % 4], "step", ["default", "default", "b", "a"] * 3),
    ],
)
@pytest.mark.parametrize("kind", [Automatic, Manual])
def test_schedules_equal_a_loop_by_hand(tmp_path, kind, tasks, every, chosen):
    module, callback = kind(), MetamaskCallback(tasks, every=every)
    added = [name for name in callback.schedule.names if name != "default"] or ["a", "b"]
    torch.manual_seed(0)
    if callable(tasks):
        for name in added:
            mm.add_task(module, name)
    trainer(tmp_path, max_epochs=3, callbacks=[callback]).fit(module, loader())
    _same(module.net, by_hand(chosen, added))
    _closed(module.net)


def test_accumulation(tmp_path):
    """The tasks of one step of the optimiser may differ."""
    module = Automatic()
    torch.manual_seed(0)
    callback = MetamaskCallback(["a", "b"], every="step")
    trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=[callback]).fit(module, loader())
    _same(module.net, by_hand(["a", "b"] * 4, ["a", "b"], accumulate=2))


def test_resumed_fit_goes_on(tmp_path):
    """The checkpoint has the masks; the schedule goes on where it was."""
    tasks = {0: "a", 1: "default", 3: "b"}
    first = Automatic()
    torch.manual_seed(0)
    kept = ModelCheckpoint(tmp_path / "kept", save_last=True)
    trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[MetamaskCallback(tasks), kept]).fit(first, loader())
    resumed = Automatic()
    torch.manual_seed(1)
    second = trainer(tmp_path, max_epochs=4, callbacks=[MetamaskCallback(tasks)])
    second.fit(resumed, loader(), ckpt_path=tmp_path / "kept" / "last.ckpt", weights_only=False)
    _same(resumed.net, by_hand(["a"] * 4 + ["default"] * 8 + ["b"] * 4, ["a", "b"]))


class Temperatures(Callback):
    def __init__(self):
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *more):
        self.seen.append(pl_module.net[0].temperature)


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 12, "max_epochs": -1}])
def test_annealing(tmp_path, limit):
    module, seen = Automatic(), Temperatures()
    trainer(tmp_path, callbacks=[MetamaskCallback("a", temperature=(1.0, 0.01)), seen], **limit).fit(module, loader())
    assert seen.seen == pytest.approx([0.01 ** (step / 11) for step in range(12)])
    assert module.net[2].temperature == pytest.approx(0.01)


def test_what_is_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [TensorBoardLogger(tmp_path / "tensorboard"), CSVLogger(tmp_path / "csv")]
    loggers.append(WandbLogger(save_dir=tmp_path, offline=True, project="metamask"))
    callback = MetamaskCallback(["a", "b"], temperature=(1.0, 0.1), histograms=2, overlap=1)
    trainer(tmp_path, max_epochs=2, logger=loggers, log_every_n_steps=1, callbacks=[callback]).fit(Automatic(), loader())
    loggers[2].experiment.finish()
    events = EventAccumulator(loggers[0].log_dir, size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    names = {f"{layer}/{task}" for layer in ("net.0", "net.2") for task in ("default", "a", "b")}
    assert set(events.Tags()["histograms"]) == {f"gates/{name}" for name in names}
    assert [each.step for each in events.Histograms("gates/net.0/a")] == [8]
    pictures = events.Images("overlap")
    assert [each.step for each in pictures] == [4, 8] and pictures[0].width > 200
    assert {"temperature", "overlap", *(f"open/{name}" for name in names)} <= set(events.Tags()["scalars"])
    loggers[1].save()
    with open(f"{loggers[1].log_dir}/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["overlap"]) for row in rows if row["overlap"]] and "open/net.0/a" in rows[0]
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb")) and list(
        (tmp_path / "wandb").glob("offline-run-*/files/media/images/*.png")
    )


def test_tasks_of_evaluation(tmp_path):
    module = Automatic()
    callback = MetamaskCallback(["a", "b"], evaluate=["b", "a"])
    fitted = trainer(tmp_path, max_epochs=2, callbacks=[callback])
    fitted.fit(module, loader(), [loader(), loader()])
    for number, task in enumerate(["b", "a"]):
        with torch.no_grad(), mm.using_task(module, task):
            assert float(fitted.callback_metrics[f"of-{number}"]) == pytest.approx(float(module.loss(next(iter(loader(16))))))
    with pytest.raises(ValueError, match="evaluate must name a task for each dataloader, got 2 for 3"):
        trainer(tmp_path, callbacks=[callback]).validate(module, [loader(), loader(), loader()], verbose=False)
    _closed(module.net)
    with pytest.raises(AmbiguousTaskError):  # Nobody says which.
        trainer(tmp_path, callbacks=[MetamaskCallback(["a", "b"])]).validate(module, loader(), verbose=False)


@pytest.mark.parametrize("kind", [FloatingPointError, AmbiguousTaskError])
def test_no_block_is_left_open_by_an_error(tmp_path, kind):
    module = Automatic(fails_at=3)
    callback = MetamaskCallback(["a", "b"], every="step")
    if kind is FloatingPointError:
        with pytest.raises(FloatingPointError):
            trainer(tmp_path, max_epochs=1, callbacks=[callback]).fit(module, loader())
    else:
        mm.add_task(module, "a")
        with pytest.raises(ValueError, match="task must be one of 'default', 'a', got 'nobody'"):
            trainer(
                tmp_path, max_epochs=1, callbacks=[MetamaskCallback(lambda number: "nobody" if number else "a", every="step")]
            ).fit(module, loader())
    _closed(module.net)


class Skipping(Automatic):
    """Ends each epoch at its second batch, in which nothing is computed."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 1 else None


def test_skipped_batch_leaves_no_block_open(tmp_path):
    module = Skipping()
    trainer(tmp_path, max_epochs=2, callbacks=[MetamaskCallback(["a", "b"], evaluate=["a"])]).fit(module, loader(), loader())
    assert module.steps == 2
    _closed(module.net)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": []}, ValueError, "tasks must name at least one task"),
        ({"tasks": "a", "every": "batch"}, ValueError, "every must be one of epoch, step"),
        ({"evaluate": "a"}, TypeError, "evaluate must be a sequence of names"),
        ({"temperature": (1.0, 0.0)}, ValueError, "temperature must be positive"),
        ({"histograms": 0}, ValueError, "histograms must be a number of epochs of at least 1, got 0"),
        ({"overlap": True}, ValueError, "overlap must be a number of epochs of at least 1, got True"),
    ],
)
def test_refused_arguments(options, error, message):
    with pytest.raises(error, match=message):
        MetamaskCallback(**options)


def test_refused_fits(tmp_path):
    """Before a parameter moves."""
    module = Automatic()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="a training without an end: set max_epochs or max_steps"):
        trainer(tmp_path, max_epochs=-1, callbacks=[MetamaskCallback(temperature=(1.0, 0.1))]).fit(module, loader())
    for layer in (module.net[0], module.net[2]):
        layer.gate = "hard"
    with pytest.raises(ValueError, match="no masked layer of the model has a sigmoid gate"):
        trainer(tmp_path, max_epochs=1, callbacks=[MetamaskCallback(temperature=(1.0, 0.1))]).fit(module, loader())
    for layer in (module.net[0], module.net[2]):
        layer.gate = "sigmoid"
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module.net = torch.nn.Linear(4, 2).double()
    with pytest.raises(ValueError, match="Automatic has no masked layer"):
        trainer(tmp_path, max_epochs=1, callbacks=[MetamaskCallback("a")]).fit(module, loader())


def _torchrun(folder, strategy):
    program = [str(TESTS / "support" / "lightning_ddp.py"), str(folder), strategy]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_ddp_equals_one_process(tmp_path):
    done = _torchrun(tmp_path, "ddp_find_unused_parameters_true")
    assert done.returncode == 0, done.stderr[-3000:]
    module = Automatic()
    torch.manual_seed(0)
    callback = MetamaskCallback(["a", "b"], every="step", temperature=(1.0, 0.5))
    trainer(tmp_path, max_epochs=3, callbacks=[callback]).fit(module, loader(batch=4))
    expected = module.net.state_dict()
    for rank in range(2):
        found = torch.load(tmp_path / f"rank-{rank}.pt")
        assert [*found] == [*expected]
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)
        assert float((tmp_path / f"temperature-{rank}").read_text()) == pytest.approx(0.5)


def test_ddp_that_expects_every_gradient_is_refused(tmp_path):
    done = _torchrun(tmp_path, "ddp")
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        text = (tmp_path / f"error-{rank}").read_text()
        assert text.startswith("strategy must be 'ddp_find_unused_parameters_true': the model has 3 tasks")
