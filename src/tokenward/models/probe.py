"""Tests a loaded model on small made-up rows, to find which fast paths give exactly its own numbers."""

import logging
from collections.abc import Hashable, Iterator
from itertools import chain
from numbers import Real
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenward.errors import UserError
from tokenward.models.attention import install_tree_attention
from tokenward.models.forward import run_model
from tokenward.models.head import SelectiveHead, install_head
from tokenward.models.identity import steady_note
from tokenward.models.internals import Readings, apart, in_float32, is_half, moved, readings
from tokenward.models.made_up import Trial, future_trial, laid_out, made_up, trial
from tokenward.ops.logprob import LogitChange, LogitStep, wide
from tokenward.tokens.batches import Batch
from tokenward.tokens.layouts import ModelInputs
from tokenward.tokens.rows import Layout


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


logger = logging.getLogger(__name__)

ROUNDING = 1e-3
"""Share of its largest number by which a part of the model may differ between two ways to lay the same rows out.

The ways sum in another order. Both are computed in float32 or better, whatever the weights are: its rounding is 6e-8,
and through the layers of a model it grows to 1e-6 to 1e-5. Another mask, position or state changes the first
part that reads it by percents. Compared is each part of each layer, where nothing is small against the rest yet.
"""

# Whatever a model's own mask code raises on a mask it does not know.
UNTAKEN = (RuntimeError, ValueError, TypeError, IndexError, KeyError)
WINDOW_SETTINGS = (
    "sliding_window",
    "attention_chunk_size",
    "sliding_window_size",
    "local_attention",
    "attention_window_size",
)
"""What keeps a layer from seeing everything before it once a row is longer; the made-up rows may be shorter."""
SPARSE_SETTINGS = ("index_topk", "index_topk_blocks", "keep_window_size")
"""The same, of layers that choose what they see."""

Packing = Literal["auto", "shared_prompts", "none"]


class Verdict(NamedTuple):
    """What the probe found out about a model.

    Attributes:
        layout: Its rows.
        head: Answers for chosen tokens, or None.
    """

    layout: Layout
    head: SelectiveHead | None


_known: dict[Hashable, tuple[Layout, LogitChange | None]] = {}
"""Verdicts of this process: a run loads the same weights many times, and the probe takes seconds."""


def probe(
    model: PreTrainedModel, *, key: Hashable, packing: Packing, name: str, start_id: int | None = None
) -> Verdict:
    """Rows and head of a language model; asked once for the same weights, held in the same way.

    Args:
        model: The model.
        key: Names its weights, their number type, device and attention.
        packing: As :func:`choose_layout`.
        name: As the user wrote it.
        start_id: What its decoder begins with, where it has an encoder.
    """
    key = (key, packing)
    if key in _known:
        layout, change = _known[key]
        if layout == "shared":
            install_tree_attention(model)
        return Verdict(layout, None if change is None else install_head(model, change))
    layout = choose_layout(model, packing=packing, name=name, start_id=start_id)
    head = choose_head(model, name=name, start_id=start_id)
    _known[key] = layout, None if head is None else head.change
    return Verdict(layout, head)


def choose_head(model: PreTrainedModel, *, name: str, start_id: int | None = None) -> SelectiveHead | None:
    """The head that answers for chosen tokens; None where it is not known exactly what the model does to its logits.

    Args:
        model: The model.
        name: As the user wrote it.
        start_id: What its decoder begins with, where it has an encoder.
    """
    change = logit_change(model, start_id)
    head = None if change is None else install_head(model, change)
    if head is None or not answers(model, head, start_id):
        _say(
            name,
            "makes all logits at every token: what it does to its head's output is nothing that is known",
        )
        return None
    return head


