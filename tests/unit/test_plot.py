"""Pictures from a run's own record, whatever it was kept in."""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

from accel_weighting import CoVWeighting, GradNorm, Smooth, Weighter, plot_history
from accel_weighting.plot import held_steps, main, plot_runs, read_runs, smooth

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def weighter():
    weighter = Weighter(GradNorm(alpha=0.5), ["a", "b", "c"], max_skipped_steps=3)
    torch.manual_seed(0)
    W = torch.randn(4, 4, requires_grad=True)
    for step in range(60):
        x = torch.randn(8, 4)
        losses = {
            task: (k + 1) * (z @ torch.ones(4)).square().mean() for k, (task, z) in enumerate(aliases(weighter, x @ W))
        }
        if step in (20, 41):
            losses["b"] = losses["b"] * torch.inf
        if step < 10:
            losses["a"] = losses["a"].new_zeros(())  # a comes late
            weighter.backward(losses, num_items={"a": 0})
        else:
            weighter.backward(losses)
    return weighter


def aliases(weighter, z):
    return weighter.branch(z).items()


def colours(ax):
    return {line.get_label(): line.get_color() for line in ax.get_lines() if not line.get_label().startswith("_")}


def test_a_task_has_one_colour_in_every_picture_even_if_it_comes_late(weighter):
    figures = [plot_history(weighter.history, values=values) for values in ("weight", "loss", "grad_norm")]
    first, *others = (colours(ax) for _, ax in figures)
    assert list(first) == ["a", "b", "c"]
    assert all(other == first for other in others)
    figure, ax = figures[1]
    assert ax.get_figure() is figure and ax.get_yscale() == "log" and ax.get_ylabel() == "loss"
    for figure, _ in figures:
        matplotlib.pyplot.close(figure)


def test_a_name_that_the_history_does_not_hold_is_refused(weighter):
    with pytest.raises(ValueError, match="The history is empty: there was no optimizer step yet"):
        plot_history([])
    with pytest.raises(ValueError, match=r"holds no `values = 'wieght'`\. Found \['cosine', 'grad_norm', "):
        plot_history(weighter.history, values="wieght")


def test_held_steps_are_marked_and_said(weighter):
    assert held_steps(weighter.history) == [20, 41]
    figure = plot_runs({"gradnorm": weighter.history})
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[0] == "weight" and "cosine of two tasks' gradients" in titles
    marks = [line for line in figure.axes[0].get_lines() if line.get_xdata()[0] == line.get_xdata()[-1]]
    assert [mark.get_xdata()[0] for mark in marks] == [20, 41]
    assert "held" in figure.get_supxlabel()
    matplotlib.pyplot.close(figure)


def test_titles_say_over_how_many_steps_values_are_means():
    history = [(step, {"weight/a": 1.0, "loss/a": 2.0}) for step in range(100)]
    figure = plot_runs({"one": history})
    assert [ax.get_title() for ax in figure.axes] == ["weight", "loss, means over 2 steps"]
    matplotlib.pyplot.close(figure)


def test_smoothing_keeps_the_mean_and_the_order_of_names():
    history = [(step, {"loss/b": float(step), "loss/a": 2.0}) for step in range(100)]
    smoothed = smooth(history)
    assert smoothed[0] == (1, {"loss/b": 0.5, "loss/a": 2.0})
    assert list(smoothed[-1][1]) == ["loss/b", "loss/a"]
    assert len(smoothed) == 99


@pytest.mark.parametrize("kind", ["example", "many", "trainer", "state", "checkpoint"])
def test_every_record_of_a_run_gives_the_same_history(weighter, tmp_path, kind):
    history, state = weighter.history, weighter.state_dict()
    if kind == "example":
        (tmp_path / "run.json").write_text(json.dumps({"history": history}))
    elif kind == "many":
        runs = {"one": {"history": history}, "two": {"history": history}}
        (tmp_path / "run.json").write_text(json.dumps({"settings": {}, "runs": runs}))
    elif kind == "trainer":
        log = [{"step": step, "loss": 1.0, **values} for step, values in history] + [{"step": 60, "eval_loss": 1.0}]
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    else:
        torch.save({"no": "weighter"}, tmp_path / "custom_checkpoint_0.pkl")
        torch.save(state, tmp_path / ("weighter.pt" if kind == "state" else "custom_checkpoint_1.pkl"))
    runs = read_runs(tmp_path)
    assert len(runs) == (2 if kind == "many" else 1)
    for found in runs.values():
        assert [(step, values) for step, values in found] == history
    picture = main([str(tmp_path)])
    assert picture == tmp_path / "weighting.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("name", ["checkpoint-{}", "checkpoint_{}"])  # the Trainer's, Accelerate's
def test_a_folder_of_checkpoints_is_drawn_from_the_latest(weighter, tmp_path, name):
    for number, tasks in ((9, ["old", "older"]), (10, ["a", "b"])):
        (tmp_path / name.format(number)).mkdir()
        state = weighter.state_dict() if number == 10 else Weighter(GradNorm(), tasks).state_dict()
        torch.save(state, tmp_path / name.format(number) / "weighter.pt")
    ((_, history),) = read_runs(tmp_path).items()
    assert list(history) == weighter.history


def test_nothing_to_draw_is_said_in_words(tmp_path, capsys):
    (tmp_path / "other.json").write_text('{"a": 1}')
    for path, words in ((tmp_path, "holds no record of a weighter"), (tmp_path / "gone", "there is no")):
        with pytest.raises(SystemExit):
            main([str(path)])
        assert words in capsys.readouterr().err


def test_the_documented_command_runs_without_a_warning(weighter, tmp_path):
    torch.save(weighter.state_dict(), tmp_path / "weighter.pt")
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "accel_weighting.plot", str(tmp_path)]
    command += ["--output", str(tmp_path / "p.png")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{GradNorm(alpha=0.5)!r}: {tmp_path}/p.png\n"
    assert (tmp_path / "p.png").exists()


def test_describe_is_one_line_for_people(weighter):
    words = weighter.describe()
    assert words.startswith("losses weighted by GradNorm(alpha=0.5); after 60 optimizer steps: a ")
    assert "\n" not in words
    fresh = Weighter(Smooth(CoVWeighting(), 0.9), ["x", "y"])
    fresh.freeze()
    assert fresh.describe() == (
        "losses weighted by Smooth(method=CoVWeighting(), decay=0.9), frozen; to begin with: x 0.5, y 0.5"
    )
