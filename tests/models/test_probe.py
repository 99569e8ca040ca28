"""What the probe finds on models that are wrong in one way only, and heads whose logits the model changes."""

import math

import pytest
import torch

from tests.models.families import ROWS, tiny
from tests.models.plain import plain_logprobs
from tests.tiny import tiny_gpt2, tiny_llama
from tokenward.errors import UserError
from tokenward.models.forward import FrozenReference, token_logprobs, token_statistics
from tokenward.models.probe import choose_head, choose_layout
from tokenward.ops.logprob import LinearHead, LogitChange, LogitStep
from tokenward.ops.tiles import linear_statistics
from tokenward.tokens.batches import Needs, collate


def test_a_soft_cap_by_hand():
    """Two logits, 3 and 0, under a cap of 2: 2 tanh(3/2) = 1.8103 against 0."""
    head = LinearHead(torch.tensor([[3.0], [0.0]]), None, LogitChange((LogitStep("cap", 2.0),)))
    hidden = torch.ones(1, 1, requires_grad=True)
    found = linear_statistics(hidden, torch.tensor([0]), head)["logp"]
    capped = 2 * math.tanh(1.5)
    assert float(found.detach()) == pytest.approx(capped - math.log(math.exp(capped) + 1), abs=1e-6)
    found.backward()
    found = found.detach()
    # (1 - p) times the slope of the cap, 1 - tanh^2, times the weight.
    expected = (1 - math.exp(float(found))) * (1 - math.tanh(1.5) ** 2) * 3
    assert float(hidden.grad) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("weak", [1e-3, 1e-6])
def test_an_influence_is_found_however_weak_it_is(weak):
    """A layer that adds a little of the token before, as a convolution does, across the border of two responses."""
    model = tiny_llama()
    layer = model.model.layers[0].mlp
    plain = layer.forward
    layer.forward = lambda hidden: plain(hidden) + weak * torch.nn.functional.pad(hidden, (0, 0, 1, -1))
    assert choose_layout(model, packing="auto", name="it") == "separate"
    with pytest.raises(UserError, match=r"layers.0.mlp a response sees another"):
        choose_layout(model, packing="shared_prompts", name="it")


def test_a_model_that_looks_ahead_is_refused():
    model = tiny_llama()
    layer = model.model.layers[1].mlp
    plain = layer.forward
    layer.forward = lambda hidden: plain(hidden) + 1e-6 * torch.nn.functional.pad(hidden, (0, 0, -1, 1))
    with pytest.raises(UserError, match=r"layers.1.mlp a token changes"):
        choose_layout(model, packing="auto", name="it")


def test_a_model_that_is_another_in_a_padded_batch_is_refused():
    model = tiny_llama()
    plain = model.model.forward

    def forward(*args, attention_mask=None, **kwargs):
        output = plain(*args, attention_mask=attention_mask, **kwargs)
        padded = attention_mask is not None and attention_mask.dim() == 2 and not attention_mask.all()
        output.last_hidden_state = output.last_hidden_state * (1.1 if padded else 1.0)
        return output

    model.model.forward = forward
    with pytest.raises(UserError, match="other numbers in a batch"):
        choose_layout(model, packing="auto", name="it")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_that_no_number_of_the_config_explains_makes_all_logits(dtype):
    model = tiny_gpt2(dtype=dtype)
    plain = model.forward

    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    model.forward = forward
    assert choose_head(model, name="it") is None


def test_the_choice_is_said_once(caplog):
    for _ in range(2):
        choose_layout(tiny("gptj"), packing="auto", name="some gptj")
    assert [record.getMessage() for record in caplog.records if "gptj" in record.getMessage()] == [
        "some gptj computes each response in a row of its own: in transformer.h.0.attn a response sees another one"
    ]


def test_a_model_is_as_it_was_after_the_probe():
    model = tiny("llama", dtype=torch.bfloat16)
    before = {name: (id(item), item.data_ptr(), item.clone()) for name, item in model.named_parameters()}
    choose_layout(model, packing="auto", name="it")
    for name, item in model.named_parameters():
        assert (id(item), item.data_ptr()) == before[name][:2]
        assert torch.equal(item, before[name][2])


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_statistics_of_a_changed_head_are_those_of_all_logits(family):
    """Entropy, divergence and rank, and the states that a frozen reference is read by."""
    model, other = tiny(family), tiny(family, lively=False)
    heads = choose_head(model, name="it"), choose_head(other, name="it")
    batch = collate(list(ROWS), layout="separate", pad_id=0)

    def found(head, reference_head):
        reference = FrozenReference(other, reference_head)
        needs = Needs(entropy=True, token_rank=True, kl="reverse")
        return token_statistics(model, head, batch, needs, reference)

    torch.testing.assert_close(found(*heads), found(None, None), rtol=0, atol=2e-6)
    # Outside a request the model is as before.
    with torch.no_grad():
        assert torch.equal(plain_logprobs(model, ROWS), plain_logprobs(tiny(family), ROWS))
        assert token_logprobs(model, heads[0], batch).isfinite().all()
