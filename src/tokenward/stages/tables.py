"""The tables of a run: its data, encoded once, and the pairs formed from it. Both are stored in the run's folder."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa

from tokenward.api.inputs import said_notes
from tokenward.artifacts import MANIFEST, Manifest, StageFolder, fingerprint, open_stage, read_manifest, said
from tokenward.data.split import fraction_places, is_eval
from tokenward.distributed import first_alone
from tokenward.errors import UserError
from tokenward.stages.run import Run
from tokenward.tokens.encode import check_some_left
from tokenward.tokens.store import ENCODED, EncodedStore, write_encoded
from tokenward.tokens.table import PAIRS, TokenTable, read_parts, write_parts
from tokenward.tokens.template import Template

_LAYOUT = 3
_NOT_PAIRED = "comparisons without a pair: closer than data.min_gap"


class Tables(NamedTuple):
    """The pairs of a run that fit its limits, and its comparisons of one response.

    Attributes:
        train: For the oracle and the policy.
        eval: For evaluation. No prompt is also in another part.
        eval_reward: For the eval reward model only; empty if the recipe has none.
        counts: For each part: rows read, dropped or changed, by reason.
    """

    train: TokenTable
    eval: TokenTable
    eval_reward: TokenTable
    counts: dict[str, dict[str, int]]

    def part(self, name: str) -> TokenTable:
        """One of the three parts, which must have rows.

        Raises:
            UserError: all of its rows were dropped.
        """
        check_some_left(self.counts[name])
        return getattr(self, name)

    @property
    def without_eval(self) -> str:
        """Why no pair can be evaluated; empty if some can."""
        if not self.counts["eval"]["read"]:
            return "there are no eval rows, so no pair is evaluated"
        try:
            check_some_left(self.counts["eval"])
        except UserError as error:
            return f"no pair is evaluated. Of the eval rows, {error}"
        return ""

    @property
    def everything(self) -> TokenTable:
        """Every prompt with all responses of its pairs."""
        return self.train.then(self.eval_reward).then(self.eval).by_prompt()

    @property
    def summed(self) -> dict[str, int]:
        """The counts of all parts together; ``kept`` comes last."""
        names = dict.fromkeys(name for part in self.counts.values() for name in part)
        found = {name: sum(part.get(name, 0) for part in self.counts.values()) for name in names}
        found["kept"] = found.pop("kept")
        return {name: count for name, count in found.items() if count or name in ("read", "kept")}


def tables(run: Run, template: Template) -> Tables:
    """The run's pairs as token ids; read from the run's folder, or formed and written there.

    The pairs of the eval reward model are taken from the training pairs, by prompt, so that it evaluates with data that
    neither the oracle nor the policy has seen.
    """
    store, train = _encoded(run, template)
    wanted = _pairs_manifest(run, template)
    folder = run.path("pairs") / wanted.fingerprint

    def form() -> None:
        with _unless_done(folder, wanted) as stage:
            if stage is not None:
                stage.complete(counts=_write_pairs(run, store, train, folder / PAIRS))

    first_alone(form)
    parts = {
        name: replace(table, scratch=run.folder) for name, table in read_parts(folder / PAIRS, store).items()
    }
    return Tables(**parts, counts=read_manifest(folder).facts["counts"])


def remove_damaged_tables(run: Run) -> bool:
    """Remove encoded data and pairs of a run whose files are not those that were written; whether there were some.

    A run whose stages are all done reads them for its report only, so that :func:`tables` is not called.
    """
    found = False
    for folder in sorted(path for kind in ("encoded", "pairs") for path in run.path(kind).glob("[!.]*")):
        problem = _problem(folder) if folder.is_dir() and not folder.is_symlink() else ""
        if problem:
            run.display.line(f"  damaged: {folder.parent.name}/{problem}. It is made again")
            shutil.rmtree(folder)
            found = True
    return found


def _problem(folder: Path) -> str:
    try:
        found = read_manifest(folder)
    except UserError as error:
        return f"{folder.name}: {error}"
    damaged = found.needed_damage(folder, every=True) if found.complete else {}
    return said(folder, damaged) if damaged else ""


def pairs_fingerprint(run: Run, template: Template) -> str:
    """Fingerprint of :func:`tables`."""
    return _pairs_manifest(run, template).fingerprint


def _pairs_manifest(run: Run, template: Template) -> Manifest:
    recipe = run.recipe
    settings = {
        "data": {"pairs": recipe.data.pairs, "min_gap": recipe.data.min_gap},
        "eval_reward": None if recipe.eval_reward is None else {"fraction": recipe.eval_reward.fraction},
        "tokens": {"context": run.limits.context},
        "seed": recipe.seed,
    }
    return Manifest.begin("pairs", settings, {"encoded": encoded_fingerprint(run, template)}, _LAYOUT)


@contextmanager
def _unless_done(folder: Path, wanted: Manifest) -> Iterator[StageFolder | None]:
    """The locked folder to write to, or None if it is complete.

    Any number of stages may read a complete folder at once; only writing needs the lock.
    """
    if (folder / MANIFEST).is_file():
        found = read_manifest(folder)
        if found.complete and not found.needed_damage(folder, every=True):
            yield None
            return
    with open_stage(
        folder,
        stage=wanted.stage,
        settings=wanted.settings,
        inputs=wanted.inputs,
        format=wanted.format,
        wait=True,  # jobs that write parts of the scores begin with the same tables
        verify=True,
    ) as stage:
        yield None if stage.done else stage


def _write_pairs(run: Run, store: EncodedStore, train: int, path: Path) -> dict[str, dict[str, int]]:
    """Form the pairs and write them; returns the counts of each part."""
    table = run.recipe.data
    with run.display.progress("pairs", len(store), brief=True) as bar:
        both = [
            TokenTable.pairs(
                store, table.pairs, min_gap=table.min_gap, first=first, last=last, progress=bar.advance
            )
            for first, last in ((0, train), (train, len(store)))
        ]
    if not len(both[0]) and table.min_gap is not None:
        raise UserError(
            f"no training pair is left: min_gap {table.min_gap} is larger than every gap. Lower it or remove it.",
            code="no-rows",
            key="data.min_gap",
        )
    mine, separate = _without_eval_reward(run, store, both[0], train)
    parts: dict[str, TokenTable] = {}
    counts: dict[str, dict[str, int]] = {}
    for name, found in {"train": mine, "eval_reward": separate, "eval": both[1]}.items():
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
    separate = _rows_of_eval_reward(run, store, train)[pairs.first_rows]
    mine, eval_reward = pairs.where(~separate), pairs.where(separate)
    if table is not None and not (len(mine) and len(eval_reward)):
        raise UserError(
            f"a fraction of {table.fraction} leaves {len(mine)} pairs for the oracle and the policy and {len(eval_reward)} for "
            "the eval reward model. Each needs some: change the fraction, or add data.",
            code="no-rows",
            key="eval_reward.fraction",
        )
    return mine, eval_reward


def _rows_of_eval_reward(run: Run, store: EncodedStore, train: int) -> np.ndarray:
    """Which training comparisons are reserved for the eval reward model.  -> [train] bool"""
    table = run.recipe.eval_reward
    if table is None:
        return np.zeros(train, bool)
    # With the seed of the eval split, the hash would choose rows that are already eval rows.
    found = (is_eval(store.comparison(row), table.fraction, run.recipe.seed + 1) for row in range(train))
    return np.fromiter(found, bool, train)


def ranked_lists(run: Run, template: Template) -> tuple[TokenTable, TokenTable]:
    """Whole ranked lists to train and to evaluate a reward; without the prompts of the eval reward model."""
    store, count = _encoded(run, template)
    train = TokenTable.whole(store, 0, count)
    return train.where(~_rows_of_eval_reward(run, store, len(train))), eval_comparisons(run, template)


def eval_comparisons(run: Run, template: Template) -> TokenTable:
    """The eval comparisons, not yet cut into pairs."""
    store, train = _encoded(run, template)
    return TokenTable.whole(store, train)


def random_part(run: Run, rows: TokenTable, share: float, salt: str) -> TokenTable:
    """A random part of a table's comparisons, chosen by their keys; see :func:`tokenward.data.split.fraction`."""
    if share == 1:
        return rows  # without reading every key
    keys = (rows.comparison(number).key for number in range(len(rows)))
    return rows.choose(np.array(fraction_places(keys, share, run.recipe.seed, salt), np.int64))


