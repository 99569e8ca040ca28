"""The named values that scorers read, and how a frozen model computes them in batches by length."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.ops.ragged import spread_over_segments
from tokenward.plugins import name_of
from tokenward.tokens.batches import Batch, budgeted
from tokenward.tokens.rows import Layout, TokenRow

KINDS = ("logp", "entropy", "rank", "attention", "similarity", "activation", "critical")
"""What a language model gives of a token: its log-probability, the entropy where it was predicted, its rank there (0
is the most probable), the attention it receives, its likeness to words of a domain, its mean activation, and whether
what is written goes wrong with another token in its place."""

IN_THE_STEP = ("logp", "entropy", "rank")
"""Kinds that the policy's own pass has while it trains."""

TAKEN = ("policy", "reference", "oracle", "reward", "data")
"""Names that no auxiliary model of a recipe may have."""


class Value(str):
    """One number per response token; as text it is its name in a record and in the store, such as ``reference_logp``.

    Settings on which a value depends are told apart by a short hash in its name.

    Attributes:
        model: ``policy``, ``reference``, ``oracle``, ``reward``, an auxiliary model's name, or ``data``.
        kind: One of :data:`KINDS`; empty for the reward, ``spans`` or ``file`` of the data.
        details: The settings, by name.
    """

    model: str
    kind: str
    details: Mapping[str, Any]

    def __new__(cls, model: str, kind: str = "", **details: Any) -> Self:
        """A value of a model.

        Args:
            model: Its name.
            kind: What of it.
            details: Settings.
        """
        name = f"{model}_{kind}" if kind else model
        if details:
            name += f"_{hashlib.sha256(json.dumps(details, sort_keys=True).encode()).hexdigest()[:6]}"
        made = super().__new__(cls, name)
        made.model, made.kind, made.details = model, kind, details
        return made

    @property
    def online(self) -> bool:
        """Whether it comes from the policy as it is in the step."""
        return self.model == "policy"


def value_of(read: str) -> Value:
    """What a name such as ``oracle_logp`` or ``reward`` means.

    Raises:
        UserError: it is no such name.
    """
    if isinstance(read, Value):
        return read
    model, _, kind = read.rpartition("_")
    if read == "reward":
        return Value("reward")
    if model and kind in KINDS:
        return Value(model, kind)
    raise UserError(
        f"a scorer reads {read!r}, which is no stored value. Write reward, or MODEL_KIND such as oracle_logp: MODEL is policy, "
        f"reference, oracle or one of the recipe's auxiliary models, KIND one of {', '.join(KINDS)}."
    )


def reads_of(scorer: Any) -> list[Value]:
    """The values that a scorer reads; one that does not say reads what an oracle gives."""
    return [value_of(read) for read in getattr(scorer, "reads", ("oracle_logp", "reference_logp"))]


class MissingValue(UserError):
    """A value that a scorer asks for and that is not there.

    Attributes:
        name: Of the value.
    """

    def __init__(self, name: str, problem: str) -> None:
        """Name the value and the problem."""
        super().__init__(problem)
        self.name = name


def answer_of(scorer: Any, record: Any) -> Any:
    """What a scorer makes of a response.

    Raises:
        UserError: it looks at a value that it does not say it reads, so that nothing made it.
    """
    try:
        return scorer(record)
    except MissingValue as error:
        declared = reads_of(scorer)
        if error.name in declared:
            raise
        value_of(error.name)  # a word that names no value is refused as such
        written = ", ".join(f'"{value}"' for value in [*declared, error.name])
        listed = ", ".join(declared) or "nothing"
        raise UserError(
            f"the scorer {name_of(scorer)} looks at {error.name}, which is not among what it reads ({listed}), so it was not made. Write "
            f"reads = ({written}{',' * (not declared)}) in the class."
        ) from error


def is_online(scorer: Any) -> bool:
    """Whether a scorer's scores depend on the policy as it is in the step."""
    return any(value.online for value in reads_of(scorer))


def scope_of_scores(scorer: Any) -> str:
    """Which responses must be seen together to score one: ``response``, ``comparison`` or ``dataset``."""
    return str(getattr(scorer, "scope", "response"))


def numbers_of(kind: str, made: Any, returned: object) -> Tensor:
    """What a scorer or selector returned, a list or an array too, as float32.

    Raises:
        UserError: it is not a list of numbers.
    """
    try:
        return torch.as_tensor(returned, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises each of them for some values
        raise UserError(
            f"the {kind} {name_of(made)} returned a {type(returned).__name__} that cannot be read as numbers ({error}). Return a "
            "tensor, an array or a list with one number per token."
        ) from error


Progress = Callable[[int], None]
Compute = Callable[[Batch], Tensor]
"""From a batch to ``[k n]``, k numbers of each token."""


@torch.inference_mode()
def over_batches(
    model: TokenModel,
    rows: Sequence[TokenRow],
    compute: Compute,
    *,
    precision: str,
    tokens_per_batch: int,
    progress: Progress | None = None,
    layout: Layout | None = None,
    collate: Callable[[Sequence[TokenRow]], Batch] | None = None,
) -> list[list[Tensor]]:
    """Numbers of each token of each response.  -> per row, per response, [k len] float32 on the CPU

    Args:
        model: Put into evaluation mode.
        rows: Comparisons as ids.
        compute: From a batch on the model's device to the numbers.
        precision: ``float32`` runs in the weights' own dtype, ``bfloat16`` under autocast.
        tokens_per_batch: Padded tokens read at once.
        progress: Called with the number of responses done.
        layout: Of the batches, where it is not the model's own.
        collate: From rows to a batch, where it is not the model's own.
    """
    model.model.eval()
    results: list[list[Tensor]] = [[] for _ in rows]
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16")
    for group in budgeted(rows, layout=layout or model.layout, tokens=tokens_per_batch):
        batch = (collate or model.collate)([rows[index] for index in group])
        with autocast:
            values = compute(batch.to(model.device))
        sizes = torch.bincount(batch.tokens.response, minlength=batch.tokens.responses).tolist()
        per_response = iter(values.float().cpu().split(sizes, dim=1))
        for index in group:
            results[index] = [next(per_response) for _ in rows[index].responses]
            if progress is not None:
                progress(len(results[index]))
    return results


def token_values(
    model: TokenModel,
    rows: Sequence[TokenRow],
    *,
    precision: str,
    tokens_per_batch: int,
    progress: Progress | None = None,
) -> list[list[Tensor]]:
    """Log-probability, or reward, of each token of each response.  -> per row, per response, [len] float32 on the CPU

    Rows with segments get the mean over each segment at every token of it.

    Args:
        model: A language model or a token reward model; put into evaluation mode.
        rows: Comparisons as ids.
        precision: See :func:`over_batches`.
        tokens_per_batch: Padded tokens read at once.
        progress: Called with the number of responses done.
    """

    def compute(batch: Batch) -> Tensor:
        values, read = model.read(model.model, batch)
        values = values.float()
        return (values if read.segment is None else spread_over_segments(values, read.segment))[None]

    found = over_batches(
        model, rows, compute, precision=precision, tokens_per_batch=tokens_per_batch, progress=progress
    )
    return [[response[0] for response in row] for row in found]


def flatten(results: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """The values of all responses, one after another."""
    for row in results:
        yield from row
