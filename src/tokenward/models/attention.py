"""Attention of packed rows, computed tree by tree; all other calls are those of transformers.

In a packed row, the responses to a prompt share it: they attend to the prompt and to themselves, not to each other. One
dense mask over the row would compute the scores of each response against all others, only to discard them. On a GPU in
half precision, one call of torch's flash attention for sequences computes the whole row: each response is a sequence, with
the keys of its prompt before its own. Elsewhere each comparison is cut into pieces that attend to the prompt and to a
contiguous stretch.

The functions are registered with transformers under new names, so the layers of any model call them. A call without a
tree (generation, separate rows) is passed on to ``sdpa`` or ``flex_attention``.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward, use_gqa_in_sdpa
from transformers.masking_utils import flex_attention_mask, sdpa_mask

from tokenward.tokens.trees import PackedComparison, Piece, Tree, tree_of, visible

TREE, FLEX_TREE = "tokenward_tree", "tokenward_flex_tree"
"""Names under which transformers knows the two functions."""

PLAIN_NAMES = {TREE: "sdpa", FLEX_TREE: "flex_attention"}
"""What each replaced: the name to load a model with."""

PASSED_ON = ("position_ids", "cache_position")
"""Tensor arguments that layers pass to every attention function, and that need no handling here."""

HALF = (torch.bfloat16, torch.float16)
"""Types that flash attention computes in."""

SCORES_AT_ONCE = 2**22
"""Most attention scores that :func:`_attend` computes without a fused kernel."""

SCORES_KEPT = 2**20
"""A piece with more attention scores is computed again in the backward pass. Otherwise its mask as numbers, and its copies of keys
and values, would be kept for each layer, and grow with the square of the length."""


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
    if takes_sequences(query, key, value, dropout):
        return _by_sequences(query, key, value, tree, scaling), None
    sizes = [item.length for item in tree.comparisons]
    parts = zip(
        tree.comparisons, query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True
    )
    attend = partial(_attend, scaling=scaling or query.shape[-1] ** -0.5, dropout=dropout)
    found = [
        part for item, q, k, v in parts for part in _comparison(attend, item, q, k, v, draws=dropout > 0)
    ]
    return torch.cat(found, dim=2).transpose(1, 2), None


def _check_unsupported(attention_mask: Any, kwargs: dict[str, Any], unknown: tuple[str, ...]) -> None:
    """Raise for arguments that would silently be ignored; the probe takes the error as a no to packing."""
    if isinstance(attention_mask, Tensor) and attention_mask.numel() > 1:
        raise ValueError("a layer has its own attention mask")
    for name, value in kwargs.items():
        if (name in unknown and value is not None) or (isinstance(value, Tensor) and name not in PASSED_ON):
            raise ValueError(f"a layer passes {name} to its attention")


def takes_sequences(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch's flash attention for sequences of different lengths computes this: half precision on a newer GPU."""
    width = query.shape[-1]
    return (
        query.device.type == "cuda"
        and query.dtype in HALF
        and dropout == 0.0
        and key.shape[1] == value.shape[1]
        and width == value.shape[-1] <= 256
        and width % 8 == 0
        and sequences_are_right(query.device)
    )


@cache
def sequences_are_right(device: torch.device) -> bool:
    """Whether the kernel is there and aligns queries with the last keys, tried once per device with few numbers."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    tree = tree_of([(5, (2, 3)), (1, (4, 1))])
    length, generator = tree.owner.shape[1], torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn((1, heads, length, 16), generator=generator).to(device, torch.bfloat16)
        for heads in (4, 2, 2)
    )
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            found = _by_sequences(query, key, value, tree.to(device), None)
        except (RuntimeError, NotImplementedError):  # a build of torch without the kernel
            return False
        wide = [item.float().repeat_interleave(4 // item.shape[1], 1) for item in (query, key, value)]
        mask = visible(tree.owner).to(device)
        expected = F.scaled_dot_product_attention(*wide, attn_mask=mask).transpose(1, 2)
        return bool((found.float() - expected).abs().max() < 0.05)


def _by_sequences(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scaling: float | None) -> Tensor:
    """Attention of a packed row in one call.  [1 h t d], [1 g t d], [1 g t d] -> [1 t h d]"""
    parts = tree.sequences
    own, seen, read = (item[0].transpose(0, 1) for item in (query, key, value))
    out = varlen_attn(
        own,
        seen.index_select(0, parts.keys),
        read.index_select(0, parts.keys),
        parts.query_ends,
        parts.key_ends,
        parts.most_queries,
        parts.most_keys,
        scale=scaling,
        window_size=(-1, 0),  # causal, with the last query at the last key
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]


def _comparison(
    attend: Callable[..., Tensor],
    item: PackedComparison,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    draws: bool,
) -> list[Tensor]:
    """Attention of one tree, in the order of its tokens; ``draws`` says that it draws random numbers."""
    trunk, *queries = query.split([item.trunk, *(piece.length for piece in item.pieces)], 2)
    found = [attend(trunk, key[:, :, : item.trunk], value[:, :, : item.trunk], None)]
    for piece, part in zip(item.pieces, queries, strict=True):
        computed = partial(_of_piece, attend, piece, item.trunk)
        scores = piece.length * (item.trunk + piece.before + piece.length)
        if scores > SCORES_KEPT and torch.is_grad_enabled():
            found.append(
                checkpoint(computed, part, key, value, use_reentrant=False, preserve_rng_state=draws)
            )
        else:
            found.append(computed(part, key, value))
    return found


def _of_piece(
    attend: Callable[..., Tensor], piece: Piece, trunk: int, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Attention of one piece; keys and values are those of the tree."""
    end = piece.start + piece.before + piece.length
    keys, values = (_seen(state, trunk, piece.start, end) for state in (key, value))
    return attend(query, keys, values, piece.seen(trunk, query.device))


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
    if query.device.type == "cpu" and query.dtype in HALF and few:
        seen = mask if mask is not None else _causal(query.shape[2], query.device)
        return _unfused(query, key, value, seen, scaling, dropout)
    grouped = heads != groups
    if grouped and not takes_groups(query, key, value, mask):
        key, value, grouped = repeat_kv(key, heads // groups), repeat_kv(value, heads // groups), False
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=grouped,
    )


def takes_groups(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether a fused kernel computes query heads that share a key head.

    On a GPU only flash attention does, which takes neither a mask nor float32. For anything else torch would fall back to
    plain products, which keep all scores; with repeated keys its memory-efficient kernel computes them.
    """
    if query.device.type == "cpu":
        return True
    return query.dtype in HALF and use_gqa_in_sdpa(mask, key, value)


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
