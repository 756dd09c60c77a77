"""Half a minute of what ``make soak`` does for ten: a bank beside plain torch, and the memory of repeated calls."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from support.paths import TESTS
from support.soak import BankBesidePlainTorch


@pytest.mark.once
def test_half_a_minute():
    command = [sys.executable, "-m", "faults.soak", "--seconds", "25", "--calls", "200"]
    done = subprocess.run(
        command, cwd=TESTS, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no difference" in done.stdout and "add and remove: " in done.stdout


@pytest.mark.once
def test_a_difference_is_found(monkeypatch):
    monkeypatch.setattr("support.soak.Plain.pack", lambda plain, task: plain.packed.add(task))
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            BankBesidePlainTorch,
            settings=settings(
                max_examples=60,
                stateful_step_count=20,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
                print_blob=False,
            ),
        )
