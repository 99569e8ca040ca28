"""From rows to the passes of one optimizer step, the selections over all of them, and the denominator."""

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
from tokenward.models.base import TokenModel
from tokenward.models.forward import FrozenReference
from tokenward.models.loading import LanguageModel
from tokenward.objectives.base import DRAW, Losses, Objective, needs_of, parts_within, title_of
from tokenward.objectives.selected import Selected
from tokenward.selection import ScoredTokens
from tokenward.tokens.batches import NOTHING, Batch, budgeted, collate
from tokenward.tokens.rows import Layout, TokenRow


class StepDenominator:
    """Divides a step's gradient by what its comparisons add to the denominator, once its last pass is done.

    That may depend on the policy as it is in the step, where tokens are selected by it, so it is known only when every
    pass has been made. Until then losses are divided by the number of comparisons, as those of other objectives are; a
    gradient is linear in the loss, so one factor at the end, before clipping, gives the exact one. The factor is the
    same in every process.

    Args:
        reduce: Sums of this process to those of all.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        self._reduce = reduce
        self._loss = self._total = torch.zeros(())

    def add(self, loss: Tensor, losses: Losses, counts: Tensor) -> None:
        """One pass.

        Args:
            loss: What went backward.
            losses: Of its comparisons.
            counts: ``[b]`` bool, which of them count.
        """
        assert losses.denominator is not None
        self._loss = self._loss.to(loss) + loss.detach()
        self._total = self._total.to(loss) + (losses.denominator.detach() * counts).sum()

    def close(self, model: nn.Module, comparisons: Tensor | int) -> Tensor:
        """Rescale the gradients of a whole step; returns its loss, as this process adds to it.

        Args:
            model: The trained one.
            comparisons: Of the step, over all processes, which the losses were divided by.
        """
        total = self._reduce(self._total)
        # Where nothing counts, nothing has a gradient either.
        factor = torch.where(total > 0, comparisons / total, 0.0)
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad.mul_(factor.to(weight.grad.device))
        share = self._loss * factor
        self._loss = self._total = torch.zeros(())
        return share


def check_divisible(objective: Objective, *, deepspeed: bool, optimizer: str) -> None:
    """Refuse such a denominator where the optimizer steps before the last gradient can be rescaled.

    Raises:
        UserError: the objective has one, and the optimizer steps inside the backward pass.
    """
    where = "DeepSpeed" if deepspeed else optimizer if "layerwise" in optimizer else ""
    if needs_of(objective).own_denominator and where:
        raise UserError(
            f"{title_of(objective)} divides by a sum over the whole optimizer step, which is known after its last pass, and "
            f"{where} steps inside the backward pass. Write normaliser: weights or length, or train without {where} (FSDP "
            "shards as well)."
        )


Prepare = Callable[[Sequence[TokenRow], int], Sequence[TokenRow]]
"""``f(rows, step) -> rows``: all rows of an optimizer step as they train, as many and in their order."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The comparisons of one device batch, cut into passes by length.

    Attributes:
        passes: Batches that go through the model one after another.
        places: Per pass, where each comparison stood in the device batch.
        sources: Per pass, where each comparison came from.
        comparisons: How many there are in all passes.
        rows: The comparisons themselves, where they are to be prepared before they are cut into passes.
        tokens: Of all comparisons, each prompt once.
    """

    passes: tuple[Batch, ...]
    places: tuple[tuple[int, ...], ...]
    sources: tuple[tuple[str, ...], ...]
    comparisons: int
    rows: tuple[TokenRow, ...] = ()
    tokens: int = 0

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "StepBatch":
        """The same passes on another device."""
        moved = tuple(item.to(device, non_blocking=non_blocking) for item in self.passes)
        return replace(self, passes=moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Makes a :class:`StepBatch` of rows.

    Attributes:
        layout: Of the rows.
        pad_id: Fills rows.
        start_id: What a decoder begins with, where the model has an encoder.
        whole: See :func:`tokenward.tokens.rows.collate`.
        tokens_per_forward: Padded tokens of a pass at most, unless one comparison alone is longer.
        defer: Leave the rows whole, for the trainer to prepare and cut when their turn comes: a loader reads
            ahead, and what depends on the weights must not be made before the step.
    """

    layout: Layout
    pad_id: int
    start_id: int | None = None
    whole: bool = True
    tokens_per_forward: int
    defer: bool = False

    def __call__(self, rows: Sequence[TokenRow]) -> StepBatch:
        """Rows as a step's batch."""
        if self.defer:
            return StepBatch((), (), (), len(rows), tuple(rows))
        return self.cut(rows)

    def cut(self, rows: Sequence[TokenRow]) -> StepBatch:
        """Cut rows into passes; the order of the comparisons inside changes, the loss does not."""
        groups = list(budgeted(rows, layout=self.layout, tokens=self.tokens_per_forward))
        passes = tuple(
            collate(
                [rows[index] for index in group],
                layout=self.layout,
                pad_id=self.pad_id,
                start_id=self.start_id,
                whole=self.whole,
            )
            for group in groups
        )
        sources = tuple(tuple(rows[index].comparison.source for index in group) for group in groups)
        tokens = sum(row.length for row in rows)
        return StepBatch(passes, tuple(map(tuple, groups)), sources, len(rows), tokens=tokens)


