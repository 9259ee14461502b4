"""A run that is killed at any moment, saving included, goes on from the latest whole checkpoint.

All legs of a run are forks of one process that has only imported things: a tenth of a second each.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.setups import build
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 7, 2


def train(
    folder: Path,
    after_step: Callable[[int], None] = lambda step: None,
    before_save: Callable[[int], object] = lambda step: None,
    anew: bool = False,
) -> None:
    """What the examples do: go on from the latest checkpoint, save every other step, write the results at the end."""
    from common import Progress, resume, save_checkpoint

    setup, progress = build("plain"), Progress()
    setup.accelerator.register_for_checkpointing(progress)
    if not anew:
        resume(setup.accelerator, folder / "checkpoints", progress)
    first = progress.step
    while progress.step < STEPS:
        setup.weighter.backward(setup.losses(progress.step))
        setup.optimizer.step()
        setup.optimizer.zero_grad()
        progress.step += 1
        after_step(progress.step)
        if progress.step % EVERY == 0:
            before_save(progress.step)
            save_checkpoint(setup.accelerator, folder / "checkpoints", progress.step)
    result = {
        "first": first,
        "weights": setup.weighter.weights,
        "average": setup.weighter.average_weights,
        "history": setup.weighter.history,
        "parameters": {name: p.tolist() for name, p in setup.inner.named_parameters()},
    }
    (folder / "result.json").write_text(json.dumps(result))


def fork(act: Callable[[], None]) -> int:
    """The process that does `act` and ends."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end_of(pid: int) -> int:
    """Exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_after_step(folder: Path, last: int) -> int:
    return end_of(fork(lambda: train(folder, lambda step: die() if step == last else None)))


CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


def killed_in_save(folder: Path, at_step: int, number: int, anew: bool = False) -> int:
    """Killed before the so manieth change to the folder that a save makes; 0 where it makes fewer."""

    def act() -> None:
        left = number

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if armed and event in CHANGES and (event == "os.remove" or event == "os.rmdir" or inside(arguments[0])):
                left -= 1
                if left < 0:
                    die()

        def inside(path: Any) -> bool:
            return isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(str(folder))

        armed = False

        def arm(step: int) -> None:
            nonlocal armed
            armed = step == at_step

        sys.addaudithook(hook)
        train(folder, before_save=arm, after_step=lambda step: arm(0), anew=anew)

    return end_of(fork(act))


def killed_by_the_clock(folder: Path, at_step: int, share: float, lasts: float) -> int:
    """Killed when a share of the time that a save lasts is over."""
    ready, go = os.pipe()

    def act() -> None:
        train(
            folder,
            after_step=lambda step: time.sleep(60 if step > at_step else 0),
            before_save=lambda step: os.write(go, b"x") if step == at_step else None,
        )

    pid = fork(act)
    os.close(go)
    os.read(ready, 1)
    os.close(ready)
    begin = time.perf_counter()
    while time.perf_counter() - begin < share * lasts:
        pass
    os.kill(pid, signal.SIGKILL)
    return end_of(pid)


def how_long_a_save_lasts(folder: Path) -> float:
    times: list[float] = []

    def act() -> None:
        def after(step: int) -> None:
            if step == 5:
                (folder / "lasts").write_text(str(time.perf_counter() - times[0]))

        train(folder, after, before_save=lambda step: times.append(time.perf_counter()) if step == 4 else None)

    assert end_of(fork(act)) == 0
    return float((folder / "lasts").read_text())


def finish(folder: Path) -> dict[str, Any]:
    """Goes on to the end; what it wrote, and what is left of checkpoints."""
    assert end_of(fork(lambda: train(folder))) == 0, "a resumed run failed"
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return {**json.loads((folder / "result.json").read_text()), "left": left}


def all_deaths(folder: Path) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "examples"))
    import common

    def new(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    warm = build("plain")  # what is imported at the first use is imported once for all forks; no backward before them
    common.save_checkpoint(warm.accelerator, folder / "warm", 0)
    common.resume(warm.accelerator, folder / "warm", common.Progress())

    found: dict[str, Any] = {"whole": finish(new("whole")), "deaths": []}
    for last in range(1, STEPS + 1):
        here = new(f"after step {last}")
        assert killed_after_step(here, last) == -signal.SIGKILL
        found["deaths"].append((f"after step {last}", (last - 1) // EVERY * EVERY, finish(here)))
    # The first save, one that replaces another, and one of a run that begins anew where there is one of that step.
    for at_step, anew in ((2, False), (4, False), (2, True)):
        number = 0
        while True:
            here = new(f"save {at_step}{' anew' * anew}, change {number}")
            if anew:
                killed_after_step(here, 3)
            code = killed_in_save(here, at_step, number, anew)
            if code == 0:
                break
            assert code == -signal.SIGKILL
            found["deaths"].append((here.name, None, finish(here)))
            number += 1
        found[f"changes at {at_step}{' anew' * anew}"] = number
    lasts = how_long_a_save_lasts(new("lasts"))
    for share in random.Random(0).choices([i / 20 for i in range(20)], k=12):
        here = new(f"share {share} {len(found['deaths'])}")
        assert killed_by_the_clock(here, 4, share, lasts) == -signal.SIGKILL
        found["deaths"].append((here.name, None, finish(here)))
    return found


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("killed")
    return run_ranks(all_deaths, 1, folder, folder, timeout=240)[0]


def test_killed_between_any_two_steps_or_in_a_save_a_run_resumes_to_the_uninterrupted_end(deaths) -> None:
    whole = deaths["whole"]
    assert whole["first"] == 0 and whole["left"] == ["step_000006"]
    assert 5 <= deaths["changes at 2"] < deaths["changes at 4"] and deaths["changes at 2"] < deaths["changes at 2 anew"]
    for name, first, run in deaths["deaths"]:
        for what in ("weights", "average", "history", "parameters"):
            assert run[what] == whole[what], f"{name}: {what}"
        assert run["left"] == ["step_000006"], name
        if first is not None:
            assert run["first"] == first, name
        else:
            assert run["first"] in ((0, 2) if "save 2," in name else (2,) if "anew" in name else (2, 4)), name
    firsts = {run["first"] for name, _, run in deaths["deaths"] if name.startswith("save 4")}
    assert firsts == {2, 4}, "a save was never interrupted before, or never after, its checkpoint was whole"
