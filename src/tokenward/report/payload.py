"""The data of a page: plain JSON, its numbers packed as little-endian base64."""

import json
from base64 import b64encode
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from tokenward.ops.selection import MAX_DENOMINATOR
from tokenward.report.channels import SCHEMA, Channels
from tokenward.report.pairs import Drawn, ScoredPair
from tokenward.report.pieces import eos_count, piece_ends, pieces
from tokenward.report.words import breaks, shared_words, words
from tokenward.scoring.store import TokenRecord

LARGEST = 4_400_000
"""Characters of packed numbers and texts on a page; further pairs are left out, and the page says so."""


def payload(
    pairs: Sequence[ScoredPair], drawn: Drawn, channels: Channels, names: dict[int, str]
) -> dict[str, Any]:
    """What the page's scripts read.

    Args:
        pairs: Those of ``drawn.places``, in their order.
        drawn: How they were chosen.
        channels: What is known of each token.
        names: Of tokens that are no text, by id.
    """
    rows: list[dict[str, Any]] = []
    size = 0
    for number in _mixed(drawn.reasons):
        row = _row(pairs[number], drawn.reasons[number], channels)
        size += _size(row)
        if rows and size > LARGEST:
            break
        rows.append(row)
    return {
        "schema": SCHEMA,
        "channels": [channel._asdict() for channel in channels.channels],
        "selection": channels.selection(),
        "denominator": MAX_DENOMINATOR,
        "names": {str(token): name for token, name in names.items()},
        "total": drawn.total,
        "comparisons": rows,
    }


def _mixed(reasons: Sequence[tuple[str, ...]]) -> list[int]:
    """Pairs of every kind in turn, so that a page that must end early has some of each."""
    turn: dict[str, int] = {}
    order = []
    for number, (first, *_) in enumerate(reasons):
        turn[first] = turn.get(first, 0) + 1
        order.append((turn[first], number))
    return [number for _, number in sorted(order)]


def _row(pair: ScoredPair, reasons: Sequence[str], channels: Channels) -> dict[str, Any]:
    values = channels.of(pair)
    sides = list(zip(pair.comparison.responses, pair.records, strict=True))
    begins = [breaks(text, record) for text, record in sides]
    first, second = (_words(*side, bits) for side, bits in zip(sides, begins, strict=True))
    return {
        "key": pair.comparison.key,
        # The file's name and line: the folders above it are the reader's business only.
        "source": PurePath(pair.comparison.source).name,
        "part": pair.part,
        "number": pair.number,
        "reasons": list(reasons),
        "prompt": [dict(message) for message in pair.comparison.prompt],
        "given": pair.comparison.scores,
        "shared": shared_words(first, second),
        "responses": [
            {
                "text": text,
                "eos": eos_count(text, record),
                "ids": _packed(record.ids, "<i4"),
                "ends": _packed(piece_ends(text, record.end), "<i4"),
                **({} if record.text is None else {"starts": _packed(piece_ends(text, record.start), "<i4")}),
                "breaks": _packed(bits, "<u1"),
                "values": {name: _packed(value, "<f4") for name, value in found.items()},
            }
            for (text, record), bits, found in zip(sides, begins, values, strict=True)
        ],
    }


def _words(text: str, record: TokenRecord, begins: np.ndarray) -> list[str]:
    size = len(begins) - eos_count(text, record)
    return words(pieces(text, record, {})[:size], begins[:size])


def _packed(values: Any, dtype: str) -> str:
    return b64encode(np.asarray(values).astype(dtype).tobytes()).decode()


def _size(row: dict[str, Any]) -> int:
    packed = sum(
        len(text)
        for response in row["responses"]
        for text in (
            response["text"],
            response["ids"],
            response["ends"],
            response["breaks"],
            *response["values"].values(),
        )
    )
    packed += len(json.dumps(row["shared"]))
    return packed + sum(len(message["content"]) for message in row["prompt"])
