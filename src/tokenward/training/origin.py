"""What a checkpoint was trained on: a training that continues from it must have the same rows and objective.

transformers continues from whatever lies in ``output_dir``. If another training left it there, the result would be that
training's, under this one's name.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenward.artifacts import atomic_write, read_json
from tokenward.errors import UserError
from tokenward.objectives.base import Objective, parts_within, title_of
from tokenward.objectives.selected import Selected
from tokenward.plugins import name_of
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable

FILE = "trained_on.json"
"""In a checkpoint: the digest of its training's rows, their number, the objective, its settings and those of the samples."""

REFERENCE = "reference log-probability per token"

_SAME_REFERENCE = 3.0e-3
"""Relative difference of means up to which two references are one: rounding differs between machines, most in bfloat16."""


def record_origin(
    checkpoint: Path, rows: Sequence[TokenRow], objective: Objective, samples: Mapping[str, str]
) -> None:
    """Write into a checkpoint what it was trained on.

    Args:
        checkpoint: The checkpoint.
        rows: The training rows.
        objective: The objective.
        samples: What decides on samples of the policy and their rewards, by name.
    """
    atomic_write(checkpoint / FILE, json.dumps(_origin(rows, objective, samples), indent=1) + "\n")


def check_origin(
    checkpoint: Path, rows: Sequence[TokenRow], objective: Objective, samples: Mapping[str, str]
) -> None:
    """Refuse a checkpoint of another training. What an earlier version did not record is taken on trust.

    Args:
        checkpoint: The checkpoint.
        rows: The rows of the training that would continue from it.
        objective: Its objective.
        samples: As for :func:`record_origin`.

    Raises:
        UserError: it was trained on other rows, in another order or with other weights, with another objective or other
            settings of it, on other samples, or against another reference.
    """
    if not (checkpoint / FILE).is_file():
        return
    own = _origin(rows, objective, samples)
    found = own | read_json(checkpoint / FILE)
    found["settings"] = own["settings"] | found["settings"]
    values = [kind.pop(REFERENCE, None) for kind in (found, own)]
    other = None not in values and not math.isclose(*values, rel_tol=_SAME_REFERENCE)
    what = [
        f"{name} {found[name]} and not {own[name]}"
        for name in ("objective", "number of rows")
        if found[name] != own[name]
    ] or [
        f"{name} {found['settings'].get(name)} and not {own['settings'].get(name)}"
        for name in sorted(own["settings"].keys() | found["settings"].keys())
        if found["settings"].get(name) != own["settings"].get(name)
    ]
    if not what and found["rows"] != own["rows"]:
        what = ["other rows, or the same in another order or with other weights"]
    if other:
        what.append(
            f"{REFERENCE} {values[0]:.5g} and not {values[1]:.5g}, so its reference was another model"
        )
    if not what:
        return
    raise UserError(
        f"{checkpoint} is of another training: {', '.join(what)}. Continue with the model, the rows and the objective that it began with, use "
        "another output_dir, or leave resume_from_checkpoint out. To begin a new training with its weights, pass its folder as the model.",
        code="unusable-checkpoint",
    )


def _origin(rows: Sequence[TokenRow], objective: Objective, samples: Mapping[str, str]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for part in _parts_of_table(rows) if isinstance(rows, TokenTable) else _parts_of_rows(rows):
        digest.update(part)
    reference = _mean_reference(rows)
    return {
        "objective": title_of(objective),
        "settings": {**_settings(objective), **samples},
        "number of rows": len(rows),
        "rows": digest.hexdigest()[:16],
        **({} if reference is None else {REFERENCE: reference}),
    }


def _mean_reference(rows: Sequence[TokenRow]) -> float | None:
    """Mean of the reference's log-probabilities over all tokens of the rows, in nats; None if the rows have none."""
    if isinstance(rows, TokenTable):
        if "reference_logp" not in rows.columns:
            return None
        flat, starts = rows.columns["reference_logp"]
        ends = zip(starts, rows.lengths, strict=True)
        sums, count = (
            (float(flat[first : first + size].sum()) for first, size in ends),
            int(rows.lengths.sum()),
        )
    else:
        found = [values for row in rows for values in row.reference_logp or ()]
        sums, count = (float(values.sum()) for values in found), sum(len(values) for values in found)
    return math.fsum(sums) / count if count else None


def _settings(objective: Objective) -> dict[str, str]:
    """The settings of an objective and of those that it calls, and its selectors, as texts by name."""
    found: dict[str, str] = {}
    for part in parts_within(objective):
        own = {field.name: getattr(part, field.name) for field in fields(part)} if is_dataclass(part) else {}
        if isinstance(part, Selected):
            own = {"selector": name_of(part.selector), "scorer": part.scorer and name_of(part.scorer)}
        for name, value in own.items():
            found.setdefault(f"{title_of(part)}.{name}", str(value))
    return found


def _parts_of_table(rows: TokenTable) -> Iterator[bytes]:
    """Names, order, ranks and lengths of the responses, and their weights."""
    for numbers in (rows.keys, rows.sizes, rows.ranks, rows.lengths):
        yield np.ascontiguousarray(numbers).tobytes()
    if "weights" in rows.columns:
        flat, starts = rows.columns["weights"]
        for first, size in zip(starts, rows.lengths, strict=True):
            yield np.ascontiguousarray(flat[first : first + size]).tobytes()


def _parts_of_rows(rows: Sequence[TokenRow]) -> Iterator[bytes]:
    for row in rows:
        lengths = [len(ids) for ids in row.responses]
        yield json.dumps([row.comparison.key, list(row.comparison.ranks), lengths]).encode()
        for weights in row.weights or ():
            yield weights.numpy().tobytes()
