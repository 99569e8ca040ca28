"""Find out, on the model itself, what it does to its head's logits."""

from collections.abc import Iterator
from itertools import chain
from numbers import Real
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tokenward.models.forward import run_model
from tokenward.models.made_up import laid_out, made_up
from tokenward.ops.heads import LogitChange, LogitStep
from tokenward.ops.logprob import wide
from tokenward.tokens.batches import Batch
from tokenward.tokens.layouts import ModelInputs


class _Call(NamedTuple):
    """One call of a model.

    Attributes:
        hidden: What its head got.
        raw: What the head gave.
        logits: What the model made of it.
    """

    hidden: Tensor
    raw: Tensor
    logits: Tensor


def few_tokens(model: nn.Module, start_id: int | None) -> Batch:
    """A batch whose logits are soon made."""
    return laid_out(
        model, made_up(model)[1:], "separate" if start_id is None else "encoder_decoder", start_id
    )


@torch.no_grad()
def logit_change(model: nn.Module, start_id: int | None = None) -> LogitChange | None:
    """What a model does to its head's logits; None where it cannot be told exactly, so that it must make them all.

    The head is made to give numbers of every size, so that no small weights can hide a soft cap. What the model
    makes of them must be, bit for bit, what numbers of its config make of them.

    Args:
        model: The model.
        start_id: What its decoder begins with, where it has an encoder.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Module):
        return None
    inputs = few_tokens(model, start_id).inputs
    real = _call(model, head, inputs)
    # bfloat16 tells whether the logits are widened first; the model's own type tells numbers apart that it cannot.
    tried = [real and _call(model, head, inputs, given=_sizes(real.raw, dtype)) for dtype in _types(real)]
    calls = [real, *tried]
    if any(call is None or call.raw.shape != call.logits.shape for call in calls):
        return None
    known = cast(list[_Call], calls)
    read = inputs.input_ids if inputs.decoder_ids is None else inputs.decoder_ids
    if known[0].raw.shape[:-1] != read.shape:
        return None  # a part of the positions, or in another order
    if not torch.equal(head.forward(known[0].hidden), known[0].raw):
        return None  # a hook stands between
    return next((change for change in _changes(model) if _explains(change, known)), None)


def _types(real: _Call | None) -> tuple[torch.dtype, ...]:
    return () if real is None else tuple({torch.bfloat16: None, real.raw.dtype: None})


def _explains(change: LogitChange, calls: list[_Call]) -> bool:
    """Whether the change gives the model's logits to the bit; a few of them suffice to see that it does not."""
    few = (call._replace(raw=call.raw[:1, :1], logits=call.logits[:1, :1]) for call in calls[::-1])
    return all(torch.equal(wide(change(call.raw)), wide(call.logits)) for call in chain(few, calls))


def _call(
    model: nn.Module, head: nn.Module, inputs: ModelInputs, given: Tensor | None = None
) -> _Call | None:
    """One call, in which the head gives ``given``; None where the head is not called once."""
    calls: list[tuple[Tensor, Tensor]] = []

    def seen(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        calls.append((arguments[0], output if given is None else given))
        return calls[-1][1]

    handle = head.register_forward_hook(seen)
    try:
        logits = run_model(model, inputs).logits
    finally:
        handle.remove()
    return _Call(*calls[0], logits) if len(calls) == 1 else None


def _sizes(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers between 0.01 and 1000 of both signs, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    size = 10 ** torch.empty(like.shape).uniform_(-2, 3, generator=generator)
    sign = torch.empty(like.shape).uniform_(-1, 1, generator=generator).sign()
    return (size * sign).to(like.device, dtype)


def _changes(model: nn.Module) -> Iterator[LogitChange]:
    """Every change that numbers of the config can make, the simple ones first."""
    numbers = sorted({float(number) for number in _numbers(model.config.to_dict())})  # type: ignore[union-attr, operator]
    scales = [LogitStep(kind, number) for number in numbers for kind in ("times", "over")]
    caps = [LogitStep("cap", number) for number in numbers]
    yield LogitChange()
    for steps in chain(([step] for step in scales + caps), ([one, two] for one in scales for two in caps)):
        for widened in (False, True):
            yield LogitChange(tuple(steps), widened)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _numbers(item)
    elif isinstance(value, Real) and not isinstance(value, bool) and value not in (0, 1):
        yield float(value)
