"""One process stops early: the other says why it cannot go on, and neither hangs, at its exit neither."""

import time

from tests.launch.launching import Launched

PATIENCE = 10.0


def test_a_process_that_leaves_early_exits_cleanly_and_the_other_names_the_cause(tmp_path):
    command = ["python", "-m", "tests.launch.leaving", str(tmp_path / "rendezvous"), str(PATIENCE)]
    environment = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **environment} for rank in range(2)]
    with Launched(command, ranks[0]) as stays, Launched(command, ranks[1]) as leaves:
        code, output = leaves.wait()
        assert code == 0, output
        begin = time.monotonic()
        assert "left after 2 steps" in output and "Error" not in output
        code, output = stays.wait()
        assert code == 1, output
        assert "RuntimeError: Another process did not reach optimizer step 2: it exited, raised an error" in output
        assert "no `break`" in output and "`accelerator.check_trigger()`" in output
        assert time.monotonic() - begin < PATIENCE + 20
