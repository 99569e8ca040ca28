"""Faults of disk and paths as errors that say what to do; libraries report them in many ways."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenward.errors import UserError

_FULL = re.compile(
    r"No space left on device|os error 28\b|Disk quota exceeded|os error 122\b|PytorchStreamWriter failed writing"
    r"|inline_container\.cc:\d+\] \. unexpected pos"  # torch.save, where the end of a file could not be written
)
_PROBLEMS = {
    errno.EACCES: ("may not be read or written by this user", "Choose a folder of your own, or change its permissions."),
    errno.EPERM: ("may not be changed by this user", "Choose a folder of your own, or change its permissions."),
    errno.EROFS: ("is on a file system that is read-only", "Choose a folder that can be written to."),
    errno.ENAMETOOLONG: ("is too long for this file system", "Choose a shorter name: most take 255 bytes in each part."),
    errno.ENOTDIR: ("leads through a file, not a folder", "Choose another path, or move the file away."),
    errno.EISDIR: ("is a folder, not a file", "Choose another path."),
    errno.EEXIST: ("exists already and is not a folder", "Choose another path, or move the file away."),
    errno.ELOOP: ("is a symbolic link that leads back to itself", "Choose another path."),
    errno.EIO: ("could not be read or written: the disk reports an error", "Check the disk, then run the same command again."),
    errno.EMFILE: ("could not be opened: too many files are open", "Raise the limit (ulimit -n), then run the same command again."),
}  # fmt: skip


def of_system(error: BaseException, place: str | Path = ".") -> UserError | None:
    """The error of a full disk, a path or a permission in words; None for any other error.

    Args:
        error: What was raised, by Python or by a library that writes files.
        place: Where files are written, if the error names none.
    """
    number = error.errno if isinstance(error, OSError) else None
    named = error.filename if isinstance(error, OSError) else None
    path = os.fsdecode(named) if isinstance(named, str | bytes) else str(place)
    if number in (errno.ENOSPC, errno.EDQUOT) or (
        not isinstance(error, UserError) and _FULL.search(str(error))
    ):
        return UserError(
            f"the disk of {path} is full ({_free(place)}). Make room, then run the same command again: finished work is kept.",
            code="disk-full",
        )
    if number not in _PROBLEMS:
        return None
    problem, advice = _PROBLEMS[number]
    shown = path if len(path) <= 200 else f"{path[:100]}...{path[-60:]}"
    return UserError(f"{shown} {problem}. {advice}", code="unusable-path")


@contextmanager
def naming_the_disk(place: str | Path = ".") -> Iterator[None]:
    """Raise faults of disk and paths as a UserError that names the path; other errors pass as they are."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = of_system(error, place)
        if found is None:
            raise
        raise found from error


def _free(place: str | Path) -> str:
    folder = Path(place)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free"
    except OSError:
        return "no figure for what is free"
