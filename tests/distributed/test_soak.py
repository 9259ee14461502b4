"""The short form of the soak; `python -m tests.distributed.soak` is the long one."""

import pytest

from tests.distributed.soak import CHANCE, check, run, script

STEPS, SEED = 300, 11


@pytest.mark.parametrize("method", ["gradnorm", "carry", "rotograd"])
def test_nothing_is_lost_in_300_steps_with_faults(method, tmp_path) -> None:
    turns, faults = script(STEPS, SEED, ranks=2)
    assert set(faults) >= set(CHANCE) and all(faults[kind] for kind in CHANCE), f"a kind that never happens: {faults}"
    assert any(not turn.recorded(2) and not turn.frozen for turn in turns), "a step of frozen micro-batches alone"
    outcomes, reference = run(method, STEPS, SEED, 2, tmp_path, print)
    first = outcomes[0]
    assert first.held and first.ended and first.resumes and first.interruptions
    check(outcomes, reference, STEPS)
