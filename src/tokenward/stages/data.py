"""The data stage: any source to clean comparisons, split once, and a preview of rows as the model sees them."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.text import Text

from tokenward.artifacts import Manifest, StageFolder, file_fingerprint, fingerprint
from tokenward.config import DataTable, EvalTable
from tokenward.data.prepare import Reading, read
from tokenward.data.stream import write_split
from tokenward.display import Display
from tokenward.stages.base import Stage
from tokenward.stages.run import Run
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.segments import spelled
from tokenward.tokens.split import Insert
from tokenward.tokens.template import Template

BUILTIN = Path(str(files("tokenward") / "data" / "builtin" / "reviews.jsonl.gz"))


NOTHING_HELD_OUT = (
    "  no comparison is held out (data.eval is {share:g}), so nothing can be evaluated. A larger data.eval or more "
    "rows would give figures"
)
NOTHING_TO_EVALUATE = (
    "  no row of data.eval is left, so nothing can be evaluated. Its rows were dropped for the reasons above"
)


class DataStage(Stage):
    """Read, clean and split the comparisons; counts what was dropped and why.

    Writes ``train.jsonl``, ``eval.jsonl`` and ``dropped.jsonl``.
    """

    name, layout = "data", 2

    def settings(self, run: Run) -> Mapping[str, Any]:
        """The table ``data``; which pairs are made of the comparisons does not matter here."""
        return {"data": run.recipe.data.model_dump(exclude={"pairs", "min_gap"}), "seed": run.recipe.seed}

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The source's files."""
        train, aside = _sources(run.recipe.data)
        found = {"source": source_fingerprint(train.path)}
        return found if aside is None else {**found, "evaluation source": source_fingerprint(aside.path)}

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Write the split.

        Raises:
            UserError: the source cannot be read as comparisons, or nothing is left.
        """
        table = run.recipe.data
        share = 0.0 if isinstance(table.eval, EvalTable) else table.eval
        return _written(folder.path, *_sources(table), share=share, seed=run.recipe.seed)

    def show(self, run: Run) -> None:
        """The counts."""
        _show(run, run.done("data"))


def _sources(table: DataTable) -> tuple["_ReadWith", "_ReadWith | None"]:
    train = _ReadWith(table.source, table.format, table.columns, table.split, table.subset, table.limit)
    return train, _evaluated(table, table.eval) if isinstance(table.eval, EvalTable) else None


class _ReadWith(NamedTuple):
    """A source and how it is read."""

    source: str | list[str]
    format: str
    columns: dict[str, str]
    split: str | None
    subset: str | None
    limit: int | None

    @property
    def path(self) -> str | list[str]:
        return str(BUILTIN) if self.source == "builtin" else self.source

    def reading(self) -> Reading:
        settings = self._asdict()
        del settings["source"]
        return read(self.path, **settings)


def _evaluated(table: DataTable, own: EvalTable) -> _ReadWith:
    """How the rows to evaluate on are read."""
    return _ReadWith(
        table.source if own.source is None else own.source,
        table.format if own.format is None else own.format,
        table.columns if own.columns is None else own.columns,
        own.split,
        own.subset if own.subset is not None or own.source is not None else table.subset,
        own.limit,
    )


def _written(
    folder: Path, train: _ReadWith, aside: _ReadWith | None, *, share: float, seed: int
) -> dict[str, Any]:
    """Write the split; the facts of the stage."""
    readings = [source.reading() for source in (train, aside) if source is not None]
    evaluation = None if aside is None else readings[1].rows
    written = write_split(folder, readings[0].rows, share=share, seed=seed, evaluation=evaluation)
    unread = dict.fromkeys(name for reading in readings for name in reading.unread)
    said = dict.fromkeys(line for reading in readings for line in reading.said)
    return {
        **written._asdict(),
        "format": readings[0].format,
        "columns_not_read": list(unread),
        "said": list(said),
    }


def _show(run: Run, manifest: Manifest) -> None:
    facts, table = manifest.facts, run.recipe.data
    counts = {
        **facts["counts"],
        **facts["notes"],
        "train": facts["train"],
        "held out": facts["eval"],
        **{
            f"unpaired, {side.replace('_', ' ')}": count for side, count in facts["unpaired"].items() if count
        },
    }
    run.display.table("rows", ("", "rows"), [(name, str(count)) for name, count in counts.items()])
    if isinstance(table.eval, EvalTable):
        found = [(name, str(count)) for name, count in facts["evaluation"].items()]
        run.display.table("rows of data.eval", ("", "rows"), found)
    for line in facts["said"]:
        run.display.line(f"  {line}")
    if facts["columns_not_read"]:
        run.display.line(f"  columns not read: {', '.join(facts['columns_not_read'])}")
    if not facts["eval"]:
        aside = isinstance(table.eval, EvalTable)
        run.display.line(NOTHING_TO_EVALUATE if aside else NOTHING_HELD_OUT.format(share=table.eval))


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


PROMPT_SHOWN = 400


def preview(display: Display, template: Template, rows: Sequence[TokenRow], *, weighted: bool = True) -> None:
    """Show the end of each prompt, and its responses with their selected tokens marked ``[so]``.

    Args:
        display: The screen.
        template: That wrote the rows.
        rows: What to show; without weights every token counts.
        weighted: Whether it is known which tokens count; if not, none is marked.
    """
    if not rows:
        return
    what = "one row as the model sees it" if len(rows) == 1 else f"{len(rows)} rows as the model sees them"
    note = (
        "tokens in [brackets] are trained, the prompt and what stands between replies are read only"
        if weighted
        else "which tokens are trained is not known yet"
    )
    text = Text()
    text.append(f"  {what}; {note}", style="italic")
    for row in rows:
        text.append("\n")
        text.append(_row(template, row, weighted))
    display.text(text)


def _row(template: Template, row: TokenRow, weighted: bool) -> Text:
    encoded = row
    text = _prompt(template, encoded.prompt)
    for side, ids in enumerate(encoded.responses):
        text.append(_name(encoded.comparison.ranks, side), style="bold")
        weights = row.weights[side].tolist() if row.weights is not None else [1.0] * len(ids)
        texts, before = pieces(template, encoded, side), 0
        for insert in (*encoded.inserts(side), Insert(len(ids), [])):
            part = slice(before, insert.before)
            text.append(marked(texts[part], weights[part]) if weighted else Text("".join(texts[part])))
            text.append(str(template.tokenizer.decode(insert.ids)), style="magenta")
            before = insert.before
    return text


def _prompt(template: Template, ids: Sequence[int]) -> Text:
    """The end of a prompt, dim, with the template's own tokens in another colour."""
    text = Text()
    for special, group in groupby(ids, key=template.special_ids.__contains__):
        text.append(str(template.tokenizer.decode(list(group))), style="magenta" if special else "dim")
    if len(text) <= PROMPT_SHOWN:
        return text
    return Text.assemble(("...", "dim"), text[-PROMPT_SHOWN:])


def _name(ranks: Sequence[int], side: int) -> str:
    if len(ranks) == 1:
        return "\nresponse: " if ranks[side] == 0 else "\nbad response: "
    return "\nchosen: " if ranks[side] == 0 else "\nrejected: "


def pieces(template: Template, encoded: TokenRow, place: int) -> list[str]:
    """The text of each token of a response; a part of a character shows the replacement mark, an end its name."""
    ids = encoded.responses[place]
    text, spans, _ = spelled(template.tokenizer, encoded, place)
    raw, count = text.encode(), len(ids) - encoded.eos[place]
    texts = [raw[span.start : span.end].decode(errors="replace") for span in spans[:count]]
    return texts + [str(template.tokenizer.convert_ids_to_tokens(token)) for token in ids[count:]]


def marked(texts: Sequence[str], weights: Sequence[float]) -> Text:
    """Tokens in a line; those with weight in brackets, followed by the weight if it is not 1."""
    text = Text()
    for piece, weight in zip(texts, weights, strict=True):
        if weight == 0:
            text.append(piece, style="dim")
        else:
            text.append(f"[{piece}]" if weight == 1 else f"[{piece}]{weight:.2g}", style="bold green")
    return text
