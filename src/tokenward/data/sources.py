"""Where rows come from: a file, several, a folder, a saved data set or a name on the Hugging Face hub."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tokenward.data.files import READERS, Rows, extension
from tokenward.errors import UserError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LISTED_NAMES = 8


def rows(
    source: str | Path | Sequence[str | Path], *, split: str | None = None, subset: str | None = None
) -> Rows:
    """The rows of a source, one after the other.

    Args:
        source: A file (JSONL, JSON, CSV, TSV, each also ``.gz``, or Parquet), a glob pattern, a folder of such
            files, a folder saved by ``datasets``, a hub name ``owner/name``, or a list of these.
        split: Which split of a saved or hub data set (default: ``train`` if there is one, or the only one).
            In a folder of files: only those whose name begins with it.
        subset: The configuration of a hub data set.

    Yields:
        Where the row stands, ``file:line`` or ``file:row N`` (counted from 1), and the row.

    Raises:
        UserError: The source is missing or cannot be read; the message names file and line.
    """
    if not isinstance(source, str | Path):
        for part in source:
            yield from rows(part, split=split, subset=subset)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        yield from _folder_rows(path, split, subset)
    elif path.exists():
        yield from _file_rows(path, split, subset)
    elif any(character in str(source) for character in "*?["):
        yield from _glob_rows(path, split, subset)
    elif _is_hub_name(str(source), path):
        yield from _hub_rows(str(source), split, subset)
    else:
        raise _missing(path)


def _file_rows(path: Path, split: str | None, subset: str | None) -> Rows:
    if split is not None:
        raise UserError(f"data.split: {split}: {path} is a file and has no splits. Leave data.split out.")
    _refuse_subset(path, subset)
    if extension(path) not in READERS:
        found = extension(path) or "a name without extension"
        raise UserError(f"{path}: cannot read {found}. Read are: {', '.join(READERS)}.")
    return READERS[extension(path)](path)


def _glob_rows(pattern: Path, split: str | None, subset: str | None) -> Rows:
    root = Path(pattern.anchor)  # Path.glob takes no absolute pattern
    found = sorted(path for path in root.glob(str(pattern.relative_to(root))) if path.is_file())
    if not found:
        raise UserError(f"{pattern}: no file matches this pattern.")
    for path in found:
        yield from _file_rows(path, split, subset)


def _folder_rows(folder: Path, split: str | None, subset: str | None) -> Rows:
    _refuse_subset(folder, subset)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        yield from _saved_rows(folder, split)
        return
    files = sorted(path for path in folder.iterdir() if path.is_file() and extension(path) in READERS)
    if not files:
        raise UserError(
            f"{folder}: holds no data file. Read are: {', '.join(READERS)}, and folders of datasets' "
            f"save_to_disk. For files further down write a pattern: {folder}/**/*.jsonl"
        )
    chosen = [
        path for path in files if split is None or re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", path.name)
    ]
    if not chosen:
        names = _listed(path.name for path in files)
        raise UserError(
            f"data.split: no file in {folder} has a name that begins with {split}. It holds: {names}."
        )
    for path in chosen:
        yield from _file_rows(path, None, None)


def _saved_rows(folder: Path, split: str | None) -> Rows:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, DatasetsError) as error:  # a part is missing or damaged
        raise UserError(
            f"{folder}: not a whole folder of datasets' save_to_disk: {error}. Save it again."
        ) from error
    if isinstance(saved, Mapping):
        name = _choose_split(str(folder), sorted(map(str, saved)), split)
        return _numbered(f"{folder}/{name}", saved[name].with_format(None))
    if split is not None:
        raise UserError(
            f"data.split: {split}: {folder} holds one data set without splits. Leave data.split out."
        )
    return _numbered(str(folder), saved.with_format(None))


def _hub_rows(name: str, split: str | None, subset: str | None) -> Rows:
    import datasets
    from datasets.exceptions import DatasetsError

    # What fails on the way to the hub, while opening and while reading on: no network, no such data set or
    # configuration, no access. Each comes with a message that says which.
    try:
        splits = datasets.load_dataset(name, subset, streaming=True)
        if not isinstance(splits, Mapping):
            raise UserError(f"{name}: datasets gave {type(splits).__name__}, expected its splits.")
        chosen = _choose_split(name, sorted(map(str, splits)), split)
        yield from _numbered(f"{name}/{chosen}", splits[chosen])
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"{name}: no such file here, and as a hub data set it cannot be read: {error}. "
            "Check the name, data.subset and the network; a downloaded copy can be given by its path."
        ) from error


def _numbered(name: str, source_rows: Iterable[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(source_rows, 1):
        yield f"{name}:row {number}", row


def _choose_split(name: str, splits: Sequence[str], wanted: str | None) -> str:
    listed = ", ".join(splits)
    if wanted in splits:
        return str(wanted)
    if wanted is not None:
        near = get_close_matches(wanted, splits, n=1)
        advice = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"data.split: {wanted} is no split of {name}.{advice} It has: {listed}.")
    if "train" in splits:
        return "train"
    if len(splits) == 1:
        return splits[0]
    raise UserError(f"{name}: has several splits and no train: {listed}. Set data.split to one of them.")


def _refuse_subset(path: Path, subset: str | None) -> None:
    if subset is not None:
        raise UserError(
            f"data.subset: {subset}: only hub data sets have subsets and {path} is here. Leave it out."
        )


def _is_hub_name(source: str, path: Path) -> bool:
    """A name that cannot have been meant as a path: no data file's ending, no such folder here."""
    return bool(_HUB_NAME.fullmatch(source)) and extension(path) not in READERS and not path.parent.exists()


def _missing(path: Path) -> UserError:
    folder, name = path.parent, path.name
    while not folder.is_dir():
        folder, name = folder.parent, folder.name
    present = sorted(entry.name for entry in folder.iterdir())
    near = get_close_matches(name, present, n=1)
    if near:
        return UserError(f"{path}: no such file or folder. Did you mean {folder / near[0]}?")
    return UserError(
        f"{path}: no such file or folder. {folder.resolve()} holds: {_listed(present) or 'nothing'}."
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED_NAMES} more" if len(names) > _LISTED_NAMES else ""
    return ", ".join(names[:_LISTED_NAMES]) + more
