"""Scorers that read a model's internals: entropy, ranks, activations, attention, similarity, continuations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.models.forward import run_model
from tokenward.models.internals import ATTENTION, MLP, first_tensor, layers_of, outputs_of, part_of
from tokenward.models.loading import LanguageModel
from tokenward.ops.representation import (
    activation_mask,
    cosine,
    entropy_and_rank,
    mean_logit,
    received_attention,
)
from tokenward.scoring.basic import Record, ValueOf
from tokenward.scoring.reads import Compute, Value, over_batches
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
        precision: As of :func:`tokenward.scoring.reads.token_values`.
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


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention that each token receives in one layer: mean over the heads and over the positions that see it.

    The pass is the eager one, which holds ``heads x t x t`` numbers of a row, with a row for each response: several
    times the cost of a pass for log-probabilities. Needed by XTF (arXiv 2602.14536), whose released code averages over
    the other axis, which gives ``1 / t`` everywhere.

    Attributes:
        of: Which model's.
        layer: 0 is the first; -1 the last.
    """

    _: KW_ONLY
    of: str = "reference"
    layer: int = -1

    @property
    def reads(self) -> tuple[Value, ...]:
        """The attention in that layer."""
        return (Value(self.of, "attention", layer=self.layer),)

    def __call__(self, record: Record) -> Tensor:
        """Scores in [0, 1].  -> [n]"""
        return record.value(self.reads[0])


@dataclass(frozen=True, slots=True)
class Similarity:
    """Cosine of a token with the mean of a domain's words (XTF's task relevance).

    Attributes:
        domain: The words.
        of: Which model's vectors.
        space: ``embedding``, the input embedding; ``alone``, the last hidden state of the token run by itself, as XTF's
            released code has it.
    """

    domain: tuple[str, ...]
    _: KW_ONLY
    of: str = "reference"
    space: Literal["embedding", "alone"] = "embedding"

    def __post_init__(self) -> None:
        if not self.domain or not all(word.strip() for word in self.domain):
            raise UserError(
                f'similarity needs the words of a domain, got {list(self.domain)}. Write for example domain: ["+", "=", maths].'
            )

    @property
    def reads(self) -> tuple[Value, ...]:
        """The likeness to these words."""
        return (Value(self.of, "similarity", domain=list(self.domain), space=self.space),)

    def __call__(self, record: Record) -> Tensor:
        """Scores in [-1, 1].  -> [n]"""
        return record.value(self.reads[0])


@dataclass(frozen=True, slots=True)
class Activation(ValueOf):
    """MaPO's mask (arXiv 2410.05102): mean activation of a frozen model where each token was predicted.

    Of MLPs, attention, layers and logits each activation is averaged over its features, standardised over the response
    and brought to [0, 1]; then averaged over the layers of a type, and over the types.

    Attributes:
        of: Which model's.
    """

    kind: ClassVar[str] = "activation"


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """1 at critical tokens: with any other likely token in the place, what follows is wrong (CFT, arXiv 2510.10974).

    At each token of a response that the verifier accepts, the most probable other tokens are written in its place and
    continued greedily; where every continuation fails, the token is critical. In a greedy response these are the second
    and third most probable tokens. A response that is not accepted has no scores. The cost is ``candidates`` replies
    for each token of the data.

    Attributes:
        verifier: ``"module:name"`` of ``f(prompts, completions, **columns)``, a number per completion that is greater
            than 0 where it is right; ``references`` among the columns holds the original response.
        of: Which model continues.
        candidates: Other tokens tried.
        max_new_tokens: Longest continuation.
    """

    verifier: str
    _: KW_ONLY
    of: str = "reference"
    candidates: int = 2
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if min(self.candidates, self.max_new_tokens) < 1:
            raise UserError(
                f"counterfactual needs candidates and max_new_tokens of 1 or more, got {self.candidates} and "
                f"{self.max_new_tokens}."
            )

    @property
    def reads(self) -> tuple[Value, ...]:
        """Whether the token is critical."""
        details = {
            "verifier": self.verifier,
            "candidates": self.candidates,
            "max_new_tokens": self.max_new_tokens,
        }
        return (Value(self.of, "critical", **details),)

    def __call__(self, record: Record) -> Tensor:
        """Scores, 0 or 1.  -> [n]"""
        return record.value(self.reads[0])
