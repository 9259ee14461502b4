"""The end of a training is the end of its processes; `python -m tests.launch.ends 100 --busy 2` is the long form."""

import sys

from tests.launch.launching import run_to_end


def test_trainings_end_on_a_busy_machine() -> None:
    code, output = run_to_end(sys.executable, "-m", "tests.launch.ends", 5, "--busy", 2)
    assert code == 0 and "5 of 5 ended well" in output, output
