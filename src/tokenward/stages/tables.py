"""The tables of a run: its data encoded once, and the pairs that are made of it, each an artifact of the run's folder."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa

from tokenward.artifacts import (
    MANIFEST,
    Manifest,
    StageFolder,
    fingerprint,
    open_stage,
    read_manifest,
)
from tokenward.data.split import fraction_places, is_eval
from tokenward.errors import UserError
from tokenward.stages.run import Run
from tokenward.tokens.encode import check_some_left, explanations
from tokenward.tokens.split import SAID, Note
from tokenward.tokens.store import ENCODED, EncodedStore, write_encoded
from tokenward.tokens.table import PAIRS, TokenTable, read_parts, write_parts
from tokenward.tokens.template import Template

_LAYOUT = 3
_NOT_PAIRED = "comparisons without a pair: closer than data.min_gap"


class Tables(NamedTuple):
    """The pairs of a run that fit its limits, and with them its comparisons of one response.

    Attributes:
        train: For the oracle and the policy.
        eval: For evaluation; none of their prompts is in the others.
        eval_reward: For the eval reward model alone; empty if the recipe has none.
        counts: What was read, dropped or changed, by reason, for each of the three.
    """

    train: TokenTable
    eval: TokenTable
    eval_reward: TokenTable
    counts: dict[str, dict[str, int]]

    def part(self, name: str) -> TokenTable:
        """One of the three, which must have rows.

        Raises:
            UserError: all of its rows were dropped.
        """
        check_some_left(self.counts[name])
        return getattr(self, name)

    @property
    def everything(self) -> TokenTable:
        """Every prompt with all responses of its pairs. No prompt is both trained on and evaluated on."""
        return self.train.then(self.eval_reward).then(self.eval).by_prompt()

    @property
    def summed(self) -> dict[str, int]:
        """The counts of all three together, what was kept last."""
        names = dict.fromkeys(name for part in self.counts.values() for name in part)
        found = {name: sum(part.get(name, 0) for part in self.counts.values()) for name in names}
        found["kept"] = found.pop("kept")
        return {name: count for name, count in found.items() if count or name in ("read", "kept")}


def tables(run: Run, template: Template) -> Tables:
    """The run's pairs as ids, by the recipe's rule; made unless its folder has them.

    The eval reward model's pairs are taken out of the training pairs, by prompt. So it judges from data that neither the
    oracle nor the policy has seen.
    """
    store, sizes = encoded_data(run, template)
    wanted = _pairs_wanted(run, template)
    folder = run.path("pairs") / wanted.fingerprint
    with _made(folder, wanted) as stage:
        if stage is not None:
            stage.complete(counts=_write_pairs(run, store, sizes["train"], folder / PAIRS))
    found = read_parts(folder / PAIRS, store)
    parts = {name: replace(table, scratch=run.folder) for name, table in found.items()}
    return Tables(**parts, counts=read_manifest(folder).facts["counts"])


def pairs_fingerprint(run: Run, template: Template) -> str:
    """Fingerprint of :func:`tables`, for the manifests of stages that read them."""
    return _pairs_wanted(run, template).fingerprint


def _pairs_wanted(run: Run, template: Template) -> Manifest:
    recipe = run.recipe
    settings = {
        "data": {"pairs": recipe.data.pairs, "min_gap": recipe.data.min_gap},
        "eval_reward": None if recipe.eval_reward is None else {"fraction": recipe.eval_reward.fraction},
        "tokens": {"context": run.limits.context},
        "seed": recipe.seed,
    }
    return Manifest.begin("pairs", settings, {"encoded": encoded_fingerprint(run, template)}, _LAYOUT)


@contextmanager
def _made(folder: Path, wanted: Manifest) -> Iterator[StageFolder | None]:
    """The folder of an artifact that must be written now; None if it is there.

    A finished folder is read by any number of stages at once; only writing it needs the lock.
    """
    if (folder / MANIFEST).is_file() and read_manifest(folder).complete:
        yield None
        return
    with open_stage(
        folder,
        stage=wanted.stage,
        settings=wanted.settings,
        inputs=wanted.inputs,
        format=wanted.format,
    ) as stage:
        yield None if stage.done else stage


def _write_pairs(run: Run, store: EncodedStore, train: int, path: Path) -> dict[str, dict[str, int]]:
    """Find the pairs once; returns what was counted."""
    table = run.recipe.data
    both = [
        TokenTable.pairs(store, table.pairs, min_gap=table.min_gap, first=first, last=last)
        for first, last in ((0, train), (train, len(store)))
    ]
    if not len(both[0]) and table.min_gap is not None:
        raise UserError(
            f"no pair is left to train on: data.min_gap {table.min_gap} is larger than every gap. Lower it or leave it out."
        )
    mine, apart = _without_eval_reward(run, store, both[0], train)
    parts: dict[str, TokenTable] = {}
    counts: dict[str, dict[str, int]] = {}
    for name, found in {"train": mine, "eval_reward": apart, "eval": both[1]}.items():
        parts[name], counted = found.fitting(run.limits)
        counts[name] = dict(counted)
    paired = np.union1d(both[0].first_rows, both[1].first_rows)
    counts["train"][_NOT_PAIRED] = len(store) - len(paired)
    counts["train"]["kept"] = counts["train"].pop("kept")
    write_parts(path, parts)
    return counts


def _without_eval_reward(
    run: Run, store: EncodedStore, pairs: TokenTable, train: int
) -> tuple[TokenTable, TokenTable]:
    table = run.recipe.eval_reward
    if table is None:
        return pairs, pairs.choose(np.zeros(0, np.int64))
    apart = rows_of_eval_reward(run, store, train)[pairs.first_rows]
    mine, eval_reward = pairs.where(~apart), pairs.where(apart)
    if not len(mine) or not len(eval_reward):
        raise UserError(
            f"eval_reward.fraction {table.fraction} leaves {len(mine)} pairs for the oracle and the policy and "
            f"{len(eval_reward)} for the eval reward model; each needs some. Change the fraction, or give more data."
        )
    return mine, eval_reward


def rows_of_eval_reward(run: Run, store: EncodedStore, train: int) -> np.ndarray:
    """Which of the training comparisons the eval reward model alone sees.  -> [train] bool"""
    table = run.recipe.eval_reward
    if table is None:
        return np.zeros(train, bool)
    found = (is_eval(store.comparison(row), table.fraction, run.recipe.seed + 1) for row in range(train))
    return np.fromiter(found, bool, train)


def ranked_lists(run: Run, template: Template) -> tuple[TokenTable, TokenTable]:
    """Whole ranked lists to learn a reward from and to judge it by; the eval reward model's prompts are in neither."""
    store, sizes = encoded_data(run, template)
    train = TokenTable.whole(store, 0, sizes["train"])
    return train.where(~rows_of_eval_reward(run, store, len(train))), eval_comparisons(run, template)


