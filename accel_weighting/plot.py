"""Pictures of a run's record: weights, losses, gradient norms and cosines over the steps. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
        ValueError: The history holds nothing of that name.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plot_history needs matplotlib: pip install 'accel-weighting[plot]'.") from error
    entries = list(history)
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
    for i, (task, (steps, ys)) in enumerate(lines.items()):
        style = STYLES[i // len(COLOURS) % len(STYLES)]
        ax.plot(steps, ys, style, color=COLOURS[i % len(COLOURS)], label=task, linewidth=1.4)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(LABELS.get(values, values))
    if values in LOGARITHMIC and all(y > 0 for _, ys in lines.values() for y in ys):
        ax.set_yscale("log")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", ncols=2 if len(lines) > 5 else 1)
    return ax.figure, ax  # type: ignore[return-value]
