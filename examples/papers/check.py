"""What the scripts of this folder share: their options, and figures beside the range they must lie in."""

import argparse
import sys
from pathlib import Path


class Checks:
    """Prints every figure beside its range as a row of a Markdown table, and remembers whether one was outside."""

    def __init__(self, title: str):
        self.title, self.failed, self._open = title, 0, False

    def _row(self, *cells: str) -> None:
        if not self._open:
            self._open = True
            print(f"\n| {self.title} | result | expected | |\n| --- | --- | --- | --- |")
        print(f"| {' | '.join(cell.replace('|', '∣') for cell in cells)} |", flush=True)

    def between(self, what: str, value: float, low: float, high: float) -> None:
        """One figure; a NaN is outside of every range."""
        inside = low <= value <= high
        self.failed += not inside
        expected = f"{low:.10g}" if low == high else f"{low:.10g} to {high:.10g}"
        self._row(what, f"{value:.4g}", expected, "" if inside else "**outside**")

    def report(self, what: str, value: str) -> None:
        """A figure that nothing is claimed about."""
        self._row(what, value, "–", "")

    def finish(self, text: str) -> None:
        """Ends the script with what the figures do and do not say; exit code 1 where one was outside of its range."""
        verdict = f"{self.failed} figure(s) outside of the range" if self.failed else "All figures are inside"
        print(f"\n{verdict}. {text}")
        sys.exit(1 if self.failed else 0)


def arguments(description: str, *, seeds: int, steps: int | None = None) -> argparse.Namespace:
    """The options that all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help=f"how many (default: {seeds})")
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps, help=f"of a run (default: {steps})")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/papers"), help="(default: %(default)s)")
    return parser.parse_args()


def save(figure, path: Path) -> None:
    """Writes a picture, and says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(f"\nPicture: {path}")
