"""Opens a stage's folder for one writer at a time; resumes or skips the stage by its fingerprint."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from glob import escape
from itertools import chain, count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tokenward.artifacts.files import MANIFEST
from tokenward.artifacts.manifest import Manifest, read_manifest
from tokenward.artifacts.outputs import recorded, said
from tokenward.artifacts.parts import StagePart
from tokenward.errors import UserError

_PREVIOUS = ".previous"
_DAMAGED = "damaged-"
_LOCK_SECONDS = 1.0
_PART_SECONDS = 30.0  # jobs that start together open the folder one after the other
_WAIT = -1.0


@dataclass(frozen=True)
class StageFolder:
    """A stage's folder, locked by this process.

    Attributes:
        path: The folder; it exists.
        manifest: Of the stage.
        resuming: Whether the stage was started before with these settings and inputs, and its files are still there.
        changed: The differences to the stage that the folder held before, a line each.
        temporary: Folders to delete when the stage is finished.
        part: The part that is locked; None if it is the whole stage.
    """

    path: Path
    manifest: Manifest
    resuming: bool = False
    changed: list[str] = field(default_factory=list)
    temporary: list[Path] = field(default_factory=list)
    part: StagePart | None = None

    @property
    def done(self) -> bool:
        """Whether the stage is already finished with these settings and inputs."""
        return self.manifest.complete

    def complete(self, **facts: Any) -> Manifest:
        """Mark the stage as finished. Call this when every file is on disk. Of several parts, the first one does it."""
        if self.part is None:
            return self._finish(facts)
        with _locked(self.path, self.manifest.stage, seconds=_WAIT):
            now = read_manifest(self.path)
            return now if now.complete else self._finish(facts)

    def _finish(self, facts: Mapping[str, Any]) -> Manifest:
        manifest = self.manifest.finished(facts, recorded(self.path, self.temporary))
        manifest.write(self.path)
        for folder in self.temporary:
            shutil.rmtree(folder, ignore_errors=True)
        return manifest


@contextmanager
def open_stage(
    folder: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    format: int,
    wait: bool = False,
    verify: bool = False,
) -> Iterator[StageFolder]:
    """Lock a stage's folder while working on it.

    If the folder holds the stage with other settings or inputs, it moves to ``.previous`` next to it. It moves back
    when those settings and inputs are requested again. A finished stage with damaged files is moved there for good.

    Args:
        folder: The stage's folder, inside the run's.
        stage: Name of the stage.
        settings: The user's settings, nested as in a recipe so that differences read like one.
        inputs: Fingerprint of every input, by name.
        format: Version of the layout of the stage's files.
        wait: Whether to wait for a process that works on the stage, and not to refuse.
        verify: Whether to read every file of a finished stage, and not only those changed after it finished.

    Raises:
        UserError: another process holds the lock, or the folder holds something else.
    """
    wanted = Manifest.begin(stage, settings, inputs, format)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder, stage, seconds=_WAIT if wait else _LOCK_SECONDS):
        _refuse_while_parts_work(folder, stage)
        yield _prepare(folder, wanted, verify=verify)


@contextmanager
def open_part(
    folder: Path,
    part: StagePart,
    *,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    format: int,
) -> Iterator[StageFolder]:
    """Lock one part of a stage's folder while working on it. Other processes can work on the other parts.

    The arguments are those of :func:`open_stage`. Whoever finds all files calls :meth:`StageFolder.complete`.

    Raises:
        UserError: another process works on the part or on the whole stage, or the folder holds something else, also the stage
            with other settings or inputs: the files of two stages would be mixed.
    """
    wanted = Manifest.begin(stage, settings, inputs, format)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        # A part is locked only under the lock of the stage, so who works on the whole stage sees every part.
        with _locked(folder, stage, seconds=_PART_SECONDS):
            _refuse_other(folder, wanted)
            found = _prepare(folder, wanted)
            held.enter_context(_locked(folder, stage, part))
        yield replace(found, part=part)


def _refuse_other(folder: Path, wanted: Manifest) -> None:
    found = read_manifest(folder) if (folder / MANIFEST).is_file() else wanted
    if found.fingerprint != wanted.fingerprint:
        raise UserError(
            f"{folder} holds {found.stage} of other settings or inputs ({'; '.join(found.changes_to(wanted))}), and parts of two "
            "stores cannot be mixed. Use the same recipe and files in every job, or move the folder away to make it anew.",
            code="other-parts",
        )


def _refuse_while_parts_work(folder: Path, stage: str) -> None:
    for path in sorted(folder.parent.glob(f".lock-{escape(folder.name)}.part-*-of-*[0-9]")):
        number, of = path.name.rpartition(".part-")[2].split("-of-")
        with _locked(folder, stage, StagePart(int(number), int(of))):
            pass


@contextmanager
def _locked(
    folder: Path, stage: str, part: StagePart | None = None, *, seconds: float = _LOCK_SECONDS
) -> Iterator[None]:
    name = f".lock-{folder.name}" if part is None else f".lock-{folder.name}.{part.name}"
    path = folder.with_name(name)
    holder = folder.with_name(f"{name}.pid")  # Windows cannot read a locked file
    _refuse_links([path, holder, folder.with_name(_PREVIOUS), folder, *_within(folder)])
    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds)
    except Timeout as error:
        pid = holder.read_text() if holder.is_file() else "unknown"
        what = stage if part is None else f"part {part} of {stage}"
        message = f"another process (pid {pid}) is working on {what} in {folder.parent}. Wait for it, or use another run folder."
        raise UserError(message, code="stage-locked") from error
    try:
        holder.write_text(str(os.getpid()))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _within(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):  # does not follow links
        yield from (Path(root) / name for name in (*folders, *files))


def _refuse_links(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_symlink():
            raise UserError(
                f"{path} is a symbolic link to {path.readlink()}. Files behind links in a run folder are neither written nor deleted. "
                "Replace the link by what it points to, or make the whole run folder a link.",
                code="symbolic-link",
            )


def _prepare(folder: Path, wanted: Manifest, *, verify: bool = False) -> StageFolder:
    # Each step is one rename or one atomic write, so that a rerun after a crash between two of them finds the old
    # folder here or in .previous, and at worst an empty new one.
    previous = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    changed: list[str] = []
    if previous is not None and previous.fingerprint == wanted.fingerprint:
        damage = previous.needed_damage(folder, every=verify)
        if not damage:
            return StageFolder(folder, previous, resuming=not previous.complete)
        changed = [f"{said(folder, damage)}; the damaged stage is now {_set_aside(folder, previous)}"]
    elif previous is not None:
        changed = previous.changes_to(wanted)
        folder.rename(_free_place(folder.parent, _kept_name(previous)))
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


def _set_aside(folder: Path, manifest: Manifest) -> Path:
    """Move a damaged stage to where no stage looks for earlier ones; returns that place."""
    place = _free_place(folder.parent, f"{_DAMAGED}{_kept_name(manifest)}")
    folder.rename(place)
    return place


def _free_place(run: Path, name: str) -> Path:
    (run / _PREVIOUS).mkdir(exist_ok=True)
    first = run / _PREVIOUS / name
    # The name can be taken if the user copied a stage by hand.
    others = (Path(f"{first}.{i}") for i in count(2))
    return next(path for path in chain([first], others) if not path.exists())


def _kept(run: Path, wanted: Manifest) -> Path | None:
    found = sorted((run / _PREVIOUS).glob(f"{_kept_name(wanted)}*/{MANIFEST}"))
    for file in found:
        manifest = read_manifest(file.parent)
        if manifest.fingerprint == wanted.fingerprint and not manifest.needed_damage(file.parent):
            return file.parent
    return None


def _kept_name(manifest: Manifest) -> str:
    return f"{manifest.stage}-{manifest.fingerprint[:8]}"


def _remove_empty(folder: Path) -> None:
    unfinished = set(folder.glob(f".{MANIFEST}.*.tmp"))
    if not folder.is_dir() or set(folder.iterdir()) - unfinished:
        message = f"{folder} is not the folder of a stage: it has no {MANIFEST}. Move it away, or use another run folder."
        raise UserError(message, code="foreign-folder")
    for path in unfinished:
        path.unlink()
    folder.rmdir()
