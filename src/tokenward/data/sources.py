"""Reads rows from a file, several files, a folder, a saved data set, or a data set on the Hugging Face hub."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tokenward.data.fields import describe, unknown_name
from tokenward.data.files import READERS, Meter, Rows, extension
from tokenward.data.messages import without_filled
from tokenward.errors import UserError

Say = Callable[[str], object]

_WORDS = "train|training|test|testing|validation|valid|val|dev|eval|evaluation"
_FIRST = re.compile(rf"({_WORDS})((?:_[a-z][a-z0-9]*)*)(?![a-z0-9])")
_LAST = re.compile(rf"[-_.]({_WORDS})(?:[-_.]?\d.*)?$")
_METADATA = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LISTED_NAMES = 8


def rows(
    source: str | Path | Sequence[str | Path],
    *,
    split: str | None = None,
    subset: str | None = None,
    say: Say = str,
    meter: Meter | None = None,
) -> Rows:
    """The rows of a source, one at a time.

    Args:
        source: A file (JSONL, JSON, CSV, TSV, each also with ``.gz``, or Parquet), a glob pattern, a folder of such
            files, a folder saved by ``datasets``, a hub name ``owner/name``, or a list of these.
        split: The split to read (default: ``train``, or the only one). File names tell their split, such as
            ``train-00000-of-00002.parquet``. If no file does, the files whose names start with ``split`` are read.
        subset: A folder inside the source, or the configuration of a hub data set.
        say: Called with a line that tells which split is read, if there are others.
        meter: Counts the bytes of files, in all and read. A data set of the hub, whose size is not known, counts none.

    Yields:
        The position of the row, ``file:line`` or ``file:row N`` (counted from 1), and the row.

    Raises:
        UserError: The source is missing or cannot be read, or the split is ambiguous.
    """
    if not isinstance(source, str | Path):
        for part in source:
            yield from rows(part, split=split, subset=subset, say=say, meter=meter)
        return
    meter = meter or Meter()
    path = _path(source)
    if path.is_dir():
        yield from _folder_rows(path, split, subset, say, meter)
    elif path.exists():
        yield from _file_rows(path, split, subset, meter)
    elif any(character in str(source) for character in "*?["):
        yield from _glob_rows(path, split, subset, meter)
    elif _is_hub_name(str(source), path):
        yield from _hub_rows(str(source), split, subset, say)
    else:
        raise _missing(path)


def _path(source: str | Path) -> Path:
    """The path of a source, which may be missing.

    Raises:
        UserError: it is empty, or cannot be a path.
    """
    written = str(source)
    try:
        if written.strip() and "\0" not in written:
            path = Path(source).expanduser()
            path.exists()
            return path
        problem = "is empty" if not written.strip() else "holds a zero byte"
    except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle, ~nobody
        problem = f"cannot be a path ({getattr(error, 'strerror', None) or error})"
    shown = repr(written if len(written) <= 120 else f"{written[:60]}...{written[-40:]}")
    raise UserError(
        f"the source {shown} {problem}. Name a file, a folder, a pattern or a data set of the hub.",
        code="bad-source",
        key="data.source",
    )


def numbered(name: str, source_rows: Iterable[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with their positions, ``name:row N``, counted from 1.

    Raises:
        UserError: one is not a mapping.
    """
    for number, row in enumerate(source_rows, 1):
        if not isinstance(row, Mapping):
            raise UserError(
                f"{name}:row {number}: found {describe(row)}, expected a mapping with a value for each column, such as "
                '{"prompt": ..., "chosen": ..., "rejected": ...}.',
                code="not-an-object",
            )
        yield f"{name}:row {number}", without_filled(row)


def split_of(name: str) -> str | None:
    """The split that a file (without its extension) or folder is named after; None if it is not named after one.

    ``train-00000-of-00002`` gives train, ``test_prefs`` itself and ``pairs-test`` test.
    """
    if first := _FIRST.match(name.lower()):
        found = "".join(first.groups())
    elif last := _LAST.search(name.lower()):
        found = last.group(1)
    else:
        return None
    return "train" if found == "training" else found


def _file_rows(path: Path, split: str | None, subset: str | None, meter: Meter) -> Rows:
    if split is not None:
        raise _no_splits(split, f"{path} is a file and has no splits")
    _refuse_subset(path, subset)
    return _files_rows([path], meter)


def _files_rows(paths: Sequence[Path], meter: Meter) -> Rows:
    """The rows of some files, one file after another."""
    for path in paths:
        meter.expect(path.stat().st_size)
    for path in paths:
        yield from _reader(path)(path, meter)
        meter.end(path.stat().st_size)


