"""The same responses under another prompt: what an auxiliary model reads in place of the policy's prompt."""

from dataclasses import replace

from tokenward.errors import UserError
from tokenward.tokens.encode import asked_ids
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.template import Template
from tokenward.types import Message

PLACE = "{prompt}"
"""Stands in an auxiliary model's prompt for the last user turn."""


def prompted(row: TokenRow, template: Template, text: str | None, context: int | None) -> TokenRow:
    """A row whose prompt is an auxiliary model's; the response's ids stay, so that values belong to the same tokens.

    Args:
        row: As the policy reads it.
        template: Of the model.
        text: The auxiliary model's prompt, in which ``{prompt}`` stands for the last user turn; None changes nothing.
        context: Positions that the model has, or None.

    Raises:
        UserError: the row has no user turn, or is too long with the new prompt.
    """
    if text is None:
        return row
    messages = with_prompt(row.comparison.prompt, text, row.comparison.source)
    ids = asked_ids(messages, row.comparison.tools, template, row.opening)
    longest = len(ids) + max(map(row.size, range(len(row.responses))))
    if context is not None and longest > context:
        raise UserError(
            f"{row.comparison.source} has {longest} tokens with the auxiliary model's prompt, and the model reads {context}. Shorten the "
            "prompt, or lower tokens.max_prompt_tokens or tokens.max_response_tokens."
        )
    return replace(row, prompt=ids)


def with_prompt(messages: tuple[Message, ...], text: str, source: str) -> tuple[Message, ...]:
    """A conversation whose last user turn is put into a text."""
    places = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not places:
        raise UserError(
            f"{source} has no user turn into whose place an auxiliary model's prompt could go. Leave prompt out."
        )
    last = places[-1]
    changed = Message(role="user", content=text.replace(PLACE, messages[last]["content"]))
    return (*messages[:last], changed, *messages[last + 1 :])
