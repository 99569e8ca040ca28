"""Spans of known value from a file of their own: what people marked in responses of a run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenward.data.fields import FieldError, items, required, text
from tokenward.data.files import jsonl_rows
from tokenward.data.parsers import answered, span_of
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
"""Bootstrap draws of the page's intervals: fewer than the evaluation's, since a page is made again and again."""


class GivenSpans(NamedTuple):
    """The spans of a file, by the key of their response.

    Attributes:
        name: Of the file, without its folder.
        spans: Spans of the responses that the run's pairs have; a response that someone looked at may have none.
        unmatched: Lines whose response is in no pair of the run.
    """

    name: str
    spans: Mapping[str, tuple[Span, ...]]
    unmatched: int


class _Line(NamedTuple):
    """One line: where it stands and what it says, its spans not yet looked at."""

    where: str
    key: str
    spans: Any


def read_spans(path: str | Path, reader: PairReader) -> GivenSpans:
    """Read and check a file of spans.

    A line is ``{"prompt": ..., "response": ..., "spans": [[start, end, value], ...]}``, or has the response's
    ``key`` in the score store in place of both texts. Start and end count characters; a value is positive where the
    span speaks for the response, negative where it speaks against it.

    Args:
        path: A JSONL file.
        reader: The run's pairs.

    Raises:
        UserError: no such file, a line that is not so (file and line are named), a response twice, or none of the run.
    """
    path = Path(path)
    lines: dict[str, _Line] = {}
    for line in _lines(path):
        if line.key in lines:
            raise UserError(
                f"{line.where}: the same response as in {lines[line.key].where}. Write all spans of a response in one line."
            )
        lines[line.key] = line
    texts = reader.texts(lines)
    if not texts:
        raise UserError(
            f"{path}: none of its {len(lines)} lines names a response of {reader.run.path}. Prompt and response must be "
            "those of the run's data, letter by letter; a key is the response's in the score store."
        )
    spans = {
        key: _placed(_spans(lines[key], response), response, reader.store[key].text, lines[key].where)
        for key, response in texts.items()
    }
    return GivenSpans(path.name, spans, len(lines) - len(spans))


def _lines(path: Path) -> Iterator[_Line]:
    for where, row in jsonl_rows(path):
        try:
            unknown = [name for name in row if name not in FIELDS]
            if unknown:
                raise FieldError(unknown[0], f"is not known; a line has {', '.join(FIELDS)}")
            yield _Line(where, _key(row), required(row, "spans"))
        except FieldError as error:
            raise UserError(f"{where}: {error}.") from error


def _key(row: Mapping[str, Any]) -> str:
    if "key" not in row:
        found = answered(row)
        return response_key(found.prompt, found.response.turns or found.response.text, found.tools)
    if "prompt" in row or "response" in row:
        raise FieldError("key", "stands beside prompt or response; write the key, or the two texts")
    return text(row["key"], "key")


def _spans(line: _Line, response: str) -> tuple[Span, ...]:
    try:
        given = items(line.spans, "spans")
        return tuple(span_of(span, f"spans[{place}]", response) for place, span in enumerate(given))
    except FieldError as error:
        raise UserError(f"{line.where}: {error}.") from error


def _placed(spans: tuple[Span, ...], response: str, text: str | None, where: str) -> tuple[Span, ...]:
    """Spans of a response in the text that its tokens spell."""
    return spans if text is None else tuple(moved(spans, response, text, where))


def given_credit(given: GivenSpans, reader: PairReader, channels: Channels) -> dict[str, Figure]:
    """How well each score of the page finds the given spans, over all responses that the file names.

    A score that is missing for some of their tokens, such as that of a further run without a response, is left out.
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
    return credit_figures(_complete(list(known.values())), resamples=RESAMPLES)


def _complete(known: list[KnownResponse]) -> list[KnownResponse]:
    names = [name for name in known[0].scores if all(x == x for one in known for x in one.scores[name])]
    return [one._replace(scores={name: one.scores[name] for name in names}) for one in known]
