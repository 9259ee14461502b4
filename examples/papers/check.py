"""Shared by the scripts of this folder: their options, and a table of figures with the range each must lie in."""

import argparse
import sys
from pathlib import Path


class Checks:
    """Prints every figure with its range as a row of a Markdown table, and counts those outside of their range."""

    def __init__(self, title: str):
        self.title, self.failed, self._open = title, 0, False

    def _row(self, *cells: str) -> None:
        if not self._open:
            self._open = True
            print(f"\n| {self.title} | result | expected | |\n| --- | --- | --- | --- |")
        print(f"| {' | '.join(cell.replace('|', '∣') for cell in cells)} |", flush=True)

    def between(self, what: str, value: float, low: float, high: float) -> None:
        """Checks one figure; a NaN is outside of every range."""
        inside = low <= value <= high
        self.failed += not inside
        expected = f"{low:.10g}" if low == high else f"{low:.10g} to {high:.10g}"
        self._row(what, f"{value:.4g}", expected, "" if inside else "**outside**")

    def report(self, what: str, value: str) -> None:
        """Prints a figure without an expected range."""
        self._row(what, value, "–", "")

    def finish(self, text: str) -> None:
        """Prints a conclusion and ends the script, with exit code 1 if a figure was outside of its range."""
        verdict = f"{self.failed} figure(s) outside of the range" if self.failed else "All figures are inside"
        print(f"\n{verdict}. {text}")
        sys.exit(1 if self.failed else 0)


def arguments(description: str, *, seeds: int, steps: int | None = None) -> argparse.Namespace:
    """Parses the options that all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help=f"number of seeds (default: {seeds})")
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps, help=f"optimizer steps of a run (default: {steps})")
    parser.add_argument("--quick", action="store_true", help="skip the parts that take long")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/papers"),
        help="folder for pictures (default: %(default)s)",
    )
    return parser.parse_args()


def save(figure, path: Path) -> None:
    """Writes a picture and prints its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(f"\nPicture: {path}")
