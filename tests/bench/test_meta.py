"""The suite meta: what is missing is named, several processes are one measurement, memory is what a backward takes."""

from __future__ import annotations

import json
import statistics
import sys
from types import SimpleNamespace

import pytest
import torch
from metamask_ext.bench import measure, meta, run
from metamask_ext.bench.cases import SUITES


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(meta, "STEPS", 1)
    monkeypatch.delenv(meta.PEERS, raising=False)


def test_without_peers_the_suite_says_how_to_install_them(small, monkeypatch, tmp_path):
    problem = meta.sine_step(2, 3)
    assert problem.contenders.keys() == {"metamask", "vmap", "loop"} and problem.missing.keys() == {"higher", "torchopt"}
    assert all(meta.INSTALL in reason and meta.PEERS in reason for reason in problem.missing.values())
    monkeypatch.setenv(meta.PEERS, str(tmp_path))
    (tmp_path / "higher.py").write_text("import no_such_module\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    missing = meta.sine_step(2, 3).missing
    assert missing["higher"].startswith("No module named 'no_such_module' (of METAMASK_PEERS: pip install")


def test_a_peer_with_another_meta_gradient_is_refused(small, monkeypatch):
    """A stand-in for TorchOpt whose inner step does nothing."""

    class MetaSGD:
        def __init__(self, model, lr):
            pass

        def step(self, loss):
            pass

    idle = SimpleNamespace(MetaSGD=MetaSGD, extract_state_dict=lambda of: None, recover_state_dict=lambda of, state: None)
    monkeypatch.setattr(meta, "_peer", lambda name: idle if name == "torchopt" else "not looked for")
    with pytest.raises(AssertionError, match="of torchopt is wrong: off by"):
        measure.check(meta.sine_step(2, 3))


def test_all_contenders_of_the_net_with_convolutions_agree(small):
    problem = meta.fewshot_step(3, 2, 4, 2)
    assert problem.contenders.keys() == {"metamask", "vmap", "loop"}
    assert all(error <= 1.0 for error in measure.check(problem).errors.values())
    names = problem.contenders["metamask"].results
    # Four convolutions and a linear layer with its bias; four batch norms
    assert len(names) == 1 + 6 + 6 + 8 and names[-1] == "meta-gradient of rest 7"


def test_a_unit_has_the_results_of_its_first_step(monkeypatch):
    monkeypatch.setattr(meta, "STEPS", 3)
    numbers = iter(range(9))
    work = meta._repeated(lambda: (torch.tensor(next(numbers)),))
    assert [int(work()[0]) for _ in range(3)] == [0, 3, 6]


def test_rounds_of_several_processes_are_one_measurement(monkeypatch):
    (case,) = (case for case in SUITES["meta"] if case.measure == "sine-step")
    assert case.processes == 3
    given = iter([([10, 30], [50, 70], 0.1, 0.5), ([20, 20], [60, 60], 0.3, 0.2), ([90, 80], [80, 90], None, 0.1)])

    def once(case, allocator):
        metamask, loop, share, error = next(given)
        found = measure.summarise({"metamask": metamask, "loop": loop})
        errors = {"metamask": error, "loop": error}
        return {"rounds": 2, "cpu_share_of_others": share, "error_over_tolerance": errors, "not_measured": {}, **found}

    monkeypatch.setattr(run, "_measure_once", once)
    row = run._measure(case, "default")
    assert row["status"] == "measured" and row["rounds"] == 6 and row["cpu_share_of_others"] == 0.3
    assert row["error_over_tolerance"] == {"metamask": 0.5, "loop": 0.5}
    assert row["contenders"]["metamask"]["times"] == [10, 30, 20, 20, 90, 80]
    assert row["ratios"]["loop/metamask"]["of_medians"] == statistics.median([50, 70, 60, 60, 80, 90]) / 25

    def broken(case, allocator):
        raise run.CaseError("it broke")

    monkeypatch.setattr(run, "_measure_once", broken)
    assert run._measure(case, "default") == {**run._row(case, "default", "failed"), "reason": "it broke"}


def test_memory_of_checkpointed_steps(monkeypatch):
    monkeypatch.setattr(meta, "MEMORY_STEPS", (1, 8))
    found = meta.checkpoint_memory(3)
    assert 1 <= found["memory of 20 inner steps / of 1"] < 4 and found["memory of 1 inner step, MB"] > 0
    keep = meta.MAML
    monkeypatch.setattr(meta, "MAML", lambda *given, checkpoint: keep(*given))
    without = meta.checkpoint_memory(3)
    assert without["memory of 20 inner steps / of 1"] > found["memory of 20 inner steps / of 1"] + 0.5


def test_results_are_kept_as_json(small, tmp_path):
    assert run.run("meta", tmp_path, only=["meta/checkpoint-memory-25"]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["status"] == "measured" and row["quantities"]["memory of 20 inner steps / of 1"] < 1.5
    assert "| 0 of 1 measured |" in (tmp_path / "table.md").read_text()
