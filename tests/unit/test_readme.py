"""The README's code runs as printed, its diff is a working loop, and it names all that is exported."""

import re
from pathlib import Path

import pytest
import torch

import accel_weighting

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def test_there_is_code() -> None:
    assert len(BLOCKS) >= 4


def test_the_python_blocks_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    scope: dict[str, object] = {"__name__": "readme"}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), scope)
    assert "{'small': 1.8" in capsys.readouterr().out


def test_the_diff_is_a_working_loop() -> None:
    diff = re.search(r"```diff\n(.*?)```", TEXT, re.S).group(1)
    changed = [line for line in diff.splitlines() if line.startswith(("+", "-"))]
    assert len(changed) <= 6, "about four lines change"
    code = "\n".join(line[2:] for line in diff.splitlines() if not line.startswith("-"))

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.topic_head, self.mood_head = (torch.nn.Linear(a, b) for a, b in ((4, 8), (8, 2), (8, 1)))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            z = self.trunk(x)
            return {"topic": self.topic_head(z), "mood": self.mood_head(z)}

    def compute_losses(outputs: dict[str, torch.Tensor], targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {task: (output - targets).square().mean() for task, output in outputs.items()}

    torch.manual_seed(0)
    model = Net()
    data = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.randn(32, 1))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.trunk.weight.clone()
    scope = {"model": model, "optimizer": optimizer, "loader": loader, "compute_losses": compute_losses}
    code = code.replace("Accelerator()", "Accelerator(cpu=True)")
    exec(compile(code, str(README), "exec"), scope)
    weights = scope["weighter"].weights
    assert sum(weights.values()) == pytest.approx(2) and weights["topic"] != 1
    assert not torch.equal(before, model.trunk.weight)


@pytest.mark.parametrize("name", [n for n in accel_weighting.__all__ if n != "State"])
def test_every_public_name_is_in_the_readme(name: str) -> None:
    assert re.search(rf"\b{name}\b", TEXT)


def test_the_ci_runs_the_readmes_commands_word_for_word() -> None:
    ci = (README.parent / ".ci" / "run").read_text()
    commands = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    launch, tests = (next(c.strip() for c in commands if word in c) for word in ("multi_digits.py", "pytest"))
    assert launch in ci and tests in ci.splitlines()
