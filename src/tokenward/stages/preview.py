"""The first picture of a run: a few pairs scored by the oracle while it still trains, for the report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args

from tokenward.artifacts import read_json, write_json
from tokenward.models.loading import LanguageModel
from tokenward.scoring.reads import Value
from tokenward.scoring.store import TokenRecord, TokenStore, records_of
from tokenward.stages.run import Run
from tokenward.stages.scores import maker_of
from tokenward.stages.tables import Tables
from tokenward.tokens.table import TokenTable

FILE = "preview.json"

PAIRS = 6
FIRST = 10


class Preview(NamedTuple):
    """Values of a few pairs, as the score store has them of all.

    Attributes:
        updates: Updates of the oracle that computed them.
        total: Updates of its whole training.
        names: Names of special tokens by id.
        records: Values by response key.
    """

    updates: int
    total: int
    names: dict[int, str]
    records: dict[str, TokenRecord]

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        records = [record._asdict() for record in self.records.values()]
        write_json(path, self._replace(records=records)._asdict())  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: Path) -> Self:
        """What :meth:`write` wrote."""
        value = read_json(path)
        names = {int(token): name for token, name in value.pop("names").items()}
        records = [TokenRecord(**record) for record in value.pop("records")]
        return cls(**value, names=names, records={record.key: record for record in records})


def due_after(step: int, total: int) -> bool:
    """Whether the picture is made after this many updates.

    It is made after a third of them, but at the latest after :data:`FIRST`, and made again after 2, 4, 8 ... times as many, up
    to half of the training.
    """
    first = min(max(total // 3, 1), FIRST)
    times, rest = divmod(step, first)
    early = step == first or 2 * step <= total
    return rest == 0 and times.bit_count() == 1 and early and step < total


class DrawPreview(TrainerCallback):
    """Writes the picture when :func:`due_after` says so. Training is not affected: nothing random is drawn.

    Args:
        make: Called with the number of updates and their total.
        path: The file.
        show: Shows a line.
    """

    def __init__(self, make: Callable[[int, int], Preview], path: Path, show: Callable[[str], None]) -> None:
        self._make, self._path, self._show = make, path, show

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        step, total = state.global_step, state.max_steps
        if not due_after(step, total):
            return
        try:
            found = self._make(step, total)
            if state.is_world_process_zero:
                found.write(self._path)
        except torch.OutOfMemoryError as error:  # no reason to end a training that fits
            self._show(f"  no first picture after {step} updates: {str(error).splitlines()[0]}")
        else:
            self._show(
                f"  the report shows a few pairs, scored by the oracle after {step} of {total} updates"
            )


def previewing(run: Run, sets: Tables, path: Path) -> Callable[[LanguageModel], DrawPreview | None]:
    """Gives the callback of an oracle; None without pairs. The reference's values of all rows are stored already."""

    def callback(model: LanguageModel) -> DrawPreview | None:
        pairs = preview_pairs(sets, run.recipe.seed)
        if not len(pairs):
            return None
        template, rows = model.template(run.style), pairs.by_prompt()
        maker = maker_of(run, "oracle", [Value("oracle", "logp")], template, loaded=model)
        names = {token: str(added) for token, added in template.tokenizer.added_tokens_decoder.items()}

        def make(step: int, total: int) -> Preview:
            found = records_of([*rows], [maker], template, reference=TokenStore(run.path("reference")))
            return Preview(step, total, names, {record.key: record for record in found})

        return DrawPreview(make, path, run.display.line)

    return callback


def preview_pairs(sets: Tables, seed: int) -> TokenTable:
    """Random eval pairs, or training pairs if there are no eval pairs."""
    held, train = (part.where(part.sizes == 2) for part in (sets.eval, sets.train))
    pairs = held if len(held) else train
    drawn = np.random.default_rng(seed).permutation(len(pairs))[:PAIRS]
    return pairs.choose(np.sort(drawn))
