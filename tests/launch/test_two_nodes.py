"""Two hosts, each with a network of its own: they reach each other over one wire and nothing else.

The hosts are network namespaces joined by a pair of virtual network cards, with two processes on each. A small model
in float64 shows how exact the weights are, and the main job that they are so in a training as users launch it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.launch.launching import ACCELERATE, ROOT, History, Launched, assert_same_history
from tests.launch.two_nodes import train
from tests.ranks import run_ranks

ADDRESSES = ("10.77.0.1", "10.77.0.2")
WIRE = "wire0"
STEPS = 32
SAVE_EVERY = 8
PATIENCE = 20  # seconds in a collective; a node that lost its network is noticed after this
METHODS = ("gradnorm", "cov", "rotograd")


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """Names of the two namespaces."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2: there is no `ip` command here")
    a, b = (f"accel_weighting_{os.getpid()}_{host}" for host in "ab")
    try:
        try:
            for host in (a, b):
                ip("netns", "add", host)
            ip("-n", a, "link", "add", WIRE, "type", "veth", "peer", "name", WIRE, "netns", b)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        for host, address in zip((a, b), ADDRESSES, strict=True):
            ip("-n", host, "address", "add", f"{address}/24", "dev", WIRE)
            ip("-n", host, "link", "set", WIRE, "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield a, b
    finally:
        for host in (a, b):
            subprocess.run(["ip", "netns", "delete", host], capture_output=True, check=False)


def launch(stack: ExitStack, hosts: Sequence[str], config: str, *script: str) -> list[Launched]:
    """A launcher on each of these hosts, which starts two processes."""
    flags = ["--config_file", str(ROOT / f"launch_configs/{config}.yaml"), "--num_processes", str(2 * len(hosts))]
    flags += ["--mixed_precision", "no"]  # the configurations are for GPUs
    if len(hosts) > 1:
        flags += ["--main_process_ip", ADDRESSES[0]]
    env = {"GLOO_SOCKET_IFNAME": WIRE}  # gloo would take 127.0.0.1
    return [
        stack.enter_context(
            Launched(["ip", "netns", "exec", host, *ACCELERATE, *flags, "--machine_rank", str(rank), *script], env)
        )
        for rank, host in enumerate(hosts)
    ]


def finish(launched: list[Launched]) -> str:
    """Until all have ended well; what they printed."""
    ends = [one.wait() for one in launched]
    assert all(code == 0 for code, _ in ends), "\n".join(output[-3000:] for _, output in ends)
    return "\n".join(output for _, output in ends)


def received(host: str) -> int:
    """Bytes that came over the wire."""
    return int(json.loads(ip("-n", host, "-j", "-s", "link", "show", WIRE))[0]["stats64"]["rx"]["bytes"])


# ---- a small model in float64 ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """Its weights on one process, step by step."""
    folder = tmp_path_factory.mktemp("exact")
    (result,) = run_ranks(train, 1, folder, "plain", folder)
    assert result["world"] == 1
    return result["weights"]


@pytest.mark.parametrize(("engine", "kind"), [("ddp", "MULTI_CPU"), ("fsdp2", "FSDP")])
def test_two_nodes_give_the_weights_of_one_process(
    engine: str, kind: str, hosts: tuple[str, str], exact: list[list[float]], tmp_path: Path
) -> None:
    before = received(hosts[0])
    with ExitStack() as stack:
        script = [str(ROOT / "tests/launch/two_nodes.py"), engine, str(tmp_path)]
        finish(launch(stack, hosts, f"{engine}_multinode", *script))
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert all((result["world"], result["type"]) == (4, kind) for result in results)
    assert all(result["weights"] == results[0]["weights"] for result in results), "processes differ"
    assert len(exact) == len(results[0]["weights"]) == 8
    for found, weights in zip(results[0]["weights"], exact, strict=True):
        assert found == pytest.approx(weights, rel=1e-12, abs=0)
    assert received(hosts[0]) - before > 10_000


# ---- the main job ------------------------------------------------------------------------------------------------


def main_job(folder: Path, *options: str) -> list[str]:
    """The script and what comes after it."""
    script = str(ROOT / "examples/multi_digits.py")
    return [script, "--cpu", "--compare", ",".join(METHODS), "--output_dir", str(folder), *options]


def histories(folder: Path, processes: int) -> dict[str, History]:
    """What the weighter of every method recorded at every step: weights, losses and gradient norms."""
    results = json.loads((folder / "multi_digits.json").read_text())
    assert results["processes"] == processes
    return {method: run["history"] for method, run in results["runs"].items()}


def assert_same(found: dict[str, History], one: dict[str, History]) -> None:
    assert tuple(found) == tuple(one) == METHODS
    for method, history in found.items():
        assert [step for step, _ in history] == list(range(STEPS))
        assert_same_history(history, one[method])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, History]:
    folder = tmp_path_factory.mktemp("one_process")
    with Launched([sys.executable, *main_job(folder, "--steps", str(STEPS))]) as one:
        assert "Processes: 1 (NO)" in finish([one])
    return histories(folder, 1)


def test_the_main_job_on_two_nodes_gives_the_weights_of_one_process(
    hosts: tuple[str, str], one_process: dict[str, History], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        output = finish(launch(stack, hosts, "ddp_multinode", *main_job(tmp_path, "--steps", str(STEPS))))
    assert "Processes: 4 (MULTI_CPU)" in output
    assert_same(histories(tmp_path, 4), one_process)


def test_a_lost_node_ends_the_other_and_the_job_resumes_on_two_nodes_and_on_one(
    hosts: tuple[str, str], one_process: dict[str, History], tmp_path: Path
) -> None:
    """FSDP2. The node goes as in a power cut: it says no goodbye, so that the other has to notice by itself."""
    checkpoints = tmp_path / "checkpoints"
    with ExitStack() as stack:
        options = ("--checkpoint_dir", str(checkpoints), "--save_every", str(SAVE_EVERY), "--timeout", str(PATIENCE))
        alive, lost = launch(stack, hosts, "fsdp2_multinode", *main_job(tmp_path, "--steps", "1000", *options))
        lost.wait_until(lambda: any(checkpoints.glob("gradnorm/step_*")), "there is a checkpoint")
        ip("-n", hosts[1], "link", "set", WIRE, "down")
        lost.kill()
        start = time.monotonic()
        code, output = alive.wait(PATIENCE + 60)
        print(f"the other node ended after {time.monotonic() - start:.1f} s")
    ip("-n", hosts[1], "link", "set", WIRE, "up")
    assert code != 0
    assert "Processes: 4 (FSDP)" in output and "Error" in output
    assert not (tmp_path / "multi_digits.json").exists(), "nobody finished"

    for again, config in ((hosts, "fsdp2_multinode"), (hosts[:1], "fsdp2")):
        folder = tmp_path / config
        shutil.copytree(checkpoints, folder / "checkpoints")
        options = ("--steps", str(STEPS), "--resume", "--checkpoint_dir", str(folder / "checkpoints"))
        with ExitStack() as stack:
            output = finish(launch(stack, again, config, *main_job(folder, *options)))
        assert f"Processes: {2 * len(again)} (FSDP)" in output
        assert re.search(r"resumed after (8|16|24) steps", output), output[-3000:]
        assert_same(histories(folder, 2 * len(again)), one_process)
