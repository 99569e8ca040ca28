"""Columns of a table from stored values: by response key, never for other tokens, and of all rows at once if needed."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.tokens.test_table import LIMITS, TEMPLATE, comparisons, table
from tokenward.errors import UserError
from tokenward.plugins import build
from tokenward.scoring.join import with_read_values, with_reference, with_scores
from tokenward.scoring.scorers import SCORERS
from tokenward.scoring.store import TokenRecord, TokenStore, write_shards
from tokenward.tokens.encode import Limits
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.store import EncodedStore
from tokenward.tokens.table import TokenTable


def value(ids: Sequence[int]) -> list[float]:
    return torch.tensor(ids, dtype=torch.float32).sin().tolist()


def stored(folder: Path, rows: Sequence[TokenRow]) -> TokenStore:
    """A store with the sine of each id as its reward, and twice that as the reference's log-probability."""
    found = {
        key: ids for row in rows for key, ids in zip(keys_of(row.comparison), row.responses, strict=True)
    }

    def record(key: str) -> TokenRecord:
        ids, rewards = found[key], value(found[key])
        return TokenRecord(
            key, ids, ids, ids, {"reward": rewards, "reference_logp": [2 * number for number in rewards]}
        )

    return write_shards(folder, sorted(found), lambda keys: map(record, keys), rows_per_shard=4)


def scorer(name: str, **settings: object):
    return build("scorer", name, settings, SCORERS)


def test_every_response_gets_the_values_of_its_key(tmp_path):
    rows = table("all")  # whose rows share responses
    store = stored(tmp_path, rows)
    assert len(store) > 4  # several shards
    joined = with_scores(with_reference(rows, store), scorer("reward"), store)
    assert len(joined.columns["scores"].flat) < rows.lengths.sum()
    joined = with_read_values(joined, scorer("reward"), store)
    for row, known in zip(joined, rows, strict=True):
        for place, ids in enumerate(known.responses):
            assert row.scores[place].tolist() == torch.tensor(value(ids)).tolist()
            assert torch.equal(row.reference_logp[place], 2 * row.scores[place])
            assert torch.equal(row.values["reward"][place], row.scores[place])
    assert len(with_scores(rows[:0], scorer("reward"), store)) == 0


def test_scores_that_are_compared_see_all_rows(tmp_path):
    """Each side by itself: 1 above its mean over the data, 0 below, of response tokens as they are in the rows."""
    rows = table("best_worst")
    steps = [{"threshold": {"at": "mean", "scope": "dataset"}}]
    combine = scorer("combine", parts=({"scorer": {"name": "reward"}, "steps": steps},))
    found = with_scores(rows, combine, stored(tmp_path, rows))
    for side in range(2):
        rewards = torch.cat([torch.tensor(value(row.responses[side])) for row in rows])
        scores = torch.cat([row.scores[side] for row in found])
        assert torch.equal(scores, (rewards > rewards.mean()).float())


def test_values_of_other_data_or_tokens_are_refused(tmp_path):
    rows = table("all")
    limits = Limits(64, 5, "truncate")
    short = EncodedStore.made(comparisons(), TEMPLATE, limits)
    both = EncodedStore([*EncodedStore.made(comparisons(), TEMPLATE, LIMITS)._batches, *short._batches])
    for code, refused, store in (
        ("missing-response", rows, stored(tmp_path / "some", rows[:2])),
        ("tokenizer-mismatch", rows, stored(tmp_path / "short", TokenTable.pairs(short, "all"))),
        ("ambiguous-response", TokenTable.pairs(both, "all"), stored(tmp_path / "all", rows)),
    ):
        with pytest.raises(UserError) as caught:
            with_reference(refused, store)
        assert caught.value.code == code
    with pytest.raises(UserError) as caught:
        with_scores(rows, lambda record: [0.5], TokenStore(tmp_path / "all"))
    assert caught.value.code == "wrong-result"
