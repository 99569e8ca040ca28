"""Memory and operations of a stage, estimated from sizes alone.

A multiply-add counts as two operations. The backward pass of a product costs one product for the gradient of its input
and one for the gradient of its weights. The counts describe a Llama-like decoder; they are close for other models.
"""

from typing import NamedTuple

from tokenward.ops.tiles import TILE_ELEMENTS

FLOAT, HALF = 4, 2
"""Bytes of a float32 and of a bfloat16."""

# Tensors that a layer saves per token for the backward pass, by their width:
SAVED_WIDTHS = 6  # hidden width: input, inverse root and output of both norms
SAVED_ATTENTION = 4  # attention width: query, key, value, output
SAVED_INNER = 4  # inner width: gate, activated gate, up, their product

TILE_COPIES = 3  # logits, probabilities and their gradient coexist for one tile
MOMENTS = 2  # of AdamW, per trained weight


class ModelSizes(NamedTuple):
    """Sizes of a model, as numbers of weights or widths."""

    weights: int  # all weights, shared ones counted once
    trained: int  # weights that a step updates
    products: int  # weights that every token is multiplied with in the layers
    head: int  # weights of the product that makes logits
    layers: int
    width: int  # of a hidden state
    attention: int  # of all attention heads together
    inner: int  # of the feed-forward network
    vocabulary: int


class Work(NamedTuple):
    """Amount of work that passes through a model."""

    tokens: float  # positions that the layers compute
    kept: float  # positions whose logits are computed
    seen: float  # attended positions, summed over all positions

    def times(self, factor: float) -> "Work":
        """The work scaled by a factor."""
        return Work(self.tokens * factor, self.kept * factor, self.seen * factor)


class NumberTypes(NamedTuple):
    """Bytes per number."""

    weights: int = FLOAT  # of a stored weight, its gradient and its moments
    products: int = FLOAT  # of inputs and outputs of matrix products


class Memory(NamedTuple):
    """Peak memory of a step in bytes, by use."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(self)


def training_memory(
    sizes: ModelSizes, work: Work, types: NumberTypes, *, checkpointing: bool = False
) -> Memory:
    """Bytes of a training step with AdamW; ``work`` is the largest pass, ``checkpointing`` saves only the inputs of layers."""
    # Autocast keeps a second copy of the weights in the type of the products.
    copies = sizes.products * types.products if types.products != types.weights else 0
    return Memory(
        weights=sizes.weights * types.weights + copies,
        gradients=sizes.trained * types.weights,
        optimizer=MOMENTS * sizes.trained * types.weights,
        activations=work.tokens * saved_per_token(sizes, types, checkpointing=checkpointing),
        logits=_logits(sizes, work),
    )


def saved_per_token(sizes: ModelSizes, types: NumberTypes, *, checkpointing: bool) -> float:
    """Bytes that all layers save per token for the backward pass."""
    # Under autocast the norms and the residual stream keep the type of the weights.
    layer = SAVED_WIDTHS * sizes.width * types.weights
    layer += (SAVED_ATTENTION * sizes.attention + SAVED_INNER * sizes.inner) * types.products
    if not checkpointing:
        return sizes.layers * layer
    return sizes.layers * sizes.width * types.weights + layer


def forward_memory(sizes: ModelSizes, work: Work, types: NumberTypes) -> Memory:
    """Bytes of a pass without gradients, which holds the activations of one layer at a time."""
    one_layer = saved_per_token(sizes._replace(layers=1), types, checkpointing=False)
    return Memory(sizes.weights * types.weights, 0, 0, work.tokens * one_layer, _logits(sizes, work))


def _logits(sizes: ModelSizes, work: Work) -> float:
    return TILE_COPIES * FLOAT * min(work.kept * sizes.vocabulary, TILE_ELEMENTS)


def forward_operations(sizes: ModelSizes, work: Work) -> float:
    """Operations of a pass without gradients."""
    attention = 4.0 * sizes.layers * sizes.attention * work.seen
    return 2.0 * (work.tokens * sizes.products + work.kept * sizes.head) + attention


def training_operations(sizes: ModelSizes, work: Work, *, checkpointing: bool = False) -> float:
    """Operations of forward pass, backward pass and AdamW; the backward pass recomputes the logits."""
    forward = forward_operations(sizes, work)
    again = forward if checkpointing else 2.0 * work.kept * sizes.head
    return forward * (2 + sizes.trained / sizes.weights) + again + 10.0 * sizes.trained


def generation_operations(sizes: ModelSizes, replies: float, tokens: float) -> float:
    """Operations to generate ``replies`` of ``tokens`` each, without their prompts."""
    return 2.0 * replies * tokens * (sizes.products + sizes.head)
