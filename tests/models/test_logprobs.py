"""Log-probabilities from a model that the caller loaded and wrapped."""

from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM

from tests.tiny import tiny_gpt2, tiny_llama, tiny_t5
from tokenward import UserError, token_logprobs
from tokenward.models.head import SelectiveHead, install_head

IDS = torch.randint(5, 200, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 6:], MASK[2, :3] = 0, 0
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
WANTED = torch.zeros_like(IDS, dtype=torch.bool)
WANTED[0, 3:7] = WANTED[1, 2:5] = WANTED[2, 4] = WANTED[2, 8] = True
FACTORS = torch.linspace(-1, 1, IDS.numel(), dtype=torch.float64).view_as(IDS)


def tiny_granite():
    """A model that divides its logits, so the answer must bypass its forward."""
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GraniteConfig(vocab_size=266, num_key_value_heads=1, logits_scaling=8.0, **settings)
    return GraniteForCausalLM(config).double()


def odd():
    """A model that changes its logits by something that is not in its config."""
    model = tiny_llama(dtype=torch.float64)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + output.sin())
    return model


def lora():
    torch.manual_seed(0)
    settings = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return get_peft_model(tiny_llama(dtype=torch.float64, tie_word_embeddings=False), settings).double()


MODELS = {
    "llama": lambda: tiny_llama(dtype=torch.float64),
    "gpt2, tied": lambda: tiny_gpt2(dtype=torch.float64),
    "granite, scaled": tiny_granite,
    "lora": lora,
    "odd": odd,
}


def plain(model, dtype=torch.float64):
    logits = model(input_ids=IDS, attention_mask=MASK).logits.to(dtype)
    found = logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).squeeze(-1)
    return torch.where(WANTED, nn.functional.pad(found, (1, 0)), 0.0)


def gradients(model, logp):
    model.zero_grad()
    (logp * FACTORS).sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def forwards(model):
    return {name: vars(module).get("forward") for name, module in model.named_modules()}


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_those_of_all_logits(name):
    """The norms of Llama and Granite are in float32, so their gradients agree to that."""
    model = MODELS[name]().eval()
    expected, before = gradients(model, plain(model)), forwards(model)
    found = token_logprobs(model, BATCH, WANTED)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, plain(model), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(model, found), expected, rtol=0, atol=1e-6)
    assert forwards(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_give_float32(dtype):
    model = tiny_llama(dtype=dtype).eval()
    found = token_logprobs(model, BATCH, WANTED)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(model, torch.float32), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["llama", "granite, scaled", "odd"])
def test_the_head_runs_for_the_selected_tokens_only(name, monkeypatch):
    requests, logits, answering = [], [], SelectiveHead.answering

    @contextmanager
    def seen(self, positions, ids, **more):
        requests.append(positions.tolist())
        with answering(self, positions, ids, **more):
            yield

    model = MODELS[name]()
    token_logprobs(model, BATCH, WANTED)  # measures the model
    monkeypatch.setattr(SelectiveHead, "answering", seen)
    model.register_forward_hook(lambda module, inputs, output: logits.append(output.logits.shape))
    token_logprobs(model, BATCH, WANTED)
    everything = name == "odd"
    assert requests == ([] if everything else [[2, 3, 4, 5, 10, 11, 12, 21, 25]])
    assert logits[0] == ((3, 9, 266) if everything else (9,)) or name.startswith("granite")


def test_the_model_keeps_its_state_and_measuring_draws_no_random_numbers():
    model = tiny_gpt2().train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(1)
    first = token_logprobs(model, BATCH, WANTED)
    torch.manual_seed(1)
    assert torch.equal(token_logprobs(model, BATCH, WANTED), first), "the same dropout without measuring"
    assert not torch.equal(token_logprobs(model, BATCH, WANTED), first)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="inputs_embeds"):
        token_logprobs(model, {**BATCH, "inputs_embeds": 3}, WANTED)
    assert not any(forwards(model).values())


def test_an_installed_head_stays_and_a_wrapper_is_called():
    model = tiny_llama(dtype=torch.float64)
    head, expected = install_head(model), plain(model)
    before, calls = forwards(model), []
    wrapped = nn.DataParallel(model)
    wrapped.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(token_logprobs(wrapped, BATCH, WANTED), expected, rtol=0, atol=1e-12)
    assert calls == [1]
    assert forwards(model) == before
    with head.answering(torch.tensor([3]), torch.tensor([7])):
        assert model(input_ids=IDS).logits.shape == (1,)


def test_selecting_no_token():
    found = token_logprobs(tiny_llama(), BATCH, torch.zeros_like(WANTED))
    found.sum().backward()
    assert not found.any()


def test_tokens_without_log_probability_are_refused():
    first, padding = WANTED.clone(), WANTED.clone()
    first[0, 0] = padding[1, 7] = padding[2, 3] = True
    for model, positions, code, match in (
        (tiny_llama(), first, "unpredicted-token", "1 tokens"),
        (tiny_llama(), padding, "unpredicted-token", "2 tokens"),
        (tiny_llama(), WANTED.long(), "wrong-shape", "int64"),
        (tiny_llama(), WANTED[:, 1:], "wrong-shape", "8"),
        (tiny_t5(), WANTED, "unsupported-model", "encoder"),
    ):
        with pytest.raises(UserError, match=match) as error:
            token_logprobs(model, BATCH, positions)
        assert error.value.code == code
