"""What must not grow unnoticed: the public names, who imports whom, and what the core needs."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import accel_weighting

PACKAGE = Path(accel_weighting.__file__).parent
TESTS = Path(__file__).parents[1]
FILES = sorted(PACKAGE.rglob("*.py"))

# module or subpackage → what it may import of this package; imports run one way
MAY = {
    "statistics": set(),
    "methods": {"statistics", "methods"},
    "errors": set(),
    "launch_configs": set(),
    "lifetime": set(),
    "optimizers": set(),
    "tracing": set(),
    "aliases": set(),
    "rows": set(),
    "structures": {"errors"},
    "pieces": set(),
    "transfer": set(),
    "contexts": set(),
    "kernels": {"pieces", "transfer"},
    "layers": {"errors", "pieces"},
    "measure": {"contexts", "kernels", "layers", "pieces"},
    "window": {"statistics", "transfer"},
    "checks": {"errors", "statistics", "window"},
    "modules": {"checks", "errors"},
    "parameters": {"aliases", "modules"},
    "growth": {"statistics"},
    "history": {"statistics"},
    "plot": {"history"},
    "checkpoint": {"statistics"},
    "state": {"checkpoint", "growth", "history", "statistics"},
    "processes": {"checks", "errors", "transfer"},
    "verdict": {"errors", "processes", "state", "statistics", "window"},
    "rotations": {"measure", "state", "statistics", "window"},
    "join": {"contexts", "measure", "rotations", "tracing"},
    "walk": {"aliases", "join", "rows"},
    "audit": {"errors", "measure", "walk"},
    "linearity": {"join", "walk"},
    "losses": {"checks", "errors", "join", "statistics", "transfer"},
    "steps": {"contexts", "losses", "processes", "state", "statistics", "verdict", "window"},
    "heads": {"checks", "errors", "modules", "tracing"},
    "shared_layer": {"errors", "join", "layers", "modules"},
    "gathering": {
        *("contexts", "errors", "join", "measure", "parameters", "rotations", "rows", "shared_layer", "window"),
    },
    "branch": {
        *("errors", "gathering", "heads", "join", "parameters", "rotations", "rows", "shared_layer", "statistics"),
        *("structures", "tracing"),
    },
    "reading": {"audit", "branch", "history", "optimizers", "rotations", "statistics", "steps"},
    "loop": {
        *("audit", "branch", "checks", "errors", "losses", "optimizers", "processes", "rotations", "state"),
        *("statistics", "steps", "verdict", "window"),
    },
    "sharing": {"checks", "loop", "parameters", "rows", "verdict", "window"},
    "coefficients": {"branch", "linearity", "loop", "losses", "statistics", "window"},
    "weighter": {
        *("audit", "branch", "checks", "coefficients", "errors", "growth", "heads", "lifetime", "losses", "modules"),
        *("optimizers", "parameters", "processes", "reading", "rotations", "shared_layer", "sharing"),
        *("state", "statistics", "steps", "verdict", "window"),
    },
    "integrations": {"losses", "methods", "statistics", "weighter", "integrations"},
    "selfcheck": {"__init__", "processes", "selfcheck"},
    "__init__": {"methods", "plot", "statistics", "weighter"},
}

# the same inside of the self-check
IN_SELFCHECK = {
    "__init__": set(),
    "cpu": set(),
    "reference": set(),
    "report": {"reference"},
    "__main__": {"__init__", "cpu", "reference", "report"},
}


def unit(path: Path) -> str:
    """The first part of a module's name inside the package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    here = ("accel_weighting", *path.relative_to(PACKAGE).with_suffix("").parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: -node.level]) + "." if node.level else ""
            module = base + (node.module or "")
            names |= {f"{module.rstrip('.')}.{alias.name}" for alias in node.names}
    return names


def test_there_are_modules() -> None:
    assert len(FILES) > 20
    assert MAY.keys() == {unit(path) for path in FILES}


def test_the_table_of_imports_has_no_circle() -> None:
    order = list(MAY)
    for name, others in MAY.items():
        if name not in ("selfcheck", "__init__"):
            assert all(order.index(other) <= order.index(name) for other in others), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_can_be_read_at_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


def test_a_weighter_owns_few_things() -> None:
    weighters = [
        accel_weighting.Weighter(accel_weighting.CoVWeighting(), ["a", "b"]),
        accel_weighting.Weighter(accel_weighting.RotoGrad(), ["a", "b"], max_losses={"a": 1.0}),
    ]
    for weighter in weighters:
        z = weighter.branch(torch.randn(3, 2, requires_grad=True))
        weighter.backward({task: x.square().mean() for task, x in z.items()})
        assert len(vars(weighter)) <= 18


