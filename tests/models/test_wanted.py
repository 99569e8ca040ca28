"""What a pass gives beside log-probabilities: divergences with gradient, states, the layers of a reference."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.models.plain import plain_logits
from tests.models.test_forward import FACTORS, ROWS, TOTAL, batch_of, gradients, made
from tests.tiny import tiny_gpt2, tiny_llama, tiny_t5
from tests.training.tools import language_model
from tokenward.models.forward import FrozenReference, token_statistics
from tokenward.models.head import SelectiveHead, install_head
from tokenward.ops.logprob import kl_of
from tokenward.tokens.batches import Needs, collate
from tokenward.training.checks import disable_dropout

PAIRS = [(row.prompt, response) for row in ROWS for response in row.responses]
DIRECTIONS = ["forward", "reverse"]


def reference_model() -> FrozenReference:
    model = tiny_gpt2(dtype=torch.float64, seed=1).eval()
    return FrozenReference(model, install_head(model))


def all_logits(model):
    return torch.cat([plain_logits(model, *pair) for pair in PAIRS])


def close(found, expected, largest=1.0):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * largest)


def check(model, head, reference, direction, batch, expected_kl):
    slopes = gradients(model, expected_kl, FACTORS)
    found = token_statistics(model, head, batch, Needs(kl=direction, entropy=True), reference)
    close(found["kl"], expected_kl)
    mine = gradients(model, found["kl"], FACTORS)
    close(mine, slopes, max(float(slope.abs().max()) for slope in slopes.values()))
    assert found["entropy"].min() > 0


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("linear", [True, False, None])
def test_divergence_and_its_gradient_are_those_of_all_logits(direction, layout, linear, monkeypatch):
    """With a head that is a matrix product, with one that is not, and with none that answers."""
    model, head = made("gpt2", torch.float64)
    reference = reference_model()
    with torch.no_grad():
        theirs = all_logits(reference.model)
    if linear is False:
        monkeypatch.setattr(SelectiveHead, "linear", None)
    if linear is None:
        head, reference = None, replace(reference, head=None)
    expected = kl_of(all_logits(model), theirs, direction)
    assert expected.min() > 0.05
    check(model, head, reference, direction, batch_of(ROWS, layout), expected)
    assert all(weight.grad is None for weight in reference.model.parameters())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_an_adapter_is_left_out_of_its_own_reference(direction, layout):
    """The same numbers as with a second copy of the base, and the adapter back in place."""
    base = tiny_gpt2(dtype=torch.float64).eval()
    torch.manual_seed(2)
    lora = LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny_gpt2(dtype=torch.float64).eval(), lora).to(torch.float64)
    head = install_head(model)
    expected = kl_of(all_logits(model), all_logits(base).detach(), direction)
    assert expected.min() > 1e-4
    before = all_logits(model).detach()
    batch = batch_of(ROWS, layout)
    reference = FrozenReference(model, head, without_adapter=True)
    adapter = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    slopes = torch.autograd.grad((expected * FACTORS).sum(), [*adapter.values()])
    disable_dropout(model)
    model.train()
    found = token_statistics(model, head, batch, Needs(kl=direction), reference)["kl"]
    assert model.training
    close(found, expected)
    mine = torch.autograd.grad((found * FACTORS).sum(), [*adapter.values()])
    close(mine, slopes, max(float(slope.abs().max()) for slope in slopes))
    assert torch.equal(all_logits(model), before)


@pytest.mark.usefixtures("exact_llama")
def test_a_head_with_an_adapter_of_its_own_is_left_out_too():
    base, adapted = (tiny_llama(dtype=torch.float64, tie_word_embeddings=False).eval() for _ in range(2))
    torch.manual_seed(2)
    lora = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(adapted, lora).to(torch.float64)
    head = install_head(model)
    assert head.linear is None
    expected = kl_of(all_logits(model), all_logits(base).detach(), "forward")
    reference = FrozenReference(model, head, without_adapter=True)
    found = token_statistics(model, head, batch_of(ROWS, "shared"), Needs(kl="forward"), reference)["kl"]
    close(found, expected)
    assert expected.min() > 1e-4
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    slopes = torch.autograd.grad((expected * FACTORS).sum(), weights)
    close(torch.autograd.grad((found * FACTORS).sum(), weights), slopes)


@pytest.mark.parametrize("with_head", [True, False])
def test_tokens_without_weight_have_none_of_it(with_head):
    model, head = made("gpt2", torch.float64)
    weights = (torch.arange(TOTAL) % 3 != 1).float()
    reference = reference_model()
    if not with_head:
        head, reference = None, replace(reference, head=None)
    needs = Needs(kl="forward", states=True, reference_layers=True)
    found = token_statistics(model, head, batch_of(ROWS, "shared", weights=weights), needs, reference)
    whole = token_statistics(model, head, batch_of(ROWS, "separate"), needs, reference)
    kept = weights != 0
    assert found.keys() == {"logp", "kl", "states", "reference_layers"}
    for name, some in found.items():
        close(some[kept], whole[name][kept])
        assert not some[~kept].any()


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("with_head", [True, False])
def test_states_and_layers_are_those_at_the_position_before_the_token(layout, with_head):
    model, head = made("gpt2", torch.float64)
    reference = reference_model()
    if not with_head:
        head, reference = None, replace(reference, head=None)
    states, layers = [], []
    with torch.no_grad():
        for prompt, response in PAIRS:
            ids = torch.tensor([prompt + response])
            place = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
            states.append(model.transformer(ids).last_hidden_state[0, place])
            output = reference.model(ids, output_hidden_states=True).hidden_states
            layers.append(torch.stack([layer[0, place] for layer in output[1:]], 1))
    needs = Needs(states=True, reference_layers=True)
    found = token_statistics(model, head, batch_of(ROWS, layout), needs, reference)
    close(found["states"], torch.cat(states))
    close(found["reference_layers"], torch.cat(layers))
    assert found["reference_layers"].shape[1] == 2
    assert found["states"].requires_grad
    assert not found["reference_layers"].requires_grad


def test_an_encoder_decoder_has_them_too():
    model, other = tiny_t5(dtype=torch.float64).eval(), tiny_t5(dtype=torch.float64, seed=1).eval()
    policy = replace(language_model(model, layout="encoder_decoder"), start_id=0)
    batch = policy.collate(list(ROWS))
    reference = FrozenReference(other, SelectiveHead(other.lm_head))
    needs = Needs(kl="forward", states=True, reference_layers=True)
    found = token_statistics(policy.model, policy.head, batch, needs, reference)
    with torch.no_grad():
        mine, theirs = (torch.cat([t5_logits(item, *pair) for pair in PAIRS]) for item in (model, other))
    torch.testing.assert_close(found["kl"], kl_of(mine, theirs, "forward"), rtol=0, atol=1e-5)
    assert found["reference_layers"].shape == (TOTAL, 2, 32)


def t5_logits(model, prompt, response):
    decoder = torch.tensor([[0, *response[:-1]]])
    return model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]


def test_a_divergence_without_a_reference_is_a_mistake():
    model, head = made("gpt2", torch.float32)
    batch = collate([ROWS[0]], layout="shared", pad_id=0)
    with pytest.raises(ValueError, match="there is no reference"):
        token_statistics(model, head, batch, Needs(kl="forward"))
