"""``tokenward score ORACLE texts.jsonl``: one's own texts, to a file or to the screen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

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
    """Score every row of a file that has the fields ``prompt`` and ``response``.

    Args:
        folder: Stage folder of an oracle or a reward, or a model folder.
        texts: JSONL, JSON, Parquet or CSV; the prompt is a text or a list of messages.
        output: JSON lines with the tokens of each row; shown on screen if left out.
        reference: Reference model, where the folder does not name it.
        overrides: ``tokens.template=plain`` or ``=chat``, where the folder does not say.

    Raises:
        UserError: a row lacks a field, or the folder is no oracle.
    """
    template = _template(overrides)
    quiet_libraries()
    wanted = [_answered(where, row) for where, row in rows(str(texts))]
    if not wanted:
        raise UserError(f"{texts} holds no rows. Write one JSON object a line, with prompt and response.")
    scored = TokenScorer.load(folder, reference=reference, template=template).score_rows(wanted)
    if output is not None:
        records = (
            {"total": item.total, "tokens": [token.flat() for token in item.tokens]} for item in scored
        )
        write_jsonl(Path(output), records)
    else:
        _show(Display(), scored)
    return scored


def _template(overrides: Sequence[str]) -> Literal["chat", "plain"] | None:
    """The one setting that texts of one's own may need; everything else is the folder's."""
    if not overrides:
        return None
    recipe, lines = parse_recipe("seed: 0", "--set", overrides)
    other = [key for key in lines.overridden if key != "tokens.template"]
    if other:
        raise UserError(
            f"--set {other[0]}: texts of your own are scored as the folder's run scored; beside it, only tokens.template=plain "
            "or =chat can be set. Leave it out, or name a recipe."
        )
    return recipe.tokens.template


def _answered(where: str, row: dict) -> Answered:
    for field in ("prompt", "response"):
        if field not in row:
            raise UserError(
                f"{where}: no field {field!r}; found: {', '.join(row)}. Each row needs prompt (a text or messages) and "
                "response (so too)."
            )
    try:
        return answered(row)
    except FieldError as error:
        raise UserError(f"{where}: {error}") from error


def _show(display: Display, scored: Sequence[ScoredResponse]) -> None:
    """Each token with its score; raised tokens are blue, lowered ones orange."""
    scale = largest(token.score for item in scored for token in item.tokens)
    for item in scored:
        line = Text()
        # A log-ratio is raised above 0; a reward, which is positive throughout, above the mean of its response.
        reward = "reward" in item.tokens[0].values
        middle = item.total / len(item.tokens) if reward else 0.0
        for token in item.tokens:
            style = "blue" if token.score > middle else "dark_orange"
            line.append(f"{token.text or '<end>'}", style="bold")
            line.append(f"({signed(token.score, scale)})", style=style)
        display.text(line)
        unit = "reward" if reward else "nats"
        display.line(f"  total {signed(item.total, scale)} {unit} over {len(item.tokens)} tokens")
