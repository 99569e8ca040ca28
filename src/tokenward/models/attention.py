"""Attention of packed rows, computed tree by tree; all other calls are those of transformers.

In a packed row, the responses to a prompt share it: they attend to the prompt and to themselves, not to each other. One
dense mask over the row would compute the scores of each response against all others, only to discard them. So each
comparison is cut into pieces that attend to the prompt and to a contiguous stretch.

The functions are registered with transformers under new names, so the layers of any model call them. A call without a
tree (generation, separate rows) is passed on to ``sdpa`` or ``flex_attention``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flex_attention_mask, sdpa_mask

from tokenward.tokens.layouts import PackedComparison, Tree

TREE, FLEX_TREE = "tokenward_tree", "tokenward_flex_tree"
"""Names under which transformers knows the two functions."""

PLAIN_NAMES = {TREE: "sdpa", FLEX_TREE: "flex_attention"}
"""What each replaced: the name to load a model with."""

PASSED_ON = ("position_ids", "cache_position")
"""Tensor arguments that layers pass to every attention function, and that need no handling here."""

SCORES_AT_ONCE = 2**22
"""Most attention scores that :func:`_attend` computes without a fused kernel."""


def install_tree_attention(model: PreTrainedModel) -> None:
    """Make the layers of a model compute packed rows. A model that uses neither sdpa nor flex attention is unchanged."""
    AttentionInterface.register(TREE, tree_attention)
    AttentionMaskInterface.register(TREE, sdpa_mask)
    AttentionInterface.register(FLEX_TREE, flex_tree_attention)
    AttentionMaskInterface.register(FLEX_TREE, flex_attention_mask)
    ours = {plain: name for name, plain in PLAIN_NAMES.items()}
    before = model.config._attn_implementation
    if before in ours:
        model.set_attn_implementation(ours[before])


def flex_tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    tree: Tree | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """:func:`tree_attention` as one call of flex attention, whose GPU kernel skips masked blocks."""
    if tree is not None:
        _check_unsupported(attention_mask, kwargs, ("sliding_window", "block_indices"))
    mask = attention_mask if tree is None else tree.block_mask
    query, key = query.to(value.dtype), key.to(value.dtype)
    return flex_attention_forward(module, query, key, value, mask, **kwargs)


# Every batch has different lengths, so a compiled graph would never be reused.
@torch.compiler.disable(recursive=True)
def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    tree: Tree | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function in the interface of transformers.  [1 h t d], [1 g t d], [1 g t d] -> [1 t h d]

    ``query`` has ``h`` heads, ``key`` and ``value`` have ``g``, each shared by ``h / g`` query heads. ``scaling`` defaults to
    ``d ** -0.5``. With a ``tree`` the row is packed and ``attention_mask`` is unused.
    """
    if tree is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _check_unsupported(attention_mask, kwargs, ("sliding_window", "block_indices", "softcap"))
    # Under autocast, rotary embeddings return float32; the values have autocast's dtype.
    query, key = query.to(value.dtype), key.to(value.dtype)
    sizes = [item.length for item in tree.comparisons]
    parts = zip(
        tree.comparisons, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True
    )
    attend = partial(_attend, scaling=scaling or query.shape[-1] ** -0.5, dropout=dropout)
    found = [part for item, q, k, v in parts for part in _comparison(attend, item, q, k, v)]
    return torch.cat(found, dim=2).transpose(1, 2), None


def _check_unsupported(attention_mask: Any, kwargs: dict[str, Any], unknown: tuple[str, ...]) -> None:
    """Raise for arguments that would silently be ignored; the probe takes the error as a no to packing."""
    if isinstance(attention_mask, Tensor) and attention_mask.numel() > 1:
        raise ValueError("a layer has its own attention mask")
    for name, value in kwargs.items():
        if (name in unknown and value is not None) or (isinstance(value, Tensor) and name not in PASSED_ON):
            raise ValueError(f"a layer passes {name} to its attention")


def _comparison(
    attend: Callable[..., Tensor], item: PackedComparison, query: Tensor, key: Tensor, value: Tensor
) -> list[Tensor]:
    """Attention of one tree, in the order of its tokens."""
    trunk, *queries = query.split([item.trunk, *(piece.length for piece in item.pieces)], 2)
    found = [attend(trunk, key[:, :, : item.trunk], value[:, :, : item.trunk], None)]
    for piece, part in zip(item.pieces, queries, strict=True):
        end = piece.start + piece.before + piece.length
        keys, values = (_seen(state, item.trunk, piece.start, end) for state in (key, value))
        found.append(attend(part, keys, values, piece.mask))
    return found


def _seen(state: Tensor, trunk: int, start: int, end: int) -> Tensor:
    """Keys or values of the trunk and of ``start`` to ``end``, without a copy if they are contiguous."""
    if start == trunk:
        return state[:, :, :end]
    return torch.cat([state[:, :, :trunk], state[:, :, start:end]], dim=2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, dropout: float
) -> Tensor:
    """Attention under a mask, causal by default.  [1 h n d], [1 g m d], [1 g m d] -> [1 h n d]"""
    heads, groups = query.shape[1], key.shape[1]
    few = heads * query.shape[2] * key.shape[2] <= SCORES_AT_ONCE
    # On the CPU, torch's fused kernel is several times slower than plain matrix products in half precision.
    if query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16) and few:
        seen = mask if mask is not None else _causal(query.shape[2], query.device)
        return _unfused(query, key, value, seen, scaling, dropout)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=heads != groups,
    )


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def _unfused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, dropout: float
) -> Tensor:
    heads, groups, length, width = query.shape[1], key.shape[1], query.shape[2], query.shape[3]
    hidden = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    # Query heads that share a key head are stacked into one matrix product.
    rows = query.reshape(groups, heads // groups * length, width)
    bias = hidden.repeat(heads // groups, 1)[None]
    scores = torch.baddbmm(bias, rows, key[0].transpose(1, 2), alpha=scaling)
    weights = F.dropout(scores.softmax(-1), dropout) if dropout else scores.softmax(-1)
    return torch.bmm(weights, value[0]).reshape(1, heads, length, value.shape[3])
