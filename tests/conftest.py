"""What `python -m pytest` runs, and what only `python -m pytest -m full` does; README.md says it in words.

A test with the mark `full` is not in the short run. The mark is set by hand, or here by one of two rules: the test is
slow and stands in `CASES`, or each of its parameters had the same value in an earlier case of the same test.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from math import inf
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

CASES: dict[str, int] = {
    "distributed/test_all_methods.py": 0,
    "distributed/test_engines.py::test_all_pairs_of_choices_follow_one_process": 0,
    "distributed/test_engines.py::test_a_cell_that_takes_its_launch_down_hides_no_other": 0,
    "distributed/test_engines.py::test_what_is_not_in_the_matrix_fails_without_a_weighter_too": 0,
    "distributed/test_healing.py": 0,
    "distributed/test_lifetime.py": 0,
    "distributed/test_lag_zero.py::test_many_steps_many_times_end_alike": 0,
    "distributed/test_soak.py": 0,
    "launch/test_compare.py": 0,
    "launch/test_examples.py::test_finetune_text": 0,
    "launch/test_examples.py::test_finetune_text_takes_a_model_and_a_data_set_from_folders_and_adapts_it_with_lora": 0,
    "launch/test_examples.py::test_finetune_trainer": 0,
    "launch/test_examples.py::test_help_shows_the_command_and_the_defaults": 0,
    "launch/test_examples.py::test_multi_loss_with_two_weighters": 0,
    "launch/test_killed.py": 0,
    "launch/test_launch_configs.py::test_hybrid_sharding_on_four_processes": 0,
    "launch/test_launch_configs.py::test_on_one_machine": 1,
    "launch/test_launch_configs.py::test_on_two_machines": 0,
    "launch/test_launch_configs.py::test_the_slurm_script_starts_one_launcher_per_node": 0,
    "launch/test_leaving.py": 0,
    "launch/test_multi_digits.py::test_a_batch_that_cannot_be_cut_evenly_is_refused": 0,
    "launch/test_multi_digits.py::test_killed_inside_a_checkpoint_a_run_resumes_to_the_uninterrupted_end": 0,
    "launch/test_multi_digits.py::test_processes_that_do_not_know_of_each_other_stop_at_once": 0,
    "launch/test_multi_digits.py::test_two_processes_and_two_micro_batches_give_the_weights_of_one_process": 0,
    "launch/test_multi_digits.py::test_under_deepspeed_they_do_too": 0,
    "launch/test_notebook.py": 0,
    "launch/test_package.py": 0,
    "launch/test_papers.py": 0,
    "launch/test_selfcheck.py::test_a_launcher_that_starts_one_of_several_is_shouted_about": 0,
    "launch/test_selfcheck.py::test_a_missing_all_reduce_fails_with_its_meaning": 1,
    "launch/test_selfcheck.py::test_one_process_that_fails_ends_all_in_bounded_time_and_says_what_it_means": 0,
    "launch/test_selfcheck.py::test_processes_that_believe_to_be_alone_are_shouted_about": 0,
    "launch/test_selfcheck.py::test_the_wrong_number_of_processes_fails": 0,
    "launch/test_selfcheck.py::test_two_processes_pass": 0,
    "launch/test_two_nodes.py": 0,
    "unit/test_growth.py::test_a_silent_task_does_not_make_the_trunk_leap_when_it_is_back": 4,
    "unit/test_price.py::test_a_further_micro_batch_takes_no_more_instructions_than_its_budget": 0,
    "unit/test_price.py::test_a_step_takes_no_more_instructions_than_its_budget": 0,
}
"""Slow files and tests, and how many cases of each the short run takes: the first ones."""

PARTS = pytest.StashKey[tuple[list[str], list[str]]]()
"""The tests of the short run and of the rest, as far as they were collected: for test_split.py."""

EVERY_CASE = ("distributed/test_negative_controls.py",)
"""Files of which the short run takes every case."""


def name_of(item: pytest.Item) -> tuple[str, str]:
    """The file of a test inside this folder, or elsewhere, and the test with it, without parameters."""
    file = item.path.relative_to(TESTS).as_posix() if item.path.is_relative_to(TESTS) else item.path.as_posix()
    return file, f"{file}::{getattr(item, 'originalname', None) or item.name}"


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
        if covered or taken[test] >= CASES.get(test, CASES.get(file, inf)):
            item.add_marker(pytest.mark.full)
        else:
            taken[test] += 1
    full = {item.nodeid for item in items if item.get_closest_marker("full")}
    names = [item.nodeid for item in items]
    config.stash[PARTS] = [name for name in names if name not in full], [name for name in names if name in full]
