"""The data stage: any source to clean comparisons, split once and for all."""

from array import array
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenward.artifacts import Manifest, file_fingerprint, fingerprint
from tokenward.config import DataTable, EvalTable
from tokenward.data.choice import Choice
from tokenward.data.lines import ComparisonFile, read_comparisons
from tokenward.data.pairs import pair_places
from tokenward.data.prepare import Reading, read
from tokenward.data.split import fraction_places, is_eval
from tokenward.data.stream import write_split
from tokenward.errors import UserError
from tokenward.pipeline.context import Run
from tokenward.pipeline.encoding import encoded_file, say_notes
from tokenward.tokens.encode import Encoded, EncodedSet, check_some_left, encode, keys_of
from tokenward.tokens.encoded import EncodedRows
from tokenward.tokens.template import Template
from tokenward.types import Comparison

BUILTIN = Path(str(files("tokenward") / "data" / "builtin" / "reviews.jsonl.gz"))


class PairSets(NamedTuple):
    """The pairs of a run, and with them its comparisons of one response.

    Attributes:
        train: For the oracle and the policy.
        eval: For evaluation; no prompt of it is in the others.
        eval_reward: For the eval reward model alone; empty where the recipe has none.
    """

    train: Choice
    eval: Choice
    eval_reward: Choice

    @property
    def all_train(self) -> Choice:
        """The pairs that something is trained on."""
        return self.train.then(self.eval_reward)


NOTHING_HELD_OUT = (
    "  no comparison is held out (data.eval is {share:g}), so nothing can be evaluated. A larger data.eval or more "
    "rows would give figures"
)
NOTHING_TO_EVALUATE = (
    "  no row of data.eval is left, so nothing can be evaluated. Its rows were dropped for the reasons above"
)


def prepare_data(run: Run) -> Manifest:
    """Read, clean and split the comparisons; counts what was dropped and why.

    Writes ``train.jsonl``, ``eval.jsonl`` and ``dropped.jsonl``.

    Raises:
        UserError: the source cannot be read as comparisons, or nothing is left.
    """
    table = run.recipe.data
    train = _ReadWith(table.source, table.format, table.columns, table.split, table.subset, table.limit)
    aside = _evaluated(table, table.eval) if isinstance(table.eval, EvalTable) else None
    share = 0.0 if isinstance(table.eval, EvalTable) else table.eval
    settings = {"data": table.model_dump(exclude={"pairs", "min_gap"}), "seed": run.recipe.seed}
    inputs = {"source": source_fingerprint(train.path)}
    if aside is not None:
        inputs["evaluation source"] = source_fingerprint(aside.path)
    with run.stage("data", settings, inputs, layout=2) as stage:
        if not stage.done:
            stage.complete(**_written(stage.path, train, aside, share=share, seed=run.recipe.seed))
    _show(run, run.done("data"))
    return run.done("data")


class _ReadWith(NamedTuple):
    """A source and how it is read."""

    source: str | list[str]
    format: str
    columns: dict[str, str]
    split: str | None
    subset: str | None
    limit: int | None

    @property
    def path(self) -> str | list[str]:
        return str(BUILTIN) if self.source == "builtin" else self.source

    def reading(self) -> Reading:
        settings = self._asdict()
        del settings["source"]
        return read(self.path, **settings)


def _evaluated(table: DataTable, own: EvalTable) -> _ReadWith:
    """How the rows to evaluate on are read."""
    return _ReadWith(
        table.source if own.source is None else own.source,
        table.format if own.format is None else own.format,
        table.columns if own.columns is None else own.columns,
        own.split,
        own.subset if own.subset is not None or own.source is not None else table.subset,
        own.limit,
    )


def _written(
    folder: Path, train: _ReadWith, aside: _ReadWith | None, *, share: float, seed: int
) -> dict[str, Any]:
    """Write the split; the facts of the stage."""
    readings = [source.reading() for source in (train, aside) if source is not None]
    evaluation = None if aside is None else readings[1].rows
    written = write_split(folder, readings[0].rows, share=share, seed=seed, evaluation=evaluation)
    unread = dict.fromkeys(name for reading in readings for name in reading.unread)
    said = dict.fromkeys(line for reading in readings for line in reading.said)
    return {
        **written._asdict(),
        "format": readings[0].format,
        "columns_not_read": list(unread),
        "said": list(said),
    }


