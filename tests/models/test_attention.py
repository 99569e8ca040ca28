"""Attention of packed rows against one dense mask, in every way that it is computed."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tokenward.models.attention as attention
from tests.tiny import tiny_llama, tiny_tokenizer
from tokenward.models.attention import FLEX_TREE, TREE, install_tree_attention, tree_attention
from tokenward.tokens import trees
from tokenward.tokens.trees import tree_of, visible

SHAPES = {
    "one response": [(3, [4])],
    "a pair": [(5, [2, 3])],
    "empty responses": [(4, [0, 3]), (1, [2, 0])],
    "several": [(6, [1, 2, 3, 4]), (1, [1, 1]), (2, [7, 5, 3])],
}


def states(tree, *, dtype=torch.float64):
    length = tree.owner.shape[1]
    generator = torch.Generator().manual_seed(length)
    shapes = [(1, heads, length, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def packed(tree, inputs, mask=None, **settings):
    return tree_attention(torch.nn.Identity(), *inputs, mask, scaling=0.3, tree=tree, **settings)[0]


def dense(query, key, value, tree):
    mask = visible(tree.owner)[None, None]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True, scale=0.3)
    return out.transpose(1, 2)


def gradients(found, inputs):
    coefficients = torch.arange(found.numel()).double().cos().to(found.dtype).view(found.shape)
    return torch.autograd.grad((found * coefficients).sum(), inputs)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("sizes", [(128, 512), (3, 4), (1, 2)], ids=["together", "mixed", "stretches"])
def test_pieces_equal_one_dense_mask(shapes, sizes, fused, monkeypatch):
    monkeypatch.setattr(trees, "PIECE", sizes[0])
    monkeypatch.setattr(trees, "STRETCH", sizes[1])

    def unfused(query, key, value, mask, *, scaling, dropout):
        seen = mask if mask is not None else attention._causal(query.shape[2], query.device)
        return attention._unfused(query, key, value, seen, scaling, dropout)

    if not fused:
        monkeypatch.setattr(attention, "_attend", unfused)
    tree = tree_of(shapes)
    inputs = states(tree)
    found, expected = packed(tree, inputs), dense(*inputs, tree)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs), rtol=0, atol=1e-12)


def test_half_precision_agrees():
    tree = tree_of(SHAPES["several"])
    inputs = states(tree, dtype=torch.bfloat16)
    found = packed(tree, inputs)
    wide = [item.detach().double().requires_grad_() for item in inputs]
    expected = dense(*wide, tree)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    for mine, theirs in zip(gradients(found, inputs), gradients(expected, wide), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0.05, atol=0.05)


def test_unsupported_arguments_are_refused():
    tree = tree_of(SHAPES["a pair"])
    for mask, more in ((visible(tree.owner), {}), (None, {"sliding_window": 4}), (None, {"softcap": 2.0})):
        with pytest.raises(ValueError, match="a layer "):
            packed(tree, states(tree), mask, **more)


def test_dropout_is_applied_with_and_without_the_fused_kernel():
    tree = tree_of(SHAPES["a pair"])
    for dtype in (torch.float32, torch.bfloat16):
        inputs = states(tree, dtype=dtype)
        torch.manual_seed(0)
        assert (packed(tree, inputs, dropout=0.5) - packed(tree, inputs)).abs().max() > 0.1


def lower_right(
    query, key, value, query_ends, key_ends, most_queries, most_keys, *, scale, window_size, enable_gqa
):
    """What torch's varlen_attn documents, in plain products: the last query of a sequence is at its last key."""
    assert window_size == (-1, 0)
    assert (most_queries, most_keys) == (int(query_ends.diff().max()), int(key_ends.diff().max()))
    sizes = [ends.diff().tolist() for ends in (query_ends, key_ends)]
    parts = zip(query.split(sizes[0]), key.split(sizes[1]), value.split(sizes[1]), strict=True)
    found = []
    for q, k, v in parts:
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        states = [item.transpose(0, 1)[None] for item in (q, k, v)]
        out = F.scaled_dot_product_attention(*states, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        found.append(out[0].transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_sequences_in_one_call_equal_one_dense_mask(shapes, monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", lower_right)
    monkeypatch.setattr(attention, "takes_sequences", lambda *inputs: True)
    tree = tree_of(shapes)
    inputs = states(tree)
    found, expected = packed(tree, inputs), dense(*inputs, tree)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs), rtol=0, atol=1e-12)


def test_a_kernel_with_another_alignment_is_not_used(monkeypatch):
    def upper_left(query, key, value, query_ends, key_ends, *more, **settings):
        flipped = lower_right(
            query.flip(0), key.flip(0), value.flip(0), query_ends, key_ends, *more, **settings
        )
        return flipped.flip(0)

    def missing(*inputs, **settings):
        raise NotImplementedError

    cpu = torch.device("cpu")
    for kernel, right in ((lower_right, True), (upper_left, False), (missing, False)):
        attention.sequences_are_right.cache_clear()
        monkeypatch.setattr(attention, "varlen_attn", kernel)
        assert attention.sequences_are_right(cpu) is right
    attention.sequences_are_right.cache_clear()


def test_the_call_of_the_kernel_has_the_types_and_shapes_that_torch_takes():
    tree = tree_of(SHAPES["several"]).to("meta")
    inputs = [item.detach().to("meta").requires_grad_() for item in states(tree, dtype=torch.bfloat16)]
    found = attention._by_sequences(*inputs, tree, 0.3)
    assert (found.shape, found.dtype) == ((1, tree.owner.shape[1], 4, 8), torch.bfloat16)
    assert [item.shape for item in torch.autograd.grad(found.sum(), inputs)] == [
        item.shape for item in inputs
    ]
    sequences = tree.sequences
    assert sequences.query_ends.dtype == sequences.key_ends.dtype == torch.int32


def test_grouped_heads_are_repeated_where_no_fused_kernel_takes_them(monkeypatch):
    mask, calls = torch.ones(2, 2, dtype=torch.bool), []

    def takes(dtype, seen, device):
        query, key, value = (torch.zeros(1, heads, 2, 8, dtype=dtype, device=device) for heads in (4, 2, 2))
        return attention.takes_groups(query, key, value, seen)

    half, full = torch.bfloat16, torch.float32
    assert all(takes(dtype, seen, "cpu") for dtype in (half, full) for seen in (None, mask))
    assert [takes(dtype, seen, "meta") for dtype in (half, full) for seen in (None, mask)] == [
        True,
        False,
        False,
        False,
    ]
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(attention, "takes_groups", lambda *inputs: False)
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(k["enable_gqa"]) or plain(*a, **k)
    )
    tree = tree_of(SHAPES["several"])
    inputs = states(tree)
    found = packed(tree, inputs)
    assert set(calls) == {False}
    monkeypatch.undo()
    expected = dense(*inputs, tree)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(found, inputs), gradients(expected, inputs), rtol=0, atol=1e-12)


