"""Statistics besides log-probabilities: entropy, rank and divergence, hidden states, and the layers of a reference."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.models.plain import plain_logits
from tests.models.test_forward import FACTORS, ROWS, SOME, TOTAL, batch_of, made
from tests.tiny import tiny_gpt2, tiny_llama, tiny_t5
from tests.training.tools import language_model
from tokenward.models.forward import FrozenReference, run_model, token_kl, token_statistics
from tokenward.models.head import SelectiveHead, install_head
from tokenward.ops.logprob import STATISTICS, entropy_of, kl_of, rank_of
from tokenward.ops.representation import entropy_and_rank
from tokenward.tokens.batches import Needs
from tokenward.training.checks import disable_dropout

PAIRS = [(row.prompt, response) for row in ROWS for response in row.responses]
IDS = torch.tensor([token for _, response in PAIRS for token in response])
DIRECTIONS = ["forward", "reverse"]


def reference_model() -> FrozenReference:
    model = tiny_gpt2(dtype=torch.float64, seed=1).eval()
    return FrozenReference(model, install_head(model))


def all_logits(model):
    return torch.cat([plain_logits(model, *pair) for pair in PAIRS])


def close(found, expected, size=1.0):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * size)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("kind", ["linear", "custom", "none"])
def test_statistics_and_gradients_are_those_of_all_logits(direction, layout, kind, monkeypatch):
    """With a head that is a matrix product, one that is not, and none; some tokens have no weight."""
    model, head = made("gpt2", torch.float64)
    reference = reference_model()
    with torch.no_grad():
        theirs = all_logits(reference.model)
    if kind == "custom":
        monkeypatch.setattr(SelectiveHead, "linear", None)
    if kind == "none":
        head, reference = None, replace(reference, head=None)
    logits = all_logits(model)
    expected = {
        "logp": logits.log_softmax(-1)[torch.arange(TOTAL), IDS],
        "entropy": entropy_of(logits),
        "kl": kl_of(logits, theirs, direction),
    }
    kept, weights = SOME != 0, [*model.parameters()]
    needs = Needs(kl=direction, entropy=True, token_rank=True, states=True)
    found = token_statistics(model, head, batch_of(ROWS, layout, weights=SOME), needs, reference)
    assert found.keys() == {*expected, "token_rank", "states"}
    assert torch.equal(found["token_rank"], torch.where(kept, rank_of(logits, IDS), 0.0))
    assert not found["token_rank"].requires_grad
    assert not found["states"][~kept].any()
    for name, value in expected.items():
        assert value.std() > 0.01
        close(found[name], torch.where(kept, value, 0.0))
        pair = (found[name], value.masked_fill(~kept, 0.0))
        mine, slopes = (
            torch.autograd.grad((item * FACTORS).sum(), weights, retain_graph=True) for item in pair
        )
        close(mine, slopes, max(float(slope.abs().max()) for slope in slopes))
    assert all(weight.grad is None for weight in reference.model.parameters())


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("with_head", [True, False])
def test_states_and_layers_are_those_before_the_token(layout, with_head):
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
    found = token_statistics(model, head, batch_of(ROWS, layout, weights=SOME), needs, reference)
    assert found.keys() == {"logp", "states", "reference_layers"}
    for name, value in (("states", torch.cat(states)), ("reference_layers", torch.cat(layers))):
        close(found[name], value * SOME.double().view(-1, *[1] * (value.dim() - 1)))
    assert found["reference_layers"].shape[1] == 2
    assert found["states"].requires_grad
    assert not found["reference_layers"].requires_grad


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_adapter_is_disabled_in_its_own_reference(direction, layout):
    """The same numbers as with a second copy of the base, and the adapter enabled again."""
    base = tiny_gpt2(dtype=torch.float64).eval()
    torch.manual_seed(2)
    settings = {"r": 4, "init_lora_weights": False, "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    lora = LoraConfig(target_modules="all-linear", **settings)
    model = get_peft_model(tiny_gpt2(dtype=torch.float64).eval(), lora).to(torch.float64)
    head = install_head(model)
    before = all_logits(model)
    expected = kl_of(before, all_logits(base).detach(), direction)
    assert expected.min() > 1e-4
    adapter = [weight for weight in model.parameters() if weight.requires_grad]
    slopes = torch.autograd.grad((expected * FACTORS).sum(), adapter)
    disable_dropout(model)
    model.train()
    reference = FrozenReference(model, head, without_adapter=True)
    found = token_statistics(model, head, batch_of(ROWS, layout), Needs(kl=direction), reference)["kl"]
    assert model.training
    close(found, expected)
    mine = torch.autograd.grad((found * FACTORS).sum(), adapter)
    close(mine, slopes, max(float(slope.abs().max()) for slope in slopes))
    assert torch.equal(all_logits(model), before)


@pytest.mark.usefixtures("exact_llama")
def test_adapter_on_the_head_is_disabled_too():
    base, adapted = (tiny_llama(dtype=torch.float64, tie_word_embeddings=False).eval() for _ in range(2))
    torch.manual_seed(2)
    lora = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(adapted, lora).to(torch.float64)
    head = install_head(model)
    assert head.linear is None
    expected = kl_of(all_logits(model), all_logits(base).detach(), "forward")
    assert expected.min() > 1e-4
    reference = FrozenReference(model, head, without_adapter=True)
    found = token_statistics(model, head, batch_of(ROWS, "shared"), Needs(kl="forward"), reference)["kl"]
    close(found, expected)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    slopes = torch.autograd.grad((expected * FACTORS).sum(), weights)
    close(torch.autograd.grad((found * FACTORS).sum(), weights), slopes)


def test_token_kl_is_reverse_and_ranks_equal_those_of_the_scorer():
    model, head = made("gpt2", torch.float64)
    reference, batch = reference_model(), batch_of(ROWS, "separate")
    with torch.no_grad():
        expected = kl_of(all_logits(model), all_logits(reference.model), "reverse")
    close(token_kl(model, head, reference.model, reference.head, batch), expected)
    assert token_kl(model, head, model, head, batch).abs().max() == 0.0
    with torch.no_grad(), head.answering(batch.inputs.predicted_from, None):
        states = run_model(model, batch.inputs).logits
    with torch.no_grad():
        stored = entropy_and_rank(states, batch.tokens.ids, head.logits)[1]
    found = token_statistics(model, head, batch, Needs(token_rank=True))["token_rank"]
    assert found.tolist() == stored.tolist()
    assert len(set(stored.tolist())) > 5


def test_encoder_decoder_has_statistics_too():
    model, other = tiny_t5(dtype=torch.float64).eval(), tiny_t5(dtype=torch.float64, seed=1).eval()
    policy = replace(language_model(model, layout="encoder_decoder"), start_id=0)
    reference = FrozenReference(other, SelectiveHead(other.lm_head))
    needs = Needs(kl="forward", states=True, reference_layers=True)
    found = token_statistics(policy.model, policy.head, policy.collate(list(ROWS)), needs, reference)

    def logits(model, prompt, response):
        decoder = torch.tensor([[0, *response[:-1]]])
        return model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]

    with torch.no_grad():
        mine, theirs = (torch.cat([logits(item, *pair) for pair in PAIRS]) for item in (model, other))
    torch.testing.assert_close(found["kl"], kl_of(mine, theirs, "forward"), rtol=0, atol=1e-5)
    assert found["reference_layers"].shape == (TOTAL, 2, 32)


@pytest.mark.parametrize("with_head", [True, False])
def test_new_statistic_needs_only_an_entry_in_the_table(with_head, monkeypatch):
    """And a field in ``Needs``; here next to a statistic that can be tiled."""
    monkeypatch.setitem(STATISTICS, "top", lambda chunk: chunk.logits.log_softmax(-1).amax(-1))
    monkeypatch.setattr(Needs, "of_head", ("entropy", "top"))
    model, head = made("gpt2", torch.float64)
    found = token_statistics(model, head if with_head else None, batch_of(ROWS, "shared"), Needs())
    close(found["top"], all_logits(model).log_softmax(-1).amax(-1))
    close(found["entropy"], entropy_of(all_logits(model)))
    assert found["top"].requires_grad


def test_divergence_needs_a_reference():
    model, head = made("gpt2", torch.float32)
    with pytest.raises(ValueError, match="need a reference"):
        token_statistics(model, head, batch_of(ROWS, "shared"), Needs(kl="forward"))
