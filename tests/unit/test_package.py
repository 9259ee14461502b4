"""What a release consists of: one version, dated changes, and launch configurations that the package can write."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import accel_weighting
from accel_weighting import launch_configs

ROOT = Path(__file__).parents[2]
VERSION = accel_weighting.__version__
FILES = {p.stem: p for p in (ROOT / "launch_configs").iterdir() if p.suffix != ".md"}


# ---- the version --------------------------------------------------------------------------------------------------


def test_the_version_is_written_once_and_quoted_where_it_is_shown() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)
    quoted = re.findall(r"version = \{(.+?)\}", (ROOT / "README.md").read_text())
    quoted += re.findall(r"^accel_weighting (\d\S+)$", (ROOT / "launch_configs" / "README.md").read_text(), re.M)
    assert quoted == [VERSION, VERSION]


def test_the_changes_of_this_version_are_dated() -> None:
    heads = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heads[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(VERSION)}\] - \d{{4}}-\d\d-\d\d", heads[1])


def test_the_lowest_versions_are_those_that_are_declared() -> None:
    """.ci/lowest.txt pins every lower bound that what is tested on lowest versions has."""
    declared = (ROOT / "pyproject.toml").read_text()
    needed = declared.partition("dependencies = [")[2].partition("\n]\n")[0]
    extras = [
        re.search(rf"^{name} = \[(.*?)\](?: +#.*)?$", declared, re.M | re.S)
        for name in ("torchjd", "trainer", "examples")
    ]
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)[^"]*"', needed + "".join(found[1] for found in extras if found)))
    lines = (ROOT / ".ci/lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert len(bounds) >= 9 and pinned.keys() == bounds.keys()
    assert all((pinned[name] + ".").startswith(f"{bound}.") for name, bound in bounds.items())


def test_every_python_that_is_named_is_tried_by_the_workflows() -> None:
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    everything, versions = jobs["all"]["steps"], jobs["versions"]["strategy"]["matrix"]["include"]
    tried = [step["with"]["python-version"] for step in everything if "python" in step.get("uses", "")]
    tried += [row["python"] for row in versions]
    assert set(tried) == set(named) and len(named) == 4
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == ["bash .ci/run", "bash .ci/versions ${{ matrix.versions }}"]
    script = (ROOT / ".ci/versions").read_text()
    assert {row["versions"] for row in versions} == set(re.findall(r"^    (\w+)\) constraints=", script, re.M))
    files = re.findall(r"^    \w+\) constraints=(\S+) ;;$", script, re.M)
    assert len(files) == 2 and all((ROOT / file).is_file() for file in files)


# ---- launch configurations ----------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `python -m accel_weighting.launch_configs`."""
    code = 0
    try:
        launch_configs.main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_all_configurations_of_the_repository_can_be_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, *FILES)
    assert code == 0 and len(FILES) == 10
    for name, file in FILES.items():
        assert (tmp_path / "launch_configs" / file.name).read_bytes() == file.read_bytes()
        assert f"wrote launch_configs/{file.name}\n" in out, name


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_the_configurations_are_listed_with_what_they_are_for(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and not list(tmp_path.iterdir())
    listed = dict(re.findall(r"^  (\w+) +(\S.*)$", out, re.M))
    assert {name: words for name, words in listed.items() if name in FILES}.keys() == FILES.keys()
    assert listed["cpu_2"] == "Two processes on one CPU"


def test_a_file_is_replaced_only_by_force(capsys, tmp_path):
    (tmp_path / "ddp.yaml").write_text("mine")
    code, _, err = run(capsys, "fsdp2", "ddp", "--folder", str(tmp_path))
    assert code == 2 and "ddp.yaml is there already" in err and "--force" in err
    assert (tmp_path / "ddp.yaml").read_text() == "mine" and not (tmp_path / "fsdp2.yaml").exists()
    assert run(capsys, "fsdp2", "ddp", "--folder", str(tmp_path), "--force")[0] == 0
    assert (tmp_path / "ddp.yaml").read_bytes() == FILES["ddp"].read_bytes() and (tmp_path / "fsdp2.yaml").exists()


def test_a_misspelt_name_is_guessed_and_nothing_is_written(capsys, tmp_path):
    code, _, err = run(capsys, "fsdp2.yaml", "zero22", "--folder", str(tmp_path / "new"))
    assert code == 2 and "'zero22' (did you mean 'zero2'?)" in err and "hsdp" in err
    assert not (tmp_path / "new").exists()


def test_the_command_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "accel_weighting.launch_configs", "cpu_2.yaml", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "cpu_2.yaml").read_text())["num_processes"] == 2
