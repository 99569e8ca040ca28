"""What a stage must cost, counted from sizes alone: bytes held and operations done.

One multiply-add is two operations. A product costs as much again for the gradient of its input, and once more for
that of its weights. Counts are of a decoder in the manner of Llama; other kinds are near, not exact.
"""

from typing import NamedTuple

from tokenward.ops.tiles import TILE_ELEMENTS

FLOAT, HALF = 4, 2
"""Bytes of a float32 and of a bfloat16."""

SAVED_WIDTHS, SAVED_ATTENTION, SAVED_INNER = 6, 4, 4
"""Tensors that a layer keeps of a token for its backward pass, by their width.

Width: inputs, roots and outputs of the two norms. Attention: query, key, value, output. Inner: gate, its activation,
up, and their product.
"""

TILE_COPIES = 3
"""Tensors of a tile of logits that exist together: logits, probabilities, their gradient."""

MOMENTS = 2
"""Numbers that AdamW keeps of each trained weight."""


class ModelSizes(NamedTuple):
    """Sizes of a model.

    Attributes:
        weights: All of them, shared ones once.
        trained: Those that a step changes.
        products: Weights that every token of every layer is multiplied with.
        head: Weights of the product that makes logits.
        layers: How many layers there are.
        width: Of a hidden state.
        attention: Width of all attention heads side by side.
        inner: Width of the feed-forward network.
        vocabulary: Tokens that the head tells apart.
    """

    weights: int
    trained: int
    products: int
    head: int
    layers: int
    width: int
    attention: int
    inner: int
    vocabulary: int

    @property
    def trained_share(self) -> float:
        """Share of the weights that a step changes."""
        return self.trained / self.weights


class Work(NamedTuple):
    """What goes through a model.

    Attributes:
        tokens: Positions that the layers compute.
        kept: Positions whose logits are made.
        seen: Over all positions, how many others each sees.
    """

    tokens: float
    kept: float
    seen: float

    def times(self, factor: float) -> "Work":
        """So much of it."""
        return Work(self.tokens * factor, self.kept * factor, self.seen * factor)


class NumberTypes(NamedTuple):
    """Bytes of a number.

    Attributes:
        weights: Of a stored weight, its gradient and its moments.
        products: Of what matrix products read and give.
    """

    weights: int = FLOAT
    products: int = FLOAT


class Memory(NamedTuple):
    """Bytes held at the worst moment of a step, by what holds them."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def training_memory(
    sizes: ModelSizes, work: Work, types: NumberTypes, *, checkpointing: bool = False
) -> Memory:
    """Bytes of a training step with AdamW.

    Args:
        sizes: Of the model.
        work: The largest pass.
        types: Number types; products in another type than the weights need a copy of the weights.
        checkpointing: Whether only the input of each layer is kept and the rest made again.
    """
    copies = sizes.products * types.products if types.products != types.weights else 0
    return Memory(
        weights=sizes.weights * types.weights + copies,
        gradients=sizes.trained * types.weights,
        optimizer=MOMENTS * sizes.trained * types.weights,
        activations=work.tokens * saved_per_token(sizes, types, checkpointing=checkpointing),
        logits=TILE_COPIES * FLOAT * min(work.kept * sizes.vocabulary, TILE_ELEMENTS),
    )


def saved_per_token(sizes: ModelSizes, types: NumberTypes, *, checkpointing: bool) -> float:
    """Bytes that all layers keep of a token for the backward pass."""
    # Under autocast the norms and the sums between layers stay in the weights' type.
    layer = SAVED_WIDTHS * sizes.width * types.weights
    layer += (SAVED_ATTENTION * sizes.attention + SAVED_INNER * sizes.inner) * types.products
    if not checkpointing:
        return sizes.layers * layer
    return sizes.layers * sizes.width * types.weights + layer


def forward_memory(sizes: ModelSizes, work: Work, types: NumberTypes) -> Memory:
    """Bytes of a pass without gradients: of the activations, those of one layer."""
    one_layer = saved_per_token(sizes._replace(layers=1), types, checkpointing=False)
    logits = TILE_COPIES * FLOAT * min(work.kept * sizes.vocabulary, TILE_ELEMENTS)
    return Memory(sizes.weights * types.weights, 0, 0, work.tokens * one_layer, logits)


def forward_operations(sizes: ModelSizes, work: Work) -> float:
    """Operations of a pass without gradients."""
    attention = 4.0 * sizes.layers * sizes.attention * work.seen
    return 2.0 * (work.tokens * sizes.products + work.kept * sizes.head) + attention


def training_operations(sizes: ModelSizes, work: Work, *, checkpointing: bool = False) -> float:
    """Operations of forward, backward and AdamW; the logits are made again in the backward pass."""
    forward = forward_operations(sizes, work)
    again = forward if checkpointing else 2.0 * work.kept * sizes.head
    return forward * (2 + sizes.trained_share) + again + 10.0 * sizes.trained


def generation_operations(sizes: ModelSizes, replies: float, tokens: float) -> float:
    """Operations of replies of so many tokens each, their prompts left out."""
    return 2.0 * replies * tokens * (sizes.products + sizes.head)
