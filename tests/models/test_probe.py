"""What the probe finds on models that are wrong in a single way, and on heads whose logits the model changes."""

import pytest
import torch

from tests.models.families import ROWS, tiny
from tests.models.plain import plain_logprobs
from tests.tiny import tiny_gpt2, tiny_llama
from tokenward.errors import UserError
from tokenward.models.forward import FrozenReference, token_statistics
from tokenward.models.probe import choose_head, choose_layout
from tokenward.tokens.batches import Needs, collate


def leaky_llama(layer: int, strength: float, shift: int):
    """A Llama with a layer that adds a little of a neighboring token, as a convolution does."""
    model = tiny_llama()
    mlp = model.model.layers[layer].mlp
    plain = mlp.forward
    mlp.forward = lambda hidden: (
        plain(hidden) + strength * torch.nn.functional.pad(hidden, (0, 0, shift, -shift))
    )
    return model


@pytest.mark.parametrize("strength", [1e-3, 1e-6])
def test_any_influence_across_responses_is_found(strength):
    model = leaky_llama(0, strength, 1)
    assert choose_layout(model, packing="auto", name="it") == "separate"
    with pytest.raises(UserError, match=r"layers\.0\.mlp") as error:
        choose_layout(model, packing="shared_prompts", name="it")
    assert (error.value.code, error.value.key) == ("unsupported-packing", "model.packing")


def test_model_that_looks_ahead_is_refused():
    with pytest.raises(UserError, match=r"layers\.1\.mlp") as error:
        choose_layout(leaky_llama(1, 1e-6, -1), packing="auto", name="it")
    assert error.value.code == "not-causal"


def test_model_that_depends_on_padding_is_refused():
    model = tiny_llama()
    plain = model.model.forward

    def forward(*args, attention_mask=None, **kwargs):
        output = plain(*args, attention_mask=attention_mask, **kwargs)
        padded = attention_mask is not None and attention_mask.dim() == 2 and not attention_mask.all()
        output.last_hidden_state = output.last_hidden_state * (1.1 if padded else 1.0)
        return output

    model.model.forward = forward
    with pytest.raises(UserError) as error:
        choose_layout(model, packing="auto", name="it")
    assert error.value.code == "batch-dependent-model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logit_change_with_a_number_outside_the_config_needs_all_logits(dtype):
    model = tiny_gpt2(dtype=dtype)
    plain = model.forward

    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    model.forward = forward
    assert choose_head(model, name="it") is None


def test_a_warning_is_logged_once(caplog, monkeypatch):
    """Also of a model that was trained from the first, which has another name."""
    monkeypatch.setattr("tokenward.models.probe._warned", set())
    for name in ("some gptj", "oracle/model"):
        choose_layout(tiny("gptj"), packing="auto", name=name)
    (message,) = [record.getMessage() for record in caplog.records if "gptj" in record.getMessage()]
    assert "transformer.h.0.attn" in message


def test_the_probe_leaves_the_weights_unchanged():
    model = tiny("llama", dtype=torch.bfloat16)
    before = {name: (id(item), item.data_ptr(), item.clone()) for name, item in model.named_parameters()}
    choose_layout(model, packing="auto", name="it")
    for name, item in model.named_parameters():
        assert (id(item), item.data_ptr()) == before[name][:2]
        assert torch.equal(item, before[name][2])


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_statistics_of_changed_logits_are_those_of_all_logits(family):
    model, other = tiny(family), tiny(family, lively=False)
    heads = choose_head(model, name="it"), choose_head(other, name="it")
    batch = collate(list(ROWS), layout="separate", pad_id=0)

    def found(head, reference_head):
        needs = Needs(entropy=True, token_rank=True, kl="reverse")
        return token_statistics(model, head, batch, needs, FrozenReference(other, reference_head))

    torch.testing.assert_close(found(*heads), found(None, None), rtol=0, atol=2e-6)
    with torch.no_grad():  # outside a request the model is unchanged
        assert torch.equal(plain_logprobs(model, ROWS), plain_logprobs(tiny(family), ROWS))
