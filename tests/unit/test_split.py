"""The short run holds what README.md in the tests' folder promises of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

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


def collected(marked: str) -> list[str]:
    """The tests that pytest would run, each with its parameters."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", marked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.fixture(scope="module")
def short_and_rest(request: pytest.FixtureRequest) -> tuple[list[str], list[str]]:
    """Both parts: as this very run knows them where it began with all tests, which saves collecting them again."""
    known = request.config.stash.get(request.config.pluginmanager.get_plugin(str(TESTS / "conftest.py")).PARTS, None)
    if known and request.config.args_source is request.config.ArgsSource.TESTPATHS:
        return known
    return collected("not full"), collected("full")


def test_it_has_many_tests_of_every_family(short_and_rest) -> None:
    short, _ = short_and_rest
    assert len(short) >= FEWEST
    families = Counter("/".join(name.split("/")[:2]) if name.startswith("tests/") else "docstrings" for name in short)
    assert families.keys() >= {"tests/methods", "tests/unit", "tests/distributed", "tests/launch", "docstrings"}
    files = {name.partition("::")[0] for name in short}
    for folder in ("methods", "unit"):
        missing = {f"tests/{folder}/{path.name}" for path in (TESTS / folder).glob("test_*.py")} - files
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
    """The table of slow tests is that of conftest.py, each row is a test that exists, and says what stands for it."""
    cases = request.config.pluginmanager.get_plugin(str(TESTS / "conftest.py")).CASES
    text = (TESTS / "README.md").read_text().split("## The short run and the rest")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(.+?)` \| (\d+) \| (.+?) \|$", text, re.M)
    assert {name: int(number) for name, number, _ in rows} == cases
    everything = [test.removeprefix("tests/") for part in short_and_rest for test in part]
    for name in cases:
        assert any(re.match(rf"{re.escape(name)}(::|\[|$)", test) for test in everything), f"{name} is no test"