def random_shapes(seed):
    rng = random.Random(seed)
    return [
        (rng.randint(1, 300), [rng.randint(0, 200) for _ in range(rng.randint(1, 4))])
        for _ in range(rng.randint(1, 6))
    ]


@pytest.mark.parametrize("shapes", [*SHAPES.values(), *map(random_shapes, range(12)), [(256, [128, 384])]])
def test_block_mask_of_flex_attention_is_that_of_the_dense_mask(shapes):
    tree = tree_of(shapes)
    mask, found = visible(tree.owner), tree.block_mask
    places = torch.arange(len(mask))
    assert torch.equal(found.mask_mod(None, None, places[:, None].expand(mask.shape), places[None]), mask)
    expected = create_block_mask(found.mask_mod, 1, None, len(mask), len(mask), device="cpu")
    assert found.shape == expected.shape
    assert found.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in ("kv", "full_kv", "q", "full_q"):
        mine, theirs = (getattr(item, f"{name}_num_blocks") for item in (found, expected))
        assert torch.equal(mine, theirs)
        assert mine.dtype == theirs.dtype
        order, other = (getattr(item, f"{name}_indices") for item in (found, expected))
        assert order.dtype == other.dtype
        listed = torch.arange(order.shape[-1]) < mine[..., None]
        assert torch.equal(order.masked_fill(~listed, -1), other.masked_fill(~listed, -1))


def test_a_block_mask_needs_no_matrix_of_all_tokens():
    tree = tree_of([(1000, [500, 500])] * 20)
    sizes = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            sizes.extend(item.numel() for item in tree_leaves(found) if isinstance(item, torch.Tensor))
            return found

    with Largest():
        assert tree.block_mask.seq_lengths == (40_000, 40_000)
    assert max(sizes) < 40_000**2 / 5_000


def test_only_supported_attention_is_replaced_and_a_call_without_tree_is_unchanged(tmp_path):
    for before, after in (("sdpa", TREE), ("flex_attention", FLEX_TREE), ("eager", "eager")):
        model = tiny_llama()
        model.set_attn_implementation(before)
        install_tree_attention(model)
        assert model.config._attn_implementation == after
    model, ids = tiny_llama(), torch.tensor([tiny_tokenizer()("the good thing")["input_ids"]])
    install_tree_attention(model)
    mine = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    assert "tokenward" not in (tmp_path / "config.json").read_text()
    model.set_attn_implementation("sdpa")
    assert torch.equal(mine, model(input_ids=ids).logits)


def test_what_a_long_row_keeps_for_the_backward_pass_grows_with_its_length(monkeypatch):
    """Not with the square of it, as masks and copies of keys would; and computing them again changes nothing, to the bit."""
    monkeypatch.setattr(trees, "STRETCH", 8)

    def kept(length: int, limit: int):
        monkeypatch.setattr(attention, "SCORES_KEPT", limit)
        tree, storages = tree_of([(8, [length, length])]), {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = (
                tensor  # kept alive, so that no address is used twice
            )
            return tensor

        inputs = states(tree)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            found = packed(tree, inputs)
        size = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
        masks = [piece.mask for item in tree.comparisons for piece in item.pieces]
        assert masks == [None] * (2 * length // 8)
        return size, gradients(found, inputs)

    (short, _), (long, again) = (kept(length, 0) for length in (200, 400))
    assert long < 2.1 * short
    squared, (everything, plain) = kept(200, 2**62)[0], kept(400, 2**62)
    assert everything > 2.8 * squared
    assert all(torch.equal(*pair) for pair in zip(again, plain, strict=True))