def eval_comparisons(run: Run, template: Template) -> TokenTable:
    """The comparisons to evaluate on as they are."""
    store, sizes = encoded_data(run, template)
    return TokenTable.whole(store, sizes["train"])


def random_part(run: Run, rows: TokenTable, share: float, salt: str) -> TokenTable:
    """A random part of a table's comparisons, by their keys; see :func:`tokenward.data.split.fraction`."""
    if share == 1:
        return rows  # and no key need be known
    keys = (rows.comparison(number).key for number in range(len(rows)))
    return rows.choose(np.array(fraction_places(keys, share, run.recipe.seed, salt), np.int64))


class EncodedData(NamedTuple):
    """The data of a run as ids.

    Attributes:
        store: Training comparisons, then those to evaluate on.
        sizes: How many of each.
    """

    store: EncodedStore
    sizes: dict[str, int]


def encoded_data(run: Run, template: Template) -> EncodedData:
    """The data of a run as ids, made unless its folder has them. Other data, tokenizers, templates or limits have another folder.

    Raises:
        UserError: what the folder holds is not whole.
    """
    sizes = {name: run.done("data").facts[name] for name in ("train", "eval")}
    wanted = _encoded_wanted(run, template)
    folder = run.path("encoded") / wanted.fingerprint
    with _made(folder, wanted) as stage:
        if stage is not None:
            files = [run.path("data") / f"{name}.jsonl" for name in sizes]
            processes = run.recipe.tokens.processes
            with run.display.progress("encoding", sum(sizes.values())) as bar:
                write_encoded(folder, files, template, run.limits, processes=processes, progress=bar.advance)
            stage.complete(rows=sum(sizes.values()))
    return EncodedData(_opened(folder / ENCODED, sum(sizes.values())), sizes)


def encoded_fingerprint(run: Run, template: Template) -> str:
    """Fingerprint of :func:`encoded_data`, for the manifests of stages that read it."""
    return _encoded_wanted(run, template).fingerprint


def _encoded_wanted(run: Run, template: Template) -> Manifest:
    settings = {"tokens": run.recipe.tokens.model_dump(exclude={"processes"})}
    inputs = {
        "data": run.done("data").fingerprint,
        "template": fingerprint([template.fingerprint, template.eos_ids]),
    }
    return Manifest.begin("encoded", settings, inputs, _LAYOUT)


_STORES: WeakValueDictionary[tuple[Path, int], EncodedStore] = WeakValueDictionary()
"""Stores that are in use: what is known of every response is held once, however many tables read it."""


def _opened(path: Path, rows: int) -> EncodedStore:
    try:
        known = path.absolute(), path.stat().st_mtime_ns
        found = _STORES.get(known)
        if found is None:
            found = _STORES[known] = EncodedStore.open([path])
        count: int | str = len(found)
    except (OSError, pa.ArrowInvalid) as error:  # removed, or cut off by a copy
        found, count = None, str(error)
    if found is None or count != rows:
        raise UserError(
            f"{path} does not hold the {rows} encoded comparisons that its {MANIFEST} says ({count}). Delete the folder; it is "
            "made again."
        )
    return found


def say_notes(run: Run, template: Template, counts: Mapping[str, int], store: EncodedStore) -> None:
    """Show how rows are written if that needs a word, each with an example."""
    found: dict[Note, Any] = {}
    for note, words in SAID.items():
        row = store.first_with(note) if counts.get(words) else None
        if row is not None:
            found[note] = store.comparison(row)
    for line in explanations(template, found, counts):
        run.display.line(line)
