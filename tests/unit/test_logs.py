"""What is logged and kept: the names and values of a step, and the history."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from accel_weighting.history import CAPACITY, PENDING, History
from tests.small import TASKS, gradients_by_hand, losses_of, weighter_and_model


def test_log_values_are_named_and_right():
    weighter, model = weighter_and_model()
    assert weighter.log_values() == {"weight/depth": 1.0, "weight/seg": 1.0, "weighting/skipped_steps": 0.0}
    for step in range(3):
        weighter.backward(losses_of(model, step))
    values = weighter.log_values()
    groups = ("weight", "loss", "loss_cov", "grad_norm")
    assert set(values) == {f"{group}/{task}" for group in groups for task in TASKS} | {
        "cosine/depth/seg",
        "weighting/skipped_steps",
    }
    G = gradients_by_hand(model, 2)
    assert all(type(value) is float for value in values.values())
    assert values["weight/seg"] == weighter.weights["seg"]
    assert values["grad_norm/seg"] == pytest.approx(G[1].norm().item(), rel=1e-6)
    assert values["cosine/depth/seg"] == pytest.approx(torch.cosine_similarity(G[0], G[1], dim=0).item(), rel=1e-6)
    seg = torch.stack([losses_of(model, step)["seg"] for step in range(3)])
    assert values["loss_cov/seg"] == pytest.approx((seg.std(correction=0) / seg.mean()).item(), rel=1e-6)
    assert weighter.history[-1][0] == 2 and weighter.history[-1][1].keys() == values.keys()


def test_absent_tasks_and_held_steps_are_left_out_of_the_logs():
    weighter, model = weighter_and_model()
    weighter.backward({"depth": losses_of(model)["depth"]})
    values = weighter.log_values()
    assert "loss/depth" in values and "loss/seg" not in values and "grad_norm/seg" not in values
    assert "cosine/depth/seg" not in values
    weighter.backward({task: loss * torch.nan for task, loss in losses_of(model).items()})
    assert weighter.log_values() == {f"weight/{task}": weighter.weights[task] for task in TASKS} | {
        "weighting/skipped_steps": 1.0
    }


@pytest.mark.parametrize("steps", [CAPACITY, CAPACITY + 1, 5 * CAPACITY])
def test_the_history_is_thinned_evenly_and_bounded(steps):
    record = History(["a"])
    most = 0
    for step in range(steps):
        record.record(step, np.array([float(step)]), None, 0)
        most = max(most, len(record._rows))
    kept = [step for step, _ in record.entries]
    assert most <= CAPACITY + PENDING and len(kept) <= CAPACITY
    if steps > CAPACITY:
        assert len(kept) > CAPACITY / 2
    assert kept == list(range(0, steps, record._stride))
    assert all(values["weight/a"] == step for step, values in record.entries)
    again = History(["a"])
    again.load_state_dict(record.state_dict(), ["a"])
    assert again.entries == record.entries and again._stride == record._stride