class Pass(NamedTuple):
    """Comparisons that go through the model together.

    Attributes:
        batch: The comparisons.
        sources: Where they came from.
        counts: ``[b]`` bool, which of them count.
        places: Where they stood in the device batch.
    """

    batch: Batch
    sources: Sequence[str]
    counts: Tensor
    places: Sequence[int]


def passes_of(batch: StepBatch, own: int, device: torch.device) -> list[Pass]:
    """The passes of a device batch, of which so many of the first comparisons count."""
    batch = batch.to(device)
    return [
        Pass(item, sources, torch.tensor([place < own for place in places], device=device), places)
        for item, sources, places in zip(batch.passes, batch.sources, batch.places, strict=True)
    ]


def frozen_reference(
    objective: Objective, model: TokenModel, reference: LanguageModel | None = None
) -> FrozenReference | None:
    """The frozen model that an objective compares with in each pass of the policy; None where it needs none.

    Args:
        objective: Who needs it.
        model: The policy. Where it has an adapter, it is its own reference without it.
        reference: The frozen model otherwise; its weights are set to need no gradient.

    Raises:
        UserError: the objective needs the reference model, and there is none.
    """
    if not needs_of(objective).frozen_reference:
        return None
    if reference is not None:
        nn.Module.to(reference.model, model.device)
        reference.model.requires_grad_(False).eval()
        return FrozenReference(reference.model, reference.head)
    if isinstance(model, LanguageModel) and model.has_adapter:
        return FrozenReference(model.model, model.head, without_adapter=True)
    raise UserError(
        f"{title_of(objective)} compares with the reference model itself, over the whole vocabulary or its layers, and "
        "there is none beside this model. Use it in the oracle or policy table, or pass TokenTrainer(reference=...)."
    )


class StepDraw:
    """One number for each optimizer step, by which an objective draws the same however the step is cut.

    Args:
        objective: It has one where it needs it; see :attr:`tokenward.tokens.batches.Needs.draws`.
    """

    def __init__(self, objective: Objective) -> None:
        self._wanted = needs_of(objective).draws
        self._number: int | None = None

    def begin(self) -> None:
        """Another step begins."""
        self._number = None

    def on(self, batch: Batch) -> Batch:
        """A batch of the step, with the number where it is wanted."""
        if not self._wanted:
            return batch
        if self._number is None:  # by torch's generator, which a checkpoint has
            self._number = int(torch.randint(2**31, ()))
        return batch.with_value(DRAW, torch.full_like(batch.tokens.ids, self._number))


class _Place(NamedTuple):
    """Where a comparison stands in the step; in this order whatever the passes are."""

    micro_batch: int
    process: int
    place: int


class _Scored(NamedTuple):
    """A comparison of the step with its scores, on the CPU; one of one comparison is what a selector is given."""

    place: _Place
    tokens: ScoredTokens


