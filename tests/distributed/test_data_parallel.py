"""DistributedDataParallel and replicate on two ranks: as one process, or refused before anything changes."""

from __future__ import annotations

import pytest
from support import data_parallel_cases as cases

RUNS = [
    cases.wrapped_after_the_optimiser,
    cases.wrapped_before_the_optimiser,
    cases.submodules_wrapped,
    cases.of_another_group,
    cases.copied,
    cases.with_a_communication_hook,
    cases.with_gradient_hooks_of_saved_tensors,
    cases.of_a_checkpoint,
    cases.replicated,
    cases.a_wrapped_and_a_bare_forward,
    cases.without_synchronisation,
    cases.a_step_without_synchronisation,
    cases.another_task_on_each_rank,
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.usefixtures("_each_optimizer")
def test_steps_are_those_of_one_process(ranks, run):
    for difference, moved in ranks(run, {}):
        assert difference < 1e-6 < moved


@pytest.mark.parametrize("name", cases.OPTIONS)
@pytest.mark.parametrize("run", RUNS[:3], ids=lambda run: run.__name__)
def test_options_of_the_wrapper(ranks, run, name):
    for difference, moved in ranks(run, cases.OPTIONS[name]):
        assert difference < 1e-6 < moved


@pytest.mark.usefixtures("_each_optimizer")
def test_a_model_beside_a_wrapped_one_is_fused(ranks):
    for difference, nodes in ranks(cases.beside_a_wrapped_model):
        assert difference < 1e-6 and nodes == 4


def test_the_optimiser_takes_the_module_not_the_wrapper(ranks):
    for result in ranks.try_(cases.given_the_wrapper):
        assert result.kind == "ValueError" and "give the module that it wraps" in result.message


CHANGES = [
    cases.add_to_the_wrapper,
    cases.add_to_the_module,
    cases.add_to_a_layer,
    cases.add_by_hand,
    cases.replace_by_hand,
    cases.load_a_state_with_another_task,
    cases.add_through_a_bank,
    cases.load_a_bank,
    cases.convert_the_rest,
]


@pytest.mark.parametrize("kind", ["wrapped", "copied", "replicate"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_mask_is_added_under_a_wrapper(ranks, change, kind):
    if kind == "replicate" and change is cases.load_a_state_with_another_task:
        pytest.skip("the module is its own wrapper: its names have no prefix")
    for message, whole in ranks(cases.add_and_remove_wrapped, change, kind):
        assert "after the model was wrapped: a DistributedDataParallel" in message
        assert "Add tasks first, and wrap then" in message
        assert whole is True


def test_the_way_that_the_message_says(ranks):
    assert max(ranks(cases.unwrapped_and_wrapped_again)) < 1e-6
    assert ranks(cases.a_wrapper_in_a_cycle_is_let_go_of) == [["default", "b"]] * 2


def test_removed_and_packed_tasks(ranks):
    assert max(ranks(cases.removed_and_packed)) < 1e-6


def test_a_bank_of_the_same_tasks(ranks):
    assert max(ranks(cases.a_bank_of_the_same_tasks)) < 1e-6


def test_task_loop(ranks):
    for difference, moved in ranks(cases.loop):
        assert difference < 1e-6 < moved
    assert max(ranks(cases.loop_resumed)) < 1e-6


def test_task_loop_asks_for_its_tasks_before_wrapping(ranks):
    for message, whole in ranks(cases.loop_without_masks_before_wrapping):
        assert "task 'a' cannot be added after the model was wrapped" in message and whole
    for message, whole, rounds in ranks(cases.loop_wrapped_before_it_runs):
        assert "cannot be added after the model was wrapped" in message and whole and rounds == 1