@torch.no_grad()
def answers(model: PreTrainedModel, head: SelectiveHead, start_id: int | None) -> bool:
    """Whether the model's forward hands on what the head answers; some look at its shape.

    Args:
        model: The model.
        head: Its head.
        start_id: What its decoder begins with, where it has an encoder.
    """
    batch = few_tokens(model, start_id)
    try:
        with head.answering(batch.inputs.predicted_from, batch.tokens.ids):
            return run_model(model, batch.inputs).logits.shape == batch.tokens.ids.shape
    except UNTAKEN:
        return False


def choose_layout(
    model: PreTrainedModel, *, packing: Packing, name: str, start_id: int | None = None
) -> Layout:
    """Rows in which a language model gives each response the numbers that it gives it alone.

    Raises:
        UserError: ``packing`` insists on shared rows and they are not exact, or the model is not causal, or it gives a
            response other numbers beside a longer one.
    """
    if start_id is not None:
        if packing == "shared_prompts":
            raise UserError(
                f"model.packing is shared_prompts, but {name} has an encoder, which reads each prompt apart. Write model.packing: auto."
            )
        return "encoder_decoder"
    return _layout(model, packing=packing, name=name, causal=True)


def reward_layout(backbone: PreTrainedModel, *, packing: Packing, name: str) -> Layout:
    """As :func:`choose_layout`, for a model without a language model head, which may see what comes later."""
    if backbone.config.is_encoder_decoder:
        return "encoder_decoder"
    return _layout(backbone, packing=packing, name=name, causal=False)


def _layout(model: PreTrainedModel, *, packing: Packing, name: str, causal: bool) -> Layout:
    steady = steady_note(model.config)
    if steady is not None:
        _say(name, steady)
    alone = _alone(model)
    if alone is not None:
        _check(model, alone, name, causal=causal)
    if packing == "none":
        return "separate"
    reason = _why_not_shared(model, alone)
    if reason is None:
        return "shared"
    if packing == "shared_prompts":
        raise UserError(
            f"model.packing is shared_prompts, but {name} gives other numbers in shared rows than in separate ones: {reason}. "
            "Write model.packing: auto."
        )
    _say(name, f"computes each response in a row of its own: {reason}")
    return "separate"


def _check(model: PreTrainedModel, alone: Readings, name: str, *, causal: bool) -> None:
    part = _differs(model, future_trial(model)) if causal else None
    if part is not None:
        raise UserError(
            f"{name} is no causal language model: in {part} a token changes what stands before it, so it sees the tokens "
            "that it shall predict. Name a causal model; write is_decoder: true (xlm: causal: true) in its config.json "
            "if it has such a setting."
        )
    _check_padding(model, alone, name)


def _check_padding(model: PreTrainedModel, alone: Readings, name: str) -> None:
    inputs = laid_out(model, made_up(model), "separate").inputs
    with torch.no_grad(), in_float32(model):
        found = apart(_at(_read(model, inputs), inputs.placed_at), alone)
    if not found.by <= ROUNDING:
        raise UserError(
            f"{name} gives a response other numbers in a batch with a longer one than alone ({found.part} differs by "
            f"{found.by:.2g} of its size), so what it learns would depend on the batch. Write model.attention: eager, "
            "and if that is refused too, name another model."
        )


def _why_not_shared(model: PreTrainedModel, alone: Readings | None) -> str | None:
    """Why packed rows are not exact, or None; the model keeps the attention that they need only if they are."""
    windows = _windows(model)
    if windows:
        return f"it has a window ({windows})"
    if alone is None:
        return "it cannot be computed in float32, in which rows are compared"
    before = model.config._attn_implementation
    install_tree_attention(model)
    try:
        reason = _packed_differs(model, alone)
    except UNTAKEN as error:
        reason = (
            f"it does not take packed ones ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
        )
    if reason is not None and before is not None and model.config._attn_implementation != before:
        model.set_attn_implementation(before)
    return reason


def _packed_differs(model: PreTrainedModel, alone: Readings) -> str | None:
    given = trial(model)
    part = _differs(model, given)
    if part is not None:
        return f"in {part} a response sees another one"
    with torch.no_grad(), in_float32(model):
        found = apart(_at(_read(model, given.inputs), given.inputs.placed_at), alone)
    if not found.by <= ROUNDING:
        return f"{found.part} differs by {found.by:.2g} of its size from rows of their own"
    return None


