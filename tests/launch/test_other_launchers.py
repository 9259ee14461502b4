"""The README's loops without Accelerate, by their own launchers: two processes give what one gives on whole batches."""

import ast
import re
import sys

import pytest

from tests.launch.launching import ROOT, run_to_end

PAGE = (ROOT / "accel_weighting" / "integrations" / "README.md").read_text()
FABRIC, TORCHRUN = (
    code for code in re.findall(r"^```python\n(.*?)^```$", PAGE, re.S | re.M) if "weighter.combine(" in code
)
NET = FABRIC[: FABRIC.index("fabric = ")]  # model and losses, which the second loop shares
COMMANDS = {
    "fabric": [sys.executable, "-m", "lightning_fabric.cli", "--accelerator", "cpu", "--strategy", "ddp"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
}


def ended(launcher, processes, accumulation, folder):
    """The weights and the sum of parameters that a loop printed."""
    code = FABRIC if launcher == "fabric" else NET.replace("from lightning_fabric import Fabric\n", "") + TORCHRUN
    assert "accumulation = 2" in FABRIC
    code = code.replace("accumulation = 2\n", "")
    script = folder / f"{launcher}_{processes}_{accumulation}.py"
    script.write_text(f"accumulation = {accumulation}\n{code}")
    number = {"fabric": "--devices", "torchrun": "--nproc_per_node"}[launcher]
    status, output = run_to_end(*COMMANDS[launcher], number, processes, script)
    assert status == 0, output
    printed = re.findall(r"^(\{.*\}) ([\d.]+)$", output, re.M)
    assert len(printed) == 1, output
    return [*ast.literal_eval(printed[0][0]).values(), float(printed[0][1])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One process, whole batches."""
    return ended("torchrun", 1, 1, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("launcher", COMMANDS)
def test_a_loop_without_accelerate_is_one_process_on_the_whole_batch(
    launcher, processes, accumulation, whole, tmp_path
):
    if launcher == "fabric":
        pytest.importorskip("lightning_fabric", reason="Lightning Fabric is not installed")
    assert ended(launcher, processes, accumulation, tmp_path) == pytest.approx(whole, rel=1e-12)
    assert abs(whole[0] - 1) > 1e-2  # the weights did move
