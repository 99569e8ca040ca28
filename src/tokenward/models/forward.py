"""Per-token statistics of a batch: the only path from a model to numbers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from tokenward.models.head import KLReference, SelectiveHead, unpacked
from tokenward.models.sharding import reading
from tokenward.ops.logprob import Chunk, by_name, statistics_of
from tokenward.tokens.batches import NOTHING, Batch, Needs
from tokenward.tokens.layouts import ModelInputs


@dataclass(frozen=True, slots=True)
class FrozenReference:
    """The model that a policy is compared with during training.

    Attributes:
        model: The module; called without gradient and in evaluation mode.
        head: Its head; None to compute all logits.
        without_adapter: Whether ``model`` is the policy itself, with its adapter disabled.
    """

    model: nn.Module
    head: SelectiveHead | None
    without_adapter: bool = False

    def logits(self, rows: Tensor) -> Tensor:
        """Logits of the states from :meth:`read`; without a head those already are logits.  [n d] -> [n v]"""
        if self.head is None:
            return rows
        with self._frozen():
            return self.head.logits(rows)

    def read(self, batch: Batch, *, layers: bool) -> tuple[Tensor, Tensor | None]:
        """States at the position that predicts each weighted token, and the outputs of all layers there.

        Returns:
            ``[m d]`` (or logits ``[m v]`` without a head), and ``[m L d]`` without the embedding, or None.
        """
        positions = batch.inputs.predicted_from[batch.tokens.kept]
        with self._frozen():
            states, output = _states(self.model, self.head, batch.inputs, positions, hidden_states=layers)
        if not layers:
            return states, None
        hidden = _hidden_states(output, batch.inputs)
        return states, torch.stack([item.flatten(0, 1)[positions] for item in hidden[1:]], 1)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        # Some modules may have been in evaluation mode already, so train() would not restore the state.
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        disabled = nullcontext()
        if self.without_adapter and isinstance(self.model, PeftModel):
            disabled = self.model.disable_adapter()
        try:
            with torch.no_grad(), disabled:
                yield
        finally:
            for module in training:
                module.training = True


def token_statistics(
    model: nn.Module,
    head: SelectiveHead | None,
    batch: Batch,
    needs: Needs = NOTHING,
    reference: FrozenReference | None = None,
) -> dict[str, Tensor]:
    """``logp`` and the needed statistics of each response token, 0 at tokens without weight.  -> [n], or [n ...], each

    Values are in nats, in float32 or float64. ``states [n d]``, the hidden states at the position that predicts the token, and
    ``reference_layers [n L d]``, the outputs of all layers of the reference there, keep the dtype of their model.

    ``model`` may be wrapped; its ``forward`` is called. ``head`` is its head, None to compute all logits. The batch is on its
    device. ``kl`` and ``reference_layers`` need a ``reference``.
    """
    kl_reference, layers = _read_reference(needs, reference, batch)
    inputs, kept, names = batch.inputs, batch.tokens.kept, needs.of_head
    positions, ids = inputs.predicted_from[kept], batch.tokens.ids[kept]
    if head is None:
        logits, output = _states(model, None, inputs, positions, hidden_states=needs.states)
        chunk = Chunk(logits, ids)
        if kl_reference is not None:
            chunk = Chunk(logits, ids, kl_reference.logits(kl_reference.hidden), kl_reference.direction)
        found = by_name(statistics_of(chunk, names), names)
        states = _hidden_states(output, inputs)[-1].flatten(0, 1)[positions] if needs.states else None
    else:
        with head.answering(positions, ids, names, kl_reference=kl_reference, states=needs.states):
            answer = run_model(model, inputs).logits
        found, states = unpacked(answer, names, states=needs.states)
    read = {**found, "states": states, "reference_layers": layers}
    return {
        name: value.new_zeros(len(batch.tokens.ids), *value.shape[1:]).index_put((kept,), value)
        for name, value in read.items()
        if value is not None
    }


def _read_reference(
    needs: Needs, reference: FrozenReference | None, batch: Batch
) -> tuple[KLReference | None, Tensor | None]:
    if not needs.frozen_reference:
        return None, None
    if reference is None:
        raise ValueError("kl and reference_layers need a reference model")
    states, layers = reference.read(batch, layers=needs.reference_layers)
    if needs.kl is None:
        return None, layers
    linear = None if reference.head is None else reference.head.linear
    return KLReference(states, linear, reference.logits, needs.kl), layers


def _states(
    model: nn.Module,
    head: SelectiveHead | None,
    inputs: ModelInputs,
    positions: Tensor,
    *,
    hidden_states: bool,
) -> tuple[Tensor, Any]:
    """Input of the head at some positions (logits without a head), and the whole output of the model."""
    if head is None:
        output = run_model(model, inputs, output_hidden_states=hidden_states)
        return output.logits.reshape(-1, output.logits.shape[-1])[positions], output
    with head.answering(positions, None):
        output = run_model(model, inputs, output_hidden_states=hidden_states)
    return output.logits, output


def _hidden_states(output: Any, inputs: ModelInputs) -> Sequence[Tensor]:
    return output.hidden_states if inputs.decoder_ids is None else output.decoder_hidden_states


def token_kl(
    model: nn.Module,
    head: SelectiveHead | None,
    reference: nn.Module,
    reference_head: SelectiveHead | None,
    batch: Batch,
) -> Tensor:
    """KL(model || reference) over the whole vocabulary at each weighted response token.  -> [n] float32"""
    frozen = FrozenReference(reference, reference_head)
    with reading(model):
        return token_statistics(model, head, batch, Needs(kl="reverse"), frozen)["kl"]


def run_model(model: nn.Module, inputs: ModelInputs, *, output_hidden_states: bool = False) -> Any:
    """Call a model on the inputs of a batch. No other function passes a batch to a ``forward``."""
    # Arguments are passed only if needed: a custom forward may not know them.
    optional: dict[str, Any] = {"output_hidden_states": True} if output_hidden_states else {}
    if inputs.decoder_ids is not None:
        optional["decoder_input_ids"] = inputs.decoder_ids
    elif inputs.tree is not None:
        # Separate rows get no position_ids: each family counts as it was trained, RoBERTa for example from its pad id on.
        optional |= {"tree": inputs.tree, "position_ids": inputs.position_ids}
    return model(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, use_cache=False, **optional
    )
