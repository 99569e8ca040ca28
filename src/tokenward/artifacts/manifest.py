"""The manifest of a stage's folder: its inputs, settings and results."""

import json
import platform
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenward.artifacts.files import MANIFEST, atomic_write, canonical, fingerprint
from tokenward.artifacts.outputs import OBSERVED, File, damage, outputs_fingerprint, said
from tokenward.errors import UserError
from tokenward.hidden import hidden, without_known_inside

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "tokenward")
_ABSENT = object()


class Manifest(BaseModel):
    """What a stage's folder was made from, and whether it is finished.

    Attributes:
        stage: Name of the stage.
        format: Version of the layout of the stage's files.
        settings: The user's settings, nested as in a recipe; secrets are masked.
        inputs: Fingerprint of every input, by name.
        fingerprint: Of the four above.
        facts: Counts and notes, set on completion.
        versions: Of Python and the packages that affect the numbers.
        created: When the stage began, ISO 8601.
        complete: Whether the stage finished.
        files: Size and fingerprint of every file of the finished stage, by its path in the folder.
        checksum: In the file, of everything above, so that an edited manifest is noticed; empty once it has been read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    stage: str
    format: int
    settings: dict[str, Any]
    inputs: dict[str, str]
    fingerprint: str
    facts: dict[str, Any] = {}
    versions: dict[str, str] = {}
    created: str = ""
    complete: bool = False
    files: dict[str, File] = {}
    checksum: str = ""

    @property
    def identity(self) -> str:
        """Fingerprint of what the stage was made from and of the files that it left: the input of a stage that reads them."""
        return fingerprint([self.fingerprint, outputs_fingerprint(self.files)])

    def is_input(self, made_from: str) -> bool:
        """Whether a stage that recorded this fingerprint was made from this one; tables are known before they are written."""
        return made_from in (self.identity, self.fingerprint)

    @classmethod
    def begin(cls, stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str], format: int) -> Self:
        """The manifest of a stage that starts now. Secrets are masked first, so that a new one makes nothing run again."""
        masked = hidden(dict(settings))
        return cls(
            stage=stage,
            format=format,
            settings=masked,
            inputs=dict(inputs),
            fingerprint=fingerprint([stage, format, masked, inputs]),
            versions=dict(_versions()),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def check(self, inputs: Mapping[str, str]) -> None:
        """Check the recorded inputs against the reader's fingerprints; other inputs are ignored.

        Raises:
            UserError: an input differs.
        """
        recorded = {name: self.inputs[name] for name in inputs if name in self.inputs}
        changes = _input_changes(recorded, inputs)
        if changes:
            raise UserError(
                f"the stage {self.stage} was made from different inputs ({'; '.join(changes)}). Run {self.stage} again, or "
                "restore its inputs.",
                code="changed-inputs",
            )

    def changes_to(self, wanted: "Manifest") -> list[str]:
        """The differences of another manifest, such as ``oracle.beta: 0.1 -> 0.2`` or ``input data: changed``."""
        changes = [f"stage: {self.stage} -> {wanted.stage}"] if self.stage != wanted.stage else []
        changes += [f"format: {self.format} -> {wanted.format}"] if self.format != wanted.format else []
        before, after = dict(_flat(self.settings, ())), dict(_flat(wanted.settings, ()))
        for key in [*before, *(key for key in after if key not in before)]:
            old, new = _written(before.get(key, _ABSENT)), _written(after.get(key, _ABSENT))
            changes += [f"{key}: {old} -> {new}"] if old != new else []
        return changes + _input_changes(self.inputs, wanted.inputs)

    def finished(self, facts: Mapping[str, Any], files: Mapping[str, File] = MappingProxyType({})) -> Self:
        """This manifest, marked as complete, with the files that the stage leaves behind."""
        done = {
            "facts": without_known_inside(facts),
            "complete": True,
            "versions": dict(_versions()),
            "files": dict(files),
        }
        return self.model_copy(update=done)

    def write(self, folder: Path) -> None:
        """Write the manifest into a stage's folder."""
        whole = self.model_copy(update={"checksum": self._computed()})
        atomic_write(folder / MANIFEST, f"{whole.model_dump_json(indent=2)}\n")

    def intact(self) -> bool:
        """Whether the checksum and the fingerprint are those of the content."""
        try:
            made_from = fingerprint([self.stage, self.format, self.settings, self.inputs])
            return self.checksum == self._computed() and self.fingerprint == made_from
        except ValueError:  # a number that JSON does not have, which no version writes
            return False

    def _computed(self) -> str:
        return fingerprint(json.loads(self.model_dump_json(exclude={"checksum"})))

    def damage(self, folder: Path, *, every: bool = False) -> dict[str, str]:
        """What is wrong with the files of the finished stage in a folder, by their paths.

        Sizes are always compared. Contents are compared if a file was changed after the manifest was written, or with ``every``.
        """
        since = None if every else (folder / MANIFEST).stat().st_mtime
        return damage(folder, self.files, since=since)

    def needed_damage(self, folder: Path, *, every: bool = False) -> dict[str, str]:
        """As :meth:`damage`, without files that nothing is computed from."""
        found = self.damage(folder, every=every)
        return {name: problem for name, problem in found.items() if name not in OBSERVED}

    def check_files(self, folder: Path, *, every: bool = True) -> None:
        """Check the files of the finished stage in a folder; ``every`` as for :meth:`damage`.

        Raises:
            DamagedFiles: a file is missing, or is not what the stage wrote.
        """
        if found := self.needed_damage(folder, every=every):
            raise DamagedFiles(folder, self.stage, found)


