"""States of wrapped and sharded models: settings and tasks come back, or the load says what to call."""

from __future__ import annotations

import pytest
from support import state_cases as cases

ANNEALED = [0.1, 1.1, 2.1]


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("plain", "FSDP"), ("FSDP", "DDP"), ("DDP", "plain"), ("compile", "FSDP")],
)
def test_distributed_checkpoints_bring_the_settings_along(ranks, tmp_path, saved, loaded):
    for difference, temperatures in ranks(cases.by_files, str(tmp_path), saved, loaded):
        assert difference < 1e-6 and temperatures == ANNEALED


@pytest.mark.parametrize("broadcast", [False, True], ids=["all", "rank 0"])
@pytest.mark.parametrize(("saved", "loaded"), [("plain", "FSDP"), ("FSDP", "DDP")])
def test_states_of_whole_tensors_bring_them_along(ranks, saved, loaded, broadcast):
    for difference, temperatures in ranks(cases.by_full_state, saved, loaded, broadcast):
        assert difference < 1e-6 and temperatures == ANNEALED


@pytest.mark.parametrize("broadcast", [False, True], ids=["all", "rank 0"])
@pytest.mark.parametrize("loaded", ["plain", "FSDP"])
def test_an_old_state_of_whole_tensors_loads_with_a_warning(ranks, loaded, broadcast):
    for messages, layers in ranks(cases.old_full_state, loaded, broadcast):
        assert len(messages) == layers and all("temperature=1.0" in message for message in messages)


@pytest.mark.parametrize("full", [False, True], ids=["files", "whole tensors"])
@pytest.mark.parametrize("loaded", ["plain", "FSDP", "DDP"])
def test_a_task_that_the_model_lacks_is_not_dropped_without_a_word(ranks, tmp_path, loaded, full):
    for message, (difference, _) in ranks(cases.a_task_that_the_model_lacks, str(tmp_path), loaded, full):
        assert difference < 1e-6
        if (loaded, full) == ("plain", True):  # it is made
            assert message is None
        else:
            assert "saved with 3 tasks" in message or "cannot be added" in message, message


def test_a_data_parallel_model_has_the_names_of_the_plain_one(ranks, tmp_path):
    for same, (difference, temperatures) in ranks(cases.wrapped_states):
        assert same and difference == 0 and temperatures == ANNEALED
    for found in ranks(cases.banks, str(tmp_path)):
        for difference, temperatures in found:
            assert difference < 1e-6 and temperatures == ANNEALED
