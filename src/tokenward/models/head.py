"""The language model head, asked for a few tokens instead of every logit.

The model's own ``forward`` is what runs, so wrappers around it (DDP, FSDP2, PEFT, autocast) work as
they do for any other call. Only the last step, the head, is answered differently while a request is
open: it receives all hidden states and returns the log-probabilities of the asked tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from tokenward.ops.logprob import chunked_logprobs


class Request(NamedTuple):
    """What the head shall answer.

    Attributes:
        positions: ``[n]``, indices into the flattened ``rows x t`` hidden states.
        ids: ``[n]`` tokens whose log-probability is wanted, or None for the hidden states themselves.
    """

    positions: Tensor
    ids: Tensor | None


class SelectiveHead:
    """Makes a model's output embedding answer requests.

    Outside :meth:`answering` the module works as before, so generation, saving and evaluation with
    other tools see an ordinary model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._plain = module.forward
        self._request: Request | None = None
        module.forward = self._forward  # an instance's forward: hooks, state dict and class stay as they are

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, as the unchanged head gives them.  [n d] -> [n v]"""
        return self._plain(hidden)

    @contextmanager
    def answering(self, positions: Tensor, ids: Tensor | None) -> Iterator[None]:
        """While open, the model's ``logits`` are ``[n]`` log-probabilities (or ``[n d]`` states without ids)."""
        self._request = Request(positions, ids)
        try:
            yield
        finally:
            self._request = None

    def _forward(self, hidden: Tensor) -> Tensor:
        if self._request is None:
            return self._plain(hidden)
        positions, ids = self._request
        rows = hidden.reshape(-1, hidden.shape[-1])[positions]
        return rows if ids is None else chunked_logprobs(rows, ids, self._plain)
