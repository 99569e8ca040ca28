"""Scores and weights that exist already: as columns of a data set, or in a folder."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, List

from tokenward.api.inputs import TokenSettings
from tokenward.artifacts import MANIFEST, read_manifest
from tokenward.errors import UserError
from tokenward.scoring.basic import Scorer
from tokenward.scoring.reads import scope_of_scores, scores_of
from tokenward.scoring.store import TokenRecord, TokenStore, write_shards
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.store import digest
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template

PREFIX = "token_"
KEYS, RANKS, EOS, TEXTS = "response_keys", "response_ranks", "response_eos", "response_texts"
PROMPTS = "prompt_digest"
IDS, STARTS, ENDS, SCORES, WEIGHTS = (
    f"{PREFIX}{name}" for name in ("ids", "starts", "ends", "scores", "weights")
)
SEGMENTS = f"{PREFIX}segments"
"""Columns of a scored data set; each row has a list with an entry per response. See :func:`tokenward.score`."""

SHARD_ROWS = 128
"""Prompts that are computed together. Equal to a recipe's default, so that the values are equal to the bit."""


def store_of(scored: Sequence[Dataset], folder: Path) -> TokenStore:
    """Write the values of scored data sets as a store.

    Raises:
        UserError: no row has values, a list of values does not fit the tokens, or two rows give one response other values.
    """
    records: dict[str, TokenRecord] = {}
    for part in scored:
        for number, record in _records_of(part):
            other = records.setdefault(record.key, record)
            if other is not record:
                _check_same_values(other, record, number)
    if not records:
        raise UserError(
            "no row of the scored data set has scores. Score it again with tokenward.score.",
            code="missing-scores",
        )
    return write_shards(
        folder, list(records), lambda keys: [records[key] for key in keys], rows_per_shard=SHARD_ROWS
    )


def _records_of(scored: Dataset) -> Iterator[tuple[int, TokenRecord]]:
    """The responses of a scored data set with their row. Scores and weights keep the names of their columns."""
    names = {
        name: name if name in (SCORES, WEIGHTS) else name.removeprefix(PREFIX)
        for name in scored.column_names
        if name.startswith(PREFIX) and name not in (IDS, STARTS, ENDS, SEGMENTS)
    }
    for number, row in enumerate(cast(Iterable[Mapping[str, Any]], scored.with_format(None)), 1):
        for place, key in enumerate(row[KEYS] or ()):
            joint = [SEGMENTS] if row.get(SEGMENTS) is not None else []
            for name in (IDS, STARTS, ENDS, *joint, *names):
                check_list(row, name, place, number)
            values = {value: row[name][place] for name, value in names.items()}
            fixed = (row[name][place] for name in (IDS, STARTS, ENDS))
            text = row[TEXTS][place] if row.get(TEXTS) else None
            segment = row[SEGMENTS][place] if joint else None
            yield number, TokenRecord(key, *fixed, values=values, text=text, segment=segment)


def check_list(row: Mapping[str, Any], name: str, place: int, number: int) -> None:
    """Refuse a list that does not have one number per token. The values of all rows are stored end to end."""
    lists, count = row[name], len(row[KEYS])
    length = len(row[IDS][place])
    if lists is None or len(lists) != count or lists[place] is None or len(lists[place]) != length:
        found = "None" if lists is None else f"lists of {[0 if one is None else len(one) for one in lists]}"
        raise UserError(
            f"row {number} of the scored data set: {name} is {found}, but its {count} responses have "
            f"{[len(one) for one in row[IDS]]} tokens. Give one number per token, or None in {KEYS} to leave the row out.",
            code="wrong-length",
        )
    if name == WEIGHTS and not all(math.isfinite(weight) and weight >= 0 for weight in lists[place]):
        raise UserError(
            f"row {number} of the scored data set: {name} must be finite numbers of at least 0, got "
            f"{min(lists[place])} to {max(lists[place])}.",
            code="wrong-result",
        )


def _check_same_values(one: TokenRecord, other: TokenRecord, number: int) -> None:
    """Refuse two rows with one response, if its scores or weights differ: values are stored per response."""
    for name in (SCORES, WEIGHTS):
        if not _equal(one.values.get(name), other.values.get(name)):
            raise UserError(
                f"row {number} of the scored data set: another row has the same response to the same prompt with other {name}, and "
                "values are stored per response. Pass selector to SelectiveTrainer, which then selects for each pair; if the other row "
                "is in the eval data set, remove one of the two.",
                code="ambiguous-response",
            )


def _equal(one: Sequence[float] | None, other: Sequence[float] | None) -> bool:
    return (one is None) == (other is None) and np.array_equal(one or (), other or (), equal_nan=True)


def check_stored(store: Any, tables: Iterable[TokenTable], template: Template, tokens: TokenSettings) -> None:
    """Check that existing scores were computed after the prompts that the rows have now.

    Raises:
        UserError: a prompt has other tokens, because of another template or another limit.
    """
    if isinstance(store, TokenStore):
        _check_folder(store, template, tokens)
    for scored in store if isinstance(store, list) else ():
        _check_prompts(scored, tables)


