"""The short form of the soak; `python -m tests.distributed.soak` is the long one."""

from tests.distributed.soak import CHANCE, check, run, script

STEPS = 300


def test_nothing_is_lost_in_300_steps_with_faults(tmp_path) -> None:
    _, faults = script(STEPS, seed=0, ranks=2)
    assert set(faults) >= set(CHANCE) and all(faults[kind] for kind in CHANCE), f"a kind that never happens: {faults}"
    outcomes, reference = run("gradnorm", STEPS, 0, 2, tmp_path, print)
    first = outcomes[0]
    assert first.held and first.ended and first.resumes and first.interruptions
    check(outcomes, reference, STEPS)
