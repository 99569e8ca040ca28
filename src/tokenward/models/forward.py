"""Per-token log-probabilities of a batch: the one path from a model to numbers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from tokenward.models.head import KLReference, SelectiveHead, unpacked
from tokenward.ops.logprob import Chunk, by_name, statistics_of
from tokenward.tokens.batches import NOTHING, Batch, Needs, TokenBatch
from tokenward.tokens.layouts import ModelInputs


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

    def read(self, batch: Batch, *, layers: bool) -> tuple[Tensor, Tensor | None]:
        """What its head needs at the predicting position of each token with weight.  -> [m d], [m L d] or None

        Args:
            batch: The rows, on the model's device.
            layers: Whether the output of each layer is wanted too; the embedding is none.
        """
        positions = batch.inputs.predicted_from[batch.tokens.kept]
        with self._frozen():
            states, output = _states(
                self.model, self.head, batch.inputs, positions, output_hidden_states=layers
            )
        if not layers:
            return states, None
        hidden = _hidden_states(output, batch.inputs)
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


def token_logprobs(model: nn.Module, head: SelectiveHead | None, batch: Batch) -> Tensor:
    """Log-probability of each response token whose weight is not zero; 0 elsewhere.  -> [n] float32

    See :func:`token_statistics`.
    """
    return token_statistics(model, head, batch)["logp"]


def token_statistics(
    model: nn.Module,
    head: SelectiveHead | None,
    batch: Batch,
    needs: Needs = NOTHING,
    reference: FrozenReference | None = None,
) -> dict[str, Tensor]:
    """``logp`` and the needed statistics of each response token, 0 where it has no weight.  -> [n], or [n ...], each

    In nats and float32 or better, but for the states. ``states [n d]`` are those at the position that predicts the token;
    ``reference_layers [n L d]`` are the output of every layer of the reference there.

    Args:
        model: The model, or a wrapper around it; its ``forward`` is called.
        head: The head of that model, None to make all logits.
        batch: The rows, on the model's device.
        needs: Which statistics.
        reference: The frozen model, needed for ``kl`` and ``reference_layers``.
    """
    kl_reference, layers = _reference(needs, reference, batch)
    positions, ids = batch.inputs.predicted_from[batch.tokens.kept], batch.tokens.ids[batch.tokens.kept]
    names = needs.of_head
    if head is None:
        found, states = _of_all_logits(model, batch.inputs, positions, ids, needs, kl_reference)
    else:
        with head.answering(positions, ids, names, kl_reference=kl_reference, states=needs.states):
            answer = run_model(model, batch.inputs).logits
        found, states = unpacked(answer, names, states=needs.states)
    read = {**found, "states": states, "reference_layers": layers}
    return {name: _at_kept(item, batch.tokens) for name, item in read.items() if item is not None}


def _reference(
    needs: Needs, reference: FrozenReference | None, batch: Batch
) -> tuple[KLReference | None, Tensor | None]:
    """What the frozen model says of the batch, as far as it is asked."""
    if not needs.frozen_reference:
        return None, None
    if reference is None:
        raise ValueError("a divergence or the layers of a reference are wanted, but there is no reference")
    states, layers = reference.read(batch, layers=needs.reference_layers)
    if needs.kl is None:
        return None, layers
    linear = None if reference.head is None else reference.head.linear
    return KLReference(states, linear, reference.logits, needs.kl), layers


def _of_all_logits(
    model: nn.Module,
    inputs: ModelInputs,
    positions: Tensor,
    ids: Tensor,
    needs: Needs,
    kl_reference: KLReference | None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The same from whole rows of logits, and the last hidden states where they are needed."""
    output = run_model(model, inputs, output_hidden_states=needs.states)
    logits = output.logits.reshape(-1, output.logits.shape[-1])[positions]
    states = _hidden_states(output, inputs)[-1].flatten(0, 1)[positions] if needs.states else None
    chunk = Chunk(logits, ids)
    if kl_reference is not None:
        chunk = Chunk(logits, ids, kl_reference.logits(kl_reference.hidden), kl_reference.direction)
    return by_name(statistics_of(chunk, needs.of_head), needs.of_head), states


def _hidden_states(output: Any, inputs: ModelInputs) -> Sequence[Tensor]:
    return output.hidden_states if inputs.decoder_ids is None else output.decoder_hidden_states


def _at_kept(values: Tensor, batch: TokenBatch) -> Tensor:
    return values.new_zeros(len(batch.ids), *values.shape[1:]).index_put((batch.kept,), values)


@torch.inference_mode()
def token_kl(
    model: nn.Module,
    head: SelectiveHead | None,
    reference: nn.Module,
    reference_head: SelectiveHead | None,
    batch: Batch,
) -> Tensor:
    """KL(model || reference) over the whole vocabulary at each response token with weight.  -> [n] float32"""
    frozen = FrozenReference(reference, reference_head)
    return token_statistics(model, head, batch, Needs(kl="reverse"), frozen)["kl"]


def _states(
    model: nn.Module, head: SelectiveHead | None, inputs: ModelInputs, positions: Tensor, **asked: Any
) -> tuple[Tensor, Any]:
    """What the head needs at some positions, and the model's whole output."""
    if head is None:
        output = run_model(model, inputs, **asked)
        return output.logits.reshape(-1, output.logits.shape[-1])[positions], output
    with head.answering(positions, None):
        output = run_model(model, inputs, **asked)
    return output.logits, output


def run_model(model: nn.Module, inputs: ModelInputs, *, output_hidden_states: bool = False) -> Any:
    """The model's own output for the inputs of a batch: the one place where a batch meets a ``forward``."""
    # What is not needed is left out: a model with a forward of its own need not know it.
    asked: dict[str, Any] = {"output_hidden_states": True} if output_hidden_states else {}
    if inputs.decoder_ids is not None:
        return model(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            decoder_input_ids=inputs.decoder_ids,
            use_cache=False,
            **asked,
        )
    if inputs.tree is not None:
        # In rows of their own, a model counts positions as it learned to: some begin behind their pad.
        asked |= {"tree": inputs.tree, "position_ids": inputs.position_ids}
    return model(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        use_cache=False,
        **asked,
    )
