"""Messages of the parts speak of recipe keys; a script's author reads names of arguments instead."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tokenward.errors import UserError

WORDS: dict[str, str] = {
    r"tokens\.chat_template_kwargs": "tokens=TokenSettings(chat_template_kwargs=...)",
    r"tokens\.(\w+): (\w+)": r'tokens=TokenSettings(\1="\2")',
    r"tokens\.(\w+)": r"tokens=TokenSettings(\1=...)",
    r"the tokens table": "tokens=",
    r"(?:set|write) data\.columns\.(\w+): (\w+)": r'rename the column: dataset.rename_column("\2", "\1")',
    r"set data\.format: implicit to take": "leave out a column prompt to take",
    r" \(data\.columns names it\)": "",
    r"data\.pairs: best_worst, all or adjacent": 'pairs="best_worst", "all" or "adjacent"',
    r"data\.pairs": "pairs",
    r"data\.min_gap": "min_gap",
    r"model\.packing: (\w+)": r'packing="\1"',
    r"model\.packing": "packing",
    r"model\.device": "device",
    r"policy\.selection's fractions": "the fractions of selector=",
    r"policy\.selection": "selector=",
    r"evaluation\.(\w+)": r"\1",
    r"write the objective \{name: kto\}": "use objective=KTO()",
    r"A row of one response trains kto or weighted_likelihood": "A row of one response trains with KTO() or WeightedLikelihood()",
    r"selection: \{name: all\}": "selector=KeepAll()",
    r"Use it in the oracle or policy table, or pass TokenTrainer\(reference=\.\.\.\)": "Give reference=",
    r" Run the reference stage first \(tokenward oracle RECIPE does\)\.": " Give reference=, or a data set that tokenward.score made.",
    r" Run the scoring stage again on this data \(tokenward score RECIPE\)\.": " Score this data again with tokenward.score.",
    r", or run the reference stage again": "",
    r", or give --reference MODEL": ", or give reference=",
    r"args\.displacement_margin sets the alarm, null turns it off": "TokenTrainingArguments(displacement_margin=...) sets the alarm, None turns it off",
}
"""From what a recipe's reader is told to what a script's reader is told, as regular expressions."""


def in_library_words(text: str) -> str:
    """A message with the names of arguments in place of recipe keys and commands."""
    for pattern, words in WORDS.items():
        text = re.sub(pattern, words, text)
    return text


@contextmanager
def library_words() -> Iterator[None]:
    """While open, a :class:`UserError` speaks of arguments."""
    try:
        yield
    except UserError as error:
        said = in_library_words(str(error))
        if said == str(error):
            raise
        raise UserError(said) from error
