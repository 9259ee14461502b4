"""The READMEs: their code runs as printed, their links and paths lead somewhere, and the front page stays short."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import accel_weighting

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
SKIPPED = {"runs", "build", "dist"}
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part in SKIPPED or part.startswith(".") for part in path.relative_to(ROOT).parts)
)
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
PRINTED = {"CONTRIBUTING.md": "{'small': 1.8", "examples/README.md": "True\n"}


def blocks(page: str, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(TEXTS[page]) if found == language]


WITH_CODE = [page for page in TEXTS if blocks(page, "python")]


# ---- code --------------------------------------------------------------------------------------------------------


def test_there_is_code() -> None:
    assert len(blocks("README.md", "python")) >= 4
    assert {"README.md", "CONTRIBUTING.md", "examples/README.md", "accel_weighting/integrations/README.md"} == set(
        WITH_CODE
    )


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_python_blocks_run_in_order(
    page: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where a block writes
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        if "init_process_group" in "".join(blocks(page, "python")):
            monkeypatch.setenv(name, value)  # as torchrun does
    torch.manual_seed(0)
    scope: dict[str, object] = {"__name__": "readme"}
    missing: set[str] = set()
    left_out: set[str] = set()
    for block in blocks(page, "python"):
        lacking, (made, used) = not_installed(block), names_of(block)
        if lacking or used & (left_out - scope.keys()):
            missing |= lacking
            left_out |= made
        else:
            exec(compile(block, page, "exec"), scope)
    assert PRINTED.get(page, "") in capsys.readouterr().out
    if missing:
        pytest.skip(f"the others ran; not installed: {', '.join(sorted(missing))}")


def not_installed(block: str) -> set[str]:
    """What a block imports and is not there."""
    nodes = list(ast.walk(ast.parse(block)))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {root for root in (name.split(".")[0] for name in names) if find_spec(root) is None}


def names_of(block: str) -> tuple[set[str], set[str]]:
    """What a block gives names to, and the names that it reads."""
    nodes = list(ast.walk(ast.parse(block)))
    made = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    made |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    made |= {a.asname or a.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names}
    return made, {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def test_the_diff_is_a_working_loop() -> None:
    (diff,) = blocks("README.md", "diff")
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


# ---- the front page ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in accel_weighting.__all__ if n != "State"])
def test_every_public_name_is_in_the_readme(name: str) -> None:
    assert re.search(rf"\b{name}\b", TEXTS["README.md"])


def test_the_front_page_is_short() -> None:
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 330 and len(text.encode()) <= 26_000
    assert len(re.findall(r"^## ", FENCE.sub("", text), re.M)) <= 14


@pytest.mark.parametrize("page", TEXTS)
def test_no_line_of_prose_is_long(page: str) -> None:
    prose = FENCE.sub("", TEXTS[page]).splitlines()
    assert not [line for line in prose if len(line) > 160 and not line.startswith(("|", "!["))]


# ---- links, paths and commands -----------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """GitHub's anchors of all headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_leads_somewhere(page: str) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", TEXTS[page])):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    assert not broken


def commands() -> list[tuple[str, str]]:
    """Every command of every page: lines of bash blocks, and spans of code that begin with one."""
    found = []
    for page, text in TEXTS.items():
        spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
        lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
        starts = ("python ", "accelerate launch", "LAUNCH ", "bash ", "sbatch ", "pip ", "CONFIG=")
        found += [(page, command) for command in [*spans, *lines] if command.startswith(starts)]
    return found


def options(source: str) -> set[str]:
    """All options that a script declares, whether written out or made from a list of names."""
    return {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@pytest.mark.parametrize(("page", "command"), commands())
def test_every_command_exists(page: str, command: str) -> None:
    words = command.split()
    for word in words:
        if re.fullmatch(r"(?:CONFIG=)?[\w./]+/[\w./]+\.(?:py|yaml|sh|txt)", word) and not word.startswith("RUN"):
            assert (ROOT / word.removeprefix("CONFIG=")).is_file(), word
    if "-m" in words:
        module = words[words.index("-m") + 1]
        at, script = words.index("-m") + 1, ROOT / f"{module.replace('.', '/')}.py"
        if script.parent.is_dir() and module.partition(".")[0] in ("accel_weighting", "tests"):
            assert script.is_file() or (script.with_suffix("") / "__main__.py").is_file(), module
    else:
        at = next((i for i, word in enumerate(words) if word.endswith(".py")), len(words))
        script = ROOT / words[at] if at < len(words) else ROOT
    if script.is_file():
        shared = [path for name in ("check", "common", "text_data") if (path := script.parent / f"{name}.py").exists()]
        known = set().union(*(options(path.read_text()) for path in (script, *shared)))
        given = [word.partition("=")[0] for word in words[at + 1 :] if word.startswith("--")]
        assert not [option for option in given if option not in known]


def test_the_ci_runs_the_readmes_commands_word_for_word() -> None:
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    start = [block for block in blocks("README.md", "bash") if "venv" in block]
    launch, tests = (next(block for block in start if word in block) for word in ("multi_digits.py", "pytest"))
    for block in (launch, tests):
        new, *commands = block.strip().splitlines()
        assert new == "python -m venv .venv && source .venv/bin/activate"  # there, in a temporary folder
        for command in commands:
            assert [line for line in ci if line == command or line.startswith(f"{command} --output_dir ")], command
    rest = "python -m pytest -n 2 --dist loadfile -m full"
    assert f"`{rest}`" in TEXTS["tests/README.md"] and rest in ci
