"""The papers' small experiments, as their scripts run them: exit code 0 says that every figure lies in its range."""

import sys

import pytest

from tests.launch.launching import run_to_end

# script → options of a budget that keeps all of them under a minute together
SCRIPTS = {
    "cov_closed_forms": ["--seeds", "2"],
    "gradnorm_toy": ["--quick"],
    "rotograd_toys": ["--quick", "--seeds", "4", "--steps", "500"],
    "multi_digits_synthetic": ["--quick", "--seeds", "1", "--steps", "800"],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_figures_lie_in_their_ranges(name, tmp_path):
    code, output = run_to_end(sys.executable, f"examples/papers/{name}.py", *SCRIPTS[name], "--output_dir", tmp_path)
    assert code == 0, output
    assert "All figures are inside." in output
    assert "**outside**" not in output
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_outside_of_its_range_is_an_error(tmp_path):
    options = ("--quick", "--steps", 5, "--output_dir", tmp_path)  # far from any equilibrium
    code, output = run_to_end(sys.executable, "examples/papers/gradnorm_toy.py", *options)
    assert code == 1
    assert "**outside**" in output
