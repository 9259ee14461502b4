"""The short run holds what README.md in the tests' folder promises of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.engines import ROWS
from tests.distributed.test_engines import FAMILIES

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
FEWEST = 1000
NEGATIVE_CONTROLS = (
    "tests/distributed/test_negative_controls.py",
    "tests/distributed/test_engines.py::test_the_command_turns_red_when_one_thing_is_broken",
    "tests/unit/test_derivatives.py::test_the_comparison_notices_a_join_that_cannot_be_differentiated",
)
REPRESENTATIVES = (
    "tests/distributed/test_engines.py::test_one_choice_of_every_row_follows_one_process",
    "tests/distributed/test_invariance.py::test_any_cut_of_the_same_batch_gives_the_same_trajectory",
    "tests/launch/test_multi_digits.py::test_methods_are_compared_on_two_processes",
    "tests/launch/test_launch_configs.py::test_on_one_machine[cpu_2]",
)


def conftest(request: pytest.FixtureRequest) -> Any:
    return request.config.pluginmanager.get_plugin(str(TESTS / "conftest.py"))


def collected(marked: str) -> list[str]:
    """The tests that pytest would run, each with its parameters."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", marked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.fixture(scope="module")
def short_and_rest(request: pytest.FixtureRequest) -> tuple[list[str], list[str]]:
    """Both parts: as this very run knows them where it began with all tests, which saves collecting them again."""
    known = request.config.stash.get(conftest(request).PARTS, None)
    if known and request.config.args_source is request.config.ArgsSource.TESTPATHS:
        return known
    return collected("not full"), collected("full")


def test_it_has_many_tests_of_every_family(short_and_rest, request: pytest.FixtureRequest) -> None:
    short, _ = short_and_rest
    assert len(short) >= FEWEST
    families = Counter("/".join(name.split("/")[:2]) if name.startswith("tests/") else "docstrings" for name in short)
    assert families.keys() >= {"tests/methods", "tests/unit", "tests/distributed", "tests/launch", "docstrings"}
    files = {name.partition("::")[0] for name in short}
    cases = conftest(request).CASES
    for folder in ("methods", "unit", "distributed"):
        there = {f"{folder}/{path.name}" for path in (TESTS / folder).glob("test_*.py")}
        missing = {name for name in there if f"tests/{name}" not in files and cases.get(name) != 0}
        assert not missing, f"nothing of {missing} is in the short run"


def test_it_has_every_engine_the_main_job_and_every_negative_control(short_and_rest) -> None:
    short, rest = short_and_rest
    assert all(any(row.engine.startswith(family) for row in ROWS) for family in FAMILIES)
    for name in REPRESENTATIVES:
        assert any(test.startswith(name) for test in short), name
    for name in NEGATIVE_CONTROLS:
        assert any(test.startswith(name) for test in short), name
        assert not any(test.startswith(name) for test in rest), name


def test_the_readme_lists_what_is_in_the_rest(short_and_rest, request: pytest.FixtureRequest) -> None:
    """Its two tables have the files and launches of conftest.py, all of which exist."""
    text = (TESTS / "README.md").read_text().split("## The short run and the rest")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([^`]+\.py)` \|", text, re.M) == list(conftest(request).CASES)
    launches = re.findall(r"^- `(launch/.+?)`", text, re.M)
    assert launches == list(conftest(request).LAUNCHES)
    names = [test.removeprefix("tests/").partition("[")[0] for part in short_and_rest for test in part]
    tests = {f"{name.partition('::')[0]}::{name.rpartition('::')[2]}" for name in names}  # without a class
    wanted = [f"{file}::{test}" for file, of in conftest(request).CASES.items() if isinstance(of, dict) for test in of]
    assert set(wanted + launches) <= tests
    files = {test.partition("::")[0] for test in tests}
    assert conftest(request).CASES.keys() <= files


def test_launches_of_the_short_run_are_there(short_and_rest, request: pytest.FixtureRequest) -> None:
    short, _ = short_and_rest
    launched = [test for test in short if test.startswith("tests/launch/")]
    assert {test.removeprefix("tests/").partition("[")[0] for test in launched} == set(conftest(request).LAUNCHES)
    assert len(launched) == len(conftest(request).LAUNCHES)
