"""The README's command, really launched. No exit code alone is a verdict: the runs say how many processes they had."""

import json
import re
import sys
import time

import pytest
import torch

from tests.launch.launching import ACCELERATE, ON_TWO_PROCESSES, Launched, assert_same_history, run_to_end

TASKS = ["left", "right", "sum", "parity", "pixels"]


def launch(*options):
    """`accelerate launch … examples/multi_digits.py` with `options`; its exit code and its output."""
    return run_to_end(*ON_TWO_PROCESSES, "examples/multi_digits.py", *options)


def train(folder, *options):
    """A short run that must go well; the output and the results it wrote."""
    code, output = launch("--cpu", "--batch_size", 64, "--output_dir", folder, *options)
    assert code == 0, output
    assert "Processes: 2 (MULTI_CPU)" in output
    results = json.loads((folder / "multi_digits.json").read_text())
    assert results["processes"] == 2
    assert (folder / "multi_digits.png").read_bytes().startswith(b"\x89PNG")
    return output, results


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    return train(folder, "--compare", "equal,gradnorm,cov", "--steps", 9, "--accumulation", 2)


def test_methods_are_compared_on_two_processes(comparison):
    output, results = comparison
    assert list(results["runs"]) == ["equal", "gradnorm", "cov"]
    for run in results["runs"].values():
        assert run["processes"] == 2
        assert run["pairs_per_step"] == 64
        assert sum(run["weights"].values()) == pytest.approx(5)
        assert list(run["weights"]) == list(run["metrics"]) == TASKS
        steps, values = zip(*run["history"], strict=True)
        assert steps == tuple(range(9))
        assert set(values[-1]) == {f"{group}/{task}" for group in ("weight", "loss", "grad_norm") for task in TASKS}
    assert set(results["runs"]["equal"]["weights"].values()) == {1.0}
    assert results["runs"]["gradnorm"]["weights"]["sum"] < 1  # by far the largest gradient
    first_losses = [run["history"][0][1]["loss/left"] for run in results["runs"].values()]
    assert first_losses == [first_losses[0]] * 3  # the same model saw the same pairs
    assert results["settings"]["steps"] == 9
    assert {"torch", "accelerate", "transformers", "accel_weighting"} < set(results["versions"])
    for task in TASKS:
        assert re.search(rf"^{task} .*\([+-]\d+\.\d %\)", output, re.MULTILINE), output
    assert "mean change" in output


def test_killed_inside_a_checkpoint_a_run_resumes_to_the_uninterrupted_end(comparison, tmp_path):
    """SIGKILL for the launcher and both processes while the second checkpoint is half written."""
    checkpoints = tmp_path / "checkpoints"
    options = ["--method", "gradnorm", "--accumulation", "2", "--checkpoint_dir", str(checkpoints), "--steps", "9"]
    options += ["--cpu", "--batch_size", "64", "--save_every", "2", "--output_dir", str(tmp_path)]
    with Launched([*ON_TWO_PROCESSES, "tests/launch/stuck_save.py", *options]) as job:
        job.wait_until(lambda: "half written" in job.output, "a checkpoint is half written")
        job.kill()
    left = {path.name for path in (checkpoints / "gradnorm").iterdir()}
    assert left == {"step_000002", "partial"}
    with pytest.raises(RuntimeError):
        torch.load(checkpoints / "gradnorm" / "partial" / "custom_checkpoint_0.pkl", weights_only=True)
    output, resumed = train(tmp_path, *options, "--resume")
    assert "resumed after 2 steps" in output
    assert [path.name for path in (checkpoints / "gradnorm").iterdir()] == ["step_000009"]
    _, whole = comparison
    for what in ("weights", "metrics", "history"):
        assert resumed["runs"]["gradnorm"][what] == whole["runs"]["gradnorm"][what]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What one process on the whole batch recorded, by method."""
    folder = tmp_path_factory.mktemp("one_process")
    options = ("--cpu", "--batch_size", 64, "--compare", "equal,gradnorm,cov", "--steps", 9, "--output_dir", folder)
    code, output = run_to_end(sys.executable, "examples/multi_digits.py", *options)
    assert code == 0 and "Processes: 1 (NO)" in output, output
    return json.loads((folder / "multi_digits.json").read_text())["runs"]


def test_two_processes_and_two_micro_batches_give_the_weights_of_one_process(comparison, one_process):
    for method, cut in comparison[1]["runs"].items():
        assert_same_history(cut["history"], one_process[method]["history"])


@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_under_deepspeed_they_do_too(config, one_process, tmp_path):
    pytest.importorskip("deepspeed")
    flags = ("--config_file", f"launch_configs/{config}.yaml", "--num_processes", 2, "--mixed_precision", "no")
    options = ("--cpu", "--batch_size", 64, "--accumulation", 2, "--compare", "equal,gradnorm,cov", "--steps", 9)
    command = (*flags, "--gradient_clipping", 1e9, "examples/multi_digits.py", *options, "--output_dir", tmp_path)
    code, output = run_to_end(*ACCELERATE, *command)
    assert code == 0 and "Processes: 2 (DEEPSPEED)" in output, output
    for method, cut in json.loads((tmp_path / "multi_digits.json").read_text())["runs"].items():
        assert_same_history(cut["history"], one_process[method]["history"])


def test_a_batch_that_cannot_be_cut_evenly_is_refused(tmp_path):
    code, output = launch("--cpu", "--batch_size", 66, "--accumulation", 2, "--output_dir", tmp_path)
    assert code != 0
    assert "--batch_size 66 cannot be cut into 2 processes × 2 micro-batches of one size." in output


def test_processes_that_do_not_know_of_each_other_stop_at_once(tmp_path):
    start = time.monotonic()
    code, output = launch("--output_dir", tmp_path)
    assert code != 0
    assert "2 processes were started, and each sees 1: they would train apart." in output
    assert "--cpu" in output
    assert not list(tmp_path.iterdir())
    assert time.monotonic() - start < 60
