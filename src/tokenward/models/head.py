"""The language model head, asked for a few tokens instead of every logit.

The model's own ``forward`` is what runs, so wrappers around it (DDP, FSDP2, PEFT, autocast) work as
they do for any other call. Only the last step, the head, is answered differently while a request is
open: it receives all hidden states and returns the log-probabilities of the asked tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenward.ops.embedding import tied_embedding
from tokenward.ops.logprob import TokenStatistics, chunked_statistics
from tokenward.ops.tiles import LinearHead, linear_statistics


class Request(NamedTuple):
    """What the head shall answer.

    Attributes:
        positions: ``[n]``, indices into the flattened ``rows x t`` hidden states.
        ids: ``[n]`` tokens whose log-probability is wanted, or None for the hidden states themselves.
        entropy: Whether the entropy at each position is wanted beside it.
    """

    positions: Tensor
    ids: Tensor | None
    entropy: bool = False


class SelectiveHead:
    """Makes a model's output embedding answer requests.

    Outside :meth:`answering` the module works as before, so generation, saving and evaluation with
    other tools see an ordinary model.

    Args:
        module: The output embedding.
        embedding: The input embedding. Where both share one weight, so do they one gradient; see
            :mod:`tokenward.ops.embedding`.
    """

    def __init__(self, module: nn.Module, embedding: nn.Module | None = None) -> None:
        self._module, self._plain = module, module.forward
        self._request: Request | None = None
        self._tied: Tensor | None = None  # the weight as the embedding handed it on in this request
        module.forward = self._forward  # an instance's forward: hooks, state dict and class stay as they are
        if type(embedding) is nn.Embedding and embedding.weight is getattr(module, "weight", None):
            self._plain_embed, self._padding = embedding.forward, embedding.padding_idx
            embedding.forward = self._embed

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, as the unchanged head gives them.  [n d] -> [n v]"""
        return self._plain(hidden)

    @contextmanager
    def answering(self, positions: Tensor, ids: Tensor | None, *, entropy: bool = False) -> Iterator[None]:
        """While open, the model's ``logits`` are what was asked for.

        ``[n]`` log-probabilities, ``[2 n]`` log-probabilities and entropies, or without ids ``[n d]`` states.
        """
        self._request = Request(positions, ids, entropy)
        try:
            yield
        finally:
            self._request = self._tied = None

    def _forward(self, hidden: Tensor) -> Tensor:
        if self._request is None:
            return self._plain(hidden)
        positions, ids, entropy = self._request
        rows = hidden.reshape(-1, hidden.shape[-1])[positions]
        if ids is None:
            return rows
        found = _statistics(self, rows, ids, entropy=entropy)
        return found.logp if found.entropy is None else torch.stack((found.logp, found.entropy))

    def _embed(self, input: Tensor) -> Tensor:
        """The tied embedding: while the head answers, it reads the weight through here."""
        head, asked = self.linear, self._request is not None and self._request.ids is not None
        if head is None or not asked or torch.compiler.is_compiling():
            return self._plain_embed(input)
        rows, self._tied = tied_embedding(input, head.weight, self._padding)
        return rows

    @property
    def linear(self) -> LinearHead | None:
        """The head's weights, where it is nothing but a matrix product; an adapter on it, say, makes it more."""
        module = self._module
        if type(module) is not nn.Linear:
            return None
        return LinearHead(module.weight if self._tied is None else self._tied, module.bias)


def install_head(model: nn.Module) -> SelectiveHead | None:
    """Let a model's head answer requests; None where it has none that is a module."""
    module, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    return SelectiveHead(module, embedding) if isinstance(module, nn.Module) else None


@torch.compiler.disable(
    recursive=True
)  # a loop over tiles: unrolled it would be a long graph that saves nothing
def _statistics(head: SelectiveHead, rows: Tensor, ids: Tensor, *, entropy: bool) -> TokenStatistics:
    linear = head.linear
    if linear is None:
        return chunked_statistics(rows, ids, head.logits, entropy=entropy)
    return linear_statistics(rows, ids, linear, entropy=entropy, dtype=product_type(rows))


def product_type(states: Tensor) -> torch.dtype:
    """Number type of matrix products with these states: autocast's, where it is on."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
