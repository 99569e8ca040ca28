"""The words whose probabilities stand for the classes."""

from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from tokenward.errors import UserError


def verbalizer_ids(tokenizer: PreTrainedTokenizerBase, verbalizers: Sequence[str]) -> list[int]:
    """The one token of each class's word.

    Args:
        tokenizer: Of the task model.
        verbalizers: One word per class, in the order of the labels; most tokenizers want a space in front, ``" great"``.

    Raises:
        UserError: there are fewer than two, a word is not exactly one known token, or two have the same one.
    """
    if len(verbalizers) < 2:
        raise UserError(
            f"verbalizers: got {list(verbalizers)}, a classifier needs one word for each of 2 or more classes."
        )
    found: dict[int, str] = {}
    for word in verbalizers:
        token = _only_token(tokenizer, word)
        if token in found:
            raise UserError(
                f"verbalizers: {found[token]!r} and {word!r} are the same token, so their classes could not be told apart. "
                "Write another word for one of them."
            )
        found[token] = word
    return list(found)


def _only_token(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    ids = _encode(tokenizer, word)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    problem = (
        "is not in the vocabulary" if len(ids) == 1 else f"is {len(ids)} tokens, {tokens}, and must be one"
    )
    spaced = " " + word.strip()
    other = _encode(tokenizer, spaced)
    fits = spaced != word and len(other) == 1 and other[0] != tokenizer.unk_token_id
    advice = f"Write {spaced!r}, with a leading space: that is one token" if fits else "Write another word"
    raise UserError(f"verbalizers: {word!r} {problem}. {advice}.")


def _encode(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    return cast(list[int], tokenizer(word, add_special_tokens=False)["input_ids"])
