"""``tokenward score ORACLE texts.jsonl``: token scores of your own texts, to a file or to the screen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.text import Text

from tokenward.artifacts import write_jsonl
from tokenward.config import parse_recipe
from tokenward.data import rows
from tokenward.data.fields import FieldError
from tokenward.data.parsers import Answered, answered
from tokenward.display import Display, largest, signed
from tokenward.errors import UserError
from tokenward.scoring.texts import ScoredResponse, TokenScorer
from tokenward.tools.run import quiet_libraries


def score_file(
    folder: str | Path,
    texts: str | Path,
    *,
    output: str | Path | None = None,
    reference: str | None = None,
    overrides: Sequence[str] = (),
) -> list[ScoredResponse]:
    """Score every row of a file with the fields ``prompt`` and ``response``, by an oracle, a reward or a policy.

    The scores go to ``output``, one JSON object per line, or to the screen. ``reference`` and the override
    ``tokens.template`` are needed only if the folder does not name them.

    Raises:
        UserError: a row lacks a field, or the folder holds no oracle.
    """
    template = _template(overrides)
    quiet_libraries()
    wanted = [_read_row(where, row) for where, row in rows(str(texts))]
    if not wanted:
        raise UserError(
            f"{texts} holds no rows. Write one JSON object per line, with the fields prompt and response.",
            code="no-rows",
        )
    scored = TokenScorer.load(folder, reference=reference, template=template).score_rows(wanted)
    if output is None:
        _show(Display(), scored)
    else:
        records = (
            {"total": item.total, "tokens": [token.flat() for token in item.tokens]} for item in scored
        )
        write_jsonl(Path(output), records)
    return scored


def _template(overrides: Sequence[str]) -> Literal["chat", "plain"] | None:
    """The only setting that can be changed; the folder decides all others."""
    if not overrides:
        return None
    recipe, lines = parse_recipe("seed: 0", "--set", overrides)
    other = next((key for key in lines.overridden if key != "tokens.template"), None)
    if other:
        raise UserError(
            f"--set {other}: texts are scored with the settings of the folder's run; only tokens.template=plain or "
            "tokens.template=chat can be set. Leave it out, or score a recipe.",
            code="unused-key",
            key=other,
        )
    return recipe.tokens.template


def _read_row(where: str, row: Mapping[str, Any]) -> Answered:
    for name in ("prompt", "response"):
        if name not in row:
            raise UserError(
                f"{where}: the field {name!r} is missing; found: {', '.join(row)}. Each row needs prompt and response, each a "
                "text or a list of messages.",
                code="missing-column",
            )
    try:
        return answered(row)
    except FieldError as error:
        raise UserError(f"{where}: {error}", code="bad-row") from error


def _show(display: Display, scored: Sequence[ScoredResponse]) -> None:
    """Each token with its score; tokens that raise the response are blue, tokens that lower it are orange."""
    scale = largest(token.score for item in scored for token in item.tokens)
    for item in scored:
        line = Text()
        # A log-ratio raises the response above 0. A reward is always positive: it raises above the mean of its response.
        reward = "reward" in item.tokens[0].values
        middle = item.total / len(item.tokens) if reward else 0.0
        for token in item.tokens:
            style = "blue" if token.score > middle else "dark_orange"
            line.append(f"{token.text or '<end>'}", style="bold")
            line.append(f"({signed(token.score, scale)})", style=style)
        display.text(line)
        unit = "reward" if reward else "nats"
        display.line(f"  total {signed(item.total, scale)} {unit} over {len(item.tokens)} tokens")
