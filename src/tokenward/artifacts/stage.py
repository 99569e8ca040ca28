"""A stage's folder: one writer at a time, resumed or skipped by what it was made from."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tokenward.artifacts.files import MANIFEST
from tokenward.artifacts.manifest import Manifest, read_manifest
from tokenward.errors import UserError

_PREVIOUS = ".previous"
_LOCK_SECONDS = 1.0


@dataclass(frozen=True)
class StageFolder:
    """A stage's folder, held by this process.

    Attributes:
        path: The folder; it exists.
        manifest: What it holds or will hold.
        resuming: It was begun with these settings and inputs, and its files are still there.
        changed: How the wanted stage differs from the one the folder held before, a line each.
        temporary: Folders that are of use only until the stage is finished, and go then.
    """

    path: Path
    manifest: Manifest
    resuming: bool = False
    changed: list[str] = field(default_factory=list)
    temporary: list[Path] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether the stage is finished with these settings and inputs, so that nothing is left to do."""
        return self.manifest.complete

    def complete(self, **facts: Any) -> Manifest:
        """Mark the stage as finished; call it when every file is on disk."""
        manifest = self.manifest.finished(facts)
        manifest.write(self.path)
        for folder in self.temporary:
            shutil.rmtree(folder, ignore_errors=True)
        return manifest


@contextmanager
def open_stage(
    folder: Path, *, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str], format: int
) -> Iterator[StageFolder]:
    """Hold a stage's folder while working on it.

    What the folder held with other settings or inputs moves to ``.previous`` beside it, and comes back
    from there when it is wanted again.

    Args:
        folder: The stage's folder; the folder around it is the run's.
        stage: Name of the stage.
        settings: What the user chose, nested as in a recipe so that differences read like it.
        inputs: Fingerprint of everything that goes in, by name.
        format: Version of the layout of what the stage writes.

    Raises:
        UserError: another process works on the stage, or the folder holds something else.
    """
    wanted = Manifest.begin(stage, settings, inputs, format)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent, stage):
        yield _prepare(folder, wanted)


@contextmanager
def _locked(run: Path, stage: str) -> Iterator[None]:
    holder = run / f".lock-{stage}.pid"  # the lock file itself cannot be read on Windows while it is held
    lock = FileLock(run / f".lock-{stage}")
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout as error:
        pid = holder.read_text() if holder.is_file() else "unknown"
        raise UserError(
            f"another process (pid {pid}) works on {stage} in {run}. "
            "Wait until it ends, or choose another run folder."
        ) from error
    try:
        holder.write_text(str(os.getpid()))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _prepare(folder: Path, wanted: Manifest) -> StageFolder:
    # Every step is one rename or one atomic write, so a rerun after a crash between two of them finds
    # the old folder here or in .previous, and at worst an empty new one.
    previous = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if previous is not None and previous.fingerprint == wanted.fingerprint:
        return StageFolder(folder, previous, resuming=not previous.complete)
    changed: list[str] = []
    if previous is not None:
        changed = previous.changes_to(wanted)
        folder.rename(_free_place(folder.parent, previous))
    elif folder.exists():
        _remove_empty(folder)
    kept = _kept(folder.parent, wanted)
    if kept is not None:
        manifest = read_manifest(kept)
        kept.rename(folder)
        return StageFolder(folder, manifest, resuming=not manifest.complete, changed=changed)
    folder.mkdir()
    wanted.write(folder)
    return StageFolder(folder, wanted, changed=changed)


def _free_place(run: Path, manifest: Manifest) -> Path:
    (run / _PREVIOUS).mkdir(exist_ok=True)
    first = run / _PREVIOUS / _kept_name(manifest)
    # A copy made by hand may have left the same name there.
    others = (Path(f"{first}.{i}") for i in count(2))
    return next(path for path in chain([first], others) if not path.exists())


def _kept(run: Path, wanted: Manifest) -> Path | None:
    found = sorted((run / _PREVIOUS).glob(f"{_kept_name(wanted)}*/{MANIFEST}"))
    same = (path.parent for path in found if read_manifest(path.parent).fingerprint == wanted.fingerprint)
    return next(same, None)


def _kept_name(manifest: Manifest) -> str:
    return f"{manifest.stage}-{manifest.fingerprint[:8]}"


def _remove_empty(folder: Path) -> None:
    unfinished = set(folder.glob(f".{MANIFEST}.*.tmp"))
    if not folder.is_dir() or set(folder.iterdir()) - unfinished:
        raise UserError(
            f"{folder} is not the folder of a stage: it has no {MANIFEST}. tokenward will not touch it; "
            "move it away, or choose another run folder."
        )
    for path in unfinished:
        path.unlink()
    folder.rmdir()
