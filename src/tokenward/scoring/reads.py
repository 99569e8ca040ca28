"""The named values that scorers read, and how a frozen model computes them in batches."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from tokenward.distributed import split
from tokenward.errors import UserError, no_exit
from tokenward.models.base import TokenModel
from tokenward.models.sharding import reading
from tokenward.ops.ragged import spread_over_segments
from tokenward.plugins import name_of
from tokenward.tokens.batches import Batch, budgeted
from tokenward.tokens.rows import Layout, TokenRow, keys_of

KINDS = ("logp", "entropy", "rank", "attention", "similarity", "activation", "critical")
"""Kinds of values of a language model, one number per response token: log-probability; entropy of the predicting
distribution; rank in it (0 is the most probable); attention received; similarity to the words of a domain; mean activation;
whether replacing the token leads to a wrong answer."""

IN_THE_STEP = ("logp", "entropy", "rank")
"""Kinds that the policy's own forward pass gives during training."""

TAKEN = ("policy", "reference", "oracle", "reward", "data")
"""Names that no auxiliary model of a recipe may have."""


class Value(str):
    """One number per response token. The string is its name in records and in the store, such as ``reference_logp``.

    A short hash in the name tells values with different settings apart.

    Attributes:
        model: ``policy``, ``reference``, ``oracle``, ``reward``, ``data`` or the name of an auxiliary model.
        kind: One of :data:`KINDS`; empty for the reward; ``spans`` or ``file`` for the data.
        details: Settings the value depends on, by name.
    """

    model: str
    kind: str
    details: Mapping[str, Any]

    def __new__(cls, model: str, kind: str = "", **details: Any) -> Self:
        name = f"{model}_{kind}" if kind else model
        if details:
            name += f"_{hashlib.sha256(json.dumps(details, sort_keys=True).encode()).hexdigest()[:6]}"
        value = super().__new__(cls, name)
        value.model, value.kind, value.details = model, kind, details
        return value

    @property
    def online(self) -> bool:
        """Whether it is a value of the policy, which changes at every training step."""
        return self.model == "policy"


def value_of(name: str) -> Value:
    """The value with a name such as ``oracle_logp`` or ``reward``.

    Raises:
        UserError: The name is malformed.
    """
    if isinstance(name, Value):
        return name
    model, _, kind = name.rpartition("_")
    if name == "reward":
        return Value("reward")
    if model and kind in KINDS:
        return Value(model, kind)
    raise UserError(
        f"a scorer reads {name!r}, which is not a known value. Write reward, or MODEL_KIND such as oracle_logp: MODEL is "
        f"policy, reference, oracle or an auxiliary model, KIND one of {', '.join(KINDS)}.",
        code="unknown-value",
    )


def reads_of(scorer: Any) -> list[Value]:
    """The values that a scorer reads; without ``reads``, those of oracle and reference."""
    return [value_of(name) for name in getattr(scorer, "reads", ("oracle_logp", "reference_logp"))]


def is_online(scorer: Any) -> bool:
    """Whether the scores depend on the policy, so that the scorer is called in each training step."""
    return any(value.online for value in reads_of(scorer))


def scope_of_scores(scorer: Any) -> str:
    """Which responses a scorer compares: ``response`` (none), ``comparison`` or ``dataset``."""
    return str(getattr(scorer, "scope", "response"))


class MissingValue(UserError):
    """A scorer used a value that is not available.

    Attributes:
        name: Name of the value.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(problem, code="missing-value")
        self.name = name


def scores_of(scorer: Any, record: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scores of one response.  -> [n]

    Raises:
        UserError: The scorer uses a value it does not declare in ``reads``, or returns anything but one number per token, which is
            finite or NaN; or it calls ``sys.exit()``.
    """
    try:
        with no_exit("scorer", name_of(scorer)):
            returned = scorer(record)
    except MissingValue as error:
        declared = reads_of(scorer)
        if error.name in declared:
            raise
        value_of(error.name)  # a malformed name gets its own message
        written = ", ".join(f'"{value}"' for value in [*declared, error.name])
        raise UserError(
            f"the scorer {name_of(scorer)} uses {error.name}, which it does not declare in reads "
            f"({', '.join(declared) or 'empty'}), so it was not computed. Write reads = ({written}{',' * (not declared)}) in the class.",
            code="undeclared-value",
        ) from error
    scores = numbers_of("scorer", scorer, returned, dtype)
    if scores.shape != (len(record.ids),):
        raise UserError(
            f"the scorer {name_of(scorer)} returned shape {tuple(scores.shape)} for a response of {len(record.ids)} tokens. "
            "Return one number per token.",
            code="wrong-result",
        )
    if bool(scores.isinf().any()):
        place = int(scores.isinf().nonzero()[0])
        raise UserError(
            f"the scorer {name_of(scorer)} returned {float(scores[place])} for token {place + 1} of {len(scores)} of the response "
            f"{getattr(record, 'key', '')}. A score is a finite number, or NaN for a token without one. Common causes are a division by 0 and "
            "the logarithm of 0.",
            code="non-finite-scores",
        )
    return scores


