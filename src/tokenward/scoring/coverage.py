"""How much of a store's tokens has values that came from another tokenizer's tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tokenward.scoring.store import TokenStore


class Coverage(NamedTuple):
    """How much of the tokens has scores of another tokenizer's tokens.

    Attributes:
        responses: Number of responses.
        unscored: Number of those without any score.
        tokens: Number of tokens of the others.
        scored: Share of these tokens in a segment with a score.
        text: Share of their bytes that belong to such a token.
        placed: Share of the values that found a token, by name: 1 minus the sum of what is missing in each response over the
            sum of its values, in absolute numbers.
        alone: Share of the scored tokens that are a segment of their own.
        segments: Number of segments of several tokens.
    """

    responses: int
    unscored: int
    tokens: int
    scored: float
    text: float
    placed: dict[str, float]
    alone: float
    segments: int

    def line(self, source: str, target: str) -> str:
        """One line for the screen."""
        parts = [
            f"  scores of the tokens of {source} go to those of {target}: {_percent(self.text)} of the text has a score, "
            f"{_percent(min(self.placed.values(), default=1.0))} of the values were placed"
        ]
        if self.segments:
            several = round(self.tokens * self.scored * (1 - self.alone))
            parts.append(
                f"{_percent(self.alone)} of {self.tokens} tokens have a score of their own; the other {several} share one in {self.segments} "
                "segments, each selected as a whole, so fractions count segments"
            )
        if self.unscored:
            parts.append(
                f"{self.unscored} of {self.responses} responses have no scores, because they are too long for {source}"
            )
        return "; ".join(parts)


def _percent(share: float) -> str:
    return "100 %" if share == 1 else f"{min(share, 0.9999):.2%}".replace("%", " %")


def coverage(source: TokenStore, target: TokenStore, names: Sequence[str]) -> Coverage:
    """How much of the tokens of a store has values that were carried over from another.

    Args:
        source: The values before.
        target: The values after.
        names: Names of the values.
    """
    counts = dict.fromkeys(
        ("responses", "unscored", "tokens", "scored", "bytes", "text", "alone", "segments"), 0
    )
    missing, whole = (dict.fromkeys(names, 0.0) for _ in range(2))
    for shard in target.columns():
        for row, key in enumerate(shard.keys):
            counts["responses"] += 1
            if key not in source:
                counts["unscored"] += 1
                continue
            tokens = slice(int(shard.starts[row]), int(shard.starts[row + 1]))
            values = {name: shard.values[name][tokens] for name in names}
            assert shard.segment is not None
            segment, widths = shard.segment[tokens], (shard.end - shard.start)[tokens]
            sizes = np.bincount(segment)
            has = np.bincount(segment, ~np.isnan(next(iter(values.values()))))[segment] > 0
            counts["tokens"] += len(has)
            counts["scored"] += int(has.sum())
            counts["bytes"] += int(widths.sum())
            counts["text"] += int(widths[has].sum())
            counts["alone"] += int((has & (sizes[segment] == 1)).sum())
            counts["segments"] += int((sizes > 1).sum())
            for name in names:
                before = float(np.sum(source[key].values[name]))
                whole[name] += abs(before)
                missing[name] += abs(before - float(np.nansum(values[name])))
    placed = {name: 1.0 - _share(missing[name], whole[name]) for name in names}
    return Coverage(
        counts["responses"],
        counts["unscored"],
        counts["tokens"],
        _share(counts["scored"], counts["tokens"]),
        _share(counts["text"], counts["bytes"]),
        {name: 1.0 if share > 1 - 1e-9 else share for name, share in placed.items()},
        _share(counts["alone"], counts["scored"]),
        counts["segments"],
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
