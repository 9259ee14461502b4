"""What `python -m pytest` runs, and what only `python -m pytest -m full` does; README.md says it in words.

A test with the mark `full` is not in the short run. The mark is set by hand, or here by one of three rules: the test is
slow and stands in `CASES`; it launches and does not stand in `LAUNCHES`; or each of its parameters had the same value
in an earlier case of the same test.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from math import inf
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

CASES: dict[str, int | dict[str, int]] = {
    "distributed/test_all_methods.py": 0,
    "distributed/test_audit.py": {
        "test_cross_talk_is_confirmed_or_said": 2,
    },
    "distributed/test_derivatives.py": {
        "test_gradients_are_those_of_one_process_on_the_whole_batch": 1,
        "test_what_fsdp2_cannot_do_by_itself": 0,
    },
    "distributed/test_engines.py": {
        "test_a_cell_that_takes_its_launch_down_hides_no_other": 0,
        "test_all_pairs_of_choices_follow_one_process": 0,
        "test_fp16_loss_scale_changes_nothing_but_rounding": 0,
        "test_fp16_overflow_in_parameters_alone_does_not_skip_the_update": 0,
        "test_fp16_overflow_on_one_process_skips_the_update_on_all": 0,
        "test_fp16_overflow_skips_the_update_of_other_methods_too": 0,
        "test_losses_that_fsdp2_casts_to_half_precision_are_told_once_on_the_main_process": 0,
        "test_what_is_not_in_the_matrix_fails_without_a_weighter_too": 0,
    },
    "distributed/test_faults.py": {
        "test_a_process_frozen_alone_ends_the_others_with_an_error": 0,
        "test_a_process_frozen_alone_for_one_step_raises_at_its_next_step": 0,
        "test_a_process_frozen_alone_under_ddp_ends_all_with_an_error": 0,
        "test_a_setting_that_differs_in_its_last_digit_raises_with_its_process": 0,
        "test_a_step_of_one_process_alone_never_mixes_with_an_all_reduce_of_the_user": 0,
        "test_a_step_of_one_process_alone_times_out_with_the_causes": 0,
        "test_any_bit_of_weights_state_or_rotations_on_one_process_is_healed_or_raises_in_that_very_step": 0,
        "test_checkpoint_inside_an_accumulation_window_warns_and_resumes_with_a_window_of_one": 0,
        "test_every_dictionary_may_be_in_any_order_on_any_process": 0,
        "test_nonfinite_windows_are_skipped_as_if_they_had_not_been": 1,
        "test_join_uneven_inputs_is_refused_at_once_on_all_processes": 0,
        "test_three_batches_against_two_under_ddp_time_out_with_the_causes": 0,
        "test_two_weighters_in_opposite_orders_say_so_and_do_not_mix": 0,
    },
    "distributed/test_harness.py": {
        "test_a_collective_on_one_process_only_times_out": 0,
        "test_every_engine_trains_alike": 0,
        "test_no_process_is_left_behind": 0,
    },
    "distributed/test_healing.py": 0,
    "distributed/test_invariance.py": {
        "test_any_cut_of_the_same_batch_gives_the_same_trajectory": 4,
        "test_float32_weights_follow_one_process_over_twenty_steps": 1,
        "test_unequal_and_incomplete_blocks_count_alike_wherever_they_are": 1,
    },
    "distributed/test_lag_zero.py": {
        "test_any_number_of_processes_is_one_process_on_their_rows_together": 1,
        "test_different_tasks_on_different_processes_neither_wait_nor_mix": 0,
        "test_many_steps_many_times_end_alike": 0,
    },
    "distributed/test_lifetime.py": 0,
    "distributed/test_loops.py": {
        "test_deepspeed_with_accumulation_raises_no_alarm": 0,
        "test_round_robin_with_carry_forward_reaches_the_weights_of_all_tasks_in_each_batch": 0,
        "test_while_the_model_trains_round_robin_moves_the_weights_the_same_way": 0,
    },
    "distributed/test_models.py": {
        "test_a_loss_that_may_be_missing_on_one_process_alone_is_said_under_zero3": 0,
        "test_a_task_without_items_on_one_process_is_weighed_as_on_the_whole_batch": 1,
        "test_several_tensors_on_two_processes": 1,
    },
    "distributed/test_parameters.py": {
        "test_first_order_losses_under_any_engine": 1,
        "test_what_engines_cannot_do_by_themselves": 0,
    },
    "distributed/test_rebuilt.py": 0,
    "distributed/test_resume.py": {
        "test_checkpoint_resumed_on_another_number_of_processes_follows_the_uninterrupted_run": 1,
    },
    "distributed/test_rotograd_invariance.py": {
        "test_any_cut_gives_the_same_moments_rotations_and_weights": 1,
        "test_checkpoint_of_rotations_resumes_bitwise_and_on_another_number_of_processes": 0,
        "test_rotations_are_folded_into_sharded_heads": 1,
    },
    "distributed/test_shared_layers.py": {
        "test_gradients_at_a_shared_layers_weight": 2,
        "test_norms_that_do_not_wait": 1,
    },
    "distributed/test_soak.py": 0,
    "methods/test_gradnorm_toy.py": 0,
    "methods/test_gram_references.py": {
        "test_the_weights_are_those_of_the_papers_formula": 4,
    },
    "methods/test_properties.py": {
        "test_a_state_with_its_rows_in_another_order_is_that_of_the_tasks_in_that_order": 10,
        "test_row_12_an_update_keeps_what_it_promises": 20,
        "test_what_should_not_matter_does_not": 10,
    },
    "methods/test_rotograd.py": {
        "test_float32_rotations_stay_orthogonal_over_ten_thousand_steps": 0,
        "test_on_the_convex_toy_only_rotations_reach_both_optima": 0,
    },
    "unit/test_compiled_calls.py": {
        "test_compiled_statistics_and_gradients_are_those_of_the_plain_model": 3,
        "test_memory_formats": 0,
        "test_several_tensors_compiled": 0,
    },
    "unit/test_growth.py": {
        "test_a_silent_task_does_not_make_the_trunk_leap_when_it_is_back": 4,
    },
    "unit/test_hooks_and_memory.py": {
        "test_three_hundred_steps_leave_no_growing_graph": 1,
    },
    "unit/test_other_tasks.py": 20,
    "unit/test_plot.py": {
        "test_the_documented_command_runs_without_a_warning": 0,
    },
    "unit/test_price.py": {
        "test_a_further_micro_batch_takes_no_more_instructions_than_its_budget": 0,
        "test_a_step_takes_no_more_instructions_than_its_budget": 0,
    },
    "unit/test_recompute_and_compile.py": {
        "test_torch_compile_makes_one_graph_of_rotations_for_all_steps": 1,
    },
    "unit/test_rotograd.py": {
        "test_ten_thousand_steps_in_bf16_keep_the_rotations_orthogonal": 0,
    },
    "unit/test_state_machine.py": {
        "runTest": 1,
    },
    "unit/test_taps.py": {
        "test_memory_of_a_large_representation": 1,
    },
}
"""Slow files and tests, and how many cases of each the short run takes: the first ones."""

LAUNCHES = (
    "launch/test_examples.py::test_the_sentences_are_what_their_script_makes",
    "launch/test_launch_configs.py::test_every_file_is_launched_here",
    "launch/test_launch_configs.py::test_on_one_machine",
    "launch/test_multi_digits.py::test_methods_are_compared_on_two_processes",
    "launch/test_selfcheck.py::test_a_missing_all_reduce_fails_with_its_meaning",
    "launch/test_selfcheck.py::test_help_says_how_to_launch",
    "launch/test_trainer.py::test_what_cannot_go_together_is_refused_in_words",
)
"""A launch takes ten seconds, so of ``launch/`` the short run takes these alone, and the first case of each."""

PARTS = pytest.StashKey[tuple[list[str], list[str]]]()
"""The tests of the short run and of the rest, as far as they were collected: for test_split.py."""

EVERY_CASE = ("distributed/test_negative_controls.py",)
"""Files of which the short run takes every case."""


@pytest.fixture(autouse=True)
def forget_the_accelerators_of_other_tests(request: pytest.FixtureRequest) -> None:
    """A weighter without one speaks of an `Accelerator` in its process, and which tests ran before is chance."""
    if "caplog" in request.fixturenames and "accelerate.state" in sys.modules:
        from tests.ranks import forget_accelerators

        forget_accelerators()


def name_of(item: pytest.Item) -> tuple[str, str]:
    """The file of a test inside this folder, or elsewhere, and the test with it, without parameters."""
    file = item.path.relative_to(TESTS).as_posix() if item.path.is_relative_to(TESTS) else item.path.as_posix()
    return file, f"{file}::{getattr(item, 'originalname', None) or item.name}"


def cases_of(file: str, test: str) -> float:
    """How many cases of a test the short run takes."""
    if file.startswith("launch/"):
        return test in LAUNCHES
    cases = CASES.get(file, inf)
    return cases.get(test.partition("::")[2], inf) if isinstance(cases, dict) else cases


def adds_nothing(item: pytest.Item, seen: dict[str, set[tuple[int, str]]]) -> bool:
    """Whether every `parametrize` of a test had this case's choice in a case before, which is noted in `seen`."""
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return False
    values = set(enumerate(callspec._idlist))  # one id for each `parametrize`; the public id runs them together
    known = seen[name_of(item)[1]]
    new = values - known
    known |= values
    return not new


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seen: dict[str, set[tuple[int, str]]] = defaultdict(set)
    taken: Counter[str] = Counter()
    for item in items:
        file, test = name_of(item)
        if item.get_closest_marker("full"):
            continue
        covered = adds_nothing(item, seen) and file not in EVERY_CASE
        if covered or taken[test] >= cases_of(file, test):
            item.add_marker(pytest.mark.full)
        else:
            taken[test] += 1
    full = {item.nodeid for item in items if item.get_closest_marker("full")}
    names = [item.nodeid for item in items]
    config.stash[PARTS] = [name for name in names if name not in full], [name for name in names if name in full]
