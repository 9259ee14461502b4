"""Two hosts, each with a network of its own: they reach each other over one wire and nothing else.

The hosts are network namespaces joined by a pair of virtual network cards, with two processes on each.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.launch.launching import ACCELERATE, ROOT, Launched
from tests.launch.two_nodes import PATIENCE, train
from tests.ranks import run_ranks

ADDRESSES = ("10.77.0.1", "10.77.0.2")
WIRE = "wire0"
STEPS = 8


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


def launch(stack: ExitStack, hosts: tuple[str, ...], *arguments: str) -> list[Launched]:
    """Two processes on each of these hosts."""
    flags = ["--multi_gpu", "--num_machines", str(len(hosts)), "--num_processes", str(2 * len(hosts))]
    flags += ["--main_process_ip", ADDRESSES[0], "--main_process_port", "29500", "--mixed_precision", "no"]
    env = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": WIRE}  # gloo would take 127.0.0.1
    script = [str(ROOT / "tests/launch/two_nodes.py"), *arguments]
    return [
        stack.enter_context(
            Launched(["ip", "netns", "exec", host, *ACCELERATE, *flags, "--machine_rank", str(rank), *script], env)
        )
        for rank, host in enumerate(hosts)
    ]


def finish(launched: list[Launched], folder: Path) -> list[dict[str, Any]]:
    """What all processes wrote."""
    ends = [one.wait() for one in launched]
    assert all(code == 0 for code, _ in ends), "\n".join(output[-3000:] for _, output in ends)
    results = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2 * len(launched))]
    assert all(result["world"] == 2 * len(launched) for result in results)
    assert all(result["weights"] == results[0]["weights"] for result in results), "processes differ"
    return results


def received(host: str) -> int:
    """Bytes that came over the wire."""
    return int(json.loads(ip("-n", host, "-j", "-s", "link", "show", WIRE))[0]["stats64"]["rx"]["bytes"])


def assert_same(weights: dict[str, list[float]], one: dict[str, list[float]], first: int) -> None:
    """The weights of all steps from `first` on, as on one process."""
    assert list(weights) == [str(step) for step in range(first, STEPS)]
    for step, values in weights.items():
        assert values == pytest.approx(one[step], rel=1e-12, abs=0), step


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    folder = tmp_path_factory.mktemp("one")
    result = run_ranks(train, 1, folder, "plain", STEPS, folder)[0]
    assert result["world"] == 1
    return {str(step): weights for step, weights in result["weights"].items()}


def test_ddp_on_two_nodes_gives_the_weights_of_one_process(
    hosts: tuple[str, str], one_process: dict[str, list[float]], tmp_path: Path
) -> None:
    before = received(hosts[0])
    with ExitStack() as stack:
        results = finish(launch(stack, hosts, "ddp", str(STEPS), str(tmp_path)), tmp_path)
    assert {result["type"] for result in results} == {"MULTI_CPU"}
    assert_same(results[0]["weights"], one_process, 0)
    assert received(hosts[0]) - before > 10_000


def test_a_killed_node_ends_the_other_and_the_job_resumes_on_two_nodes_and_on_one(
    hosts: tuple[str, str], one_process: dict[str, list[float]], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        alive, killed = launch(stack, hosts, "fsdp2", "10000", str(tmp_path), "--save_at", "4", "--slow")
        killed.wait_for("did step 6")
        killed.kill()
        start = time.monotonic()
        code, output = alive.wait(PATIENCE + 60)
        print(f"the other node ended after {time.monotonic() - start:.1f} s")
    assert code != 0
    assert "Error" in output and "did step 6" in output
    assert not list(tmp_path.glob("rank*.json")), "nobody finished"

    for again in (hosts, hosts[:1]):
        with ExitStack() as stack:
            results = finish(launch(stack, again, "fsdp2", str(STEPS), str(tmp_path), "--resume"), tmp_path)
        assert {result["type"] for result in results} == {"FSDP"}
        assert_same(results[0]["weights"], one_process, 4)
        assert results[0]["step"] == STEPS
