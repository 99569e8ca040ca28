"""One row as the model will see it, with the weight of each token."""

from collections.abc import Sequence

from rich.text import Text

from tokenward.display import Display
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.spans import byte_spans
from tokenward.tokens.template import Template

PROMPT_SHOWN = 400


def preview(display: Display, template: Template, row: TokenRow) -> None:
    """Show the end of the prompt, and each response with its selected tokens marked ``[so]``."""
    prompt = str(template.tokenizer.decode(row.encoded.prompt))
    text = Text()
    text.append("  one row as the model sees it; tokens in [brackets] are trained\n", style="italic")
    text.append(("..." if len(prompt) > PROMPT_SHOWN else "") + prompt[-PROMPT_SHOWN:], style="dim")
    for side, ids in enumerate(row.encoded.responses):
        comparison = row.encoded.comparison
        text.append(_name(comparison.ranks, side), style="bold")
        weights = row.weights[side].tolist() if row.weights is not None else [1.0] * len(ids)
        text.append(marked(pieces(template, comparison.responses[side], ids), weights))
    display.text(text)


def _name(ranks: Sequence[int], side: int) -> str:
    if len(ranks) == 1:
        return "\nreference: "
    return "\nchosen: " if ranks[side] == 0 else "\nrejected: "


def pieces(template: Template, response: str, ids: Sequence[int]) -> list[str]:
    """The text of each token; a token that is part of a character shows the replacement mark, an end its name."""
    raw = response.encode()
    spans = byte_spans(template.tokenizer, response)[: len(ids)]
    texts = [raw[span.start : span.end].decode(errors="replace") for span in spans]
    return texts + [str(template.tokenizer.convert_ids_to_tokens(token)) for token in ids[len(texts) :]]


def marked(texts: Sequence[str], weights: Sequence[float]) -> Text:
    """Tokens in a line; those with weight in brackets, followed by the weight if it is not 1."""
    text = Text()
    for piece, weight in zip(texts, weights, strict=True):
        if weight == 0:
            text.append(piece, style="dim")
        else:
            text.append(f"[{piece}]" if weight == 1 else f"[{piece}]{weight:.2g}", style="bold green")
    return text
