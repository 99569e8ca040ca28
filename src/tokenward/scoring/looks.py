"""Values that need a look inside a language model: entropy and rank, activations, attention, likeness to words."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.models.forward import run_model
from tokenward.models.inside import ATTENTION, MLP, first_tensor, layers_of, outputs_of, part_of
from tokenward.models.loading import LanguageModel
from tokenward.ops.looks import activation_mask, cosine, entropy_and_rank, mean_logit, received_attention
from tokenward.scoring.reads import Value
from tokenward.scoring.values import Compute, over_batches
from tokenward.tokens.batches import Batch, collate
from tokenward.tokens.rows import TokenRow

LOOKED_AT = ("entropy", "rank", "attention", "similarity", "activation")
"""Kinds of values that are made here."""


def looked_at(
    model: LanguageModel, rows: Sequence[TokenRow], value: Value, *, precision: str, tokens_per_batch: int
) -> list[list[Tensor]]:
    """One value of each token of each response.  -> per row, per response, [len] float32 on the CPU

    Args:
        model: The model; for ``attention`` one with transformers' eager attention.
        rows: Comparisons as ids.
        value: Which, one of :data:`LOOKED_AT`.
        precision: As of :func:`tokenward.scoring.values.token_values`.
        tokens_per_batch: Padded tokens read at once.
    """
    settings: dict[str, Any] = {"precision": precision, "tokens_per_batch": tokens_per_batch}
    if value.kind == "similarity":
        return _similar(model, rows, value)
    if value.kind == "attention":
        settings |= {
            "layout": "separate",
            "collate": lambda group: collate(group, layout="separate", pad_id=model.pad_id),
        }
    found = over_batches(model, rows, _COMPUTE[value.kind](model, value), **settings)
    return [[response[0] for response in row] for row in found]


def predicting_states(model: LanguageModel, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What the head gets at the position before each token, and the head.  -> [n d]"""
    if model.head is None:  # a model that changes its logits: they stand for the states
        logits = run_model(model.model, batch.inputs).logits
        return logits.reshape(-1, logits.shape[-1])[batch.inputs.predicted_from], lambda rows: rows
    with model.head.answering(batch.inputs.predicted_from, None):
        return run_model(model.model, batch.inputs).logits, model.head.logits


def _statistic(model: LanguageModel, value: Value) -> Compute:
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
    """Mean over the features of a module's output at the position before each token.  -> [n]"""
    return first_tensor(output).float().mean(-1).reshape(-1)[batch.inputs.predicted_from]


def _attention(model: LanguageModel, value: Value) -> Compute:
    layers, wanted = layers_of(model.model, model.name), value.details["layer"]
    if not -len(layers) <= wanted < len(layers):
        raise UserError(
            f"attention: layer {wanted} of {model.name}, which has {len(layers)}. Count from 0, or from -1 back."
        )
    module = part_of(layers[wanted], ATTENTION, model.name)

    def compute(batch: Batch) -> Tensor:
        with outputs_of({"attention": module}) as found:
            run_model(model.model, batch.inputs)
        output = found["attention"]
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None or weights.dim() != 4:
            raise UserError(
                f"{model.name} does not give the weights of its attention, even computed eagerly. Use another scorer."
            )
        received = received_attention(weights, batch.inputs.attention_mask.bool())
        return received.reshape(-1)[batch.inputs.placed_at][None]

    return compute


_COMPUTE: Mapping[str, Callable[[LanguageModel, Value], Compute]] = {
    "entropy": _statistic,
    "rank": _statistic,
    "activation": _activation,
    "attention": _attention,
}


@torch.inference_mode()
def _similar(model: LanguageModel, rows: Sequence[TokenRow], value: Value) -> list[list[Tensor]]:
    """Cosine with the mean vector of a domain's words; each id of the rows is looked at once."""
    words = [model.tokenizer(word, add_special_tokens=False)["input_ids"] for word in value.details["domain"]]
    vectors = _embedded if value.details["space"] == "embedding" else _alone
    domain = torch.stack([vectors(model, torch.tensor(ids)).float().mean(0) for ids in words if ids]).mean(0)
    known, place = torch.unique(
        torch.tensor([token for row in rows for ids in row.responses for token in ids]),
        return_inverse=True,
    )
    scores = cosine(vectors(model, known), domain).cpu()[place]
    parts = iter(scores.split([len(ids) for row in rows for ids in row.responses]))
    return [[next(parts) for _ in row.responses] for row in rows]


def _embedded(model: LanguageModel, ids: Tensor) -> Tensor:
    """Input embeddings.  [n] -> [n d]"""
    return model.model.get_input_embeddings()(ids.to(model.device))  # type: ignore[operator]


def _alone(model: LanguageModel, ids: Tensor) -> Tensor:
    """Last hidden state of each token as a text of its own.  [n] -> [n d]"""
    output = model.model(input_ids=ids.to(model.device)[:, None], output_hidden_states=True, use_cache=False)
    return output.hidden_states[-1][:, 0]
