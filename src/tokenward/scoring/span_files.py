"""Files of spans, by any tokenizer or person, as the scorer ``external`` reads them."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from tokenward.data import rows as read_rows
from tokenward.data.fields import FieldError, required
from tokenward.data.parsers import answered
from tokenward.errors import UserError
from tokenward.tokens.rows import response_key
from tokenward.types import Span


def read_spans(path: str) -> Iterator[tuple[str, list[Span]]]:
    """The spans of each response in a file, with the response's key.

    Raises:
        UserError: there is no such file, or a row is not what it should be.
    """
    for where, row in read_rows(path):
        yield _spans_of(where, row)


def check_spans(path: str) -> None:
    """Read a file of spans to its end and keep nothing of it.

    Raises:
        UserError: as :func:`read_spans`, or it holds no row.
    """
    if not sum(1 for _ in read_spans(path)):
        raise UserError(
            f"{path} holds no row, so no token would have a score. Write a line for each response: "
            '{"prompt": "...", "response": "...", "spans": [[start, end, value]]}.'
        )


def _spans_of(where: str, row: Mapping[str, Any]) -> tuple[str, list[Span]]:
    try:
        found, given = answered(row), required(row, "spans")
        spans = [Span(int(start), int(end), float(value)) for start, end, value in given]
    except (TypeError, ValueError, FieldError) as error:
        raise UserError(
            f"{where}: {_wrong(error)}. Each row needs prompt (a text or messages), response (so too) and spans, a list of [start, end, "
            f"value] in characters; got {json.dumps(row, default=str)[:80]}."
        ) from error
    response = found.response.text
    for span in spans:
        if not 0 <= span.start <= span.end <= len(response) or not math.isfinite(span.value):
            raise UserError(
                f"{where}: the span {list(span)} does not lie in its response, which has {len(response)} characters, or its value is "
                "not finite. Write [start, end, value] in characters of the response, 0 the first."
            )
    return response_key(found.prompt, found.response.turns or response, found.tools), spans


def _wrong(error: Exception) -> str:
    return str(error) if isinstance(error, FieldError) else "its spans are not lists of three numbers"
