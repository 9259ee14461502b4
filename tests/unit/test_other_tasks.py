"""Checkpoints of a weighter with other tasks, for every method: what fits is taken over, and promises are kept."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel_weighting.state import WeighterState
from tests.methods.test_properties import check_weights, close, examples, rows, runs


@rows
@examples
@given(run=runs(), seed=st.integers(0, 1000))
def test_a_checkpoint_goes_on_under_another_order_of_the_tasks(row, run, seed):
    """Loaded with ``strict=False``: every part of the state follows its task."""
    K, half = len(run.tasks), len(run.losses) // 2
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed)).tolist()
    before = WeighterState(row.build(run.tasks), run.tasks, None)
    for statistics in run.windows()[:half]:
        before.update(statistics)
    after = WeighterState(row.build(run.tasks), [run.tasks[k] for k in order], None)
    after.load_state_dict(before.state_dict(), strict=False)
    close(row, [after.weights], [np.asarray(before.weights)[order]])
    for name, value in after.method_state.items():
        assert value.shape == before.method_state[name].shape
    if row.equivariant:
        for statistics, permuted in zip(run.windows()[half:], run.at(order).windows()[half:], strict=True):
            before.update(statistics)
            after.update(permuted)
            close(row, [after.weights], [np.asarray(before.weights)[order]])


@rows
@examples
@given(run=runs(), seed=st.integers(0, 1000))
def test_a_checkpoint_of_more_or_fewer_tasks_keeps_what_the_method_promises(row, run, seed):
    K, half = len(run.tasks), len(run.losses) // 2
    for old in (run.at(list(range(1 + seed % K))), run.at([*range(K), *[0] * (1 + seed % 3)])):
        before = WeighterState(row.build(old.tasks), old.tasks, None)
        for statistics in old.windows()[:half]:
            before.update(statistics)
        after = WeighterState(row.build(run.tasks), run.tasks, None)
        after.load_state_dict(before.state_dict(), strict=False)
        check_weights(row, after.weights, K)
        for statistics in run.windows()[half:]:
            after.update(statistics)
            check_weights(row, after.weights, K)
