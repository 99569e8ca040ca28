"""The language model head, computed for selected tokens only.

The logits of a whole batch are its largest tensor by far, and most of them are never used. So the head module of a model
is made to return what is needed in place of logits: hidden states or statistics of chosen positions. Everything else
about the model stays as it is, so wrappers (DDP, PEFT, FSDP2) and gradient checkpointing work as usual.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import islice
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from tokenward.models.sharding import is_exactly
from tokenward.ops.logprob import (
    UNCHANGED,
    Direction,
    Head,
    LinearHead,
    LogitChange,
    Reference,
    by_name,
    chunked_statistics,
)
from tokenward.ops.representation import tied_embedding
from tokenward.ops.tiles import TILED, linear_statistics


class KLReference(NamedTuple):
    """The model that a KL divergence compares with; it gets no gradient."""

    hidden: Tensor  # [n d], its states at the same positions
    linear: LinearHead | None  # its head, if that is a plain matrix product
    logits: Head  # its head as a function
    direction: Direction


class HeadRequest(NamedTuple):
    """What a head should return."""

    positions: Tensor  # [n], indices into the flattened hidden states [rows x t]
    ids: Tensor | None  # [n], tokens to return log-probabilities for; None to return the hidden states
    names: Sequence[str]  # further statistics, from tokenward.ops.logprob.STATISTICS
    kl_reference: KLReference | None  # needed for ``kl``
    states: bool  # whether to return the hidden states too


class SelectiveHead:
    """Makes the output embedding of a model answer requests.

    Outside :meth:`answering` the module works as before, so generation, saving and other tools see an ordinary model.

    ``change`` is how ``model`` transforms the output of its head into logits; if it has steps, the answer must bypass them. If the
    input embedding shares its weight with the head, both share one gradient tensor, see
    :func:`tokenward.ops.representation.tied_embedding`.
    """

    def __init__(
        self,
        module: nn.Module,
        embedding: nn.Module | None = None,
        *,
        change: LogitChange = UNCHANGED,
        model: nn.Module | None = None,
    ) -> None:
        self._module, self._plain, self.change = module, module.forward, change
        self._request: HeadRequest | None = None
        self._answer: Tensor | None = None
        self._tied: Tensor | None = None  # the tied weight, as the embedding returned it in this request
        if model is not None and change.steps:
            self._bypass(model)
        # Set on the instance: hooks, state dict and class of the module stay as they are.
        module.forward = self._forward
        if is_exactly(embedding, nn.Embedding) and embedding.weight is getattr(module, "weight", None):
            self._plain_embed, self._padding = embedding.forward, embedding.padding_idx
            embedding.forward = self._embed

    def _bypass(self, model: nn.Module) -> None:
        """Return the answer from the model's forward unchanged."""
        plain = model.forward

        @wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = plain(*args, **kwargs)
            if self._answer is not None:
                output.logits = self._answer
            return output

        model.forward = forward

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the model from hidden states.  [n d] -> [n v]"""
        return self.change(self._plain(hidden))

    @contextmanager
    def answering(
        self,
        positions: Tensor,
        ids: Tensor | None,
        names: Sequence[str] = (),
        *,
        kl_reference: KLReference | None = None,
        states: bool = False,
    ) -> Iterator[None]:
        """While open, the ``logits`` of the model are the answer to a request, see :class:`HeadRequest`.

        The answer is ``[n]`` log-probabilities, or hidden states ``[n d]`` if ``ids`` is None. If more is requested, it has one
        row each for log-probabilities, the named statistics, and the ``d`` columns of the states; :func:`unpacked` splits it.
        """
        self._request = HeadRequest(positions, ids, names, kl_reference, states)
        try:
            yield
        finally:
            self._request = self._tied = self._answer = None

    def _forward(self, hidden: Tensor) -> Tensor:
        if self._request is None:
            return self._plain(hidden)
        self._answer = self._answered(hidden, self._request)
        # If the model goes on to change its logits, it gets a dummy with their shape, and `_bypass` returns the answer.
        return hidden.new_zeros(*hidden.shape[:-1], 1) if self.change.steps else self._answer

    def _answered(self, hidden: Tensor, request: HeadRequest) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])[request.positions]
        if request.ids is None:
            return rows
        parts = [*_statistics(self, rows, request.ids, request).values()]
        # A single tensor, so that wrappers around the model see an ordinary output.
        if request.states:
            return torch.cat((torch.stack(parts), rows.T))
        return parts[0] if len(parts) == 1 else torch.stack(parts)

    def _embed(self, input: Tensor) -> Tensor:
        """Forward of a tied embedding: during a request, the head gets the weight through it."""
        head, answers = self.linear, self._request is not None and self._request.ids is not None
        if head is None or not answers or torch.compiler.is_compiling():
            return self._plain_embed(input)
        rows, self._tied = tied_embedding(input, head.weight, self._padding)
        return rows

    @property
    def linear(self) -> LinearHead | None:
        """Weights of the head if it is a plain matrix product, which it is not, for example, under an adapter."""
        module = self._module
        if not is_exactly(module, nn.Linear):
            return None
        return LinearHead(module.weight if self._tied is None else self._tied, module.bias, self.change)


def install_head(model: nn.Module, change: LogitChange = UNCHANGED) -> SelectiveHead | None:
    """Install a :class:`SelectiveHead`; None if the model has no output embedding."""
    module, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return (
        SelectiveHead(module, embedding, change=change, model=inner)
        if isinstance(module, nn.Module)
        else None
    )


@torch.compiler.disable(recursive=True)  # a compiled graph would unroll the loop over tiles and gain nothing
def _statistics(head: SelectiveHead, rows: Tensor, ids: Tensor, request: HeadRequest) -> dict[str, Tensor]:
    """By tiles of the vocabulary if the heads are matrix products, else by chunks of the tokens."""
    linear, other, names = head.linear, request.kl_reference, request.names
    settings: dict[str, Any] = {} if other is None else {"direction": other.direction}
    if linear is None or (other is not None and other.linear is None) or not set(names).issubset(TILED):
        if other is not None:
            settings["reference"] = (other.hidden, other.logits)
        return chunked_statistics(rows, ids, head.logits, names, **settings)
    if other is not None and other.linear is not None:
        settings["reference"] = Reference(other.hidden, other.linear)
    return linear_statistics(rows, ids, linear, names, dtype=_product_dtype(rows), **settings)


def unpacked(
    answer: Tensor, names: Sequence[str], *, states: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Split the answer of a head into ``logp`` and the named statistics, and the states ``[n d]`` or None."""
    if not (names or states):
        return {"logp": answer}, None
    rows = iter(answer)
    found = by_name(islice(rows, 1 + len(names)), names)
    return found, torch.stack([*rows], 1) if states else None


def _product_dtype(states: Tensor) -> torch.dtype:
    """Dtype of a linear layer applied to these states, which autocast may change."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
