"""Attention of packed rows against one dense mask, in every way that it is computed."""

import pytest
import torch
import torch.nn.functional as F

import tokenward.models.attention as attention
from tests.tiny import tiny_llama, tiny_tokenizer
from tokenward.models.attention import FLEX_TREE, TREE, install_tree_attention, tree_attention
from tokenward.tokens import layouts as trees
from tokenward.tokens.layouts import tree_of, visible

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


def test_block_mask_of_flex_attention_is_the_dense_mask():
    tree = tree_of(SHAPES["several"])
    mask = visible(tree.owner)
    places = torch.arange(len(mask))
    found = tree.block_mask.mask_mod(None, None, places[:, None].expand(mask.shape), places[None])
    assert torch.equal(found, mask)


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
