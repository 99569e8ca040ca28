"""The data stage: reads any source, cleans and splits it; and a preview of rows as the model reads them."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.text import Text

from tokenward.artifacts import StageFolder, file_fingerprint, fingerprint, user_path
from tokenward.config import DataTable, EvalTable
from tokenward.data.prepare import Dropped, Reading, Usable, read
from tokenward.data.stream import write_split
from tokenward.display import Bar, Display
from tokenward.stages.base import Stage
from tokenward.stages.run import Run
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.segments import spelled
from tokenward.tokens.split import Insert
from tokenward.tokens.template import Template

BUILTIN = Path(str(files("tokenward") / "data" / "builtin" / "reviews.jsonl.gz"))

_MEGABYTE = 1_000_000
_ROWS_PER_LOOK = 1024

_NO_EVAL_SHARE = "  there are no eval rows (data.eval is {share:g}), so nothing can be evaluated. Raise data.eval or add data"
_NO_EVAL_LEFT = (
    "  no row of data.eval is left, so nothing can be evaluated. The counts above say why they were dropped"
)


class DataStage(Stage):
    """Read, clean and split the comparisons; count what is dropped and why.

    Writes ``train.jsonl``, ``eval.jsonl`` and ``dropped.jsonl``.
    """

    name, layout = "data", 2

    def settings(self, run: Run) -> Mapping[str, Any]:
        """The table ``data``, without the keys that form pairs: those act later."""
        return {"data": run.recipe.data.model_dump(exclude={"pairs", "min_gap"}), "seed": run.recipe.seed}

    def inputs(self, run: Run) -> Mapping[str, str]:
        names = ("source", "evaluation source")
        return {
            name: source_fingerprint(path)
            for name, (path, _) in zip(names, _sources(run.recipe.data), strict=False)
        }

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        table = run.recipe.data
        readings = [read(path, **settings) for path, settings in _sources(table)]
        with run.display.progress("reading, MB", 0, brief=True) as bar:
            shown = [_shown(reading, bar) for reading in readings]
            counts = write_split(
                folder.path,
                shown[0],
                share=0.0 if isinstance(table.eval, EvalTable) else table.eval,
                seed=run.recipe.seed,
                evaluation=shown[1] if len(shown) > 1 else None,
                progress=lambda done, total: bar.note(f"{done:,} of {total:,} rows written"),
            )
        return {
            **counts._asdict(),
            "format": readings[0].format,
            "columns_not_read": list(dict.fromkeys(name for reading in readings for name in reading.unread)),
            "said": list(dict.fromkeys(line for reading in readings for line in reading.said)),
        }

    def show(self, run: Run) -> None:
        facts, share = run.done("data").facts, run.recipe.data.eval
        unpaired = {f"unpaired, {part}": count for part, count in facts["unpaired"].items() if count}
        counts = {**facts["counts"], **facts["notes"], "train": facts["train"], "eval": facts["eval"]}
        _show_counts(run.display, "rows", counts | unpaired)
        if isinstance(share, EvalTable):
            _show_counts(run.display, "rows of data.eval", facts["evaluation"])
        for line in facts["said"]:
            run.display.line(f"  {line}")
        if facts["columns_not_read"]:
            run.display.line(f"  columns not read: {', '.join(facts['columns_not_read'])}")
        if not facts["eval"]:
            run.display.line(
                _NO_EVAL_LEFT if isinstance(share, EvalTable) else _NO_EVAL_SHARE.format(share=share)
            )


def _shown(reading: Reading, bar: Bar) -> Iterator[Usable | Dropped]:
    """The rows of a source, with a bar that shows how far its files have been read."""
    for number, row in enumerate(reading.rows, 1):
        yield row
        if not number % _ROWS_PER_LOOK:
            bar.reach(
                reading.meter.done // _MEGABYTE, -(-reading.meter.total // _MEGABYTE), f"{number:,} rows"
            )


def _show_counts(display: Display, title: str, counts: Mapping[str, int]) -> None:
    display.table(title, ("", "rows"), [(name, str(count)) for name, count in counts.items()])


def _sources(table: DataTable) -> list[tuple[str | list[str], dict[str, Any]]]:
    """The training source and, if it is separate, that of the eval rows, each with how it is read."""
    fields = ("format", "columns", "split", "subset", "limit")
    settings = {name: getattr(table, name) for name in fields}
    found = [(_path(table.source), settings)]
    own = table.eval
    if isinstance(own, EvalTable):
        mine = {name: getattr(own, name) for name in fields}
        inherited = ["format", "columns", *(["subset"] if own.source is None else [])]
        mine |= {name: settings[name] for name in inherited if mine[name] is None}
        found.append((_path(table.source if own.source is None else own.source), mine))
    return found


def _path(source: str | list[str]) -> str | list[str]:
    return str(BUILTIN) if source == "builtin" else source


def source_fingerprint(source: str | list[str]) -> str:
    """Fingerprint of a source's files, or of its name if it is on the hub."""
    parts = []
    for name in [source] if isinstance(source, str) else source:
        path = user_path(name)
        root = Path(path.anchor)
        matches = [path] if path.exists() else sorted(root.glob(str(path.relative_to(root))))
        found = [
            item for match in matches for item in ([match] if match.is_file() else sorted(match.rglob("*")))
        ]
        parts += [file_fingerprint(item) for item in found if item.is_file()] or [name]
    return fingerprint(parts)


