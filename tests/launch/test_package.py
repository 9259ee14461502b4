"""The files of a release, built and installed as a user installs them."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import BytesParser
from pathlib import Path

import pytest

import accel_weighting
from tests.launch.launching import environment

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```.*?^```$", re.S | re.M)


def run(*command: object, cwd: Path = ROOT) -> str:
    """The output of a command that must end well, which does not see this repository but in its arguments."""
    env = environment()
    del env["PYTHONPATH"]
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def metadata(release: tuple[Path, Path]) -> Message:
    with zipfile.ZipFile(release[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return BytesParser().parsebytes(wheel.read(name))


def test_twine_finds_nothing_wrong(release: tuple[Path, Path]) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *release)


def test_the_wheel_holds_the_package_and_the_launch_configurations(release: tuple[Path, Path]) -> None:
    package = {p for p in (ROOT / "accel_weighting").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    wanted = {str(path.relative_to(ROOT)): path for path in package}
    wanted |= {f"accel_weighting/_launch_configs/{p.name}": p for p in (ROOT / "launch_configs").iterdir()}
    with zipfile.ZipFile(release[1]) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert found == wanted.keys() and "accel_weighting/py.typed" in found
        assert all(wheel.read(name) == path.read_bytes() for name, path in wanted.items())


def test_the_sdist_holds_all_that_the_tests_need(release: tuple[Path, Path]) -> None:
    with tarfile.open(release[0]) as sdist:
        found = {name.partition("/")[2] for name in sdist.getnames()}
    for folder in ("accel_weighting", "examples", "launch_configs", "tests"):
        files = [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".yaml", ".sh", ".md", ".png")]
        assert files and {str(path.relative_to(ROOT)) for path in files} <= found
    assert {"CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "constraints.txt", "pyproject.toml"} <= found


def test_the_package_page_is_the_readme_without_ways_into_the_repository(metadata: Message) -> None:
    readme, page = (ROOT / "README.md").read_text(), metadata.get_payload(decode=True).decode()
    assert metadata["Version"] == accel_weighting.__version__
    assert FENCE.findall(page) == FENCE.findall(readme) != []
    prose = FENCE.sub("", page)
    assert not re.findall(r"!\[", prose)
    links = re.findall(r"\]\(([^)\s]+)\)", prose)
    assert links and all(link.startswith("https://") for link in links)
    headings = [re.findall(r"^#+ .*$", text, re.M) for text in (prose, FENCE.sub("", readme))]
    assert headings[0] == headings[1]


def new_environment(folder: Path, *install: object) -> Path:
    """Python of a new virtual environment with this project installed, which borrows torch and Accelerate from here."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", *install)
    (site,) = folder.glob("lib/python*/site-packages")
    # After its own packages; `.pth` files in that folder are not read.
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"])
    return python


def where(python: Path, folder: Path) -> Path:
    code = "import accel_weighting.launch_configs as m; print(next(iter(m.configurations().values())).parent)"
    return Path(run(python, "-c", code, cwd=folder).strip())


def test_the_wheel_writes_a_configuration_and_the_self_check_passes_with_it(release, tmp_path) -> None:
    python = new_environment(tmp_path / "venv", release[1])
    assert where(python, tmp_path).is_relative_to(tmp_path)
    run(python, "-m", "accel_weighting.launch_configs", "cpu_2", cwd=tmp_path)
    launch = (python, "-m", "accelerate.commands.accelerate_cli", "launch")
    options = ("--cpu", "--expect", 2, "--steps", 3, "--timings", 0)
    config = ("--config_file", "launch_configs/cpu_2.yaml")
    output = run(*launch, *config, "-m", "accel_weighting.selfcheck", *options, cwd=tmp_path)
    assert f"accel_weighting {accel_weighting.__version__}" in output and "PASSED" in output


def test_an_editable_install_reads_the_folder_of_the_repository(tmp_path) -> None:
    python = new_environment(tmp_path / "venv", "-e", ROOT)
    assert where(python, tmp_path) == ROOT / "launch_configs"
