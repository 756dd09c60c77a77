"""fully_shard on two ranks: ordinary steps, as one process, or refused before anything changes."""

from __future__ import annotations

import pytest
from support import sharded_cases as cases

KINDS = ["root", "layers", "layers, gathered until the backward", "replicate"]
RUNS = [
    cases.steps,
    cases.after_a_forward_for_evaluation,
    cases.with_evaluation_between,
    cases.several_tasks,
    cases.step_by_step,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.usefixtures("_each_optimizer")
def test_steps_are_those_of_one_process(ranks, run, kind):
    for difference, moved in ranks(run, kind):
        assert difference < 1e-6 < moved


@pytest.mark.usefixtures("_each_optimizer")
def test_the_optimiser_of_a_part(ranks):
    for difference, moved in ranks(cases.a_part, "root"):
        assert difference < 1e-6 < moved
    for kind, message, whole in ranks(cases.a_part_with_gathered_parameters):
        assert kind == "RuntimeError" and "give the module that fully_shard was called on" in message and whole


@pytest.mark.parametrize("kind", ["one layer", "not resharded"])
@pytest.mark.usefixtures("_each_optimizer")
def test_the_numbers_of_torch_where_they_are_not_those_of_one_process(ranks, kind):
    for difference, moved in ranks(cases.as_torchs, kind):
        assert difference < 1e-7 and moved > 1e-6


@pytest.mark.parametrize("kind", ["root", "layers"])
@pytest.mark.usefixtures("_each_optimizer")
def test_sharding_after_the_optimiser_was_made(ranks, kind):
    for error, message, whole in ranks(cases.sharded_after_the_optimiser, kind):
        assert error == "RuntimeError" and "make the optimiser after fully_shard" in message and whole


@pytest.mark.parametrize("gathered", [False, True], ids=["sharded", "gathered"])
@pytest.mark.parametrize("name", cases.CHANGES)
def test_tasks_stay_as_they_are(ranks, name, gathered):
    for error, message, whole, tasks in ranks(cases.change, name, gathered):
        assert error in ("RuntimeError", "ValueError") and "sharded" in message, message
        assert whole and tasks == ["default", "b"]


@pytest.mark.usefixtures("_each_optimizer")
def test_the_older_wrapper_trains_as_one_process(ranks):
    for difference, moved in ranks(cases.flattened):
        assert difference < 1e-6 < moved