def _show(run: Run, manifest: Manifest) -> None:
    facts, table = manifest.facts, run.recipe.data
    counts = {
        **facts["counts"],
        **facts["notes"],
        "train": facts["train"],
        "held out": facts["eval"],
        **{
            f"unpaired, {side.replace('_', ' ')}": count for side, count in facts["unpaired"].items() if count
        },
    }
    run.display.table("rows", ("", "rows"), [(name, str(count)) for name, count in counts.items()])
    if isinstance(table.eval, EvalTable):
        found = [(name, str(count)) for name, count in facts["evaluation"].items()]
        run.display.table("rows of data.eval", ("", "rows"), found)
    for line in facts["said"]:
        run.display.line(f"  {line}")
    if facts["columns_not_read"]:
        run.display.line(f"  columns not read: {', '.join(facts['columns_not_read'])}")
    if not facts["eval"]:
        aside = isinstance(table.eval, EvalTable)
        run.display.line(NOTHING_TO_EVALUATE if aside else NOTHING_HELD_OUT.format(share=table.eval))


def source_fingerprint(source: str | list[str]) -> str:
    """Fingerprint of a source's files; of its name, where the hub holds it."""
    parts = []
    for name in [source] if isinstance(source, str) else source:
        path = Path(name).expanduser()
        root = Path(path.anchor)
        matches = [path] if path.exists() else sorted(root.glob(str(path.relative_to(root))))
        found = [
            item for match in matches for item in ([match] if match.is_file() else sorted(match.rglob("*")))
        ]
        parts += [file_fingerprint(item) for item in found if item.is_file()] or [name]
    return fingerprint(parts)


def comparison_file(run: Run, part: str) -> ComparisonFile:
    """A part of the finished data stage, ``train`` or ``eval``."""
    return ComparisonFile(run.path("data") / f"{part}.jsonl")


def pair_sets(run: Run) -> PairSets:
    """Pairs of the finished data stage, by the recipe's rule.

    The eval reward model's pairs are taken out of the training pairs, by prompt, so that it judges from data
    which neither the oracle nor the policy has seen.
    """
    table = run.recipe.data
    train, eval_rows = (_pairs_of(run, side) for side in ("train", "eval"))
    if not train and table.min_gap is not None:
        raise UserError(
            f"no pair is left to train on: data.min_gap {table.min_gap} is larger than every gap. Lower it or leave it out."
        )
    if run.recipe.eval_reward is None:
        return PairSets(train, eval_rows, train[:0])
    judged_apart = rows_of_eval_reward(run, train.file)[train.first_rows()]
    mine, eval_reward = (train.choose(np.flatnonzero(side)) for side in (~judged_apart, judged_apart))
    if not mine or not eval_reward:
        raise UserError(
            f"eval_reward.fraction {run.recipe.eval_reward.fraction} leaves {len(mine)} pairs for the oracle and the policy and "
            f"{len(eval_reward)} for the eval reward model; each needs some. Change the fraction, or give more data."
        )
    return PairSets(mine, eval_rows, eval_reward)


def rows_of_eval_reward(run: Run, file: ComparisonFile) -> np.ndarray:
    """Which of the training comparisons the eval reward model alone sees.  -> [comparisons] bool"""
    table = run.recipe.eval_reward
    if table is None:
        return np.zeros(len(file), bool)
    return np.fromiter((is_eval(row, table.fraction, run.recipe.seed + 1) for row in file), bool, len(file))


def _pairs_of(run: Run, side: str) -> Choice:
    table = run.recipe.data
    file = comparison_file(run, side)
    rows, places, sizes = array("q"), array("i"), array("b")
    for number, comparison in enumerate(file):
        alone = [(0,)] if len(comparison.responses) == 1 else []
        for part in alone or pair_places(comparison, table.pairs, min_gap=table.min_gap):
            rows.append(number)
            places.extend(part)
            sizes.append(len(part))
    return Choice.pairs(file, rows, places, sizes)


