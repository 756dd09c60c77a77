"""TaskLoop on Lightning Fabric, in processes of torchrun: as one process, and bit for bit after a kill. Needs lightning."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support import fabric_loops
from support.paths import ROOT

pytest.importorskip("lightning.fabric", reason="lightning is no part of the test extra: make test-distributed")


def _run(folder, strategy, precision, world, *kill):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "support.fabric_loops", str(folder), strategy, precision, *map(str, kill)]
    if world > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True, timeout=240)


def _result(folder, *run):
    ran = _run(folder, *run)
    assert ran.returncode == 0, ran.stderr
    return torch.load(folder / "result.pt")


def _assert_close(got, wanted, tolerance):
    assert got["model"].keys() == wanted["model"].keys()
    for name, tensor in got["model"].items():
        torch.testing.assert_close(tensor, wanted["model"][name], rtol=0, atol=tolerance)


def test_one_process_is_the_loop_without_fabric(tmp_path):
    alone = fabric_loops.loop(None).run(fabric_loops.ROUNDS)
    got = _result(tmp_path, "alone", "32-true", 1)
    for name, tensor in alone.model.state_dict().items():
        assert torch.equal(got["model"][name], tensor), name


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_processes_are_one(tmp_path, strategy, world):
    alone = fabric_loops.loop(None, dtype=torch.float64).run(fabric_loops.ROUNDS)
    got = _result(tmp_path, strategy, "double", world)
    _assert_close(got, {"model": alone.model.state_dict()}, 1e-6)
    assert got["slots"] == alone.steps_of


@pytest.mark.parametrize(("strategy", "victim"), [("ddp", 0), ("ddp", 1), ("fsdp", 0), ("fsdp", 1)])
def test_a_run_goes_on_bit_for_bit_after_one_of_two_processes_is_killed(tmp_path, strategy, victim):
    whole = _result(tmp_path / "whole", strategy, "32-true", 2)
    assert _run(tmp_path / "killed", strategy, "32-true", 2, victim, 4).returncode != 0
    resumed = _result(tmp_path / "killed", strategy, "32-true", 2)
    assert resumed["resumed"] == 3 and whole["resumed"] is None
    assert all(torch.equal(tensor, whole["model"][name]) for name, tensor in resumed["model"].items())
    assert resumed["metrics"] == whole["metrics"] and len(whole["metrics"]) == fabric_loops.ROUNDS


@pytest.mark.parametrize("world", [1, 2])
def test_mixed_precision(tmp_path, world):
    got = _result(tmp_path, "ddp" if world > 1 else "alone", "bf16-mixed", world)
    assert all(tensor.dtype in (torch.float32, torch.float64) for tensor in got["model"].values())
    alone = fabric_loops.loop(None).run(fabric_loops.ROUNDS)
    _assert_close(got, {"model": alone.model.state_dict()}, 0.05)
    assert any(not torch.equal(tensor, alone.model.state_dict()[name]) for name, tensor in got["model"].items())


def test_another_number_of_processes_is_another_run(tmp_path):
    _result(tmp_path, "ddp", "32-true", 2)
    ran = _run(tmp_path, "alone", "32-true", 1)
    assert ran.returncode != 0 and "CheckpointError" in ran.stderr and "fabric was" in ran.stderr


def test_settings_that_cannot_be_are_refused_before_anything_changes(tmp_path):
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy, FSDPStrategy

    one = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(TypeError, match="fabric must be a lightning.fabric.Fabric, got str"):
        fabric_loops.loop(None, "ddp")
    for strategy, message in ((DDPStrategy(), "find_unused_parameters=True"), (FSDPStrategy(), "ModelParallelStrategy")):
        one._strategy = strategy
        with pytest.raises(ValueError, match=message):
            fabric_loops.loop(None, one)
