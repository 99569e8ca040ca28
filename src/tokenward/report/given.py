"""Spans from a file: parts of responses that people marked in the pairs of a run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenward.data.fields import FieldError, items, required, text
from tokenward.data.files import jsonl_rows
from tokenward.data.parsers import answered, spans_of
from tokenward.errors import UserError
from tokenward.evaluation.credit import KnownResponse, credit_figures, known_response
from tokenward.evaluation.statistics import Figure
from tokenward.report.channels import Channels
from tokenward.report.pairs import PairReader
from tokenward.tokens.rows import response_key
from tokenward.tokens.segments import moved
from tokenward.tokens.spans import ByteSpan
from tokenward.types import Span

FIELDS = ("key", "prompt", "response", "spans", "system", "tools")
RESAMPLES = 500
"""Bootstrap draws; fewer than in the evaluation, because a page is often made again."""


class GivenSpans(NamedTuple):
    """The name of a file, its spans by response key, and the number of lines whose response is in no pair of the run."""

    name: str
    spans: Mapping[str, tuple[Span, ...]]
    unmatched: int


class _Line(NamedTuple):
    where: str
    key: str
    spans: Any


def read_spans(path: str | Path, reader: PairReader) -> GivenSpans:
    """Read and check a file of spans.

    A line is ``{"prompt": ..., "response": ..., "spans": [[start, end, value], ...]}``, or has the response's ``key`` in
    the score store instead of both texts. Start and end count characters. A value is positive if the span speaks for the
    response and negative if it speaks against it.

    Raises:
        UserError: a line is wrong, names the same response as another line, or no line names a response of the run.
    """
    path = Path(path)
    lines: dict[str, _Line] = {}
    for line in _lines(path):
        if line.key in lines:
            raise UserError(
                f"{line.where}: the same response as in {lines[line.key].where}. Write all spans of a response on one line.",
                code="duplicate-row",
            )
        lines[line.key] = line
    texts = reader.texts(lines)
    if not texts:
        raise UserError(
            f"{path}: none of its {len(lines)} lines names a response of {reader.run.path}. Copy prompt and response exactly "
            "from the run's data, or write the response's key in the score store.",
            code="no-rows",
        )
    spans = {}
    for key, response in texts.items():
        where, stored = lines[key].where, reader.store[key].text
        found = _spans(lines[key], response)
        spans[key] = found if stored is None else tuple(moved(found, response, stored, where))
    return GivenSpans(path.name, spans, len(lines) - len(spans))


def _lines(path: Path) -> Iterator[_Line]:
    for where, row in jsonl_rows(path):
        try:
            unknown = next((name for name in row if name not in FIELDS), None)
            if unknown:
                raise FieldError(unknown, f"is not a known field; a line has {', '.join(FIELDS)}")
            yield _Line(where, _key(row), required(row, "spans"))
        except FieldError as error:
            raise UserError(f"{where}: {error}.", code="bad-row") from error


def _key(row: Mapping[str, Any]) -> str:
    if "key" not in row:
        found = answered(row)
        return response_key(found.prompt, found.response.turns or found.response.text, found.tools)
    if "prompt" in row or "response" in row:
        raise FieldError("key", "cannot be combined with prompt or response; write the key or the two texts")
    return text(row["key"], "key")


def _spans(line: _Line, response: str) -> tuple[Span, ...]:
    try:
        given = items(line.spans, "spans")
        return spans_of(given, "spans", response)
    except FieldError as error:
        raise UserError(f"{line.where}: {error}.", code="bad-row") from error


def given_credit(given: GivenSpans, reader: PairReader, channels: Channels) -> dict[str, Figure]:
    """How well each score finds the given spans, over all responses of the file.

    A score that is missing for some of their tokens is left out, such as that of another run without a response.
    """
    known: dict[str, KnownResponse] = {}
    for place, _ in reader.places():
        wanted = [key for key in place.keys if key in given.spans and key not in known]
        if wanted:
            pair = reader.pair(place)
            for response, record in zip(pair.comparison.responses, pair.records, strict=True):
                if record.key in wanted:
                    tokens = [ByteSpan(*span) for span in zip(record.start, record.end, strict=True)]
                    scores = {name: values.tolist() for name, values in channels.scores_of(record).items()}
                    known[record.key] = known_response(response, given.spans[record.key], tokens, scores)
    found = list(known.values())
    names = [name for name in found[0].scores if all(x == x for one in found for x in one.scores[name])]
    complete = [one._replace(scores={name: one.scores[name] for name in names}) for one in found]
    return credit_figures(complete, resamples=RESAMPLES)
