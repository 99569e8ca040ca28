"""The comparisons that are measured: chosen, made or cut, always by a seed."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.model import Pair
from tokenward.data import load
from tokenward.models.loading import LanguageModel, load_tokenizer
from tokenward.selection import ScoredTokens, SideRule, TopFraction
from tokenward.tokens.encode import Limits, encode
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.template import Template
from tokenward.types import Comparison

PAIRS = "../shared/data/hh_harmless_test/test.jsonl.gz"
LONGEST = 512
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "a",
    "in",
    "that",
    "it",
    "is",
    "was",
    "for",
    "on",
    "as",
    "with",
    "be",
    "by",
    "he",
    "at",
    "from",
    "his",
    "but",
    "not",
    "are",
    "or",
    "an",
    "they",
]


def encoded_pairs(
    source: str, tokenizer: str, *, count: int, longest: int = LONGEST, seed: int = 0
) -> list[TokenRow]:
    """Random pairs of a file, prompt and each response together at most ``longest`` tokens."""
    comparisons = list(load(source).comparisons)
    random.Random(seed).shuffle(comparisons)
    loaded = load_tokenizer(tokenizer)
    template = Template(tokenizer=loaded, kind="chat" if loaded.chat_template else "plain")
    limits = Limits(longest, longest, "drop", longest)
    # A few at a time: a file may hold many more than are wanted.
    found: list[TokenRow] = []
    for start in range(0, len(comparisons), 4 * count):
        found += encode(comparisons[start : start + 4 * count], template, limits, may_be_empty=True)[0]
        if len(found) >= count:
            return found[:count]
    raise ValueError(f"{source} holds {len(found)} pairs of at most {longest} tokens, {count} are wanted")


def random_ids(
    lengths: Sequence[Pair], *, vocabulary: int, seed: int = 0, responses: int | None = None
) -> list[TokenRow]:
    """Comparisons of random ids with given lengths; ``responses`` keeps only the first ones of each."""
    rng = random.Random(seed)
    rows = []
    for number, pair in enumerate(lengths):
        prompt = [rng.randrange(3, vocabulary) for _ in range(pair.prompt)]
        ids = [[rng.randrange(3, vocabulary) for _ in range(length)] for length in pair.responses]
        kept = ids[:responses]
        comparison = Comparison(
            key=str(number),
            prompt=(),
            responses=tuple(map(str, range(len(kept)))),
            ranks=tuple(range(len(kept))),
            source=f"made:{number + 1}",
        )
        rows.append(TokenRow(comparison, prompt, kept, [1] * len(kept)))
    return rows


def random_weights(rows: Sequence[TokenRow], fraction: float, *, seed: int = 0) -> list[TokenRow]:
    """SePO's selection by random scores: a step's cost depends on how many tokens are kept, not on which."""
    generator = torch.Generator().manual_seed(seed)
    selector = TopFraction(chosen=SideRule(fraction=fraction), rejected=SideRule(fraction=fraction))
    found = []
    for row in rows:
        lengths = [len(ids) for ids in row.responses]
        kept = selector(_scored(row, lengths, generator))
        found.append(replace(row, weights=list(kept.split(lengths))))
    return found


def _scored(row: TokenRow, lengths: list[int], generator: torch.Generator) -> ScoredTokens:
    total = sum(lengths)
    return ScoredTokens(
        scores=torch.rand(total, generator=generator),
        response=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        comparison=torch.zeros(len(lengths), dtype=torch.int64),
        rank=torch.tensor(row.comparison.ranks),
        eos=torch.zeros(total, dtype=torch.bool),
        seeds=torch.arange(len(lengths)),
    )


def with_reference(rows: Sequence[TokenRow], values: Sequence[Sequence[Tensor]]) -> list[TokenRow]:
    """Rows with the log-probabilities of their reference."""
    return [replace(row, reference_logp=value) for row, value in zip(rows, values, strict=True)]


def lengths_of(rows: Sequence[TokenRow]) -> list[Pair]:
    """Lengths alone, as the cost model wants them."""
    return [Pair(len(row.prompt), tuple(map(len, row.responses))) for row in rows]


def fits(model: LanguageModel, rows: Sequence[TokenRow]) -> None:
    """Refuse ids that the model does not have."""
    size = cast(nn.Embedding, model.model.get_input_embeddings()).num_embeddings  # type: ignore[operator]
    largest = max(max(row.prompt + [token for ids in row.responses for token in ids]) for row in rows)
    if largest >= size:
        raise ValueError(f"id {largest} is not among the {size} of {model.name}")


def write_synthetic(path: Path, count: int, *, seed: int = 0) -> None:
    """A preference file of made sentences; row ``i`` is the same whatever the number of rows."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            rng = random.Random(f"{seed}-{number}")
            row = {
                "prompt": f"{number}: {_sentence(rng, 6, 12)}",
                "chosen": _sentence(rng, 5, 10),
                "rejected": _sentence(rng, 5, 10) + " so",
            }
            file.write(json.dumps(row) + "\n")


def _sentence(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))