def _check_folder(store: TokenStore, template: Template, tokens: TokenSettings) -> None:
    known = (store.folder / MANIFEST).is_file()
    made = read_manifest(store.folder).facts.get("tokens") if known else None
    if made is None:  # written by an older version, or not by a stage
        return
    truncates = "truncate" in (made["too_long"], tokens.too_long)
    if made["template"] != template.fingerprint:
        found = "another template"
    elif truncates and made["max_prompt_tokens"] != tokens.max_prompt_tokens:
        found = f"prompts truncated to {made['max_prompt_tokens']} tokens, not {tokens.max_prompt_tokens}"
    else:
        return
    raise UserError(
        f"the scores in {store.folder} were computed with {found}. Pass the TokenSettings of the run that computed them.",
        code="template-mismatch",
    )


def _check_prompts(scored: Dataset, tables: Iterable[TokenTable]) -> None:
    if PROMPTS not in scored.column_names:
        return
    columns = scored.select_columns([KEYS, PROMPTS]).with_format(None)
    known = {key: row[PROMPTS] for row in cast(Iterable[Any], columns) for key in row[KEYS] or ()}
    for table in tables:
        for number in range(len(table)):
            row = table[number]
            found = prompt_digest(row)
            for key in keys_of(row.comparison):
                if known.get(key, found) != found:
                    raise UserError(
                        f"{row.comparison.source}: its scores were computed after a prompt with other tokens, so with another template "
                        "or another limit of the prompt. Pass the same tokens= to tokenward.score and here.",
                        code="template-mismatch",
                    )


def prompt_digest(row: TokenRow) -> str:
    """A hash of the tokens that precede a response of a row."""
    return f"{int(digest(np.asarray(row.prompt, np.int64))):016x}"


def as_data_set(rows: Any) -> Any:
    """Rows with scores or weights as a ``datasets.Dataset``, in whatever form they come; other rows as they are."""
    if isinstance(rows, Dataset | TokenTable) or rows is None:
        return rows
    if isinstance(rows, Iterator):  # a look at its first row would take that row away
        rows = list(rows)
    first = next(iter(rows), None)
    return Dataset.from_list(list(rows)) if isinstance(first, Mapping) and KEYS in first else rows


def score_columns(table: TokenTable, scorer: Scorer, store: TokenStore) -> dict[str, dict[str, list[Any]]]:
    """The new columns of each row, by the row's source."""
    found: dict[str, dict[str, list[Any]]] = {}
    # Columns of a table are float32; values that came from another tokenizer keep their sums in float64.
    exact = store.has_segments and scope_of_scores(scorer) == "response"
    for number in range(len(table)):
        row = table[number]
        mine = found.setdefault(row.comparison.source, {})
        mine[PROMPTS] = cast(Any, prompt_digest(row))
        for place, key in enumerate(keys_of(row.comparison)):
            if key in mine.get(KEYS, ()):
                continue
            record = store[key]
            assert row.scores is not None
            scores = scores_of(scorer, record, torch.float64) if exact else row.scores[place]
            joint = {} if record.segment is None else {SEGMENTS: record.segment}
            entry = {
                KEYS: key,
                RANKS: int(table.ranks[int(table.starts[number]) + place]),
                EOS: row.eos[place],
                TEXTS: record.text,
                IDS: record.ids,
                STARTS: record.start,
                ENDS: record.end,
                **{f"{PREFIX}{name}": values for name, values in record.values.items() if name != SCORES},
                SCORES: scores.tolist(),
                **joint,
            }
            for name, value in entry.items():
                mine.setdefault(name, []).append(value)
    return found


def with_score_columns(rows: Any, found: Mapping[str, Mapping[str, list[Any]]]) -> Dataset:
    """Rows with new columns, found by the rows' sources, in place of those of earlier scores."""
    if isinstance(rows, TokenTable):
        known = [rows.comparison(number) for number in range(len(rows))]
        sources = [row.source for row in known]
        rows = [
            {"prompt": list(row.prompt), "responses": list(row.responses), "ranks": list(row.ranks)}
            for row in known
        ]
    else:
        sources = [f"dataset:row {number}" for number in range(1, len(rows) + 1)]
    made = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    names = list(dict.fromkeys(name for columns in found.values() for name in columns))
    # Weights and values of earlier scores would be taken for those of these.
    made = made.remove_columns(
        [name for name in made.column_names if name in names or _is_of_scores(made, name)]
    )
    for name in names:
        column = [found.get(source, {}).get(name) for source in sources]
        if name != TEXTS or any(text for texts in column for text in texts or ()):
            made = made.add_column(name, cast(Any, column))
    return made


def _is_of_scores(rows: Dataset, name: str) -> bool:
    """Whether a column is one of :func:`tokenward.score` or :func:`tokenward.select`: a user's column may be called token_x too, but has no lists of lists."""
    kind = rows.features[name]
    nested = isinstance(kind, List) and isinstance(kind.feature, List)
    return KEYS in rows.column_names and name.startswith(PREFIX) and nested
