"""Cost model of a step: matrix products, bytes held and bytes moved, counted from shapes alone.

One multiply-add is two operations. Each of the two gradients of a product costs as much as the product, so forward and
backward are three passes. Two measured rates, operations and bytes per second, convert counts into seconds. Only ratios
of such times are reported, because the rates do not model caches and threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

FLOAT = 4
"""Bytes of a float32."""

SAVED_WIDTHS, SAVED_ATTENTION, SAVED_INNER = 6, 4, 4
"""Number of float tensors that a Llama layer saves for its backward pass, by width.

Model width: inputs, roots and outputs of the two norms. Attention width: query, repeated key, repeated value, output.
Inner width: gate, its activation, up, and their product.
"""

PASSES_OVER_SAVED = 5
"""Times that a saved activation is moved: written, read, read again, its gradient written and read."""

PASSES_OVER_LOGITS = 8
"""Times that a logit is moved from its product to its gradient: maximum, exponential, sum, gradient."""

PASSES_OVER_STATE = 7
"""Times that a weight-sized tensor is moved by clipping and AdamW: norm, scale, and two moments and the weight."""


class Product(NamedTuple):
    """One matrix product of the model, ``[rows, inputs] x [inputs, outputs]``."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Llama model with tied embeddings."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Sizes in a transformers config."""
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            inner=config.intermediate_size,
            vocabulary=config.vocab_size,
        )

    @property
    def attention_width(self) -> int:
        """Total width of all heads."""
        return self.heads * self.head_dim

    def layer_products(self) -> list[Product]:
        """Products of one layer with its weights."""
        keys = self.kv_heads * self.head_dim
        return [
            Product("q", self.width, self.attention_width),
            Product("k", self.width, keys),
            Product("v", self.width, keys),
            Product("o", self.attention_width, self.width),
            Product("gate", self.width, self.inner),
            Product("up", self.width, self.inner),
            Product("down", self.inner, self.width),
        ]

    @property
    def head_product(self) -> Product:
        """The product that makes logits."""
        return Product("head", self.width, self.vocabulary)

    @property
    def body_weights(self) -> int:
        """Weights of all layers' products."""
        return self.layers * sum(item.inputs * item.outputs for item in self.layer_products())

    @property
    def head_weights(self) -> int:
        """Weights of the head, which it shares with the embedding."""
        return self.width * self.vocabulary

    @property
    def weights(self) -> int:
        """Weights of layers and head; norms are negligible."""
        return self.body_weights + self.head_weights

    @property
    def saved_per_token(self) -> int:
        """Bytes that all layers save per token for the backward pass, in float32."""
        widths = SAVED_WIDTHS * self.width + SAVED_ATTENTION * self.attention_width + SAVED_INNER * self.inner
        return FLOAT * self.layers * widths


class Pair(NamedTuple):
    """Lengths of a comparison: its prompt and its responses."""

    prompt: int
    responses: tuple[int, ...]


class Layout(NamedTuple):
    """The part of a batch that goes through the model.

    Attributes:
        rows: Length of each row, including padding.
        head_rows: Number of positions whose logits are computed.
    """

    rows: tuple[int, ...]
    head_rows: int

    @property
    def tokens(self) -> int:
        """Positions that the layers compute."""
        return sum(self.rows)


class Cost(NamedTuple):
    """Operations and bytes of a step."""

    products: float
    attention: float
    moved: float

    def seconds(self, rates: "Rates") -> float:
        """Time at the machine's rates."""
        return (self.products + self.attention) / rates.operations + self.moved / rates.bytes


class Rates(NamedTuple):
    """Measured rates of a machine, per second."""

    operations: float
    bytes: float


def shared(pairs: Sequence[Pair], *, fraction: float = 1.0, padded: bool = True) -> Layout:
    """Tokenward's layout: the prompt once, with all its responses in one row, and logits for selected tokens."""
    lengths = [item.prompt + sum(item.responses) for item in pairs]
    if padded:
        lengths = [max(lengths)] * len(lengths)
    kept = sum(max(1, int(fraction * length)) for item in pairs for length in item.responses)
    return Layout(tuple(lengths), kept)


def separate(pairs: Sequence[Pair]) -> Layout:
    """TRL's layout without Triton: one padded row per response, logits at every predicting position."""
    lengths = [item.prompt + length for item in pairs for length in item.responses]
    rows = (max(lengths),) * len(lengths)
    return Layout(rows, sum(rows) - len(rows))


