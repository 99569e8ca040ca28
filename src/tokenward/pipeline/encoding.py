"""Encoding, once: the ids of a data file are kept in the run's folder and serve every stage."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from tokenward.artifacts import MANIFEST, file_fingerprint, fingerprint, open_stage, read_manifest
from tokenward.data.lines import ComparisonFile
from tokenward.errors import UserError
from tokenward.pipeline.context import Run
from tokenward.tokens.notes import explanations, notes_of
from tokenward.tokens.shards import ENCODED, EncodedFile, write_encoded
from tokenward.tokens.split import SAID, Note
from tokenward.tokens.template import Template
from tokenward.types import Comparison

_LAYOUT = 2
_STAGE = "encoded"


def encoded_file(run: Run, file: ComparisonFile, template: Template) -> EncodedFile:
    """The ids of a whole file of comparisons, made unless the run has them.

    Another file, tokenizer, template or limit has a folder of its own.

    Raises:
        UserError: what the folder holds is not whole.
    """
    table = run.recipe.tokens
    settings = {"tokens": table.model_dump(exclude={"processes"})}
    inputs = {
        "comparisons": file_fingerprint(file.path),
        "template": fingerprint([template.fingerprint, template.eos_ids]),
    }
    folder = run.path(_STAGE) / fingerprint([settings, inputs, _LAYOUT])
    if not _complete(folder):
        with open_stage(folder, stage=_STAGE, settings=settings, inputs=inputs, format=_LAYOUT) as stage:
            if not stage.done:
                with run.display.progress(f"encoding {file.path.stem}", len(file)) as bar:
                    write_encoded(
                        folder, file, template, run.limits, processes=table.processes, progress=bar.advance
                    )
                stage.complete(rows=len(file))
    return _opened(folder, len(file))


def say_notes(
    run: Run, template: Template, counts: Mapping[str, int], sources: Sequence[Sequence[Comparison]]
) -> None:
    """Show how rows are written where that needs a word, each with an example.

    Args:
        run: Whose screen and encoded files are used.
        template: That wrote the rows.
        counts: What encoding counted.
        sources: Where the rows come from.
    """
    found: dict[Note, Comparison] = {}
    for note, words in SAID.items():
        examples = (_first_with(run, template, note, source) for source in sources if counts.get(words))
        example = next((row for row in examples if row is not None), None)
        if example is not None:
            found[note] = example
    for line in explanations(template, found, counts):
        run.display.line(line)


def _first_with(run: Run, template: Template, note: Note, source: Sequence[Comparison]) -> Comparison | None:
    if isinstance(source, ComparisonFile):
        row = encoded_file(run, source, template).first_with(note)
        return None if row is None else source[row]
    return next((row for row in source if notes_of(template, row) & note), None)


def _complete(folder: Path) -> bool:
    # A finished file is read by any number of stages at once; only writing it needs the lock.
    return (folder / MANIFEST).is_file() and read_manifest(folder).complete


def _opened(folder: Path, rows: int) -> EncodedFile:
    try:
        found = EncodedFile(folder / ENCODED)
        count: int | str = len(found)
    except (OSError, pa.ArrowInvalid) as error:  # removed, or cut off by a copy
        found, count = None, str(error)
    if found is None or count != rows:
        raise UserError(
            f"{folder / ENCODED} is not the {rows} encoded comparisons that its {MANIFEST} says ({count}). "
            "Delete the folder; it is made again."
        )
    return found
