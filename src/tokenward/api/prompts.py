"""Prompts to reply to: those of comparisons, or rows that have a prompt alone."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset

from tokenward.api.constant import Say
from tokenward.api.inputs import Rows, check_rows_type, encode_rows, say_counts
from tokenward.data.formats import has_format
from tokenward.data.prepare import asked, comparison_key
from tokenward.data.sources import numbered
from tokenward.errors import UserError
from tokenward.tokens.encode import Limits, encode
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template
from tokenward.types import Comparison, Example


class Prompts(NamedTuple):
    """Prompts to reply to.

    Attributes:
        rows: One for each, without replies.
        examples: Their examples by key.
    """

    rows: list[TokenRow]
    examples: dict[str, Example]


def different_prompts(rows: Iterable[TokenRow], context: int | None, longest: int, say: Say) -> Prompts:
    """The different prompts of some rows that leave room for a reply.

    Args:
        rows: Rows with or without responses.
        context: The model's context, in tokens; None is without limit.
        longest: Tokens of the longest reply.
        say: Shows a line about prompts that are left out.

    Raises:
        UserError: None is left.
    """
    found, left_out = Prompts([], {}), set[str]()
    for row in rows:
        known, prompt = row.comparison, row.asked
        key = comparison_key(known.prompt, (), tools=known.tools)
        if key in found.examples or key in left_out:
            continue
        if context is not None and len(prompt) + longest > context:
            left_out.add(key)
            continue
        about = {"key": key, "prompt": known.prompt, "source": known.source, "tools": known.tools}
        found.examples[key] = Example(**about)
        found.rows.append(TokenRow(Comparison(**about, responses=(), ranks=()), prompt, [], []))
    if left_out:
        say(
            f"  {len(left_out)} prompts left out: with a reply of {longest} tokens they exceed the context of {context}"
        )
    if not found.rows:
        raise UserError(
            f"no prompt leaves room for a reply of {longest} tokens in the model's context of {context}. Lower max_new_tokens of the "
            "sampling, or max_prompt_tokens.",
            code="no-rows",
            key="policy.sampling.max_new_tokens",
        )
    return found


def reusable(rows: Rows, name: str) -> Rows:
    """The rows as something that can be read twice.

    Raises:
        UserError: they are no data set.
    """
    if isinstance(rows, TokenTable):
        return rows
    check_rows_type(rows, name)
    return rows.with_format(None) if isinstance(rows, Dataset | IterableDataset) else list(rows)


def are_prompts(rows: Rows) -> bool:
    """Whether :func:`reusable` rows have a prompt and no responses, by the first of them."""
    first: Any = None if isinstance(rows, TokenTable) else next(iter(rows), None)
    return isinstance(first, Mapping) and "prompt" in first and not has_format(first)


def encode_prompts(rows: Rows, name: str, template: Template, limits: Limits, say: Say) -> list[TokenRow]:
    """Rows of prompts alone as token ids, without responses.

    Raises:
        UserError: a row has no prompt, or no prompt is within its limit.
    """
    found, counts = encode(_prompts(rows, name), template, limits.of_prompts)
    say_counts(counts, name, say)
    return found


def encode_replied(rows: Rows, template: Template, limits: Limits, say: Say) -> Iterable[TokenRow]:
    """The rows of a trainer that samples its own replies: comparisons, of which it reads the prompts, or prompts alone."""
    given = reusable(rows, "train_dataset")
    if isinstance(given, TokenTable):
        return given
    if are_prompts(given):
        return encode_prompts(given, "train_dataset", template, limits, say)
    return encode_rows(given, None, template, limits.of_prompts, pairs=None, say=say).train


def _prompts(rows: Any, name: str) -> Iterator[Comparison]:
    for where, row in numbered(name, rows):
        found = asked(where, row)
        key = comparison_key(found.prompt, (), tools=found.tools)
        yield Comparison(
            key=key, prompt=found.prompt, responses=(), ranks=(), source=where, tools=found.tools
        )
