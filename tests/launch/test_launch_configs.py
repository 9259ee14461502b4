"""Every file in launch_configs/, launched as it stands but for what takes it from GPUs to a few CPU processes."""

from __future__ import annotations

import math
import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from tests.launch.launching import ACCELERATE, ROOT, Launched, free_port, read, report, selfcheck

CONFIGS = ROOT / "launch_configs"
SHORT = ("--cpu", "--steps", "3", "--timings", "0", "--methods", "GradNorm", "RotoGrad")

ONE_MACHINE = {
    "cpu_2": ("MULTI_CPU", "DDP"),
    "ddp": ("MULTI_CPU", "DDP"),
    "fsdp1": ("FSDP", "FSDP1"),
    "fsdp2": ("FSDP", "FSDP2"),
    "zero2": ("DEEPSPEED", "DeepSpeed ZeRO-2"),
    "zero3": ("DEEPSPEED", "DeepSpeed ZeRO-3"),
}
SEVERAL = {"ddp_multinode": ("MULTI_CPU", "DDP"), "fsdp2_multinode": ("FSDP", "FSDP2")}
HSDP = "FSDP2, mesh {'dp_replicate': 2, 'dp_shard': 2}"


def assert_trained(found: dict, processes: int, distributed_type: str, engine: str, output: str) -> None:
    """So many processes under that engine took steps, and hold the same finite weights."""
    assert found["passed"], output[-4000:]
    assert found["processes"] == found["launched"] == processes
    assert found["summed_over"] == list(range(processes))
    assert (found["distributed_type"], found["engine"]) == (distributed_type, engine)
    for method in found["methods"].values():
        assert method["ranks_equal"]
        assert all(math.isfinite(weight) and weight > 0 for weight in method["final_weights"])
        assert len(set(method["final_weights"])) == 3, "the weights never moved"


@pytest.mark.parametrize("name", ONE_MACHINE)
def test_on_one_machine(name: str, tmp_path: Path) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    flags = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--num_processes", "2"]
    code, output, found = selfcheck(flags, tmp_path, SHORT)
    assert_trained(found, 2, *ONE_MACHINE[name], output)
    assert code == 0
    wanted = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()).get("mixed_precision", "no")
    assert found["mixed_precision"] == wanted


def test_hybrid_sharding_on_four_processes(tmp_path: Path) -> None:
    flags = ["--config_file", str(CONFIGS / "hsdp.yaml"), "--num_machines", "1", "--num_processes", "4"]
    flags += ["--parallelism_config_dp_shard_size", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", "0"]
    code, output, found = selfcheck(flags, tmp_path, (*SHORT[:-1],))
    assert_trained(found, 4, "FSDP", HSDP, output)
    assert code == 0


@pytest.mark.parametrize("name", SEVERAL)
def test_on_two_machines(name: str, tmp_path: Path) -> None:
    """Two launchers with machine ranks, as on two machines; test_two_nodes.py gives each a network of its own."""
    flags = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    flags += ["--main_process_port", str(free_port())]
    with ExitStack() as stack:
        machines = []
        for rank in (0, 1):
            command = [*ACCELERATE, *flags, "--machine_rank", str(rank), "-m", "accel_weighting.selfcheck", *SHORT]
            machines.append(stack.enter_context(Launched([*command, *report(tmp_path)])))
        (code, output), (other_code, other_output) = (machine.wait() for machine in machines)
    assert_trained(read(tmp_path, output + other_output), 2, *SEVERAL[name], output)
    assert code == other_code == 0


STUBS = {
    # SLURM starts the command once per node; here both nodes are this machine.
    "srun": """#!/bin/bash
while [[ $1 == --* ]]; do echo "srun option $1"; shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
""",
    "scontrol": """#!/bin/bash
[[ "$*" == "show hostnames node[0-1]" ]] || exit 1
printf '127.0.0.1\\n127.0.0.2\\n'
""",
}


def test_the_slurm_script_starts_one_launcher_per_node(tmp_path: Path) -> None:
    script = CONFIGS / "slurm_multinode.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    for name, text in STUBS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    env |= {"SLURM_JOB_ID": str(free_port()), "CONFIG": str(CONFIGS / "ddp_multinode.yaml")}
    path = os.pathsep.join([str(tmp_path), *environment_path()])
    arguments = ["-m", "accel_weighting.selfcheck", *SHORT, *report(tmp_path)]
    with Launched(["bash", str(script), *arguments], env | {"PATH": path}) as job:
        code, output = job.wait()
    assert_trained(read(tmp_path, output), 2, "MULTI_CPU", "DDP", output)
    assert code == 0
    assert "srun option --kill-on-bad-exit=1" in output


def environment_path() -> list[str]:
    from tests.launch.launching import environment

    return environment()["PATH"].split(os.pathsep)


def test_every_file_is_launched_here() -> None:
    launched = {*ONE_MACHINE, *SEVERAL, "hsdp", "slurm_multinode"}
    assert {file.stem for file in CONFIGS.iterdir() if file.suffix != ".md"} == launched
