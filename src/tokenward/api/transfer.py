"""Rows in the tokens of an oracle whose tokenizer or chat template is not the policy's."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.identity import positions_of
from tokenward.scoring.scorers import Scorer
from tokenward.scoring.transfer import Speller, check_carried, check_texts
from tokenward.tokens.encode import Limits, check_some_left
from tokenward.tokens.rows import keys_of
from tokenward.tokens.store import EncodedStore
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Style, Template
from tokenward.types import Comparison

OTHER_TOKENS = "other_tokens"
"""Folder in a store for the values in the tokens of the models that computed them, if those are not the rows' tokens."""

_NO_LIMIT = 10**9


@dataclass(frozen=True, kw_only=True)
class OtherTokens:
    """Rows in the tokens of other models, whose values are carried over to the rows' own tokens.

    Attributes:
        template: The template of the models.
        models: Names of the models.
        rows: All responses of each prompt as one row, in their tokens.
        own: The rows in their own tokens.
        own_template: The template of these.
    """

    template: Template
    models: frozenset[str]
    rows: TokenTable
    own: TokenTable
    own_template: Template

    @cached_property
    def spellers(self) -> tuple[Speller, Speller]:
        """Spell the models' tokens, and the rows' own."""
        return Speller(self.template), Speller(self.own_template)

    @property
    def style(self) -> Style:
        """The style of the template."""
        return style_of(self.template)

    def check(self) -> None:
        """Check that both sides spell the same texts.

        Raises:
            UserError: they do not.
        """
        check_texts(self.rows, self.own, self.spellers)


def style_of(template: Template) -> Style:
    """The style that a template writes in."""
    return Style(template.kind, template.variables, template.day)


def other_templates(
    models: Mapping[str, Template], own: Template, scorer: Scorer
) -> tuple[Template, frozenset[str]] | None:
    """The one template of the models that read other tokens than the rows have, and their names; None if none does.

    Args:
        models: The template of each model that computes values.
        own: The template of the rows.
        scorer: The scorer that reads the values.

    Raises:
        UserError: the scores cannot go from their tokens to those of the rows.
    """
    others = {name: found for name, found in models.items() if found.fingerprint != own.fingerprint}
    if not others:
        return None
    check_carried(scorer, {name: found.fingerprint for name, found in others.items()})
    first, *more = others.values()
    if any(found.fingerprint != first.fingerprint for found in more):
        raise UserError(
            f"{', '.join(others)} have different tokenizers or chat templates, and none of them is that of the policy. Scores can come "
            "from the tokens of one other tokenizer. Use models of one family beside the policy.",
            code="cannot-transfer",
        )
    return first, frozenset(others)


def encoded_again(rows: TokenTable, template: Template, models: Iterable[TokenModel]) -> TokenTable:
    """The responses of some rows in the tokens of another template, with one row for each prompt.

    Only the context of the models that read them limits their lengths: the limits of the rows count the rows' own tokens.

    Args:
        rows: All responses of each prompt as one row.
        template: The other template.
        models: The models that read them.

    Raises:
        UserError: none of them fits the context.
    """
    known = (positions_of(model.model.config) for model in models)  # type: ignore[arg-type]  # of a loaded model
    context = min((length for length in known if length is not None), default=None)
    limits = Limits(_NO_LIMIT, _NO_LIMIT, "drop", context)
    table, counts = TokenTable.whole(EncodedStore.made(_single(rows), template, limits)).fitting(limits)
    check_some_left(counts)
    return replace(table, scratch=rows.scratch).by_prompt()


def _single(rows: TokenTable) -> Iterator[Comparison]:
    """Each response as a comparison of its own, so that one that is too long drops no other."""
    for number in range(len(rows)):
        row = rows.comparison(number)
        for place, key in enumerate(keys_of(row)):
            one = slice(place, place + 1)
            yield replace(
                row,
                key=key,
                responses=row.responses[one],
                ranks=(0,),
                scores=None,
                spans=None,
                turns=None if row.turns is None else row.turns[one],
            )