class DamagedFiles(UserError):
    """Files of a finished stage are missing, or are not what the stage wrote.

    Attributes:
        folder: The stage's folder.
        stage: Name of the stage.
        found: What is wrong, by path in the folder.
    """

    def __init__(self, folder: Path, stage: str, found: Mapping[str, str]) -> None:
        super().__init__(
            f"the stage {stage} is damaged: {said(folder, found)}. Restore the file from a copy, or move {folder} away and run the "
            "recipe again, which makes the stage anew.",
            code="damaged-files",
        )
        self.folder, self.stage, self.found = folder, stage, dict(found)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a stage's folder.

    Raises:
        UserError: it is missing, not in a format that this version reads, or was changed after it was written.
    """
    path = folder / MANIFEST
    try:
        found = Manifest.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        message = f"{folder} has no {MANIFEST}, so it is not the folder of a stage."
        raise UserError(message, code="missing-manifest") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        problem = f"{where}: {first['msg']}" if where else first["msg"]
        message = f"this version of tokenward cannot read {path} ({problem}). Move the folder away to create it again."
        raise UserError(message, code="unreadable-manifest") from error
    if not found.intact():
        raise UserError(
            f"{path} was changed after tokenward wrote it, or another version wrote it: its checksum is not that of its content, so what "
            "it says about the stage cannot be trusted. Restore it from a copy, or move the folder away and run the recipe again.",
            code="edited-manifest",
        )
    return found.model_copy(update={"checksum": ""})


def require(folder: Path, stage: str) -> Manifest:
    """The manifest of a finished stage whose files are there, each with its size.

    Raises:
        UserError: the stage has not run, has not finished, is damaged, or the folder holds another stage.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: the stage {stage} has not run yet. Run it first.", code="stage-missing")
    manifest = read_manifest(folder)
    if manifest.stage != stage:
        message = f"{folder} holds the stage {manifest.stage}, not {stage}. Check the path."
        raise UserError(message, code="wrong-stage")
    if not manifest.complete:
        message = f"{folder}: the stage {stage} has started but not finished. Run it to the end first."
        raise UserError(message, code="stage-unfinished")
    manifest.check_files(folder, every=False)
    return manifest


def _input_changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    found = {name: "changed" if name in after else "removed" for name in before}
    found |= {name: "added" for name in after if name not in before}
    return [
        f"input {name}: {change}" for name, change in found.items() if before.get(name) != after.get(name)
    ]


def _flat(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, (*path, str(key)))
    else:
        yield ".".join(path), value


def _written(value: Any) -> str:
    return "not set" if value is _ABSENT else json.dumps(canonical(value), ensure_ascii=False)


@cache  # reading the metadata takes longer than a small stage
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # tokenward itself, run from a checkout
            versions[package] = "not installed"
    return versions
