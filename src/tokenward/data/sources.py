"""Where rows come from: a file, several files, a folder, a saved data set, or a name on the Hugging Face hub."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tokenward.data.files import READERS, Rows, extension
from tokenward.data.messages import without_filled
from tokenward.errors import UserError

Say = Callable[[str], object]

_WORDS = "train|training|test|testing|validation|valid|val|dev|eval|evaluation"
_FIRST = re.compile(rf"({_WORDS})((?:_[a-z][a-z0-9]*)*)(?![a-z0-9])")
_LAST = re.compile(rf"[-_.]({_WORDS})(?:[-_.]?\d.*)?$")

_METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")

LISTED_NAMES = 8


def split_of(name: str) -> str | None:
    """The split that a name says: ``train-00000-of-00002`` train, ``test_prefs`` itself, ``pairs-test`` test.

    Args:
        name: Of a file without its ending, or of a folder.
    """
    found = _FIRST.match(name.lower())
    said = "".join(found.groups()) if found else ""
    if not said:
        last = _LAST.search(name.lower())
        said = last.group(1) if last else ""
    return ("train" if said == "training" else said) or None


def by_split(folder: Path) -> dict[str | None, list[Path]]:
    """The data files of a folder by their split; under None those whose name says none.

    They are the files in the folder itself; where it has none, those in its ``data/``, or in folders that are named as
    splits.
    """
    for place in (folder, folder / "data"):
        if files := data_files(place):
            return grouped(files)
        named = (
            {sub: split_of(sub.name) for sub in sorted(place.iterdir()) if sub.is_dir()}
            if place.is_dir()
            else {}
        )
        found: dict[str | None, list[Path]] = {}
        for sub, split in named.items():
            if split is not None and (inside := data_files(sub)):
                found.setdefault(split, []).extend(inside)
        if found:
            return found
    return {}


def data_files(folder: Path) -> list[Path]:
    """The files of a folder that can be read, in the order of their names; none where there is no such folder."""
    if not folder.is_dir():
        return []
    files = (path for path in folder.iterdir() if path.is_file() and extension(path) in READERS)
    return sorted(path for path in files if path.name not in _METADATA)


def grouped(files: Iterable[Path]) -> dict[str | None, list[Path]]:
    """Files by the split that their name says."""
    found: dict[str | None, list[Path]] = {}
    for path in files:
        name = path.name[: -len(extension(path))]
        found.setdefault(split_of(name), []).append(path)
    return found


def chosen_files(
    groups: Mapping[str | None, Sequence[Path]], wanted: str | None, what: str, say: Say
) -> list[Path]:
    """The files of the split that is wanted, or of the one that is read where none is named.

    Args:
        groups: Files by split.
        wanted: ``data.split``.
        what: The source, for messages.
        say: Is told which split is read where others are there too.

    Raises:
        UserError: There is no such split, or it is not clear which is meant.
    """
    unnamed = list(groups.get(None, ()))
    named = sorted(name for name in groups if name is not None)
    if not named:
        return unnamed if wanted is None else _beginning(unnamed, wanted, what)
    if wanted is None and unnamed:
        raise UserError(
            f"{what}: some files are of a split ({', '.join(named)}) and others are not ({listed(p.name for p in unnamed)}). "
            "Set data.split to read one split, or give the files that you want as a list."
        )
    return list(groups[choose_split(what, named, wanted, say)])


def _beginning(files: Sequence[Path], wanted: str, what: str) -> list[Path]:
    """Files whose name begins with a word."""
    found = [path for path in files if re.match(rf"{re.escape(wanted)}(?![A-Za-z0-9])", path.name)]
    if not found:
        raise UserError(
            f"data.split: no file in {what} has a name that begins with {wanted}. It holds: "
            f"{listed(path.name for path in files)}."
        )
    return found


def choose_split(what: str, splits: Sequence[str], wanted: str | None, say: Say) -> str:
    """The split to read: the one wanted, else ``train``, else the only one.

    Raises:
        UserError: There is no such split, or there are several and no ``train``.
    """
    names = ", ".join(splits)
    if wanted is not None:
        if wanted in splits:
            return wanted
        near = get_close_matches(wanted, splits, n=1)
        advice = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"data.split: {wanted} is no split of {what}.{advice} It has: {names}.")
    if len(splits) == 1:
        return splits[0]
    if "train" not in splits:
        raise UserError(f"{what}: has several splits and no train: {names}. Set data.split to one of them.")
    others = ", ".join(name for name in splits if name != "train")
    say(f"{what}: the split train is read; also there: {others}")
    return "train"


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(names[:LISTED_NAMES]) + more


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def rows(
    source: str | Path | Sequence[str | Path],
    *,
    split: str | None = None,
    subset: str | None = None,
    say: Say = str,
) -> Rows:
    """The rows of a source, one after the other.

    Args:
        source: A file (JSONL, JSON, CSV, TSV, each also ``.gz``, or Parquet), a glob pattern, a folder of such
            files, a folder saved by ``datasets``, a hub name ``owner/name``, or a list of these.
        split: Which split of a source with several (default: ``train`` if there is one, or the only one). Files name
            their split, such as ``train-00000-of-00002.parquet``; of files that name none, those whose name begins so.
        subset: A folder inside the source, or the configuration of a hub data set.
        say: Is told which split is read where others are there too.

    Yields:
        Where the row stands, ``file:line`` or ``file:row N`` (counted from 1), and the row.

    Raises:
        UserError: The source is missing or cannot be read, or it is not clear which split is meant; the message names
            file and line.
    """
    if not isinstance(source, str | Path):
        for part in source:
            yield from rows(part, split=split, subset=subset, say=say)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        yield from _folder_rows(path, split, subset, say)
    elif path.exists():
        yield from _file_rows(path, split, subset)
    elif any(character in str(source) for character in "*?["):
        yield from _glob_rows(path, split, subset)
    elif _is_hub_name(str(source), path):
        yield from _hub_rows(str(source), split, subset, say)
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
    _refuse_subset(pattern, subset)
    root = Path(pattern.anchor)  # Path.glob takes no absolute pattern
    found = sorted(path for path in root.glob(str(pattern.relative_to(root))) if path.is_file())
    if not found:
        raise UserError(f"{pattern}: no file matches this pattern.")
    groups = grouped(found)
    if split is None and len(groups) > 1:
        names = ", ".join(sorted(name for name in groups if name is not None))
        raise UserError(
            f"{pattern}: matches files of a split ({names}) and others beside it: {listed(p.name for p in found)}. Set "
            "data.split, or write a pattern that matches only what you want."
        )
    for path in found if split is None else chosen_files(groups, split, str(pattern), str):
        yield from _file_rows(path, None, None)


def _folder_rows(folder: Path, split: str | None, subset: str | None, say: Say) -> Rows:
    folder = _inside(folder, subset)
    if _is_saved(folder):
        yield from _saved_rows(folder, split, say)
        return
    groups = by_split(folder)
    if not groups:
        raise _no_files(folder)
    for path in chosen_files(groups, split, str(folder), say):
        yield from _file_rows(path, None, None)


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _inside(folder: Path, subset: str | None) -> Path:
    """The folder of a subset."""
    if subset is None:
        return folder
    for place in (folder / subset, folder / "data" / subset):
        if place.is_dir():
            return place
    names = _subsets(folder)
    advice = f"It has: {listed(names)}." if names else "It has no folders with data: leave data.subset out."
    raise UserError(f"data.subset: {subset}: {folder} has no folder of this name. {advice}")


def _subsets(folder: Path) -> list[str]:
    places = [sub for place in (folder, folder / "data") if place.is_dir() for sub in sorted(place.iterdir())]
    return [sub.name for sub in places if sub.is_dir() and (by_split(sub) or _is_saved(sub))]


def _no_files(folder: Path) -> UserError:
    kinds = f"Read are: {', '.join(READERS)}, and folders of datasets' save_to_disk."
    names = _subsets(folder)
    advice = (
        f"Set data.subset to one of its folders: {listed(names)}."
        if names
        else f"{kinds} For files further down write a pattern: {folder}/**/*.jsonl"
    )
    return UserError(f"{folder}: holds no data file. {advice}")


def _saved_rows(folder: Path, split: str | None, say: Say) -> Rows:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, DatasetsError) as error:  # a part is missing or damaged
        raise UserError(
            f"{folder}: not a whole folder of datasets' save_to_disk: {error}. Save it again."
        ) from error
    if isinstance(saved, Mapping):
        name = choose_split(str(folder), sorted(map(str, saved)), split, say)
        return numbered(f"{folder}/{name}", saved[name].with_format(None))
    if split is not None:
        raise UserError(
            f"data.split: {split}: {folder} holds one data set without splits. Leave data.split out."
        )
    return numbered(str(folder), saved.with_format(None))


def _hub_rows(name: str, split: str | None, subset: str | None, say: Say) -> Rows:
    import datasets
    from datasets.exceptions import DatasetsError

    # What fails on the way to the hub, while opening and while reading on: no network, no such data set or
    # configuration, no access. Each comes with a message that says which.
    try:
        splits = datasets.load_dataset(name, subset, streaming=True)
        if not isinstance(splits, Mapping):
            raise UserError(f"{name}: datasets gave {type(splits).__name__}, expected its splits.")
        chosen = choose_split(name, sorted(map(str, splits)), split, say)
        yield from numbered(f"{name}/{chosen}", splits[chosen])
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"{name}: no such file here, and as a hub data set it cannot be read: {error}. "
            "Check the name, data.subset and the network; a downloaded copy can be given by its path."
        ) from error


def numbered(name: str, source_rows: Iterable[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with where each stands, ``name:row N``, counted from 1."""
    for number, row in enumerate(source_rows, 1):
        yield f"{name}:row {number}", without_filled(row)


def _refuse_subset(path: Path, subset: str | None) -> None:
    if subset is not None:
        raise UserError(
            f"data.subset: {subset}: only folders and hub data sets have subsets, and {path} is neither. Leave it out."
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
        f"{path}: no such file or folder. {folder.resolve()} holds: {listed(present) or 'nothing'}."
    )