def _encoded(run: Run, template: Template) -> tuple[EncodedStore, int]:
    """The run's data as token ids, and how many of its rows train; the others are eval rows.

    The ids are encoded unless the run's folder has them: each data, tokenizer, template and limits has its own folder.

    Raises:
        UserError: the file of the ids is incomplete.
    """
    sizes = {name: run.done("data").facts[name] for name in ("train", "eval")}
    total = sum(sizes.values())
    wanted = _encoded_manifest(run, template)
    folder = run.path("encoded") / wanted.fingerprint

    def encode() -> None:
        with _unless_done(folder, wanted) as stage:
            if stage is None:
                return
            files = [run.path("data") / f"{name}.jsonl" for name in sizes]
            processes = run.recipe.tokens.processes
            with run.display.progress("encoding", total) as bar:
                write_encoded(folder, files, template, run.limits, processes=processes, progress=bar.advance)
            stage.complete(rows=total)

    first_alone(encode)
    return _opened(folder / ENCODED, total), sizes["train"]


def encoded_fingerprint(run: Run, template: Template) -> str:
    """Fingerprint of the run's encoded data."""
    return _encoded_manifest(run, template).fingerprint


def _encoded_manifest(run: Run, template: Template) -> Manifest:
    settings = {"tokens": run.recipe.tokens.model_dump(exclude={"processes"})}
    inputs = {
        "data": run.done("data").identity,
        "template": fingerprint([template.fingerprint, template.eos_ids]),
    }
    return Manifest.begin("encoded", settings, inputs, _LAYOUT)


# Stores in use, so that several tables of one file share one copy of what is known of every response.
_STORES: WeakValueDictionary[tuple[Path, int], EncodedStore] = WeakValueDictionary()


def _opened(path: Path, rows: int) -> EncodedStore:
    try:
        known = path.absolute(), path.stat().st_mtime_ns
        found = _STORES.get(known)
        if found is None:
            found = _STORES[known] = EncodedStore.open([path])
        count: int | str = len(found)
    except (OSError, pa.ArrowInvalid) as error:  # deleted, or truncated by a copy
        found, count = None, str(error)
    if found is None or count != rows:
        raise UserError(
            f"{path} should hold {rows} encoded comparisons, as its {MANIFEST} says, but does not ({count}). Delete the folder "
            "and run again to encode the data anew.",
            code="incomplete-file",
        )
    return found


def say_notes(run: Run, template: Template, counts: Mapping[str, int], store: EncodedStore) -> None:
    """Explain unusual ways in which the template renders rows, each with an example."""
    for line in said_notes(template, counts, store):
        run.display.line(line)
