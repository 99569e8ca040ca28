"""Atomic writes, JSON files, and fingerprints of values, files and folders."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tokenward.errors import UserError

MANIFEST = "manifest.json"
LONGEST_NAME = 255
"""Bytes of the longest name of a file or folder on most systems."""

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")

_file_memo: dict[tuple[str, int, int, int], str] = {}


def user_path(name: str | Path) -> Path:
    """A path as a user writes it, with ``~`` for the home folder.

    Raises:
        UserError: it cannot be a path.
    """
    text = str(name)
    problem = "it holds a zero byte" if "\0" in text else "" if text else "it is empty"
    if (
        max(
            (len(os.fsencode(part)) if _is_text(part) else LONGEST_NAME + 1 for part in Path(text).parts),
            default=0,
        )
        > LONGEST_NAME
    ):
        problem = f"a name in it is longer than {LONGEST_NAME} bytes, or is no text"
    try:
        if not problem:
            return Path(name).expanduser()
    except RuntimeError as error:  # ~nobody
        problem = str(error).rstrip(".")
    raise UserError(f"{text!r:.200} cannot be a path: {problem}. Check the path.", code="unusable-path")


def _is_text(part: str) -> bool:
    try:
        os.fsencode(part)
    except UnicodeEncodeError:  # half of a character
        return False
    return True


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a rerun after a crash, sees either all of it or none."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """As :func:`atomic_write`, for content written in pieces. An error leaves no file."""
    # Jobs in containers have the same process id, and two of them may write one file at once.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, ascii: bool = False) -> None:
    """Write a value as indented JSON, atomically; ``ascii`` escapes all other characters."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=ascii) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_bytes())


def write_jsonl(
    path: Path, records: Iterable[Any], *, ascii: bool = False, default: Callable[[Any], Any] | None = None
) -> None:
    """Write one record of JSON per line, all of them or no file.

    Args:
        path: The file.
        records: What JSON can hold.
        ascii: Whether to escape characters outside of ASCII.
        default: Called with each value that JSON cannot hold; its result is written instead.
    """
    with atomic_file(path) as file:
        for record in records:
            file.write((json.dumps(record, ensure_ascii=ascii, default=default) + "\n").encode())


def read_jsonl(path: Path) -> list[Any]:
    """The records of a file with one JSON record per line. Skips empty lines."""
    # str.splitlines would also split at characters inside a text, such as U+2028.
    with path.open("rb") as file:
        return [json.loads(line) for line in file if line.strip()]


T = TypeVar("T")


def content_of(path: Path, read: Callable[[Path], T]) -> T:
    """What a file of a finished stage holds.

    Raises:
        UserError: it is missing or broken.
    """
    try:
        return read(path)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = (
            "missing"
            if isinstance(error, FileNotFoundError)
            else f"damaged ({type(error).__name__}: {error})"
        )
        raise UserError(
            f"{path} is {problem}. Run the recipe again, which makes its stage anew, or restore the file from a copy.",
            code="damaged-file",
        ) from error


def fingerprint(value: Any) -> str:
    """Sixteen hexadecimal digits that identify a JSON value, independent of key order and of 1 versus 1.0."""
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def canonical(value: Any) -> Any:
    """A JSON value with tuples as lists and integral floats as integers."""
    if isinstance(value, Mapping):
        return {key: canonical(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def file_fingerprint(path: Path) -> str:
    """Fingerprint of a file's content, cached while its size and times of change stay the same."""
    try:
        status = path.stat()
        key = (str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if key not in _file_memo:
            with path.open("rb") as file:
                _file_memo[key] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path} is not a file. Check the path.", code="missing-file") from error
    return _file_memo[key]


def folder_fingerprint(
    folder: Path, patterns: Sequence[str] = MODEL_FILES, *, also: Iterable[Path] = ()
) -> str:
    """Fingerprint of the names and contents of a folder's files that match a glob pattern.

    The default patterns match the files of a saved model. ``also`` are further files, which may lie elsewhere; those that do not
    exist are left out.
    """
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    files = {path for path in (*found, *also) if path.is_file()}
    # A manifest is excluded: it holds the time of creation.
    named = {Path(os.path.relpath(path, folder)).as_posix(): path for path in files if path.name != MANIFEST}
    if not named:
        names = ", ".join(patterns)
        raise UserError(f"{folder} holds none of the files {names}. Check the path.", code="missing-file")
    return fingerprint({name: file_fingerprint(path) for name, path in named.items()})
