"""Values that are read inside a model: entropy, rank, activations, attention and similarity."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.models.forward import run_model
from tokenward.models.internals import ATTENTION, MLP, first_tensor, layers_of, outputs_of, part_of
from tokenward.models.loading import LanguageModel
from tokenward.models.sharding import reading
from tokenward.ops.representation import (
    activation_mask,
    cosine,
    entropy_and_rank,
    mean_logit,
    received_attention,
)
from tokenward.scoring.reads import Compute, Value, over_batches
from tokenward.tokens.batches import Batch, collate
from tokenward.tokens.rows import TokenRow


def internal_values(
    model: LanguageModel, rows: Sequence[TokenRow], value: Value, *, precision: str, tokens_per_batch: int
) -> list[list[Tensor]]:
    """One value of each response token that is read inside the model.

    Args:
        model: The model; for ``attention`` it must run transformers' eager attention.
        rows: Encoded comparisons.
        value: Its kind is ``entropy``, ``rank``, ``attention``, ``similarity`` or ``activation``.
        precision: As in :func:`tokenward.scoring.reads.over_batches`.
        tokens_per_batch: Padded tokens per batch.

    Returns:
        For each row and response ``[len]``, float32 on the CPU.
    """
    if value.kind == "similarity":
        return _similarity(model, rows, value)
    settings: dict[str, Any] = {"precision": precision, "tokens_per_batch": tokens_per_batch}
    if value.kind == "attention":
        # The mean over the positions that see a token assumes a plain causal mask, which shared rows do not have.
        settings |= {
            "layout": "separate",
            "collate": lambda group: collate(group, layout="separate", pad_id=model.pad_id),
        }
    found = over_batches(model, rows, _COMPUTE[value.kind](model, value), **settings)
    return [[response[0] for response in row] for row in found]


def predicting_states(model: LanguageModel, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The states from which the head predicts each response token, and the head.  -> [n d]"""
    if model.head is None:  # the model changes its logits, so they serve as states of an identity head
        logits = run_model(model.model, batch.inputs).logits
        return logits.reshape(-1, logits.shape[-1])[batch.inputs.predicted_from], lambda rows: rows
    with model.head.answering(batch.inputs.predicted_from, None):
        return run_model(model.model, batch.inputs).logits, model.head.logits


def _entropy_or_rank(model: LanguageModel, value: Value) -> Compute:
    place = ("entropy", "rank").index(value.kind)

    def compute(batch: Batch) -> Tensor:
        states, head = predicting_states(model, batch)
        return entropy_and_rank(states, batch.tokens.ids, head)[place : place + 1]

    return compute


def _activation(model: LanguageModel, value: Value) -> Compute:
    layers = layers_of(model.model, model.name)
    kinds = {
        "mlp": [part_of(layer, MLP, model.name) for layer in layers],
        "attention": [part_of(layer, ATTENTION, model.name) for layer in layers],
        "layer": layers,
    }
    modules = {f"{kind} {place}": part for kind, parts in kinds.items() for place, part in enumerate(parts)}

    def compute(batch: Batch) -> Tensor:
        with outputs_of(modules) as found:
            states, head = predicting_states(model, batch)
        means = {name: _mean_feature(output, batch) for name, output in found.items()}
        stacked = [
            torch.stack([means[f"{kind} {place}"] for place in range(len(parts))])
            for kind, parts in kinds.items()
        ]
        stacked.append(mean_logit(states, head)[None])
        return activation_mask(stacked, batch.tokens.response, batch.tokens.responses)[None]

    return compute


def _mean_feature(output: Any, batch: Batch) -> Tensor:
    """Mean over the features of a module's output where each token is predicted.  -> [n]"""
    return first_tensor(output).float().mean(-1).reshape(-1)[batch.inputs.predicted_from]


def _attention(model: LanguageModel, value: Value) -> Compute:
    layers, wanted = layers_of(model.model, model.name), value.details["layer"]
    if not -len(layers) <= wanted < len(layers):
        raise UserError(
            f"attention: there is no layer {wanted} in {model.name}, which has {len(layers)}. Count from 0, or from -1 backwards.",
            code="out-of-range",
        )
    module = part_of(layers[wanted], ATTENTION, model.name)

    def compute(batch: Batch) -> Tensor:
        with outputs_of({"attention": module}) as found:
            run_model(model.model, batch.inputs)
        output = found["attention"]
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None or weights.dim() != 4:
            raise UserError(
                f"{model.name} does not return attention weights, not even with eager attention. Use another scorer.",
                code="unsupported-model",
            )
        received = received_attention(weights, batch.inputs.attention_mask.bool())
        return received.reshape(-1)[batch.inputs.placed_at][None]

    return compute


_COMPUTE: Mapping[str, Callable[[LanguageModel, Value], Compute]] = {
    "entropy": _entropy_or_rank,
    "rank": _entropy_or_rank,
    "activation": _activation,
    "attention": _attention,
}


def _similarity(model: LanguageModel, rows: Sequence[TokenRow], value: Value) -> list[list[Tensor]]:
    with reading(model.model):
        return _similarities(model, rows, value)


def _similarities(model: LanguageModel, rows: Sequence[TokenRow], value: Value) -> list[list[Tensor]]:
    words = [model.tokenizer(word, add_special_tokens=False)["input_ids"] for word in value.details["domain"]]
    vectors = _input_embeddings if value.details["space"] == "embedding" else _states_alone
    domain = torch.stack([vectors(model, torch.tensor(ids)).float().mean(0) for ids in words if ids]).mean(0)
    # A token's vector does not depend on its context: each id is looked up once.
    ids, place = torch.unique(
        torch.tensor([token for row in rows for ids in row.responses for token in ids]),
        return_inverse=True,
    )
    scores = cosine(vectors(model, ids), domain).cpu()[place]
    parts = iter(scores.split([len(ids) for row in rows for ids in row.responses]))
    return [[next(parts) for _ in row.responses] for row in rows]


def _input_embeddings(model: LanguageModel, ids: Tensor) -> Tensor:
    return model.model.get_input_embeddings()(ids.to(model.device))  # type: ignore[operator]


def _states_alone(model: LanguageModel, ids: Tensor) -> Tensor:
    """Last hidden state of each token as the only input.  [n] -> [n d]"""
    output = model.model(input_ids=ids.to(model.device)[:, None], output_hidden_states=True, use_cache=False)
    return output.hidden_states[-1][:, 0]
