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
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._plain = module, module.forward
        self._request: Request | None = None
        module.forward = self._forward  # an instance's forward: hooks, state dict and class stay as they are

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
            self._request = None

    def _forward(self, hidden: Tensor) -> Tensor:
        if self._request is None:
            return self._plain(hidden)
        positions, ids, entropy = self._request
        rows = hidden.reshape(-1, hidden.shape[-1])[positions]
        if ids is None:
            return rows
        found = _statistics(self, rows, ids, entropy=entropy)
        return found.logp if found.entropy is None else torch.stack((found.logp, found.entropy))

    @property
    def linear(self) -> LinearHead | None:
        """The head's weights, where it is nothing but a matrix product; an adapter on it, say, makes it more."""
        module = self._module
        return LinearHead(module.weight, module.bias) if type(module) is nn.Linear else None


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
