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


RERUN = '''
import gc, warnings, weakref

CELLS = {
    "model": """
import torch
from accelerate import Accelerator
from accel_weighting import GradNorm, Weighter
accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = torch.nn.ModuleDict({"trunk": torch.nn.Linear(4, 4), "a": torch.nn.Linear(4, 1), "b": torch.nn.Linear(4, 1)})
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
""",
    "weighter": """
heads = {"a": "a", "b": "b"}
weighter = Weighter(GradNorm(), ["a", "b"], accelerator=accelerator, heads=heads, model=model)
""",
    "train": """
for step in range(3):
    z = model["trunk"](torch.randn(8, 4, generator=torch.Generator().manual_seed(step)))
    weighter.backward({"a": model["a"](z).square().mean(), "b": 9 * model["b"](z).square().mean()})
    optimizer.step()
    optimizer.zero_grad()
""",
}
notebook, weighters = {"__name__": "__main__"}, []


def run(*names):
    for name in names:
        exec(compile(CELLS[name], name, "exec"), notebook)
        if name == "weighter":
            weighters.append(weakref.ref(notebook["weighter"]))
    gc.collect()
    alive = sum(one() is not None for one in weighters)
    registered = len(notebook["accelerator"]._custom_objects)
    print(list(notebook["weighter"].weights.values()), notebook["weighter"].history[-1][0], alive, registered)


with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    run("model", "weighter", "train")
    run("weighter", "train")
    run("weighter", "weighter", "train")
    run("model", "weighter", "train")
    run("train")
    print(sum("the new one replaces it" in str(one.message) for one in said), "replaced")
'''


def test_cells_that_run_again_are_a_notebook_that_begins_anew(tmp_path):
    """The weighter's cell takes the older one's place; the model's starts over; the training's goes on."""
    script = tmp_path / "rerun.py"
    script.write_text(RERUN)
    code, output = run_to_end(sys.executable, script)
    assert code == 0, output
    *runs, replaced = output.strip().splitlines()[-6:]
    assert len(set(runs[:4])) == 1 and runs[0].endswith(" 2 1 1"), output
    assert runs[4].endswith(" 5 1 1") and runs[4] != runs[0], output
    assert replaced == "3 replaced", output


def test_a_training_function_is_launched_twice_from_one_notebook(tmp_path):
    script = tmp_path / "cells.py"
    script.write_text(
        CELLS.format(launcher="debug_launcher", processes=2) + "\ndebug_launcher(training_function, num_processes=2)\n"
    )
    code, output = run_to_end(sys.executable, script)
    assert code == 0, output
    assert output.count("2 processes, 2 blocks") == 4, output
