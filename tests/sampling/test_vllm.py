"""The sampler vllm, with a stand-in of the package's interface that samples with transformers."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.sampling.test_sampler import EOS, PROMPTS, TEMPLATE, TOKENIZER, language_model
from tests.tiny import move_trained, tiny_llama
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel, load_model
from tokenward.sampling import SamplingSettings, sample_replies
from tokenward.sampling.engines import EngineSampler
from tokenward.sampling.vllm import VllmSampler
from tokenward.scoring.reads import token_values
from tokenward.tokens.rows import TokenRow
from tokenward.types import Comparison

HOT = SamplingSettings(max_new_tokens=8, temperature=0.7, top_p=0.9, top_k=40, stop=("zz",))
GREEDY = SamplingSettings(max_new_tokens=8, temperature=0.0)
BLANK = Comparison(key="k", prompt=(), responses=("",), ranks=(0,), source="s")


class StandInLLM:
    """``vllm.LLM`` as documented: loads a folder, generates from token ids, reloads weights."""

    made: ClassVar[list["StandInLLM"]] = []
    stuck = False
    finish: str | None = None

    def __init__(self, model: str, tokenizer: str, generation_config: str, **more: Any) -> None:
        assert tokenizer == model
        assert generation_config == "vllm"
        self.model, self.more = load_model(model), more
        self.calls: list[tuple[list[Any], list[Any]]] = []
        self.reloads, self.ended = 0, False
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._end))
        self.made.append(self)

    def _end(self) -> None:
        self.ended = True

    def collective_rpc(self, method: str, *, kwargs: dict[str, str]) -> list[None]:
        assert method == "reload_weights"
        self.reloads += 1
        if not self.stuck:
            self.model = load_model(kwargs["weights_path"])
        return [None]

    def reset_prefix_cache(self) -> bool:
        return True

    def generate(self, prompts: list[Any], params: list[Any], *, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        self.calls.append((prompts, params))
        return [self._answer(prompt, one) for prompt, one in zip(prompts, params, strict=True)]

    def _answer(self, prompt: dict[str, list[int]], params: Any) -> Any:
        settings = SamplingSettings(
            max_new_tokens=params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            stop=tuple(params.stop),
        )
        ids = prompt["prompt_token_ids"]
        (reply,) = sample_replies(self.model, TEMPLATE, [ids], settings, seed=params.seed)
        row = TokenRow(BLANK, ids, [reply.ids], [0])
        ((values,),) = token_values(self.model, [row], precision="float32", tokens_per_batch=4096)
        found = [
            {token: SimpleNamespace(logprob=value)}
            for token, value in zip(reply.ids, values.tolist(), strict=True)
        ]
        output = SimpleNamespace(
            token_ids=tuple(reply.ids),
            finish_reason=self.finish or ("stop" if reply.ended else "length"),
            logprobs=None if params.logprobs is None else found,
        )
        return SimpleNamespace(outputs=[output])


@pytest.fixture(autouse=True)
def package(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams, module.__version__ = StandInLLM, SimpleNamespace, "0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(StandInLLM, "made", [])


def sampler(model: LanguageModel, settings: SamplingSettings = GREEDY, **more: Any) -> EngineSampler:
    engine = VllmSampler(**more).open()
    return EngineSampler(engine=engine, model=model, template=TEMPLATE, settings=settings)


def untied(seed: int = 0) -> LanguageModel:
    return language_model(tiny_llama(tie_word_embeddings=False, seed=seed))


def test_what_is_asked_is_complete_and_replies_keep_their_order():
    model, seen = untied(), []
    asked = sampler(model, HOT, llm={"max_model_len": 256}, chunk=4)
    found = asked(PROMPTS[:3], count=2, seed=7, progress=seen.append)
    (llm,) = StandInLLM.made
    assert llm.more == {"dtype": "float32", "max_model_len": 256}
    assert seen == [4, 2]
    (_, checked), (prompts, params), (more, _) = llm.calls
    assert checked[0] == SimpleNamespace(
        n=1, max_tokens=8, temperature=1.0, top_p=1.0, top_k=0, seed=checked[0].seed, stop=[], stop_token_ids=[EOS, 2], logprobs=0
    )  # fmt: skip
    assert params[0] == SimpleNamespace(
        n=1, max_tokens=8, temperature=0.7, top_p=0.9, top_k=40, seed=params[0].seed, stop=["zz"], stop_token_ids=[EOS, 2],
        logprobs=None,
    )  # fmt: skip
    assert [item["prompt_token_ids"] for item in [*prompts, *more]] == [
        PROMPTS[n] for n in (0, 0, 1, 1, 2, 2)
    ]
    assert found == asked(PROMPTS[:3], count=2, seed=7)
    assert found != asked(PROMPTS[:3], count=2, seed=8)
    assert found[0][0] != found[0][1]
    greedy = sampler(model)(PROMPTS[:3], count=1, seed=0)
    assert [reply for (reply,) in greedy] == sample_replies(model, TEMPLATE, PROMPTS[:3], GREEDY, seed=0)
    assert StandInLLM.made[-1].model.name not in (model.name, "")


def test_weights_that_change_are_loaded_anew_and_others_are_refused(monkeypatch):
    model = untied()
    asked = sampler(model)
    asked(PROMPTS[:2], count=1, seed=0)
    move_trained(model.model, by=0.05)
    found = asked(PROMPTS[:2], count=1, seed=0)
    (llm,) = StandInLLM.made
    assert (llm.reloads, len(asked.checks)) == (1, 2)
    assert [reply for (reply,) in found] == sample_replies(model, TEMPLATE, PROMPTS[:2], GREEDY, seed=0)
    monkeypatch.setattr(StandInLLM, "stuck", True)
    move_trained(model.model, by=0.05, seed=2)
    with pytest.raises(UserError, match="answers exactly as before the weights changed"):
        asked(PROMPTS[:2], count=1, seed=0)
    monkeypatch.setattr(StandInLLM, "stuck", False)
    monkeypatch.setattr(StandInLLM, "reset_prefix_cache", lambda self: False)
    with pytest.raises(UserError, match="kept its cache of prompts"):
        asked(PROMPTS[:2], count=1, seed=0)


def test_a_head_that_shares_its_weight_needs_a_new_engine():
    """vLLM 0.32 leaves such a head as it was when it reloads, and its log-probabilities are then off by half a nat."""
    model = language_model(tiny_llama())
    asked = sampler(model)
    asked(PROMPTS[:2], count=1, seed=0)
    move_trained(model.model, by=0.05)
    asked(PROMPTS[:2], count=1, seed=0)
    first, second = StandInLLM.made
    assert first.ended
    assert (first.reloads, second.reloads, second.ended) == (0, 0, False)
    asked.engine.close()
    assert second.ended


def test_an_adapter_is_merged_in_a_copy():
    torch.manual_seed(3)
    wrapped = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "up_proj"]))
    move_trained(wrapped, by=0.1)
    model = replace(language_model(tiny_llama()), model=wrapped, head=None)
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    found = sampler(model)(PROMPTS[:2], count=1, seed=0)
    assert [reply for (reply,) in found] == sample_replies(model, TEMPLATE, PROMPTS[:2], GREEDY, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())


def test_what_vllm_cannot_do_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"sets model of vllm\.LLM itself"):
        VllmSampler(llm={"model": "x"})
    model = untied()
    with pytest.raises(UserError, match="MLP before the head"):
        sampler(replace(model, head_mlp=torch.nn.Linear(1, 1)))(PROMPTS[:1], count=1, seed=0)  # type: ignore[arg-type]
    monkeypatch.setattr(StandInLLM, "finish", "abort")
    with pytest.raises(UserError, match="finish_reason 'abort'"):
        sampler(model)(PROMPTS[:1], count=1, seed=0)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="needs vllm"):
        VllmSampler().open()
    assert TOKENIZER.eos_token_id == EOS
