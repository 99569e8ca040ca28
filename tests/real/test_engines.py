"""A real llama.cpp server with the default model: equal in float32, and found out where it is quantized."""

from dataclasses import replace

import pytest

from tests.sampling.llamacpp import llamacpp, write_gguf
from tokenward.errors import UserError
from tokenward.models.default import _fetch_gguf
from tokenward.models.loading import load_model
from tokenward.sampling import SamplingSettings, sample_replies
from tokenward.sampling.engines import EngineSampler
from tokenward.sampling.server import ServerSampler

TEXTS = ["Name three rivers.", "What is a noun?", "Write a line about rain.", "Count to five."]
GREEDY = SamplingSettings(max_new_tokens=16, temperature=0.0)


@pytest.mark.slow
@pytest.mark.real
def test_greedy_replies_are_equal_in_float32_and_four_bits_are_refused(tmp_path):
    """llama.cpp rounds activations to 8 bits before it multiplies them with weights of 4 bits; the cached folder holds the
    same weights in float32."""
    model = load_model("default")
    template = model.template("chat")
    prompts = [template.prompt_ids([{"role": "user", "content": text}]) for text in TEXTS]

    def sampler(address: str, **more) -> EngineSampler:
        server = ServerSampler(address=address, parallel=4, **more)
        return EngineSampler(
            engine=server.open(), model=model, template=template, settings=GREEDY, tolerance=server.tolerance
        )

    whole = write_gguf(model.model, model.tokenizer, tmp_path / "float32.gguf")
    with llamacpp(whole) as address:
        asked = sampler(address)
        found = [reply for (reply,) in asked(prompts, count=1, seed=0)]
    whole.unlink()
    assert found == sample_replies(model, template, prompts, GREEDY, seed=0)
    assert asked.checks[0].mean < 1e-3
    assert asked.checks[0].tokens > 30
    with llamacpp(_fetch_gguf(tmp_path)) as address:
        with pytest.raises(UserError, match=r"differ from the model's by 0\.\d+ nats per token") as error:
            sampler(address, tolerance=0.03)(prompts, count=1, seed=0)
        assert error.value.code == "other-weights"
        asked = sampler(address, tolerance=0.2)
        asked.settings = replace(GREEDY, max_new_tokens=4)
        asked(prompts, count=1, seed=0)
        assert 0.01 < asked.checks[0].mean < 0.2
