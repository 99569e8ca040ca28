"""Rotary embeddings that depend on the longest row of a call: refused beyond their steady length."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from tests.models.plain import plain_logprobs, token_logprobs
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer
from tests.tokens.rows import encoded
from tokenward.errors import UserError
from tokenward.models.identity import context_length
from tokenward.models.loading import load_model

SIZES = {
    "vocab_size": len(tiny_tokenizer()),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
SHORT = encoded(list(range(20, 30)), [1, 2, 3, 4, 5, 6], [7, 8, 9])
LONG = encoded(list(range(20, 60)), [11, 12, 13], [14, 15])


def longrope(**factors):
    rope = {"rope_type": "longrope", **FACTORS, **factors}
    return Phi3ForCausalLM(Phi3Config(**SIZES, rope_scaling=rope, original_max_position_embeddings=32))


def dynamic():
    settings = {**SIZES, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**settings, rope_scaling={"rope_type": "dynamic", "factor": 4.0}))


def loaded(build, folder):
    torch.manual_seed(0)
    return load_model(str(save_tiny(folder, build())), device="cpu")


def logprobs(model, *rows):
    with torch.no_grad():
        return token_logprobs(model.model, model.head, model.collate(list(rows)))


@pytest.mark.parametrize(("build", "steady"), [(longrope, 32), (dynamic, 31)])
def test_row_that_would_change_its_neighbors_is_refused(build, steady, tmp_path):
    model = loaded(build, tmp_path)
    with torch.no_grad():
        alone = plain_logprobs(model.model, [SHORT])
        longer = model.model(input_ids=torch.tensor([SHORT.prompt + SHORT.responses[0] + [0] * 30])).logits
    # In a batch with a longer row the response would get these numbers, which is more than rounding.
    first = longer[0, 9:15].log_softmax(-1).gather(-1, torch.tensor(SHORT.responses[0])[:, None])[:, 0]
    assert (first - alone[:6]).abs().max() > 0.1
    with pytest.raises(UserError, match=rf"42 positions.* more than {steady}") as error:
        logprobs(model, SHORT, LONG)
    assert (error.value.code, error.value.key) == ("too-long", "tokens.max_prompt_tokens")
    # The advice: shorter rows, which have the same numbers as alone.
    assert context_length(str(tmp_path)) == steady
    torch.testing.assert_close(logprobs(model, SHORT), alone, rtol=0, atol=1e-5)


def yarn():
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_scaling=rope))


@pytest.mark.parametrize("build", [lambda: longrope(short_factor=FACTORS["long_factor"]), yarn])
def test_the_other_advice_of_the_message_works(build, tmp_path):
    """One set of longrope factors, and yarn, are the same for every length."""
    model = loaded(build, tmp_path)
    assert context_length(str(tmp_path)) == 64
    with torch.no_grad():
        alone = plain_logprobs(model.model, [SHORT, LONG])
    torch.testing.assert_close(logprobs(model, SHORT, LONG), alone, rtol=0, atol=1e-5)


def test_other_models_have_the_positions_of_their_config(tmp_path):
    save_tiny(tmp_path, tiny_llama())
    assert context_length(str(tmp_path)) == 512
