"""Pictures of a run's record: weights, losses, gradient norms and cosines over the steps. Needs matplotlib.

    python -m accel_weighting.plot RUN [--output PICTURE.png]

RUN is what a run left: the JSON file of one of this project's examples, a Trainer's ``trainer_state.json``, a
weighter's saved state (``weighter.pt``, ``custom_checkpoint_0.pkl``), or a folder that holds one of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[tuple[int, Mapping[str, float]]]

# Okabe and Ito's colours, which colour-blind readers can tell apart, and line styles for more than eight tasks.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
STYLES = ("-", "--", ":", "-.")

LABELS = {
    "weight": "weight",
    "loss": "loss",
    "loss_cov": "coefficient of variation of the loss",
    "grad_norm": "gradient norm at the shared representation",
    "cosine": "cosine of two tasks' gradients",
}
LOGARITHMIC = ("loss", "loss_cov", "grad_norm")
PANELS = ("weight", "loss", "grad_norm", "cosine")
SKIPPED = "weighting/skipped_steps"
KIND = "accel_weighting.Weighter"


def plot_history(
    history: Iterable[tuple[int, Mapping[str, float]]], ax: Axes | None = None, *, values: str = "weight"
) -> tuple[Figure, Axes]:
    """Draws one group of a weighter's history over optimizer steps, one line per task (or pair of tasks).

    Args:
        history: ``weighter.history``, or any ``(step, values)`` pairs with its names.
        ax: Where to draw; None makes a figure.
        values: ``"weight"``, ``"loss"``, ``"loss_cov"``, ``"grad_norm"`` or ``"cosine"``.

    Returns:
        The figure and the axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The history is empty, or holds nothing of that name.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plot_history needs matplotlib: pip install 'accel-weighting[plot]'.") from error
    entries = list(history)
    if not entries:
        raise ValueError("The history is empty: there was no optimizer step yet.")
    tasks = list(dict.fromkeys(n.partition("/")[2] for _, named in entries for n in named if n.startswith("weight/")))
    lines: dict[str, tuple[list[int], list[float]]] = {}
    for step, named in entries:
        for name, value in named.items():
            group, _, task = name.partition("/")
            if group == values:
                steps, ys = lines.setdefault(task, ([], []))
                steps.append(step)
                ys.append(value)
    if not lines:
        found = sorted({name.partition("/")[0] for _, named in entries for name in named})
        raise ValueError(f"The history holds no `values = {values!r}`. Found {found}.")
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    order = tasks if set(lines) <= set(tasks) else list(lines)  # a task keeps its colour in every picture
    for task in sorted(lines, key=order.index):
        (steps, ys), i = lines[task], order.index(task)
        style = STYLES[i // len(COLOURS) % len(STYLES)]
        ax.plot(steps, ys, style, color=COLOURS[i % len(COLOURS)], label=task, linewidth=1.4)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(LABELS.get(values, values))
    if values in LOGARITHMIC and all(y > 0 for _, ys in lines.values() for y in ys):
        ax.set_yscale("log")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", ncols=2 if len(lines) > 5 else 1)
    return ax.figure, ax  # type: ignore[return-value]


# ---- a whole run -------------------------------------------------------------------------------------------------


def plot_runs(runs: Mapping[str, History]) -> Figure:
    """One row per run, with its weights, losses, gradient norms and cosines; steps that were held are marked.

    Losses, norms and cosines are means over a fiftieth of the run, since single steps are too noisy to look at.

    Args:
        runs: ``{name: history}``.
    """
    import matplotlib.pyplot as plt

    present = {name.partition("/")[0] for history in runs.values() for _, values in history for name in values}
    panels = [panel for panel in PANELS if panel in present]
    if not panels:
        raise ValueError(f"The runs {list(runs)!r} hold no weights, losses, gradient norms or cosines.")
    columns = 2 if len(runs) == 1 and len(panels) > 2 else len(panels)
    rows = -(-len(panels) // columns) * len(runs)
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.2 * columns, 0.5 + 3.2 * rows), layout="constrained", squeeze=False
    )
    cells = iter(axes.flat)
    for name, history in runs.items():
        held = held_steps(history)
        for panel in panels:
            ax = next(cells)
            if not any(key.startswith(f"{panel}/") for _, values in history for key in values):
                ax.axis("off")
                continue
            plot_history(history if panel == "weight" else smooth(history), ax, values=panel)
            title = LABELS[panel] if len(runs) == 1 else f"{name}: {LABELS[panel]}"
            if panel != "weight" and (width := _fiftieth(history)) > 1:
                title += f", means over {width} steps"
            ax.set_title(title, fontsize="medium")
            ax.set_ylabel("")
            if panel == "cosine":
                ax.axhline(0, color="black", linewidth=0.6)
                ax.set_ylim(-1.05, 1.05)
            for step in held:
                ax.axvline(step, color="#D55E00", linewidth=0.8, alpha=0.5, ymax=0.06)
        if held:
            figure.supxlabel("marks on the axis: steps whose weights were held", fontsize="small", color="#D55E00")
    for ax in cells:
        ax.axis("off")
    drawn: Figure = figure
    return drawn


