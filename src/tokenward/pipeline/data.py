"""The data stage: any source to clean comparisons, split once and for all."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from tokenward.artifacts import Manifest, atomic_write, file_fingerprint, fingerprint
from tokenward.data import fraction, load, pairs, split
from tokenward.errors import UserError
from tokenward.pipeline.context import Run
from tokenward.tokens.encode import Encoded, EncodedSet, encode, response_key
from tokenward.tokens.template import Template
from tokenward.types import Comparison, Message, Span

BUILTIN = Path(str(files("tokenward") / "data" / "builtin" / "reviews.jsonl.gz"))


class PairSets(NamedTuple):
    """The pairs of a run.

    Attributes:
        train: For the oracle and the policy.
        held_out: For evaluation; no prompt of it is in the others.
        referee: For the referee alone; empty where the recipe has none.
    """

    train: list[Comparison]
    held_out: list[Comparison]
    referee: list[Comparison]


def prepare_data(run: Run) -> Manifest:
    """Read, clean and split the comparisons; counts what was dropped and why.

    Writes ``train.jsonl``, ``held_out.jsonl`` and ``dropped.jsonl``.

    Raises:
        UserError: the source cannot be read as comparisons, or nothing is left.
    """
    table = run.recipe.data
    source = str(BUILTIN) if table.source == "builtin" else table.source
    settings = {"data": table.model_dump(exclude={"pairs", "min_gap"}), "seed": run.recipe.seed}
    with run.stage("data", settings, {"source": source_fingerprint(source)}) as stage:
        if not stage.done:
            loaded = load(
                source,
                format=table.format,
                columns=table.columns,
                split=table.split,
                subset=table.subset,
                limit=table.limit,
            )
            train, held_out = split(loaded.comparisons, held_out=table.held_out, seed=run.recipe.seed)
            if not train:
                raise UserError(
                    f"no comparison is left to train on: {loaded.counts}. Lower data.held_out (now {table.held_out}) or "
                    "give more data."
                )
            write_comparisons(stage.path / "train.jsonl", train)
            write_comparisons(stage.path / "held_out.jsonl", held_out)
            dropped = "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in loaded.dropped)
            atomic_write(stage.path / "dropped.jsonl", dropped)
            stage.complete(
                counts=loaded.counts,
                notes=loaded.notes,
                format=loaded.format,
                train=len(train),
                held_out=len(held_out),
            )
    manifest = run.done("data")
    counts = {
        **manifest.facts["counts"],
        **manifest.facts["notes"],
        "train": manifest.facts["train"],
        "held out": manifest.facts["held_out"],
    }
    run.display.table("rows", ("", "rows"), [(name, str(count)) for name, count in counts.items()])
    return manifest


def source_fingerprint(source: str | list[str]) -> str:
    """Fingerprint of a source's files; of its name, where the hub holds it."""
    parts = []
    for name in [source] if isinstance(source, str) else source:
        path = Path(name).expanduser()
        root = Path(path.anchor)
        matches = [path] if path.exists() else sorted(root.glob(str(path.relative_to(root))))
        found = [
            item for match in matches for item in ([match] if match.is_file() else sorted(match.rglob("*")))
        ]
        parts += [file_fingerprint(item) for item in found if item.is_file()] or [name]
    return fingerprint(parts)


def write_comparisons(path: Path, rows: Iterable[Comparison]) -> None:
    """Write comparisons as JSON lines, one a row."""
    lines = []
    for row in rows:
        record = {name: getattr(row, name) for name in row.__slots__}
        lines.append(
            json.dumps(
                {name: value for name, value in record.items() if value is not None}, ensure_ascii=False
            )
        )
    atomic_write(path, "\n".join(lines) + "\n" if lines else "")


