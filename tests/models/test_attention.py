"""Attention of packed rows against one dense mask, in every way it is computed."""

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
    "no rest of one": [(4, [0, 3]), (1, [2, 0])],
    "several": [(6, [1, 2, 3, 4]), (1, [1, 1]), (2, [7, 5, 3])],
}


def states(length: int, *, heads: int = 4, groups: int = 2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(1, count, length, 8, generator=generator).to(dtype).requires_grad_()
        for count in (heads, groups, groups)
    ]


def dense(query, key, value, tree):
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible(tree.owner)[None, None], enable_gqa=True, scale=0.3
    )
    return out.transpose(1, 2)


def gradients(found, inputs):
    coefficients = torch.arange(found.numel()).double().cos().to(found.dtype).view(found.shape)
    return torch.autograd.grad((found * coefficients).sum(), inputs)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("sizes", [(128, 512), (3, 4), (1, 2)], ids=["together", "mixed", "stretches"])
def test_pieces_equal_one_dense_mask(shapes, sizes, monkeypatch):
    monkeypatch.setattr(trees, "PIECE", sizes[0])
    monkeypatch.setattr(trees, "STRETCH", sizes[1])
    tree = tree_of(shapes)
    inputs = states(tree.owner.shape[1])
    found, _ = tree_attention(torch.nn.Identity(), *inputs, None, scaling=0.3, tree=tree)
    expected = dense(*inputs, tree)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for mine, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_half_precision_is_written_out_and_agrees():
    tree = tree_of(SHAPES["several"])
    inputs = states(tree.owner.shape[1], dtype=torch.bfloat16)
    found, _ = tree_attention(torch.nn.Identity(), *inputs, None, scaling=0.3, tree=tree)
    wide = [item.detach().double().requires_grad_() for item in inputs]
    expected = dense(*wide, tree)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    for mine, theirs in zip(gradients(found, inputs), gradients(expected, wide), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=0.05, atol=0.05)


def test_few_scores_are_written_out_in_float32_too(monkeypatch):
    """The written-out form is the same mathematics; here in a precision that can tell."""
    tree = tree_of(SHAPES["several"])
    inputs = states(tree.owner.shape[1])
    expected, _ = tree_attention(torch.nn.Identity(), *inputs, None, scaling=0.3, tree=tree)

    def written_out(query, key, value, mask, *, scaling, dropout):
        seen = mask if mask is not None else attention._causal(query.shape[2], query.device)
        return attention._written_out(query, key, value, seen, scaling, dropout)

    monkeypatch.setattr(attention, "_attend", written_out)
    found, _ = tree_attention(torch.nn.Identity(), *inputs, None, scaling=0.3, tree=tree)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_what_a_layer_wants_beyond_the_tree_is_not_left_out():
    tree = tree_of(SHAPES["a pair"])
    inputs = states(tree.owner.shape[1])
    for mask, more in ((visible(tree.owner), {}), (None, {"sliding_window": 4}), (None, {"softcap": 2.0})):
        with pytest.raises(ValueError, match="a layer "):
            tree_attention(torch.nn.Identity(), *inputs, mask, scaling=0.3, tree=tree, **more)


def test_dropout_reaches_both_forms():
    tree = tree_of(SHAPES["a pair"])
    for dtype in (torch.float32, torch.bfloat16):
        inputs = states(tree.owner.shape[1], dtype=dtype)
        torch.manual_seed(0)
        dropped, _ = tree_attention(torch.nn.Identity(), *inputs, None, dropout=0.5, scaling=0.3, tree=tree)
        whole, _ = tree_attention(torch.nn.Identity(), *inputs, None, scaling=0.3, tree=tree)
        assert (dropped - whole).abs().max() > 0.1


def test_the_block_mask_of_flex_attention_is_the_dense_mask():
    tree = tree_of(SHAPES["several"])
    mask = visible(tree.owner)
    length = mask.shape[0]
    places = torch.arange(length)
    found = tree.block_mask.mask_mod(None, None, places[:, None].expand(length, length), places[None])
    assert torch.equal(found, mask)


def test_only_attention_that_takes_trees_is_replaced():
    for before, after in (("sdpa", TREE), ("flex_attention", FLEX_TREE), ("eager", "eager")):
        model = tiny_llama()
        model.set_attn_implementation(before)
        install_tree_attention(model)
        assert model.config._attn_implementation == after


def test_without_a_tree_it_is_transformers_own(tmp_path):
    model = tiny_llama()
    ids = torch.tensor([tiny_tokenizer()("the good thing")["input_ids"]])
    mine = model(input_ids=ids).logits
    # A saved folder names no attention of ours.
    model.save_pretrained(tmp_path)
    assert "tokenward" not in (tmp_path / "config.json").read_text()
    model.set_attn_implementation("sdpa")
    assert torch.equal(mine, model(input_ids=ids).logits)
