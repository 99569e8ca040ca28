"""The files that a stage leaves behind, recorded with size and digest, and compared when the stage is used again."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tokenward.artifacts.files import MANIFEST, file_fingerprint, fingerprint

File = tuple[int, str]
"""Size in bytes, and fingerprint of the content."""

OBSERVED = ("history.jsonl", "events.jsonl", "preview.json")
"""Files with wall times, or for the eye only. No stage reads them, so one that is lost is said and does not run its stage again."""

EVENTS = "tensorboard"
"""Folder of a tracker's files, which the tracker may write to after the stage has ended; they are not recorded."""

_UNFINISHED = re.compile(r"\..*\.tmp")


def recorded(folder: Path, without: Iterable[Path] = ()) -> dict[str, File]:
    """Size and fingerprint of every file in a folder, by its path there; links are not followed.

    Args:
        folder: The folder of a stage.
        without: Folders that will be deleted.
    """
    left_out = set(without)
    paths = sorted(_files(folder, left_out))
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, file_fingerprint(path)) for path in paths
    }


def _files(folder: Path, without: set[Path]) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        here = Path(root)
        folders[:] = [name for name in folders if name != EVENTS and here / name not in without]
        for name in names:
            path = here / name
            if name != MANIFEST and not _UNFINISHED.fullmatch(name) and not path.is_symlink():
                yield path


def damage(folder: Path, files: Mapping[str, File], *, since: float | None = None) -> dict[str, str]:
    """What is wrong with recorded files, by their paths in the folder.

    Args:
        folder: The folder of the stage.
        files: As :func:`recorded` returned them.
        since: Read the content of files changed after this time only, in seconds since 1970; None reads every file.
            The size of every file is compared.
    """
    found: dict[str, str] = {}
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            status = path.stat()
        except OSError:
            found[name] = "is missing"
            continue
        if status.st_size != size:
            found[name] = f"has {status.st_size:,} bytes instead of {size:,}"
        elif (since is None or status.st_mtime > since) and (now := file_fingerprint(path)) != digest:
            found[name] = f"has other content (fingerprint {now} instead of {digest})"
    return found


def said(folder: Path, found: Mapping[str, str]) -> str:
    """Damaged files in one line, such as ``data/train.jsonl is missing``."""
    first, *others = found.items()
    more = f", and {len(others)} more" if others else ""
    return f"{folder.name}/{first[0]} {first[1]}{more}"


def outputs_fingerprint(files: Mapping[str, File]) -> str:
    """Fingerprint of the contents of all files that another stage may read."""
    return fingerprint({name: digest for name, (_, digest) in files.items() if name not in OBSERVED})
