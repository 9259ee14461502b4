"""What the scripts of this folder share: their options, and figures beside the range they must lie in."""

import argparse
import sys
from pathlib import Path


class Checks:
    """Prints every figure beside its range, and remembers whether one was outside."""

    def __init__(self, title: str):
        print(title)
        self.failed = 0

    def between(self, what: str, value: float, low: float, high: float) -> None:
        """One figure; a NaN is outside of every range."""
        inside = low <= value <= high
        self.failed += not inside
        print(f"  {'ok  ' if inside else 'FAIL'}  {what}: {value:.6g}, expected {low:.10g} to {high:.10g}", flush=True)

    def report(self, what: str, value: str) -> None:
        """A figure that nothing is claimed about."""
        print(f"        {what}: {value}", flush=True)

    def note(self, text: str) -> None:
        """What a figure does not say."""
        print(f"  {text}")

    def finish(self) -> None:
        """Ends the script: exit code 1 where a figure was outside of its range."""
        print(f"{self.failed} figure(s) outside of the range" if self.failed else "all figures inside of their ranges")
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
    print(f"  picture: {path}")
