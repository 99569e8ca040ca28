"""Which split a file belongs to, by its name, and which of several splits is read."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from tokenward.data.files import READERS, extension
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
