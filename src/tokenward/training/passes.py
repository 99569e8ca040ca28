"""Cuts the rows of an optimizer step into forward passes, and what is computed once over the whole step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from tokenward.errors import UserError
from tokenward.models.base import TokenModel, shares_weights
from tokenward.models.forward import FrozenReference
from tokenward.models.loading import LanguageModel
from tokenward.models.sharding import is_empty
from tokenward.objectives.base import DRAW, Losses, Objective, needs_of, parts_within, title_of
from tokenward.objectives.selected import Selected
from tokenward.selection import ScoredTokens
from tokenward.tokens.batches import NOTHING, Batch, budgeted, collate
from tokenward.tokens.rows import Layout, TokenRow

Prepare = Callable[[Sequence[TokenRow], int], Sequence[TokenRow]]
"""``f(rows, step) -> rows``: the rows of an optimizer step as they are trained on, same number and order."""


class Pass(NamedTuple):
    """Comparisons that go through the model together.

    Attributes:
        batch: The comparisons.
        sources: Source of each comparison (``file:line``), for errors.
        places: Index of each comparison in its device batch.
        counts: ``[b]`` bool, False for padding comparisons, which contribute nothing.
    """

    batch: Batch
    sources: Sequence[str]
    places: Sequence[int]
    counts: Tensor


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The comparisons of one device batch, cut into passes by length.

    Attributes:
        passes: Empty if the rows are still to be prepared.
        comparisons: Number of comparisons in all passes.
        rows: The comparisons, if they are to be prepared before they are cut.
        tokens: Number of tokens, each prompt counted once.
    """

    passes: tuple[Pass, ...]
    comparisons: int
    rows: tuple[TokenRow, ...] = ()
    tokens: int = 0

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "StepBatch":
        """The same passes on another device; accelerate calls it."""
        # A copy to a GPU need not wait, because what uses it is queued behind it. Accelerate does not ask for that.
        freely = non_blocking or torch.device(device).type not in ("cpu", "mps")
        moved = (
            item._replace(
                batch=item.batch.to(device, non_blocking=freely),
                counts=item.counts.to(device, non_blocking=freely),
            )
            for item in self.passes
        )
        return replace(self, passes=tuple(moved))

    def pin_memory(self) -> "StepBatch":
        """The same passes in page-locked memory; torch's data loader calls it if there is a GPU."""
        pinned = (
            item._replace(batch=item.batch.pin_memory(), counts=item.counts.pin_memory())
            for item in self.passes
        )
        return replace(self, passes=tuple(pinned))

    def counting(self, first: int, device: torch.device) -> list[Pass]:
        """The passes on a device, with only the first comparisons of the batch counted."""
        moved = self.to(device)
        if first >= self.comparisons:
            return [*moved.passes]
        counted = (torch.tensor([place < first for place in item.places]) for item in self.passes)
        return [
            item._replace(counts=counts.to(item.counts.device, non_blocking=True))
            for item, counts in zip(moved.passes, counted, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Turns rows into a :class:`StepBatch`; see :func:`tokenward.tokens.batches.collate`.

    Attributes:
        tokens_per_forward: Maximum padded tokens of a pass; a longer comparison gets a pass of its own.
        defer: Keep the rows uncut for the trainer to prepare. A data loader reads ahead, so anything that depends on
            the current weights must not be computed in it.
    """

    layout: Layout
    pad_id: int
    start_id: int | None = None
    whole: bool = True
    tokens_per_forward: int
    defer: bool = False

    def __call__(self, rows: Sequence[TokenRow]) -> StepBatch:
        """The batch of these rows."""
        return StepBatch((), len(rows), tuple(rows)) if self.defer else self.cut(rows)

    def cut(self, rows: Sequence[TokenRow]) -> StepBatch:
        """Cut rows into passes. This reorders the comparisons, which does not change the loss."""
        groups = budgeted(rows, layout=self.layout, tokens=self.tokens_per_forward)
        passes = tuple(self._pass([rows[index] for index in group], group) for group in groups)
        return StepBatch(passes, len(rows), tokens=sum(row.length for row in rows))

    def _pass(self, rows: Sequence[TokenRow], places: Sequence[int]) -> Pass:
        batch = collate(
            rows, layout=self.layout, pad_id=self.pad_id, start_id=self.start_id, whole=self.whole
        )
        sources = tuple(row.comparison.source for row in rows)
        return Pass(batch, sources, tuple(places), torch.ones(len(rows), dtype=torch.bool))


class StepDenominator:
    """Divides a step's gradient by the objective's own denominator once the last pass is done.

    The denominator may depend on the policy (if tokens are selected in the step), so it is known only after every pass.
    Until then losses are divided by the number of comparisons, as for other objectives. A gradient is linear in the
    loss, so one factor at the end, applied before clipping, gives the exact result. ``reduce`` sums a tensor over
    processes, so the factor is the same in each.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        self._reduce = reduce
        # Numbers, not tensors: a tensor would have to be copied to the device, for which the host waits.
        self._loss: Tensor | float = 0.0
        self._total: Tensor | float = 0.0

    def add(self, loss: Tensor, losses: Losses, counts: Tensor) -> None:
        """Add one pass: the scalar that went backward, its losses, and which comparisons count (``[b]`` bool)."""
        assert losses.denominator is not None
        self._loss = self._loss + loss.detach()
        self._total = self._total + (losses.denominator.detach() * counts).sum().to(loss)

    def close(self, comparisons: Tensor | int) -> tuple[Tensor, Tensor]:
        """By what to multiply the gradients of a finished step, and this process's share of the step's loss.

        ``comparisons`` are those of the step over all processes, by which the losses were divided.
        """
        total = self._reduce(torch.as_tensor(self._total))
        # If nothing counts, every gradient is 0 already.
        factor = torch.where(total > 0, comparisons / total, 0.0)
        share = self._loss * factor
        self._loss = self._total = 0.0
        return factor, share


def check_divisible(objective: Objective, *, optimizer: str) -> None:
    """Reject an objective with a step-wide denominator if the optimizer steps before gradients can be rescaled."""
    if needs_of(objective).own_denominator and "layerwise" in optimizer:
        raise UserError(
            f"{title_of(objective)} divides by a sum over the whole optimizer step, which is known only after its last pass, but "
            f"{optimizer} updates weights inside the backward pass. Use normaliser weights or length, or train without {optimizer}.",
            code="step-denominator",
        )


def frozen_reference(
    objective: Objective, model: TokenModel, reference: LanguageModel | None = None
) -> FrozenReference | None:
    """The frozen reference model that an objective compares with in each pass; None if it needs none.

    Without a given reference, a policy with an adapter is compared with its base: this is right for a new adapter only. A given
    reference is moved to the policy's device.

    Raises:
        UserError: the objective needs a reference model, but there is none, or it shares weights with the policy.
    """
    if not needs_of(objective).frozen_reference:
        return None
    if reference is not None:
        if shares_weights(model, reference):
            raise UserError(
                "the frozen reference shares weights with the model that trains, so both would always be the same. Pass another copy of "
                "the model before training as reference.",
                code="same-model",
            )
        if not is_empty(model.model):
            nn.Module.to(reference.model, model.device)
        reference.model.requires_grad_(False).eval()
        return FrozenReference(reference.model, reference.head)
    if isinstance(model, LanguageModel) and model.has_adapter:
        return FrozenReference(model.model, model.head, without_adapter=True)
    raise UserError(
        f"{title_of(objective)} compares with the reference model itself (its whole vocabulary or its layers), but there is "
        "none. Pass reference= to the trainer; in a recipe, use this objective for the oracle or the policy.",
        code="missing-reference-model",
    )


class StepDraw:
    """A random number per optimizer step, so that what an objective draws does not depend on how the step is cut."""

    def __init__(self, objective: Objective) -> None:
        self._needed = needs_of(objective).draws
        self._number: int | None = None

    def begin(self) -> None:
        """Start another step."""
        self._number = None

    def add_to(self, batch: Batch) -> Batch:
        """The batch with the step's number, if the objective needs it."""
        if not self._needed:
            return batch
        if self._number is None:  # from torch's global generator, whose state is in every checkpoint
            self._number = int(torch.randint(2**31, ()))
        return batch.with_value(DRAW, torch.full_like(batch.tokens.ids, self._number))


_Place = tuple[int, int, int]
"""Micro-batch, process and index in the device batch: an order that does not depend on the passes."""


class StepSelections:
    """Makes selections with scope ``batch`` over all comparisons of an optimizer step before any of them trains.

    So the update is the same however the step is cut into passes, micro-batches and processes. If scores read the
    policy, this costs an extra forward pass without gradient, unless the step is a single pass. ``precision`` opens the
    precision context of a forward pass; the step is shared by ``processes``, of which this is number ``process``.
    """

    def __init__(
        self,
        objective: Objective,
        model: TokenModel,
        precision: Callable[[], AbstractContextManager[object]],
        *,
        processes: int,
        process: int,
    ) -> None:
        self._parts = [
            part for part in parts_within(objective) if isinstance(part, Selected) and part.over_step
        ]
        self._model, self._precision = model, precision
        self._processes, self._process = processes, process
        self._needs = reduce(or_, [part.scorer_needs for part in self._parts], NOTHING)

    def __bool__(self) -> bool:
        return bool(self._parts)

    def __call__(self, module: nn.Module, step: Sequence[Sequence[Pass]]) -> list[list[Pass]]:
        """The passes of each micro-batch (as many in every process) with the weights that the selections give."""
        whole = [list(passes) for passes in step]
        # A single pass is the whole step: the objective then selects by itself, at no extra cost.
        if not self._parts or (self._processes == 1 and sum(map(len, whole)) <= 1):
            return whole
        training = module.training
        module.eval()  # dropout noise of this pass must not decide what another pass trains on
        scored = [
            self._scored(module, number, item) for number, passes in enumerate(whole) for item in passes
        ]
        module.train(training)
        for index, part in enumerate(self._parts):
            own = {place: tokens for found in scored for place, tokens in found[index].items()}
            weights = self._weights(part, own)
            whole = [
                [self._weighted(part, number, item, weights) for item in passes]
                for number, passes in enumerate(whole)
            ]
        return whole

    @torch.no_grad()
    def _scored(self, module: nn.Module, number: int, item: Pass) -> list[dict[_Place, ScoredTokens]]:
        """For each selection, the scored tokens of each comparison that counts, on the CPU."""
        logp, tokens = torch.zeros_like(item.batch.tokens.weights), item.batch.tokens
        if any(part.scorer is not None for part in self._parts):
            with self._precision():
                logp, tokens = self._model.read(module, item.batch, self._needs)
        counts = item.counts.tolist()
        return [
            {
                (number, self._process, place): scored
                for place, counted, scored in zip(item.places, counts, comparisons, strict=True)
                if counted
            }
            for comparisons in (_split(part.scored(logp, tokens)) for part in self._parts)
        ]

    def _weights(self, part: Selected, own: dict[_Place, ScoredTokens]) -> dict[_Place, Tensor]:
        """The token weights of each comparison, selected among those of all processes."""
        everyone = dict(gather_object([*own.items()])) if self._processes > 1 else own
        if not everyone:
            return {}
        places = sorted(everyone)
        tokens = _concatenated([everyone[place] for place in places])
        if bool(tokens.scores.isnan().all()):
            raise part.no_scores_error()
        sizes = [len(everyone[place].scores) for place in places]
        return dict(zip(places, part.weights_of(tokens).split(sizes), strict=True))

    def _weighted(self, part: Selected, number: int, item: Pass, weights: dict[_Place, Tensor]) -> Pass:
        tokens = item.batch.tokens
        sizes = torch.bincount(tokens.comparison[tokens.response], minlength=tokens.comparisons).tolist()
        found = [
            weights[number, self._process, place] if counted else torch.zeros(size)
            for place, counted, size in zip(item.places, item.counts.tolist(), sizes, strict=True)
        ]
        column = torch.cat(found).to(tokens.weights)
        return item._replace(batch=item.batch.with_value(part.column, column))


def _split(tokens: ScoredTokens) -> Iterator[ScoredTokens]:
    """The tokens of each comparison on their own, on the CPU, with responses counted from 0."""
    tokens = tokens._replace(
        **{name: part.cpu() for name, part in tokens._asdict().items() if part is not None}
    )
    owner = tokens.comparison[tokens.response]
    responses = torch.bincount(tokens.comparison).tolist()
    sizes = torch.bincount(owner, minlength=len(responses)).tolist()
    per_token = (part.split(sizes) for part in (tokens.scores, tokens.response, tokens.eos))
    per_response = (part.split(responses) for part in (tokens.rank, tokens.seeds))
    joints = [None] * len(sizes) if tokens.joint is None else tokens.joint.split(sizes)
    before = 0
    for scores, response, eos, rank, seeds, joint in zip(*per_token, *per_response, joints, strict=True):
        own = ScoredTokens(scores, response - before, torch.zeros_like(rank), rank, eos, seeds)
        yield own._replace(joint=joint)
        before += len(rank)


def _concatenated(parts: Sequence[ScoredTokens]) -> ScoredTokens:
    counts = torch.tensor([len(part.rank) for part in parts])
    before = (counts.cumsum(0) - counts).tolist()
    joint = [part.joint for part in parts if part.joint is not None]
    return ScoredTokens(
        scores=torch.cat([part.scores for part in parts]),
        response=torch.cat([part.response + first for part, first in zip(parts, before, strict=True)]),
        comparison=torch.repeat_interleave(torch.arange(len(parts)), counts),
        rank=torch.cat([part.rank for part in parts]),
        eos=torch.cat([part.eos for part in parts]),
        seeds=torch.cat([part.seeds for part in parts]),
        joint=torch.cat(joint) if joint else None,
    )
