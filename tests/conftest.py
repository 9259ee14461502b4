"""What `python -m pytest` runs, and what only `python -m pytest -m full` does: README.md in this folder says it in words.

Two rules mark a test `full`: it is slow and stands in `FULL`, or has the mark already; or it is one more combination of
parameters whose every value occurs in a case before it.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

FULL: dict[str, str] = {}
"""Files and tests that are too slow for the short run, and what stands for them there."""

EVERY_CASE = ("distributed/test_negative_controls.py",)
"""Files of which the short run takes every case."""


def name_of(item: pytest.Item) -> tuple[str, str]:
    """The file of a test inside this folder, or elsewhere, and the test with it, without parameters."""
    file = item.path.relative_to(TESTS).as_posix() if item.path.is_relative_to(TESTS) else item.path.as_posix()
    return file, f"{file}::{getattr(item, 'originalname', None) or item.name}"


def adds_nothing(item: pytest.Item, seen: dict[str, set[tuple[int, str]]]) -> bool:
    """Whether every `parametrize` of a test had this case's choice in a case before, which is noted in `seen`."""
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return False
    values = set(enumerate(callspec._idlist))  # one id for each `parametrize`; the public id runs them together
    known = seen[name_of(item)[1]]
    new = values - known
    known |= values
    return not new


@pytest.hookimpl(tryfirst=True)  # before pytest looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: dict[str, set[tuple[int, str]]] = defaultdict(set)
    for item in items:
        file, test = name_of(item)
        if item.get_closest_marker("full"):
            continue
        if file in FULL or test in FULL or (adds_nothing(item, seen) and file not in EVERY_CASE):
            item.add_marker(pytest.mark.full)
