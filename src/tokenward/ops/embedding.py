# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""An embedding whose weight is the head's too: one gradient of the vocabulary's size instead of two.

Autograd makes a whole table for the embedding's gradient and another one for the head's, and adds them. Here
the head reads the weight through the embedding, so that its gradient comes by and takes the few rows in.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def tied_embedding(ids: Tensor, weight: Tensor, padding: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows of an embedding, and its weight for the head.  [...], [v d] -> [... d], [v d]

    The weight that is returned must be used for one thing, whose gradient is a tensor that nobody else holds: it
    is changed in place.

    Args:
        ids: Tokens.
        weight: Of embedding and head.
        padding: Token whose row gets no gradient from the embedding.
    """
    rows, for_head = _Tied.apply(weight, ids, padding)  # type: ignore[misc]
    return rows, for_head


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, weight: Tensor, ids: Tensor, padding: int | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.shape = padding, weight.shape
        ctx.set_materialize_grads(False)
        return F.embedding(ids, weight), weight.detach()

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, of_rows: Tensor | None, of_head: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        (ids,) = ctx.saved_tensors
        if of_rows is None:
            return of_head, None, None
        total = of_rows.new_zeros(ctx.shape) if of_head is None else of_head
        flat, slopes = ids.reshape(-1), of_rows.reshape(-1, of_rows.shape[-1])
        if ctx.padding is not None:
            slopes = slopes.masked_fill((flat == ctx.padding)[:, None], 0.0)
        return total.index_add_(0, flat, slopes.to(total.dtype)), None, None
