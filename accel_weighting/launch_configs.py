"""Launch configurations for ``accelerate launch``, written from the installed package.

``python -m accel_weighting.launch_configs`` lists them, and ``python -m accel_weighting.launch_configs fsdp2`` writes
``launch_configs/fsdp2.yaml``.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parent
INSTALLED, IN_A_CLONE = PACKAGE / "_launch_configs", PACKAGE.parent / "launch_configs"


def configurations() -> dict[str, Path]:
    """All configurations that this installation has.

    Returns:
        ``{name: file}``, sorted by name. A wheel holds a copy of the repository's folder ``launch_configs/``; an
        editable installation reads that folder itself.
    """
    folder = INSTALLED if INSTALLED.is_dir() else IN_A_CLONE
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in (".yaml", ".sh")}


def summary(path: Path) -> str:
    """What a configuration is for: the first sentence of the comment that its file begins with."""
    comment = next(line for line in path.read_text().splitlines() if line.startswith("# "))
    return comment.removeprefix("# ").rstrip(":").partition(". ")[0].rstrip(".")


def listing() -> str:
    """A line for each configuration: its name and what it is for."""
    found = configurations()
    width = max(map(len, found))
    return "\n".join(f"  {name:{width}}  {summary(path)}" for name, path in found.items())


def write(names: Sequence[str], folder: Path, *, force: bool = False) -> list[Path]:
    """Writes configurations into a folder, which is made if need be; all of them, or none where one is refused.

    Args:
        names: Names of :func:`configurations`; ``"fsdp2.yaml"`` means the same as ``"fsdp2"``.
        folder: Where to write them, under their own file names.
        force: Replace files that are there already.

    Returns:
        The files that were written.

    Raises:
        ValueError: No configuration has such a name. The message names the nearest one.
        FileExistsError: A file is there already, and ``force`` is not given.
    """
    found = configurations()
    stems = list(dict.fromkeys(Path(name).stem if Path(name).suffix in (".yaml", ".sh") else name for name in names))
    unknown = [name for name in stems if name not in found]
    if unknown:
        raise ValueError(no_such_configuration(unknown, list(found)))
    targets = {folder / found[name].name: found[name].read_bytes() for name in stems}
    there = [str(target) for target in targets if target.exists()]
    if there and not force:
        raise FileExistsError(already_there(there))
    folder.mkdir(parents=True, exist_ok=True)
    for target, content in targets.items():
        target.write_bytes(content)
    return list(targets)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m accel_weighting.launch_configs",
        description="Writes configurations for `accelerate launch`. Without a name it lists them.",
        epilog=f"configurations:\n{listing()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("names", nargs="*", metavar="NAME", help="which configurations to write; see the list below")
    made.add_argument(
        "--folder", type=Path, default=Path("launch_configs"), help="where to write them (default: %(default)s)"
    )
    made.add_argument("--force", action="store_true", help="replace files that are there already")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Lists or writes, as the command line says; what is refused goes to stderr, with exit code 2."""
    command = parser()
    given = command.parse_args(arguments)
    if not given.names:
        print(listing())
        return
    try:
        written = write(given.names, given.folder, force=given.force)
    except (ValueError, OSError) as error:
        command.exit(2, f"{command.prog}: {error}\n")
    for path in written:
        print(f"wrote {path}")


# ---- messages ----------------------------------------------------------------------------------------------------


def no_such_configuration(unknown: Sequence[str], names: Sequence[str]) -> str:
    """Names the nearest configuration to each unknown name, and all that there are."""
    parts = []
    for name in unknown:
        close = difflib.get_close_matches(name, names, 1)
        parts.append(f"no configuration is called {name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    return f"{'; '.join(parts)}. There are: {', '.join(names)}. Nothing was written."


def already_there(files: Sequence[str]) -> str:
    """Names the files, and the option that replaces them."""
    one = len(files) == 1
    return (
        f"{', '.join(files)} {'is' if one else 'are'} there already and may hold changes of yours. "
        f"Nothing was written. Give --force to replace {'it' if one else 'them'}, or --folder for another place."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