def test_the_linter_and_the_type_checker_are_as_strict_as_they_can_be() -> None:
    """The package is under all of their rules, with no function above a complexity of 10."""
    tomllib: Any = pytest.importorskip("tomllib")  # of Python 3.11
    tools = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["tool"]
    lint = tools["ruff"]["lint"]
    assert lint["mccabe"]["max-complexity"] == 10 and "C90" in lint["select"] and tools["mypy"]["strict"]
    assert all(files.startswith(("tests/", "examples/")) for files in lint["per-file-ignores"])
    assert not any("noqa: C901" in path.read_text() for path in FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    names = imported(path)
    ours = {name.split(".")[1] for name in names if name.startswith("accel_weighting.")}
    ours = {"__init__" if name in (*accel_weighting.__all__, "__version__") else name for name in ours} - {unit(path)}
    assert ours <= MAY[unit(path)], f"{path.name} must not import {ours - MAY[unit(path)]}"
    outside = {name for name in names if not name.startswith("accel_weighting")}
    assert unit(path) == "processes" or not any(n.startswith("torch.distributed") for n in outside)
    allowed = ("loop", "weighter", "processes", "selfcheck", "integrations")
    assert unit(path) in allowed or not any(n.split(".")[0] == "accelerate" for n in outside)
    assert not any(n.startswith("torch.autograd") for n in outside) or unit(path) in (
        "audit",
        "branch",
        "gathering",
        "join",
    )


@pytest.mark.parametrize("path", [p for p in FILES if unit(p) == "selfcheck"], ids=lambda path: path.stem)
def test_imports_inside_the_selfcheck_run_one_way(path: Path) -> None:
    names = [name.split(".")[2] for name in imported(path) if name.startswith("accel_weighting.selfcheck.")]
    modules = {name if (PACKAGE / "selfcheck" / f"{name}.py").exists() else "__init__" for name in names}
    assert modules <= IN_SELFCHECK[path.stem]


def test_the_core_imports_with_the_core_dependencies_alone() -> None:
    """Nothing optional is imported until it is used."""
    optional = ["matplotlib", "transformers", "torchjd", "deepspeed", "sklearn", "datasets", "peft", "trl", "triton"]
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({optional!r}))\n"  # None makes an import fail
        "import accel_weighting, accel_weighting.weighter\n"
        "weighter = accel_weighting.Weighter(accel_weighting.GradNorm(), ['a', 'b'])\n"
        "print(weighter.weights)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "{'a': 1.0, 'b': 1.0}", done.stderr


def test_public_names() -> None:
    assert sorted(accel_weighting.__all__) == sorted(
        [
            "AlignedMTL",
            "CAGrad",
            "CarryForward",
            "Clamp",
            "CoBa",
            "CoVWeighting",
            "ConFIG",
            "CosineGate",
            "DBMTL",
            "DualProj",
            "DynamicWeightAverage",
            "EqualWeighting",
            "Every",
            "FAMO",
            "FairGrad",
            "GeometricLoss",
            "GradNorm",
            "GradVac",
            "GradientBalancer",
            "IMTLG",
            "IMTLL",
            "MGDA",
            "Method",
            "NTKWeighting",
            "NashMTL",
            "PCGrad",
            "RandomLossWeighting",
            "ReLoBRaLo",
            "ReferenceNorm",
            "RotoGrad",
            "RotoGradNorm",
            "SLAW",
            "ScaleInvariant",
            "Smooth",
            "SmoothTchebycheff",
            "SoftAdapt",
            "State",
            "StaticWeighting",
            "Statistics",
            "TorchJDWeighting",
            "UPGrad",
            "UWSO",
            "UncertaintyWeighting",
            "Warmup",
            "Weighter",
            "plot_history",
        ]
    )


def test_every_failure_of_the_readme_is_shown_by_tests_that_exist() -> None:
    """The table in tests/README.md has 35 rows; each names one of four outcomes, and tests that are there."""
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", (TESTS / "README.md").read_text(), re.M)
    assert [int(number) for number, *_ in rows] == list(range(1, 36))
    for number, _, outcome, shown_by in rows:
        kinds = re.findall(r"\*\*(.+?)\*\*", outcome)
        assert kinds and set(kinds) <= {"held", "error on all", "error on this process", "fine"}, number
        tests = re.findall(r"`([\w/]+\.py)::(test_\w+)`", shown_by)
        assert tests and len(tests) == shown_by.count("::"), number
        for file, name in tests:
            assert re.search(rf"^def {name}\(", (TESTS / file).read_text(), re.M), f"{number}: {file}::{name}"


def test_every_public_name_has_a_docstring() -> None:
    for name in set(accel_weighting.__all__) - {"State"}:
        assert (getattr(accel_weighting, name).__doc__ or "").strip(), name


def test_every_loop_is_shown_by_tests_that_are_there() -> None:
    """The table of loops in tests/README.md."""
    text = (TESTS / "README.md").read_text().split("## Loops")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (`[^|]+`) \|$", text, re.M)
    assert len(rows) > 18
    for loop, outcome, shown_by in rows:
        assert re.search(r"exact|refused|quiet|warning|same|weighed|loads|flat", outcome), loop
        for name in re.findall(r"`(.+?)`", shown_by):
            path, _, test = name.partition("::")
            assert re.search(rf"^def {test}\(", (TESTS / path).read_text(), re.M), name


def test_every_shape_of_model_is_shown_by_tests_that_are_there() -> None:
    """The table of models in tests/README.md: each row is exact, refused or said, and shown by tests."""
    text = (TESTS / "README.md").read_text().split("## Models")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (`.+?`) \|$", text, re.M)
    assert len(rows) > 25
    for model, outcome, shown_by in rows:
        assert re.search(r"exact|refuse|warning|said|fails without", outcome), model
        for name in re.findall(r"`(.+?)`", shown_by):
            path, _, test = name.partition("::")
            assert re.search(rf"^def {test}\(", (TESTS / path).read_text(), re.M), name
