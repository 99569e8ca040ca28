"""The data stage: any source to clean comparisons, split once and for all."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from tokenward.artifacts import Manifest, StageFolder, file_fingerprint, fingerprint
from tokenward.config import DataTable, EvalTable
from tokenward.data.prepare import Reading, read
from tokenward.data.stream import write_split
from tokenward.stages.base import Stage
from tokenward.stages.run import Run

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
