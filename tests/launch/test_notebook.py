"""Launched from a notebook: `notebook_launcher` in one process, `debug_launcher` on two."""

import sys

import pytest

from tests.launch.launching import run_to_end

CELLS = """
import torch
from accelerate import Accelerator, {launcher}
from accel_weighting import GradNorm, Weighter

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)

    def forward(self, x):
        z = self.trunk(x)
        return {{"a": self.a(z).square().mean(), "b": self.b(z).square().mean()}}

def training_function():
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    weighter = Weighter(GradNorm(), ["a", "b"], accelerator=accelerator, heads={{"a": "a", "b": "b"}}, model=model)
    for step in range(3):
        weighter.backward(model(torch.randn(8, 4) + accelerator.process_index))
        optimizer.step()
        optimizer.zero_grad()
    blocks = weighter.statistics.micro_batches
    print(f"{{accelerator.num_processes}} processes, {{blocks}} blocks\\n", end="", flush=True)

{launcher}(training_function, num_processes={processes})
"""


@pytest.mark.parametrize(("launcher", "processes"), [("notebook_launcher", 1), ("debug_launcher", 2)])
def test_a_training_function_runs_from_a_notebook(tmp_path, launcher, processes):
    script = tmp_path / "cells.py"  # in a process of its own: launchers fork, which a process that trained must not
    script.write_text(CELLS.format(launcher=launcher, processes=processes))
    code, output = run_to_end(sys.executable, script)
    assert code == 0, output
    assert output.count(f"{processes} processes, {processes} blocks") == processes, output