def read_comparisons(path: Path) -> Iterator[Comparison]:
    """Read what :func:`write_comparisons` wrote."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield _comparison(json.loads(line))


def _comparison(record: dict[str, Any]) -> Comparison:
    spans = record.get("spans")
    scores = record.get("scores")
    return Comparison(
        key=record["key"],
        prompt=tuple(Message(role=item["role"], content=item["content"]) for item in record["prompt"]),
        responses=tuple(record["responses"]),
        ranks=tuple(record["ranks"]),
        source=record["source"],
        scores=None if scores is None else tuple(scores),
        spans=None if spans is None else tuple(tuple(Span(*span) for span in response) for response in spans),
    )


def pair_sets(run: Run) -> PairSets:
    """Pairs of the finished data stage, by the recipe's rule.

    The referee's pairs are taken out of the training pairs, by prompt, so that it judges from data
    which neither the oracle nor the policy has seen.
    """
    table = run.recipe.data
    train, held_out = (_pairs_of(run, side) for side in ("train", "held_out"))
    if not train:
        raise UserError(
            f"no pair is left to train on: data.min_gap {table.min_gap} is larger than every gap. Lower it or leave it out."
        )
    if run.recipe.referee is None:
        return PairSets(train, held_out, [])
    mine, referee = split(train, held_out=run.recipe.referee.fraction, seed=run.recipe.seed + 1)
    if not mine or not referee:
        raise UserError(
            f"referee.fraction {run.recipe.referee.fraction} leaves {len(mine)} pairs for the oracle and the policy and "
            f"{len(referee)} for the referee; each needs some. Change the fraction, or give more data."
        )
    return PairSets(mine, held_out, referee)


def _pairs_of(run: Run, side: str) -> list[Comparison]:
    table = run.recipe.data
    comparisons = read_comparisons(run.path("data") / f"{side}.jsonl")
    return [
        pair for comparison in comparisons for pair in pairs(comparison, table.pairs, min_gap=table.min_gap)
    ]


def without_pairs(run: Run) -> int:
    """Comparisons all of whose pairs lie closer than ``data.min_gap``."""
    table = run.recipe.data
    both = (
        row for side in ("train", "held_out") for row in read_comparisons(run.path("data") / f"{side}.jsonl")
    )
    return sum(not pairs(row, table.pairs, min_gap=table.min_gap) for row in both)


def pair_settings(run: Run) -> dict[str, Any]:
    """Everything of the recipe that decides which pairs there are and what their tokens are."""
    table, referee = run.recipe.data, run.recipe.referee
    return {
        "tokens": {**run.recipe.tokens.model_dump(), "context": run.limits.context},
        "data": {"pairs": table.pairs, "min_gap": table.min_gap},
        "referee": None if referee is None else {"fraction": referee.fraction},
        "seed": run.recipe.seed,
    }


def oracle_pairs(run: Run, train: Sequence[Comparison]) -> list[Comparison]:
    """The random part of the training pairs that the oracle sees."""
    return fraction(train, run.recipe.oracle.fraction, run.recipe.seed, "oracle")


def by_prompt(rows: Iterable[Comparison]) -> list[Comparison]:
    """The distinct responses of each prompt as one comparison, so that the prompt is computed once.

    The ranks carry no meaning: pairs of one response may disagree about it.
    """
    groups: dict[str, dict[str, tuple[Span, ...] | None]] = {}
    prompts: dict[str, Comparison] = {}
    for row in rows:
        name = json.dumps(row.prompt)
        prompts.setdefault(name, row)
        group = groups.setdefault(name, {})
        for text, spans in zip(row.responses, row.spans or (None,) * len(row.responses), strict=True):
            group.setdefault(text, spans)
    return [_group(prompts[name], group) for name, group in groups.items()]


def _group(row: Comparison, responses: Mapping[str, tuple[Span, ...] | None]) -> Comparison:
    spans = tuple(found for found in responses.values() if found is not None)
    return replace(
        row,
        responses=tuple(responses),
        ranks=tuple(range(len(responses))),
        scores=None,
        spans=spans if len(spans) == len(responses) else None,
    )


def encode_set(
    run: Run, rows: Sequence[Comparison], template: Template, *, show: str = "", may_be_empty: bool = False
) -> EncodedSet:
    """Encode comparisons within the recipe's limits; ``show`` names the table that is displayed."""
    result = encode(rows, template, run.limits, may_be_empty=may_be_empty)
    if show:
        run.display.table(show, ("", "rows"), [(name, str(count)) for name, count in result.counts.items()])
    return result


def response_keys(row: Encoded) -> list[str]:
    """Stable names of a row's responses."""
    return [response_key(row.comparison.prompt, text) for text in row.comparison.responses]