class StepSelections:
    """Selections of scope ``batch``, made over all comparisons of an optimizer step before any of them trains.

    So the update is the same however the step is cut into passes, micro-batches and processes. What scores read of the
    policy costs a pass without gradient, unless the step is a single pass.

    Args:
        objective: Whose selections these are; a selection inside another objective is one of its ``parts``.
        model: The policy.
        precision: Opens what a pass of the policy is computed in.
        processes: How many share the step.
        process: Which of them this is.
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
        """The passes of a step with the weights that its selections give their tokens.

        Args:
            module: What is called: the policy, or a wrapper around it.
            step: The passes of each micro-batch, as many in every process.
        """
        whole = [list(passes) for passes in step]
        if not self._parts or (self._processes == 1 and sum(map(len, whole)) <= 1):
            return whole
        training = module.training
        module.eval()  # without dropout: the noise of one pass must not decide what another one trains on
        scored = [self._scored(module, number, passes) for number, passes in enumerate(whole)]
        module.train(training)
        for place, part in enumerate(self._parts):
            weights = self._weights(part, [item for micro in scored for item in micro[place]])
            whole = [
                [self._weighted(part, number, item, weights) for item in passes]
                for number, passes in enumerate(whole)
            ]
        return whole

    @torch.no_grad()
    def _scored(self, module: nn.Module, number: int, passes: Sequence[Pass]) -> list[list[_Scored]]:
        """Of each selection, the comparisons of a micro-batch that count."""
        found: list[list[_Scored]] = [[] for _ in self._parts]
        for item in passes:
            logp, tokens = torch.zeros_like(item.batch.tokens.weights), item.batch.tokens
            if any(part.scorer is not None for part in self._parts):
                with self._precision():
                    logp, tokens = self._model.read(module, item.batch, self._needs)
            for place, part in enumerate(self._parts):
                parts = _apart(part.scored(logp, tokens))
                for where, counts, scored in zip(item.places, item.counts.tolist(), parts, strict=True):
                    if counts:
                        found[place].append(_Scored(_Place(number, self._process, where), scored))
        return found

    def _weights(self, part: Selected, own: list[_Scored]) -> dict[_Place, Tensor]:
        """What the selector gives the tokens of each comparison, among those of all processes."""
        everyone: list[_Scored] = gather_object(own) if self._processes > 1 else own
        if not everyone:
            return {}
        ordered = sorted(everyone, key=lambda item: item.place)
        tokens = _joined([item.tokens for item in ordered])
        if bool(tokens.scores.isnan().all()):
            raise part.no_scores_error()
        weights = part.weights_of(tokens)
        sizes = [len(item.tokens.scores) for item in ordered]
        return {item.place: found for item, found in zip(ordered, weights.split(sizes), strict=True)}

    def _weighted(self, part: Selected, number: int, item: Pass, weights: dict[_Place, Tensor]) -> Pass:
        tokens = item.batch.tokens
        sizes = torch.bincount(tokens.comparison[tokens.response], minlength=tokens.comparisons).tolist()
        nothing = (torch.zeros(size) for size in sizes)
        counts = item.counts.tolist()
        found = [
            weights[_Place(number, self._process, place)] if counted else none
            for place, counted, none in zip(item.places, counts, nothing, strict=True)
        ]
        column = torch.cat(found).to(tokens.weights)
        return item._replace(batch=item.batch.with_value(part.column, column))


def _apart(tokens: ScoredTokens) -> Iterator[ScoredTokens]:
    """Each comparison's tokens by themselves, on the CPU, their responses counted from 0."""
    tokens = tokens._replace(
        **{name: part.cpu() for name, part in tokens._asdict().items() if part is not None}
    )
    owner = tokens.comparison[tokens.response]
    responses = torch.bincount(tokens.comparison).tolist()
    sizes = torch.bincount(owner, minlength=len(responses)).tolist()
    per_token = zip(
        *(part.split(sizes) for part in (tokens.scores, tokens.response, tokens.eos)), strict=True
    )
    per_response = zip(*(part.split(responses) for part in (tokens.rank, tokens.seeds)), strict=True)
    before = 0
    for (scores, response, eos), (rank, seeds) in zip(per_token, per_response, strict=True):
        yield ScoredTokens(scores, response - before, torch.zeros_like(rank), rank, eos, seeds)
        before += len(rank)


def _joined(parts: Sequence[ScoredTokens]) -> ScoredTokens:
    """Tokens of comparisons laid end to end."""
    counts = torch.tensor([len(part.rank) for part in parts])
    before = (counts.cumsum(0) - counts).tolist()
    return ScoredTokens(
        scores=torch.cat([part.scores for part in parts]),
        response=torch.cat([part.response + first for part, first in zip(parts, before, strict=True)]),
        comparison=torch.repeat_interleave(torch.arange(len(parts)), counts),
        rank=torch.cat([part.rank for part in parts]),
        eos=torch.cat([part.eos for part in parts]),
        seeds=torch.cat([part.seeds for part in parts]),
    )
