"""Rows as the model will see them, with the weight of each token."""

from collections.abc import Sequence
from itertools import groupby

from rich.text import Text

from tokenward.display import Display
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.spelled import spelled
from tokenward.tokens.split import Insert
from tokenward.tokens.template import Template

PROMPT_SHOWN = 400


def preview(display: Display, template: Template, rows: Sequence[TokenRow], *, weighted: bool = True) -> None:
    """Show the end of each prompt, and its responses with their selected tokens marked ``[so]``.

    Args:
        display: The screen.
        template: That wrote the rows.
        rows: What to show; without weights every token counts.
        weighted: Whether it is known which tokens count; if not, none is marked.
    """
    if not rows:
        return
    what = "one row as the model sees it" if len(rows) == 1 else f"{len(rows)} rows as the model sees them"
    note = (
        "tokens in [brackets] are trained, the prompt and what stands between replies are read only"
        if weighted
        else "which tokens are trained is not known yet"
    )
    text = Text()
    text.append(f"  {what}; {note}", style="italic")
    for row in rows:
        text.append("\n")
        text.append(_row(template, row, weighted))
    display.text(text)


def _row(template: Template, row: TokenRow, weighted: bool) -> Text:
    encoded = row
    text = _prompt(template, encoded.prompt)
    for side, ids in enumerate(encoded.responses):
        text.append(_name(encoded.comparison.ranks, side), style="bold")
        weights = row.weights[side].tolist() if row.weights is not None else [1.0] * len(ids)
        texts, before = pieces(template, encoded, side), 0
        for insert in (*encoded.inserts(side), Insert(len(ids), [])):
            part = slice(before, insert.before)
            text.append(marked(texts[part], weights[part]) if weighted else Text("".join(texts[part])))
            text.append(str(template.tokenizer.decode(insert.ids)), style="magenta")
            before = insert.before
    return text


def _prompt(template: Template, ids: Sequence[int]) -> Text:
    """The end of a prompt, dim, with the template's own tokens in another colour."""
    text = Text()
    for special, group in groupby(ids, key=template.special_ids.__contains__):
        text.append(str(template.tokenizer.decode(list(group))), style="magenta" if special else "dim")
    if len(text) <= PROMPT_SHOWN:
        return text
    return Text.assemble(("...", "dim"), text[-PROMPT_SHOWN:])


def _name(ranks: Sequence[int], side: int) -> str:
    if len(ranks) == 1:
        return "\nresponse: " if ranks[side] == 0 else "\nbad response: "
    return "\nchosen: " if ranks[side] == 0 else "\nrejected: "


def pieces(template: Template, encoded: TokenRow, place: int) -> list[str]:
    """The text of each token of a response; a part of a character shows the replacement mark, an end its name."""
    ids = encoded.responses[place]
    text, spans, _ = spelled(template.tokenizer, encoded, place)
    raw, count = text.encode(), len(ids) - encoded.eos[place]
    texts = [raw[span.start : span.end].decode(errors="replace") for span in spans[:count]]
    return texts + [str(template.tokenizer.convert_ids_to_tokens(token)) for token in ids[count:]]


def marked(texts: Sequence[str], weights: Sequence[float]) -> Text:
    """Tokens in a line; those with weight in brackets, followed by the weight if it is not 1."""
    text = Text()
    for piece, weight in zip(texts, weights, strict=True):
        if weight == 0:
            text.append(piece, style="dim")
        else:
            text.append(f"[{piece}]" if weight == 1 else f"[{piece}]{weight:.2g}", style="bold green")
    return text