def _reader(path: Path) -> Callable[[Path, Meter | None], Rows]:
    if extension(path) not in READERS:
        found = extension(path) or "a name without extension"
        raise UserError(
            f"{path}: cannot read {found}. Supported are: {', '.join(READERS)}.", code="unknown-file-type"
        )
    if not path.is_file():
        raise UserError(
            f"{path} is a pipe or a device, not a file, and a source is read more than once. Write its content to a file.",
            code="bad-source",
            key="data.source",
        )
    return READERS[extension(path)]


def _glob_rows(pattern: Path, split: str | None, subset: str | None, meter: Meter) -> Rows:
    _refuse_subset(pattern, subset)
    root = Path(pattern.anchor)  # Path.glob does not take an absolute pattern
    found = sorted(path for path in root.glob(str(pattern.relative_to(root))) if path.is_file())
    if not found:
        raise UserError(f"{pattern}: no file matches this pattern.", code="missing-file")
    groups = _grouped(found)
    if split is None and len(groups) > 1:
        names = ", ".join(sorted(name for name in groups if name is not None))
        raise UserError(
            f"{pattern}: matches files of the splits {names} and other files: {_listed(p.name for p in found)}. Set "
            "split, or use a pattern that matches only the files to read.",
            code="ambiguous-split",
            key="data.split",
        )
    yield from _files_rows(
        found if split is None else _files_of_split(groups, split, str(pattern), str), meter
    )


def _folder_rows(folder: Path, split: str | None, subset: str | None, say: Say, meter: Meter) -> Rows:
    if subset is not None:
        folder = _subset_folder(folder, subset)
    if _is_saved(folder):
        yield from _saved_rows(folder, split, say, meter)
        return
    groups = _by_split(folder)
    if not groups:
        names = _subsets(folder)
        advice = (
            f"Set subset to one of its folders: {_listed(names)}."
            if names
            else f"Supported are: {', '.join(READERS)}, and folders of datasets' save_to_disk. For files in deeper "
            f"folders use a pattern: {folder}/**/*.jsonl"
        )
        raise UserError(f"{folder}: contains no data file. {advice}", code="missing-file", key="data.subset")
    yield from _files_rows(_files_of_split(groups, split, str(folder), say), meter)


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _subset_folder(folder: Path, subset: str) -> Path:
    for place in (folder / subset, folder / "data" / subset):
        if place.is_dir():
            return place
    names = _subsets(folder)
    advice = f"It has: {_listed(names)}." if names else "It has no folders with data: leave subset out."
    raise UserError(f"{folder} has no folder {subset}. {advice}", code="unknown-subset", key="data.subset")


def _subsets(folder: Path) -> list[str]:
    places = [sub for place in (folder, folder / "data") if place.is_dir() for sub in sorted(place.iterdir())]
    return [sub.name for sub in places if sub.is_dir() and (_by_split(sub) or _is_saved(sub))]


def _refuse_subset(path: Path, subset: str | None) -> None:
    if subset is not None:
        raise UserError(
            f"subset {subset}: only folders and hub data sets have subsets, and {path} is neither. Leave it out.",
            code="unknown-subset",
            key="data.subset",
        )


def _by_split(folder: Path) -> dict[str | None, list[Path]]:
    """The data files of a folder by their split; None for files whose names tell no split.

    If the folder itself has no data files, those in ``data/`` or in folders named after splits are used.
    """
    for place in (folder, folder / "data"):
        if files := _data_files(place):
            return _grouped(files)
        found: dict[str | None, list[Path]] = {}
        for sub in sorted(place.iterdir()) if place.is_dir() else ():
            if (split := split_of(sub.name)) is not None and (inside := _data_files(sub)):
                found.setdefault(split, []).extend(inside)
        if found:
            return found
    return {}


def _data_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = (path for path in folder.iterdir() if path.is_file() and extension(path) in READERS)
    return sorted(path for path in files if path.name not in _METADATA)


def _grouped(files: Iterable[Path]) -> dict[str | None, list[Path]]:
    found: dict[str | None, list[Path]] = {}
    for path in files:
        found.setdefault(split_of(path.name[: -len(extension(path))]), []).append(path)
    return found