def _differs(model: PreTrainedModel, given: Trial) -> str | None:
    """The part in which foreign tokens change the kept places, or None.

    The outputs must stay to the bit: in float32, where no influence is rounded away, and as the model is, which may
    have other kernels. Only auxiliary models move them without an influence, for they are given the tokens of a batch together,
    so that products are summed in another order. There the gradient decides, which is exactly zero where nothing is
    seen; and a choice that has no gradient is no matter of rounding.
    """
    kept = given.kept.flatten()
    with torch.no_grad():
        with in_float32(model):
            wide = [_at(_read(model, inputs), kept) for inputs in (given.inputs, given.other)]
        part, by = moved(*wide), apart(*wide)
        if part is None and is_half(model):
            part = moved(*(_at(_read(model, inputs), kept) for inputs in (given.inputs, given.other)))
    if part is not None and by.by <= ROUNDING and not _reaches(model, given):
        return None
    return part


def _reaches(model: PreTrainedModel, given: Trial) -> bool:
    """Whether the gradient of the kept places' output with respect to foreign tokens' embeddings is not exactly zero."""
    embedded: list[Tensor] = []

    def leaf(module: Any, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].view_as(output)

    handle = model.get_input_embeddings().register_forward_hook(leaf)
    try:
        output = _main(run_model(model, given.inputs))
    finally:
        handle.remove()
    kept = given.kept.to(output.device)
    coefficients = torch.arange(output[kept].numel(), device=output.device).cos().view_as(output[kept])
    (gradient,) = torch.autograd.grad((output[kept].float() * coefficients).sum(), embedded[:1])
    return bool((gradient[~kept] != 0).any())


@torch.no_grad()
def _alone(model: PreTrainedModel) -> Readings | None:
    """Each response with its prompt in a call of its own, as transformers is called: ids and nothing else.

    None where the model cannot be computed in float32.
    """
    device = next(model.parameters()).device
    pieces: list[Readings] = []
    try:
        with in_float32(model):
            for encoded in (row for row in made_up(model)):
                for response in encoded.responses:
                    ids = torch.tensor([[*encoded.prompt, *response]], device=device)
                    pieces.append(_at(_read_ids(model, ids), slice(len(encoded.prompt), None)))
    except UNTAKEN:
        return None
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _read_ids(model: PreTrainedModel, ids: Tensor) -> Readings:
    return readings(model, lambda: _main(model(input_ids=ids, use_cache=False)), (1, ids.shape[1]))


def _read(model: PreTrainedModel, inputs: ModelInputs) -> Readings:
    shape = (inputs.input_ids.shape[0], inputs.input_ids.shape[1])
    return readings(model, lambda: _main(run_model(model, inputs)), shape)


def _main(output: Any) -> Tensor:
    return output.logits if "logits" in output else output.last_hidden_state


def _at(read: Readings, places: Tensor | slice) -> Readings:
    return {name: values[places] for name, values in read.items()}


def _windows(model: PreTrainedModel) -> str:
    config = model.config.get_text_config()
    # Qwen keeps a window in its config that it does not use unless told to.
    unused = getattr(config, "use_sliding_window", True) is False
    full = set(getattr(config, "layer_types", None) or ()) == {"full_attention"}
    names = SPARSE_SETTINGS if unused or full else WINDOW_SETTINGS + SPARSE_SETTINGS
    found = {name: getattr(config, name, None) for name in names}
    return ", ".join(f"{name}: {value}" for name, value in found.items() if value)


_said = set[tuple[str, str]]()


def _say(name: str, what: str) -> None:
    """Once for a model: each stage of a run loads it again."""
    if (name, what) not in _said:
        _said.add((name, what))
        logger.warning("%s %s", name, what)