def held_steps(history: History) -> list[int]:
    """Steps at which the count of skipped steps went up."""
    steps, before = [], 0.0
    for step, values in history:
        count = values.get(SKIPPED, before)
        if count > before:
            steps.append(step)
        before = count
    return steps


def _fiftieth(history: History) -> int:
    return max(1, len(history) // 50)


def smooth(history: History) -> list[tuple[int, dict[str, float]]]:
    """Means over a fiftieth of the run, at the last step of each."""
    width = _fiftieth(history)
    windows = [history[end - width : end] for end in range(width, len(history) + 1)]
    names = list(dict.fromkeys(name for _, values in history for name in values))
    return [
        (
            window[-1][0],
            {name: fmean(seen) for name in names if (seen := [v[name] for _, v in window if name in v])},
        )
        for window in windows
    ]


def read_runs(path: Path) -> dict[str, History]:
    """The histories that a file or a folder holds, by name; of a folder of checkpoints, those of the latest.

    Raises:
        ValueError: Nothing that is known is there.
    """
    for file in _files(path) if path.is_dir() else [path]:
        if runs := _json_runs(file) if file.suffix == ".json" else _state_runs(file):
            return runs
    raise ValueError(
        f"{path} holds no record of a weighter: no JSON file with a history, and no saved weighter's state."
    )


def _files(folder: Path) -> list[Path]:
    """What may hold a record in a folder, and in its checkpoints, the latest first."""
    checkpoints = [found for found in folder.glob("checkpoint[-_]*") if found.is_dir()]
    folders = [folder, *sorted(checkpoints, key=lambda found: (len(found.name), found.name), reverse=True)]
    patterns = ("*.json", "weighter.pt", "custom_checkpoint_*.pkl")
    return [file for place in folders for pattern in patterns for file in sorted(place.glob(pattern))]


def _json_runs(file: Path) -> dict[str, History]:
    content = json.loads(file.read_text())
    if not isinstance(content, dict):
        return {}
    runs = content.get("runs", {file.stem: content})
    histories: dict[str, History] = {name: run["history"] for name, run in runs.items() if run.get("history")}
    if logs := [entry for entry in content.get("log_history", []) if any(key.startswith("weight/") for key in entry)]:
        histories[file.parent.name] = [(log["step"], {k: v for k, v in log.items() if "/" in k}) for log in logs]
    return histories


def _state_runs(file: Path) -> dict[str, History]:
    import torch

    state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping) or state.get("kind") != KIND:
        return {}
    return {str(state["method"]): history_of(state)}


def history_of(state: Mapping[str, Any]) -> History:
    """The history in a weighter's saved state."""
    from .history import History as Saved

    saved = Saved(state["tasks"])
    saved.load_state_dict(state["record"], state["tasks"])
    return saved.entries


def main(arguments: Sequence[str] | None = None) -> Path:
    """Draws what a run left into one picture; says and returns where it is."""
    parser = argparse.ArgumentParser(
        prog="python -m accel_weighting.plot",
        description="Draws weights, losses, gradient norms, cosines and held steps of a run into one picture.",
    )
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="the JSON file of an example, a Trainer's trainer_state.json, a saved weighter (custom_checkpoint_0.pkl, "
        "weighter.pt), or a folder that holds one of them, or checkpoints",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the picture; its ending says which kind: .png, .pdf, .svg (default: weighting.png in RUN, or beside it)",
    )
    args = parser.parse_args(arguments)
    try:
        import matplotlib
    except ImportError:
        parser.error("drawing needs matplotlib: pip install 'accel-weighting[plot]'")
    if not args.run.exists():
        parser.error(f"there is no {args.run}")
    matplotlib.use("Agg")
    try:
        runs = read_runs(args.run)
    except ValueError as error:
        parser.error(str(error))
    output: Path = args.output or (args.run if args.run.is_dir() else args.run.parent) / "weighting.png"
    plot_runs(runs).savefig(output, dpi=120)
    print(f"{', '.join(runs)}: {output}")
    return output


if __name__ == "__main__":
    main()
