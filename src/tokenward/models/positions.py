"""How long a row may be so that a model gives it the same numbers in every batch."""

from collections.abc import Iterator
from typing import Any

from transformers import PretrainedConfig


def positions_of(config: PretrainedConfig) -> int | None:
    """Positions of a model that mean the same in every call; None where its config does not say.

    The frequencies of ``longrope`` and ``dynamic`` rotary embeddings follow the longest row of a call: beyond the
    length that the model was first trained with, every response of the batch gets other numbers.
    """
    text = config.get_text_config()
    known = [*_steady(text), getattr(text, "max_position_embeddings", None)]
    return min((length for length in known if length), default=None)


def _steady(text: PretrainedConfig) -> Iterator[int]:
    rope = getattr(text, "rope_parameters", None) or {}
    for item in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = item.get("rope_type")
        if kind == "longrope" and item["short_factor"] != item["long_factor"]:
            yield int(item["original_max_position_embeddings"])
        if kind == "dynamic" and not item.get("alpha"):
            # One less: after a longer call, frequencies are set back by a call that is shorter, not by one as long.
            yield int(text.max_position_embeddings) - 1


def steady_note(config: PretrainedConfig) -> str | None:
    """What a user shall know of a model that has more positions than rows may have; None where there is nothing."""
    text = config.get_text_config()
    steady, known = _least(text), getattr(text, "max_position_embeddings", None)
    if steady is None or known is None or steady + 1 >= known:
        return None
    return f"is used up to {steady} of its {known} positions: {WHY.format(steady)}. {_way_out(text, steady)}"


def longer_than_steady(config: PretrainedConfig, name: str, longest: int) -> str | None:
    """Why rows of so many positions are refused, and what to write; None where they are not.

    Args:
        config: Of the model.
        name: As the user wrote it.
        longest: Positions of the longest row.
    """
    text = config.get_text_config()
    steady = _least(text)
    if steady is None or longest <= steady:
        return None
    return f"a row for {name} has {longest} positions, and {WHY.format(steady)}. {_way_out(text, steady)}"


WHY = (
    "its rotary embedding gives a whole batch other frequencies as soon as one row has more than {}, so that a response's "
    "numbers would depend on its neighbours"
)


def _least(text: PretrainedConfig) -> int | None:
    return min(_steady(text), default=None)


def _way_out(text: PretrainedConfig, steady: int) -> str:
    shorter = f"Write tokens.max_prompt_tokens and tokens.max_response_tokens that are {steady} together"
    rope: dict[str, Any] = text.rope_parameters  # type: ignore[assignment]
    if rope.get("rope_type") == "longrope":
        return (
            f"{shorter}; or copy long_factor over short_factor in its config.json, so that every row has the frequencies of "
            "long ones."
        )
    return f"{shorter}; or write rope_type: yarn, which is the same for every length, in its config.json."
