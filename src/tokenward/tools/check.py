"""Compares every file of a run with what its stages recorded."""

from pathlib import Path
from typing import NamedTuple

from tokenward.artifacts import MANIFEST, read_manifest
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.tools.finished import run_folder


class CheckedStage(NamedTuple):
    """A stage of a run, and whether its files are what it wrote.

    Attributes:
        name: Its folder in the run's.
        files: Number of recorded files.
        size: Their size in bytes.
        problems: What is wrong, a line each; empty if nothing is.
        finished: Whether the stage has finished; before that, nothing is recorded.
    """

    name: str
    files: int = 0
    size: int = 0
    problems: tuple[str, ...] = ()
    finished: bool = True


def check_run(run: str | Path) -> list[CheckedStage]:
    """Read every file of a run's stages, tables and merged models, and compare it with the manifest beside it.

    Args:
        run: Folder of the run, or of one of its stages.

    Raises:
        UserError: there is no run.
    """
    folder = run_folder(run)
    manifests = (path for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/{MANIFEST}"))
    found = (path.parent for path in manifests if not path.relative_to(folder).parts[0].startswith("."))
    return [_checked(place, place.relative_to(folder).as_posix()) for place in sorted(found, key=_age)]


def _age(folder: Path) -> tuple[float, str]:
    return (folder / MANIFEST).stat().st_mtime, folder.name


def _checked(folder: Path, name: str) -> CheckedStage:
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return CheckedStage(name, problems=(str(error),))
    damage = manifest.damage(folder, every=True)
    problems = tuple(f"{name}/{file} {problem}" for file, problem in damage.items())
    size = sum(size for size, _ in manifest.files.values())
    return CheckedStage(name, len(manifest.files), size, problems, manifest.complete)


def show_check(display: Display, run: str | Path) -> bool:
    """Show the table of :func:`check_run` and what is wrong; returns whether nothing is."""
    found = check_run(run)
    display.table("files of the run", ("stage", "files", "bytes", ""), map(_row, found))
    problems = [problem for item in found for problem in item.problems]
    display.line("")
    for problem in problems:
        display.line(f"  {problem}")
    if problems:
        stages = ", ".join(item.name for item in found if item.problems)
        display.line(
            f"damaged: {stages}. Restore the files from a copy, or move the folder away and run the recipe again, which makes the "
            "stage anew, and those that were made from it if it comes out different"
        )
    else:
        display.line(f"every file is what its stage wrote ({sum(item.files for item in found)} files)")
    return not problems


def _row(item: CheckedStage) -> tuple[str, ...]:
    state = "damaged" if item.problems else "" if item.finished else "not finished"
    return item.name, str(item.files), f"{item.size:,}", state
