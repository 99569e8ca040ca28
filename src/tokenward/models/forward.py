"""Per-token log-probabilities of a batch: the one path from a model to numbers."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from tokenward.models.head import KLReference, SelectiveHead, unpacked
from tokenward.ops.logprob import Direction, TokenStatistics, entropy_of, kl_of, logprobs_of, rank_of
from tokenward.tokens.batches import TokenBatch


@dataclass(frozen=True, slots=True)
class FrozenReference:
    """The model that a policy is compared with while it trains.

    Attributes:
        model: The module; it is called without gradient and in evaluation mode.
        head: Its head, None to make all logits.
        without_adapter: Whether ``model`` is the policy itself, whose adapter is left out.
    """

    model: nn.Module
    head: SelectiveHead | None
    without_adapter: bool = False

    def logits(self, rows: Tensor) -> Tensor:
        """Logits of its hidden states; where all logits are made, they are the states.  [n d] -> [n v]"""
        if self.head is None:
            return rows
        with self._frozen():
            return self.head.logits(rows)

    def read(self, batch: TokenBatch, *, layers: bool) -> tuple[Tensor, Tensor | None]:
        """What its head needs at the predicting position of each token with weight.  -> [m d], [m L d] or None

        Args:
            batch: The rows, on the model's device.
            layers: Whether the output of each layer is wanted too; the embedding is none.
        """
        positions = batch.predicted_from[batch.kept]
        with self._frozen():
            states, output = _states(self.model, self.head, batch, positions, output_hidden_states=layers)
        if not layers:
            return states, None
        hidden = output.hidden_states if batch.decoder_ids is None else output.decoder_hidden_states
        return states, torch.stack([item.flatten(0, 1)[positions] for item in hidden[1:]], 1)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        left_out = nullcontext()
        if self.without_adapter and isinstance(self.model, PeftModel):
            left_out = self.model.disable_adapter()
        try:
            with torch.no_grad(), left_out:
                yield
        finally:
            for module in training:  # some of its modules may have been in evaluation mode
                module.training = True


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSpec:
    """What is asked of a model beside the log-probabilities of tokens.

    Attributes:
        entropy: The entropy of the whole distribution.
        token_rank: How many tokens are more probable than each one.
        states: The last hidden state at the position that predicts the token.
        kl: The KL divergence over the whole vocabulary between the model and ``reference``, in this direction.
        reference_layers: The output of every layer of ``reference`` at that position.
        reference: The frozen model, where one of the two is wanted.
    """

    entropy: bool = False
    token_rank: bool = False
    states: bool = False
    kl: Direction | None = None
    reference_layers: bool = False
    reference: FrozenReference | None = None


class TokenReading(NamedTuple):
    """What one pass says of each response token; 0 where it has no weight, None where it was not asked for.

    Attributes:
        logp: ``[n]``, log-probability, nats, float32 or better as all of these but the layers.
        entropy: ``[n]``, nats.
        kl: ``[n]``, nats.
        token_rank: ``[n]``, 0 is the most probable; without gradient.
        states: ``[n d]``.
        reference_layers: ``[n L d]``, without gradient.
    """

    logp: Tensor
    entropy: Tensor | None = None
    kl: Tensor | None = None
    token_rank: Tensor | None = None
    states: Tensor | None = None
    reference_layers: Tensor | None = None


def token_logprobs(model: nn.Module, head: SelectiveHead | None, batch: TokenBatch) -> Tensor:
    """Log-probability of each response token whose weight is not zero; 0 elsewhere.  -> [n] float32

    See :func:`token_statistics`.
    """
    return token_statistics(model, head, batch).logp


def token_statistics(
    model: nn.Module, head: SelectiveHead | None, batch: TokenBatch, wanted: OutputSpec | None = None
) -> TokenReading:
    """Log-probability, and what else is wanted, of each response token whose weight is not zero.  -> [n]

    Args:
        model: The model, or a wrapper around it; its ``forward`` is called.
        head: The head of that model, None to make all logits.
        batch: The rows, on the model's device.
        wanted: What is wanted beside it.
    """
    wanted = OutputSpec() if wanted is None else wanted
    kl_reference, layers = _reference(wanted, batch)
    positions, ids = batch.predicted_from[batch.kept], batch.ids[batch.kept]
    if head is None:
        found, states = _of_all_logits(model, batch, positions, ids, wanted, kl_reference)
    else:
        asked = {"entropy": wanted.entropy, "rank": wanted.token_rank, "states": wanted.states}
        with head.answering(positions, ids, kl_reference=kl_reference, **asked):
            answer = run_model(model, batch).logits
        found, states = unpacked(answer, divergence=kl_reference is not None, **asked)
    read = (*found, states, layers)
    return TokenReading(*(None if item is None else _at_kept(item, batch) for item in read))  # type: ignore[arg-type]


def _reference(wanted: OutputSpec, batch: TokenBatch) -> tuple[KLReference | None, Tensor | None]:
    """What the frozen model says of the batch, as far as it is asked."""
    if wanted.kl is None and not wanted.reference_layers:
        return None, None
    reference = wanted.reference
    if reference is None:
        raise ValueError("a divergence or the layers of a reference are wanted, but there is no reference")
    states, layers = reference.read(batch, layers=wanted.reference_layers)
    if wanted.kl is None:
        return None, layers
    linear = None if reference.head is None else reference.head.linear
    return KLReference(states, linear, reference.logits, wanted.kl), layers


def _of_all_logits(
    model: nn.Module,
    batch: TokenBatch,
    positions: Tensor,
    ids: Tensor,
    wanted: OutputSpec,
    kl_reference: KLReference | None,
) -> tuple[TokenStatistics, Tensor | None]:
    """The same from whole rows of logits, and the last hidden states where they are wanted."""
    output = run_model(model, batch, output_hidden_states=wanted.states)
    logits = output.logits.reshape(-1, output.logits.shape[-1])[positions]
    states = None
    if wanted.states:
        hidden = output.hidden_states if batch.decoder_ids is None else output.decoder_hidden_states
        states = hidden[-1].flatten(0, 1)[positions]
    statistics = TokenStatistics(
        logprobs_of(logits, ids),
        entropy_of(logits) if wanted.entropy else None,
        None
        if kl_reference is None
        else kl_of(logits, kl_reference.logits(kl_reference.hidden), kl_reference.direction),
        rank_of(logits, ids) if wanted.token_rank else None,
    )
    return statistics, states


def _at_kept(values: Tensor, batch: TokenBatch) -> Tensor:
    return values.new_zeros(len(batch.ids), *values.shape[1:]).index_put((batch.kept,), values)


@torch.inference_mode()
def token_kl(
    model: nn.Module,
    head: SelectiveHead | None,
    reference: nn.Module,
    reference_head: SelectiveHead | None,
    batch: TokenBatch,
) -> Tensor:
    """KL(model || reference) over the whole vocabulary at each response token with weight.  -> [n] float32"""
    wanted = OutputSpec(kl="reverse", reference=FrozenReference(reference, reference_head))
    found = token_statistics(model, head, batch, wanted)
    assert found.kl is not None
    return found.kl


def _states(
    model: nn.Module, head: SelectiveHead | None, batch: TokenBatch, positions: Tensor, **asked: Any
) -> tuple[Tensor, Any]:
    """What the head needs at some positions, and the model's whole output."""
    if head is None:
        output = run_model(model, batch, **asked)
        return output.logits.reshape(-1, output.logits.shape[-1])[positions], output
    with head.answering(positions, None):
        output = run_model(model, batch, **asked)
    return output.logits, output


def run_model(model: nn.Module, batch: TokenBatch, *, output_hidden_states: bool = False) -> Any:
    """The model's own output for a batch: the one place where a batch meets a ``forward``."""
    # What is not needed is left out: a model with a forward of its own need not know it.
    asked: dict[str, Any] = {"output_hidden_states": True} if output_hidden_states else {}
    if batch.decoder_ids is not None:
        return model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            decoder_input_ids=batch.decoder_ids,
            use_cache=False,
            **asked,
        )
    if batch.tree is not None:
        # In rows of their own, a model counts positions as it learned to: some begin behind their pad.
        asked |= {"tree": batch.tree, "position_ids": batch.position_ids}
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        use_cache=False,
        **asked,
    )
