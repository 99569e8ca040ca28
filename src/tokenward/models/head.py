"""The language model head, computed for selected tokens only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import islice
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

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
    """What a model is compared with over the whole vocabulary; it gets no gradient.

    Attributes:
        hidden: ``[n d]``, the other model's states at the same positions.
        linear: Its head, where that is nothing but a matrix product.
        logits: Its head as a function.
        direction: Of the KL divergence.
    """

    hidden: Tensor
    linear: LinearHead | None
    logits: Head
    direction: Direction


class HeadRequest(NamedTuple):
    """What the head shall answer.

    Attributes:
        positions: ``[n]``, indices into the flattened ``rows x t`` hidden states.
        ids: ``[n]`` tokens whose log-probability is wanted, or None for the hidden states themselves.
        names: Statistics that are wanted beside it, of :data:`tokenward.ops.logprob.STATISTICS`.
        kl_reference: The other model, needed for ``kl``.
        states: Whether the hidden states are wanted beside it.
    """

    positions: Tensor
    ids: Tensor | None
    names: Sequence[str] = ()
    kl_reference: KLReference | None = None
    states: bool = False


class SelectiveHead:
    """Makes a model's output embedding answer requests.

    Outside :meth:`answering` the module works as before, so generation, saving and evaluation with
    other tools see an ordinary model.

    Args:
        module: The output embedding.
        embedding: The input embedding. Where both share one weight, so do they one gradient; see
            :mod:`tokenward.ops.representation`.
        change: What the model does to its head's logits.
        model: The model, needed where it does something: what the head answers must not meet it.
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
        if model is not None and change.steps:
            self._pass_by(model)
        self._tied: Tensor | None = None  # the weight as the embedding handed it on in this request
        module.forward = self._forward  # an instance's forward: hooks, state dict and class stay as they are
        if type(embedding) is nn.Embedding and embedding.weight is getattr(module, "weight", None):
            self._plain_embed, self._padding = embedding.forward, embedding.padding_idx
            embedding.forward = self._embed

    def _pass_by(self, model: nn.Module) -> None:
        """Let the answer leave the model's forward as it is, not changed as if it were logits."""
        plain = model.forward

        @wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = plain(*args, **kwargs)
            if self._answer is not None:
                output.logits = self._answer
            return output

        model.forward = forward

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits of hidden states.  [n d] -> [n v]"""
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
        """While open, the model's ``logits`` are what was asked for; :func:`unpacked` takes them apart.

        ``[n]`` log-probabilities; with more, one row each of log-probabilities, the named statistics and the ``d``
        columns of the states; without ids ``[n d]`` states.
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
        # What the model changes and throws away has the shape of logits, for it may look at that.
        return hidden.new_zeros(*hidden.shape[:-1], 1) if self.change.steps else self._answer

    def _answered(self, hidden: Tensor, request: HeadRequest) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])[request.positions]
        if request.ids is None:
            return rows
        found = _statistics(self, rows, request.ids, request)
        # One tensor, so that whatever wraps the model's forward sees an output like any other.
        parts = [*found.values()]
        if request.states:
            return torch.cat((torch.stack(parts), rows.T))
        return parts[0] if len(parts) == 1 else torch.stack(parts)

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
        return LinearHead(module.weight if self._tied is None else self._tied, module.bias, self.change)


def install_head(model: nn.Module, change: LogitChange = UNCHANGED) -> SelectiveHead | None:
    """Let a model's head answer requests; None where it has none that is a module.

    Args:
        model: The model.
        change: What it does to its head's logits; :func:`tokenward.models.probe.logit_change` finds out.
    """
    module, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(module, nn.Module):
        return None
    return SelectiveHead(module, embedding, change=change, model=inner)


@torch.compiler.disable(
    recursive=True
)  # a loop over tiles: unrolled it would be a long graph that saves nothing
def _statistics(head: SelectiveHead, rows: Tensor, ids: Tensor, request: HeadRequest) -> dict[str, Tensor]:
    linear, kl_reference, names = head.linear, request.kl_reference, request.names
    asked: dict[str, Any] = {} if kl_reference is None else {"direction": kl_reference.direction}
    chunked = linear is None or (kl_reference is not None and kl_reference.linear is None)
    if chunked or not set(names).issubset(TILED):
        if kl_reference is not None:
            asked["reference"] = (kl_reference.hidden, kl_reference.logits)
        return chunked_statistics(rows, ids, head.logits, names, **asked)
    if kl_reference is not None and kl_reference.linear is not None:
        asked["reference"] = Reference(kl_reference.hidden, kl_reference.linear)
    return linear_statistics(rows, ids, linear, names, dtype=product_type(rows), **asked)  # type: ignore[arg-type]


def unpacked(
    answer: Tensor, names: Sequence[str], *, states: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What a head answered: ``logp`` and the named statistics, and the states ``[n d]`` or None."""
    if not (names or states):
        return {"logp": answer}, None
    rows = iter(answer)
    found = by_name(islice(rows, 1 + len(names)), names)
    return found, torch.stack([*rows], 1) if states else None


def product_type(states: Tensor) -> torch.dtype:
    """Number type of matrix products with these states: autocast's, where it is on."""
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