_PROMPT_SHOWN = 400


def preview(display: Display, template: Template, rows: Sequence[TokenRow], *, weighted: bool = True) -> None:
    """Show the end of each prompt, and its responses with the trained tokens marked ``[so]``.

    In rows without weights every token trains. Nothing is marked unless ``weighted``: which tokens train is not known yet.
    """
    if not rows:
        return
    what = "one row as the model sees it" if len(rows) == 1 else f"{len(rows)} rows as the model sees them"
    note = "tokens in [brackets] are trained, all others are context"
    text = Text()
    text.append(
        f"  {what}; {note if weighted else 'which tokens are trained is not known yet'}", style="italic"
    )
    for row in rows:
        text.append("\n")
        text.append(_row(template, row, weighted))
    display.text(text)


def _row(template: Template, row: TokenRow, weighted: bool) -> Text:
    text = _prompt(template, row.prompt)
    for side, ids in enumerate(row.responses):
        text.append(_label(row.comparison.ranks, side), style="bold")
        weights = row.weights[side].tolist() if row.weights is not None else [1.0] * len(ids)
        texts, before = _token_texts(template, row, side), 0
        for insert in (*row.inserts(side), Insert(len(ids), [])):
            part = slice(before, insert.before)
            text.append(_marked(texts[part], weights[part]) if weighted else Text("".join(texts[part])))
            text.append(str(template.tokenizer.decode(insert.ids)), style="magenta")
            before = insert.before
    return text


def _prompt(template: Template, ids: Sequence[int]) -> Text:
    """The end of a prompt, dim, with the template's own tokens in another colour."""
    text = Text()
    for special, group in groupby(ids, key=template.special_ids.__contains__):
        text.append(str(template.tokenizer.decode(list(group))), style="magenta" if special else "dim")
    return text if len(text) <= _PROMPT_SHOWN else Text.assemble(("...", "dim"), text[-_PROMPT_SHOWN:])


def _label(ranks: Sequence[int], side: int) -> str:
    if len(ranks) == 1:
        return "\nresponse: " if ranks[side] == 0 else "\nbad response: "
    return "\nchosen: " if ranks[side] == 0 else "\nrejected: "


def _token_texts(template: Template, row: TokenRow, side: int) -> list[str]:
    """The text of each token of a response; part of a character shows as the replacement mark, eos by its name."""
    ids = row.responses[side]
    text, spans, _ = spelled(template.tokenizer, row, side)
    raw, count = text.encode(), len(ids) - row.eos[side]
    texts = [raw[span.start : span.end].decode(errors="replace") for span in spans[:count]]
    return texts + [str(template.tokenizer.convert_ids_to_tokens(token)) for token in ids[count:]]


def _marked(texts: Sequence[str], weights: Sequence[float]) -> Text:
    """Tokens in a line; trained tokens in brackets, followed by the weight if it is not 1."""
    text = Text()
    for piece, weight in zip(texts, weights, strict=True):
        if weight == 0:
            text.append(piece, style="dim")
        else:
            text.append(f"[{piece}]" if weight == 1 else f"[{piece}]{weight:.2g}", style="bold green")
    return text