def _files_of_split(
    groups: Mapping[str | None, Sequence[Path]], wanted: str | None, source: str, say: Say
) -> Sequence[Path]:
    unnamed = groups.get(None, [])
    named = sorted(name for name in groups if name is not None)
    if named and wanted is None and unnamed:
        raise UserError(
            f"{source}: some files are of a split ({', '.join(named)}) and others are not "
            f"({_listed(p.name for p in unnamed)}). Set split to read one split, or list the files to read.",
            code="ambiguous-split",
            key="data.split",
        )
    if named:
        return groups[choose_split(source, named, wanted, say)]
    if wanted is None:
        return unnamed
    found = [path for path in unnamed if re.match(rf"{re.escape(wanted)}(?![A-Za-z0-9])", path.name)]
    if not found:
        raise UserError(
            f"no file in {source} has a name that begins with {wanted}. It contains: "
            f"{_listed(path.name for path in unnamed)}.",
            code="unknown-split",
            key="data.split",
        )
    return found


def choose_split(source: str, splits: Sequence[str], wanted: str | None, say: Say) -> str:
    """The split to read: the wanted one, otherwise ``train``, otherwise the only one.

    Raises:
        UserError: There is no such split, or there are several and none is ``train``.
    """
    names = ", ".join(splits)
    if wanted is not None:
        if wanted not in splits:
            raise unknown_name(wanted, f"a split of {source}", splits, key="data.split", code="unknown-split")
        return wanted
    if len(splits) == 1:
        return splits[0]
    if "train" not in splits:
        raise UserError(
            f"{source}: has several splits, but no train: {names}. Set split to one of them.",
            code="ambiguous-split",
            key="data.split",
        )
    others = ", ".join(name for name in splits if name != "train")
    say(f"{source}: the split train is read; also there: {others}")
    return "train"


def _no_splits(split: str, problem: str) -> UserError:
    return UserError(f"split {split}: {problem}. Leave split out.", code="unknown-split", key="data.split")


def _saved_rows(folder: Path, split: str | None, say: Say, meter: Meter) -> Rows:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, DatasetsError) as error:  # a part is missing or damaged
        raise UserError(
            f"{folder}: not a complete folder of datasets' save_to_disk: {error}. Save it again.",
            code="damaged-file",
        ) from error
    if isinstance(saved, Mapping):
        name = choose_split(str(folder), sorted(map(str, saved)), split, say)
        return _metered(numbered(f"{folder}/{name}", saved[name].with_format(None)), saved[name], meter)
    if split is not None:
        raise _no_splits(split, f"{folder} contains one data set without splits")
    return _metered(numbered(str(folder), saved.with_format(None)), saved, meter)


def _metered(found: Rows, saved: Any, meter: Meter) -> Rows:
    """The rows of a saved data set, whose files are read at equal speed."""
    size = sum(Path(part["filename"]).stat().st_size for part in saved.cache_files)
    meter.expect(size)
    for number, row in enumerate(found):
        meter.at(size * number // len(saved))
        yield row
    meter.end(size)


def _hub_rows(name: str, split: str | None, subset: str | None, say: Say) -> Rows:
    import datasets
    from datasets.exceptions import DatasetsError

    # No network, no such data set or configuration, no access: each can fail when opening or later when reading, and
    # the library's message says which it was.
    try:
        splits = datasets.load_dataset(name, subset, streaming=True)
        assert isinstance(splits, Mapping)  # without split=, it returns all of them
        chosen = choose_split(name, sorted(map(str, splits)), split, say)
        yield from numbered(f"{name}/{chosen}", splits[chosen])
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"{name}: there is no such file, and it cannot be read as a hub data set: {error}. Check the name, the "
            "subset and the network. A downloaded copy can be read by its path.",
            code="unreadable-hub-data",
            key="data.source",
        ) from error


def _is_hub_name(source: str, path: Path) -> bool:
    """A name that cannot be a path: it has no data file's extension, and its folder does not exist."""
    return bool(_HUB_NAME.fullmatch(source)) and extension(path) not in READERS and not path.parent.exists()


def _missing(path: Path) -> UserError:
    folder, name = path.parent, path.name
    while not folder.is_dir():
        folder, name = folder.parent, folder.name
    present = sorted(entry.name for entry in folder.iterdir())
    near = get_close_matches(name, present, n=1)
    advice = (
        f"Did you mean {folder / near[0]}?"
        if near
        else f"{folder.resolve()} contains: {_listed(present) or 'nothing'}."
    )
    return UserError(f"{path}: no such file or folder. {advice}", code="missing-file", key="data.source")


def _listed(names: Iterable[str]) -> str:
    """The first few names, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - _LISTED_NAMES} more" if len(names) > _LISTED_NAMES else ""
    return ", ".join(names[:_LISTED_NAMES]) + more