def whole_comparisons(file: ComparisonFile) -> Choice:
    """All comparisons of a file as they are, with every response."""
    sizes = array("i", (len(row.responses) for row in file))
    return Choice.whole(file, range(len(sizes)), sizes)


def without_pairs(run: Run) -> int:
    """Comparisons all of whose pairs lie closer than ``data.min_gap``."""
    table = run.recipe.data
    both = (row for side in ("train", "eval") for row in read_comparisons(run.path("data") / f"{side}.jsonl"))
    ranked = (row for row in both if len(row.responses) > 1)
    return sum(not pair_places(row, table.pairs, min_gap=table.min_gap) for row in ranked)


def token_settings(run: Run) -> dict[str, Any]:
    """Everything of the recipe's ``tokens`` that decides which tokens there are."""
    return run.recipe.tokens.model_dump(exclude={"processes"})


def pair_settings(run: Run) -> dict[str, Any]:
    """Everything of the recipe that decides which pairs there are and what their tokens are."""
    table, eval_reward = run.recipe.data, run.recipe.eval_reward
    return {
        "tokens": {**token_settings(run), "context": run.limits.context},
        "data": {"pairs": table.pairs, "min_gap": table.min_gap},
        "eval_reward": None if eval_reward is None else {"fraction": eval_reward.fraction},
        "seed": run.recipe.seed,
    }


def oracle_pairs(run: Run, train: Choice) -> Choice:
    """The random part of the training pairs that the oracle sees."""
    return random_part(run, train, run.recipe.oracle.fraction, "oracle")


def random_part(run: Run, rows: Choice, share: float, salt: str) -> Choice:
    """A random part of chosen comparisons, by their keys; see :func:`tokenward.data.split.fraction`."""
    if share == 1:
        return rows  # and no key need be known
    keys = (row.key for row in rows)
    return rows.choose(np.array(fraction_places(keys, share, run.recipe.seed, salt), np.int64))


def encode_set(
    run: Run, rows: Sequence[Comparison], template: Template, *, show: str = "", may_be_empty: bool = False
) -> EncodedSet:
    """Encode comparisons within the recipe's limits; ``show`` names the table that is displayed.

    Those chosen from a file of the data stage come from the ids that the run keeps of the whole file.

    Raises:
        UserError: one is too long and that is an error, or none is left and that may not be.
    """
    if isinstance(rows, Choice):
        result = EncodedSet(*encoded_choice(run, rows, template))
    else:
        result = encode(rows, template, run.limits, may_be_empty=True)
    if not may_be_empty:
        check_some_left(result.counts)
    if show:
        run.display.table(show, ("", "rows"), [(name, str(count)) for name, count in result.counts.items()])
        say_notes(run, template, result.counts, [rows.file if isinstance(rows, Choice) else rows])
    return result


def encoded_choice(run: Run, rows: Choice, template: Template) -> tuple[EncodedRows, dict[str, int]]:
    """Chosen comparisons within the recipe's limits, from the ids that the run keeps, and what was counted."""
    chosen = EncodedRows(
        comparisons=rows,
        ids=encoded_file(run, rows.file, template),
        limits=run.limits,
    )
    kept, counts = chosen.judged()
    return kept, {**counts, "kept": len(kept)}


def response_keys(row: Encoded) -> list[str]:
    """Stable names of a row's responses."""
    return keys_of(row.comparison)


def first_by_key(rows: Sequence[Encoded], count: int) -> list[Encoded]:
    """The rows with the smallest keys, of each prompt the last row."""
    assert isinstance(rows, EncodedRows)
    _, place = np.unique(rows.of_rows("prompt_digest")[::-1], return_index=True)
    last = len(rows) - 1 - place
    order = np.argsort(rows.of_rows("key")[last])
    return [rows[number] for number in last[order][:count].tolist()]
