"""Tokens that are read and have no number: every layout gives the assistant's tokens what the whole conversation gives them."""

from dataclasses import replace

import pytest
import torch

from tests.models.plain import plain_logits
from tests.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tokenward.models.head import SelectiveHead
from tokenward.models.loading import LanguageModel
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.split import Insert
from tokenward.types import Comparison

INSERTS = {
    "before": [[Insert(0, [9, 8])], [Insert(0, [9, 8])]],
    "other before": [[Insert(0, [9, 8])], [Insert(0, [9, 7, 6])]],
    "inside": [[Insert(2, [30, 31, 32])], []],
    "both": [[Insert(0, [9]), Insert(1, [30]), Insert(4, [31, 32])], [Insert(0, [9]), Insert(3, [33])]],
}
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def encoded(context: list[list[Insert]]) -> TokenRow:
    known = Comparison(key="k", prompt=(), responses=("a", "b"), ranks=(0, 1), source="s")
    responses = [[11, 12, 13, 14, 15], [11, 12, 23, 24]]
    return TokenRow(known, [3, 4, 5], responses, [1, 1], context)


def read(model, layout: str, rows: list[TokenRow]) -> torch.Tensor:
    held = LanguageModel(
        model=model,
        tokenizer=tiny_tokenizer(),
        head=SelectiveHead(model.get_output_embeddings()),
        layout=layout,  # type: ignore[arg-type]
        fingerprint="",
        name="tiny",
    )
    batch = held.collate(rows)
    return held.read(model, batch)[0]


def plain(model, row: TokenRow) -> torch.Tensor:
    """Log-probabilities of the assistant's tokens in a forward of the whole conversation."""
    parts = []
    for place in range(len(row.responses)):
        ids, own = row.whole(place)
        logp = plain_logits(model, row.prompt, ids).log_softmax(-1)
        parts.append(logp.gather(-1, torch.tensor(ids)[:, None])[own, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("inserts", INSERTS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_context_is_read_and_has_no_number(name, layout, inserts):
    model = MODELS[name](dtype=torch.float64).eval()
    row = encoded(INSERTS[inserts])
    other = encoded(INSERTS["inside"])  # another comparison beside it
    expected = torch.cat([plain(model, row), plain(model, other)])
    found = read(model, layout, [row, other])
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("inserts", INSERTS)
@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_what_follows_the_last_token_with_weight_is_not_read(layout, inserts):
    model = tiny_llama(dtype=torch.float64).eval()
    row = encoded(INSERTS[inserts])
    expected = plain(model, row)
    for last in range(4):
        weights = [torch.tensor([1.0] * (last + 1) + [0.0] * (4 - last)), torch.tensor([0.0, 1.0, 0.0, 0.0])]
        found = read(model, layout, [replace(row, weights=weights)])
        kept = torch.cat(weights) != 0
        torch.testing.assert_close(found[kept], expected[kept].to(found.dtype), rtol=0, atol=1e-6)
        assert bool((found[~kept] == 0).all())


def test_the_length_of_a_comparison_counts_its_context():
    row = encoded(INSERTS["both"])
    assert [row.size(0), row.size(1), row.length] == [9, 6, 18]
    assert row.whole(0) == ([9, 11, 30, 12, 13, 14, 31, 32, 15], [1, 3, 4, 5, 8])
    shape = row.shape
    assert [shape("shared"), shape("separate")] == [(1, 18), (2, 12)]
