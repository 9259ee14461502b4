"""The self-check passes where all is right, and fails, saying what that means, where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from accel_weighting.selfcheck.__main__ import main
from accel_weighting.selfcheck.report import MEANING
from tests.launch.launching import ACCELERATE, ROOT, Launched, read, report, selfcheck

TWO = ["--num_processes", "2", "--main_process_port", "0"]
ENGINES = {
    "DDP": ["--multi_gpu"],
    "FSDP2": ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"],
    "DeepSpeed ZeRO-3": ["--use_deepspeed", "--zero_stage", "3"],
}


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_pass(engine: str, tmp_path: Path) -> None:
    if "DeepSpeed" in engine:
        pytest.importorskip("deepspeed")
    code, output, found = selfcheck([*TWO, *ENGINES[engine]], tmp_path, ("--cpu", "--timings", "3", "--expect", "2"))
    assert "PASSED" in output, output[-4000:]
    assert code == 0 and found["passed"] and not found["problems"]
    assert found["processes"] == found["launched"] == 2 and found["summed_over"] == [0, 1]
    assert found["engine"] == engine
    assert found["micro_batches"] == 2
    assert set(found["methods"]) == {"GradNorm", "CoVWeighting", "RotoGrad"}
    for method in found["methods"].values():
        assert method["ranks_equal"]
        assert all(method[name] < 1e-4 for name in ("losses", "gram", "weights", "model"))
    assert found["methods"]["RotoGrad"]["rotations"] < 1e-5
    assert found["cost"]["ratio"] > 0 and found["cost"]["all_reduce_ms"] > 0


@pytest.mark.parametrize(
    ("sabotage", "problems"), [("dropped", ["error"]), ("own numbers only", ["statistics", "ranks"])]
)
def test_a_missing_all_reduce_fails_with_its_meaning(sabotage: str, problems: list[str], tmp_path: Path) -> None:
    command = [*ACCELERATE, *TWO, "--multi_gpu", str(ROOT / "tests/launch/sabotaged.py"), "--cpu", "--timings", "0"]
    with Launched([*command, *report(tmp_path)], {"SABOTAGE": sabotage}) as one:
        code, output = one.wait()
    found = read(tmp_path, output)
    assert code == 1 and not found["passed"] and "PASSED" not in output
    assert found["processes"] == 2
    assert found["problems"] == problems
    for problem in problems:
        assert MEANING[problem] in output
    if sabotage == "dropped":
        assert "The processes no longer agree" in output


def test_one_process_that_fails_ends_all_in_bounded_time_and_says_what_it_means() -> None:
    command = [*ACCELERATE, *TWO, "--multi_gpu", str(ROOT / "tests/launch/sabotaged.py"), "--cpu", "--timeout", "20"]
    with Launched(command, {"SABOTAGE": "failing on one"}) as one:
        code, output = one.wait(90)
    assert code != 0 and "PASSED" not in output
    assert "no memory left on purpose" in output and MEANING["error"] in output


def test_processes_that_believe_to_be_alone_are_shouted_about(tmp_path: Path) -> None:
    code, output, found = selfcheck([*TWO, "--multi_gpu"], tmp_path, ())  # and no --cpu, on a machine without GPUs
    assert code == 1 and "PASSED" not in output
    assert (found["processes"], found["launched"], found["problems"]) == (1, 2, ["alone"])
    assert "!!!!!!!!!!" in output and "2 separate trainings" in output


def test_a_launcher_that_starts_one_of_several_is_shouted_about(tmp_path: Path) -> None:
    code, output, found = selfcheck(["--cpu", "--num_processes", "2"], tmp_path, ())
    assert code == 1 and "PASSED" not in output
    assert (found["processes"], found["problems"]) == (1, ["started one"])
    assert "!!!!!!!!!!" in output and "started one" in output


def test_the_wrong_number_of_processes_fails(tmp_path: Path) -> None:
    code, output, found = selfcheck(["--cpu", "--num_processes", "1"], tmp_path, ("--cpu", "--expect", "16"))
    assert code == 1 and found["problems"] == ["count"]
    assert "There are 1 processes, not the 16" in output


def test_help_says_how_to_launch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "accelerate launch <your configuration> -m accel_weighting.selfcheck" in text
    for option in ("--steps", "--cpu", "--json", "--expect", "--methods", "--micro_batches", "--timeout"):
        assert option in text
