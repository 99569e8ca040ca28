"""One row as the model will see it, with the weight of each token."""

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from tokenward.display import Display
from tokenward.tokens.rows import TokenRow

PROMPT_SHOWN = 400


def preview(display: Display, tokenizer: PreTrainedTokenizerBase, row: TokenRow) -> None:
    """Show the end of the prompt, and each response with its selected tokens marked ``[so]``."""
    prompt = tokenizer.decode(row.encoded.prompt)
    text = Text("  one row as the model sees it; [marked] tokens are trained\n", style="dim")
    text.append(("..." if len(prompt) > PROMPT_SHOWN else "") + prompt[-PROMPT_SHOWN:], style="dim")
    for side, ids in enumerate(row.encoded.responses):
        name = "chosen" if row.encoded.comparison.ranks[side] == 0 else "rejected"
        text.append(f"\n{name}: ", style="bold")
        weights = row.weights[side].tolist() if row.weights is not None else [1.0] * len(ids)
        text.append(marked(tokenizer, ids, weights))
    display.text(text)


def marked(tokenizer: PreTrainedTokenizerBase, ids: list[int], weights: list[float]) -> Text:
    """The tokens of a response; those with weight in brackets, with the weight if it is not 1."""
    text = Text()
    for token, weight in zip(ids, weights, strict=True):
        piece = tokenizer.decode([token])
        if weight == 0:
            text.append(piece, style="dim")
        else:
            shown = f"[{piece}]" if weight == 1 else f"[{piece}]{weight:.2g}"
            text.append(shown, style="bold green")
    return text