def product_operations(
    shape: Shape, layout: Layout, *, body_passes: int = 3, head_passes: int = 4
) -> tuple[float, float]:
    """Operations of the products of the layers and of the head.

    Args:
        shape: Shape of the model.
        layout: Layout of the batch.
        body_passes: 3 with the backward pass, 1 without.
        head_passes: 3 with the backward pass, 4 if it recomputes logits, 1 without.
    """
    body = 2.0 * body_passes * layout.tokens * shape.body_weights
    return body, 2.0 * head_passes * layout.head_rows * shape.head_weights


def attention_operations(shape: Shape, layout: Layout, *, passes: float = 3.5) -> float:
    """Operations of query x key and attention x value over whole rows, including masked positions.

    Args:
        shape: Shape of the model.
        layout: Rows that attend to themselves.
        passes: 3.5 with a backward pass that recomputes attention (five products after two), 1 without.
    """
    return passes * 4.0 * shape.layers * shape.attention_width * sum(length**2 for length in layout.rows)


def visible_attention(shape: Shape, pairs: Sequence[Pair], *, passes: float = 3.5) -> float:
    """Operations of attention over visible positions only: the prompt once, each response separately."""
    seen = sum(
        item.prompt * (item.prompt + 1) / 2
        + sum(length * item.prompt + length * (length + 1) / 2 for length in item.responses)
        for item in pairs
    )
    return passes * 4.0 * shape.layers * shape.attention_width * seen


def training_step(
    shape: Shape,
    layout: Layout,
    *,
    head_passes: int = 4,
    logit_passes: int = PASSES_OVER_LOGITS,
    recomputed: bool = False,
) -> Cost:
    """Cost of forward, backward, clipping and AdamW.

    Args:
        shape: Shape of the model.
        layout: Layout of the batch.
        head_passes: See :func:`product_operations`.
        logit_passes: Times that a logit is moved.
        recomputed: Whether the backward pass recomputes the layers.
    """
    body_passes, attention_passes = (4, 4.5) if recomputed else (3, 3.5)
    products = sum(product_operations(shape, layout, body_passes=body_passes, head_passes=head_passes))
    moved = PASSES_OVER_SAVED * layout.tokens * shape.saved_per_token
    moved += FLOAT * logit_passes * layout.head_rows * shape.vocabulary
    moved += FLOAT * PASSES_OVER_STATE * shape.weights
    return Cost(products, attention_operations(shape, layout, passes=attention_passes), float(moved))


def scoring_pass(shape: Shape, layout: Layout, *, logit_passes: int = 3, saves: bool = False) -> Cost:
    """Cost of a forward pass that computes log-probabilities.

    Args:
        shape: Shape of the model.
        layout: Layout of the batch.
        logit_passes: Times that a logit is moved: 3 for maximum, exponential and sum.
        saves: Whether activations are saved for a backward pass, although there is none.
    """
    products = sum(product_operations(shape, layout, body_passes=1, head_passes=1))
    moved = (3 if saves else 2) * layout.tokens * shape.saved_per_token
    moved += FLOAT * (logit_passes * layout.head_rows * shape.vocabulary + shape.weights)
    return Cost(products, attention_operations(shape, layout, passes=1), float(moved))


def training_peak(
    shape: Shape, layout: Layout, *, logit_rows: int, logit_copies: int, recomputed: bool = False
) -> int:
    """Peak bytes of a step: weights, gradients, two moments, activations, logits.

    Args:
        shape: Shape of the model.
        layout: Layout of the batch.
        logit_rows: Number of rows whose logits exist at the same time.
        logit_copies: Number of such tensors.
        recomputed: Whether only the inputs of the layers and the activations of one layer are saved.
    """
    state = 4 * FLOAT * shape.weights
    logits = FLOAT * logit_rows * shape.vocabulary * logit_copies
    saved = shape.saved_per_token
    if recomputed:
        saved = FLOAT * shape.layers * shape.width + saved // shape.layers
    return state + layout.tokens * saved + logits


def full_logits(positions: int, vocabulary: int) -> int:
    """Bytes of one float32 tensor of all logits."""
    return FLOAT * positions * vocabulary