def numbers_of(kind: str, plugin: Any, returned: object, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor, array or list that a scorer or selector returned, as a tensor.

    Raises:
        UserError: It cannot be converted to numbers.
    """
    try:
        return torch.as_tensor(returned, dtype=dtype).detach()  # it may come from a module
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises each of them for some values
        raise UserError(
            f"the {kind} {name_of(plugin)} returned a {type(returned).__name__} that cannot be read as numbers ({error}). Return a "
            "tensor, an array or a list with one number per token.",
            code="wrong-result",
        ) from error


T = TypeVar("T")

Progress = Callable[[int], None]
Compute = Callable[[Batch], Tensor]
"""Computes k numbers per token of a batch, ``[k n]``."""


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
    shared: bool = False,
) -> list[list[Tensor]]:
    """Compute numbers of each response token, in batches of rows of similar length.

    Args:
        model: The model; it is set to evaluation mode.
        rows: Encoded comparisons.
        compute: Called with each batch on the model's device.
        precision: ``float32`` computes in the dtype of the weights, ``bfloat16`` under autocast.
        tokens_per_batch: Padded tokens per batch.
        progress: Called with the number of responses done.
        layout: Layout of the batches, by default the model's.
        collate: Makes a batch of rows, by default the model's.
        shared: Whether every process of a launch calls this with the same rows, and they share the batches. The results are those
            of one process, and all of them reach each process.

    Returns:
        For each row and response ``[k len]``, float32 on the CPU.
    """
    model.model.eval()
    results: list[list[Tensor]] = [[] for _ in rows]
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16")

    def queued(group: Sequence[int]) -> tuple[list[int], Tensor]:
        batch = (collate or model.collate)([rows[index] for index in group])
        sizes = torch.bincount(batch.tokens.response, minlength=batch.tokens.responses).tolist()
        with reading(model.model), autocast:
            return sizes, compute(_on_device(batch, model.device)).float()

    def read(made: tuple[list[int], Tensor]) -> list[Tensor]:
        sizes, values = made
        return [*values.cpu().split(sizes, dim=1)]

    groups = [*budgeted(rows, layout=layout or model.layout, tokens=tokens_per_batch)]
    # Reading waits for a GPU, so the next batch is queued before one is read.
    found = (
        split(groups, lambda group: read(queued(group))) if shared else map(read, _ahead(map(queued, groups)))
    )
    for group, values in zip(groups, found, strict=True):
        per_response = iter(values)
        for index in group:
            results[index] = [next(per_response) for _ in rows[index].responses]
            if progress is not None:
                progress(len(results[index]))
    return results


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each after the next one was made."""
    waiting: list[T] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


def _on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device, for a GPU from page-locked memory, so that the host need not wait."""
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)


def token_values(
    model: TokenModel,
    rows: Sequence[TokenRow],
    *,
    precision: str,
    tokens_per_batch: int,
    progress: Progress | None = None,
    shared: bool = False,
) -> list[list[Tensor]]:
    """Log-probability of each response token, or its reward if the model is a token reward model.

    Arguments are those of :func:`over_batches`. If the rows have segments, every token gets the mean over its segment.

    Returns:
        For each row and response ``[len]``, float32 on the CPU.

    Raises:
        UserError: A value is not finite; it names the row.
    """

    def compute(batch: Batch) -> Tensor:
        values, read = model.read(model.model, batch)
        values = values.float()
        segments = None if read.sizes is None else read.sizes.segments
        return (values if read.segment is None else spread_over_segments(values, read.segment, segments))[
            None
        ]

    settings: dict[str, Any] = {"precision": precision, "tokens_per_batch": tokens_per_batch}
    found = over_batches(model, rows, compute, progress=progress, shared=shared, **settings)
    values = [[response[0] for response in row] for row in found]
    for row, responses in zip(rows, values, strict=True):
        for number, response in enumerate(responses):
            if not bool(response.isfinite().all()):
                raise _not_finite(model, row, number, response)
    return values


def _not_finite(model: TokenModel, row: TokenRow, number: int, values: Tensor) -> UserError:
    place = int((~values.isfinite()).nonzero()[0])
    kind = "log-probability" if hasattr(model, "head_mlp") else "reward"
    key = keys_of(row.comparison)[number] if row.comparison.responses else row.comparison.key
    return UserError(
        f"{row.comparison.source}: {model.name} gives token {place + 1} of {len(values)} of response {number + 1} (key {key}) the {kind} "
        f"{float(values[place])}. A training that diverged leaves such a model: use an earlier one. If its weights are finite, a product "
        "overflows in its number type: use float32.",
        code="non-finite-values",
    )
