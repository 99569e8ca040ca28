"""Sampling: order, seeds, ends, and the same replies as transformers alone."""

import math

import pytest
import torch
from transformers import GenerationConfig

from tests.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tokenward.models.head import SelectiveHead
from tokenward.models.loading import LanguageModel
from tokenward.sampling import Reply, SamplingSettings, sample_replies
from tokenward.tokens.template import Template

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
TEMPLATE = Template(tokenizer=TOKENIZER)
GREEDY = SamplingSettings(max_new_tokens=12, temperature=0.0)
TEXTS = [
    "hello",
    "the good moon and the sun",
    "a",
    "who are you and what is it",
    "b c",
    "x" * 30,
    "in the good old days",
]
PROMPTS = [TEMPLATE.prompt_ids([{"role": "user", "content": text}]) for text in TEXTS]


def language_model(model) -> LanguageModel:
    head = SelectiveHead(model.get_output_embeddings())
    return LanguageModel(
        model=model, tokenizer=TOKENIZER, head=head, layout="shared", fingerprint="", name="tiny"
    )


MODELS = {"llama": lambda: language_model(tiny_llama()), "gpt2": lambda: language_model(tiny_gpt2())}


class Scripted(torch.nn.Module):
    """Stands for a language model head: after a token comes the next one, ``EOS`` after ``last``."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(len(TOKENIZER)), requires_grad=False)
        self._last = last

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        following = (hidden.argmax(-1) + 1) % 256
        following = torch.where(following == self._last + 1, EOS, following)
        return torch.nn.functional.one_hot(following, len(TOKENIZER)).float() * 50


def counting_model(last: int) -> LanguageModel:
    """Writes ids upwards by one from the prompt's last token, and ends after ``last``."""
    size = len(TOKENIZER)
    model = tiny_llama(
        hidden_size=size, num_attention_heads=1, num_key_value_heads=1, head_dim=4, tie_word_embeddings=False
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.lm_head = Scripted(last)
    return language_model(model.eval())


@pytest.mark.parametrize("name", MODELS)
def test_greedy_replies_are_those_of_transformers_one_prompt_at_a_time(name):
    model = MODELS[name]()
    replies = sample_replies(model, TEMPLATE, PROMPTS, GREEDY._replace(batch=4), seed=0)
    plain = MODELS[name]().model.eval()
    config = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=EOS, pad_token_id=EOS)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        ids = torch.tensor([prompt])
        row = plain.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert reply.ids == row[0, len(prompt) :].tolist()
        assert reply.text == TOKENIZER.decode(reply.ids, skip_special_tokens=True)
        assert reply.ended == (EOS in reply.ids)
    assert len({tuple(reply.ids) for reply in replies}) > 1


@pytest.mark.parametrize("name", MODELS)
def test_the_batch_size_does_not_change_greedy_replies(name):
    model = MODELS[name]()
    one = sample_replies(model, TEMPLATE, PROMPTS, GREEDY._replace(batch=1), seed=0)
    for batch in (2, 3, 64):
        assert sample_replies(model, TEMPLATE, PROMPTS, GREEDY._replace(batch=batch), seed=0) == one


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_replies_come_in_the_order_of_the_prompts_and_end_at_eos_although_pad_is_eos(batch):
    """Each prompt's last token says what its reply must be; the lengths are out of order."""
    assert TOKENIZER.pad_token_id == EOS
    model = counting_model(last=99)
    prompts = [[5] * width + [start] for width, start in [(9, 95), (0, 90), (30, 98), (3, 99), (5, 97)]]
    replies = sample_replies(model, TEMPLATE, prompts, GREEDY._replace(batch=batch), seed=0)
    expected = [
        [96, 97, 98, 99, EOS], [91, 92, 93, 94, 95, 96, 97, 98, 99, EOS], [99, EOS], [EOS], [98, 99, EOS],
    ]  # fmt: skip
    assert [reply.ids for reply in replies] == expected
    assert all(reply.ended for reply in replies)
    assert [reply.text for reply in replies] == [TOKENIZER.decode(ids[:-1]) for ids in expected]


def test_a_reply_that_reaches_the_limit_has_not_ended():
    (long, just) = sample_replies(
        counting_model(last=99), TEMPLATE, [[80], [97]], GREEDY._replace(max_new_tokens=3), seed=0
    )
    assert long == Reply([81, 82, 83], TOKENIZER.decode([81, 82, 83]), False)
    assert just == Reply([98, 99, EOS], TOKENIZER.decode([98, 99]), True)


def test_prompts_that_contain_eos_are_not_cut():
    """A chat's earlier turns end with the same token that pads and that ends the reply."""
    replies = sample_replies(counting_model(last=99), TEMPLATE, [[EOS, 7, EOS, 96], [98]], GREEDY, seed=0)
    assert [reply.ids for reply in replies] == [[97, 98, 99, EOS], [99, EOS]]


def test_the_same_seed_gives_the_same_replies_and_another_seed_others():
    model = MODELS["llama"]()
    drawn = SamplingSettings(max_new_tokens=12, batch=3)
    first = sample_replies(model, TEMPLATE, PROMPTS, drawn, seed=1)
    torch.manual_seed(123)
    assert sample_replies(model, TEMPLATE, PROMPTS, drawn, seed=1) == first
    other = sample_replies(model, TEMPLATE, PROMPTS, drawn, seed=2)
    assert all(one.ids != two.ids for one, two in zip(first, other, strict=True))


def test_the_global_random_state_is_left_as_it_was():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sample_replies(MODELS["llama"](), TEMPLATE, PROMPTS, SamplingSettings(max_new_tokens=4), seed=1)
    # Making a tiny model seeds the generator itself; sampling is what must leave no trace.
    model = MODELS["llama"]()
    torch.set_rng_state(before)
    sample_replies(model, TEMPLATE, PROMPTS, SamplingSettings(max_new_tokens=4), seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_models_see_the_same_random_numbers():
    """A model and itself after a change of nothing: equal draws, so a difference is the model's."""
    drawn = SamplingSettings(max_new_tokens=8)
    first = sample_replies(MODELS["llama"](), TEMPLATE, PROMPTS, drawn, seed=3)
    assert sample_replies(MODELS["llama"](), TEMPLATE, PROMPTS, drawn, seed=3) == first


def test_draws_follow_the_models_probabilities():
    """First tokens of many draws of one prompt against the softmax of its logits."""
    model = language_model(tiny_llama(initializer_range=0.3))
    prompt, count = PROMPTS[2], 2000
    for temperature in (1.0, 0.5):
        settings = SamplingSettings(max_new_tokens=1, temperature=temperature, batch=500)
        replies = sample_replies(model, TEMPLATE, [prompt] * count, settings, seed=0)
        counts = torch.bincount(torch.tensor([reply.ids[0] for reply in replies]), minlength=len(TOKENIZER))
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([prompt])).logits[0, -1]
        expected = (logits / temperature).softmax(-1)
        likely = expected > 0.02
        assert int(likely.sum()) >= 3
        error = (expected * (1 - expected) / count).sqrt()
        assert float(((counts / count - expected).abs() / error)[likely].max()) < 4


def test_top_k_of_1_and_a_small_nucleus_are_greedy():
    model = MODELS["llama"]()
    greedy = sample_replies(model, TEMPLATE, PROMPTS, GREEDY, seed=0)
    for drawn in (GREEDY._replace(temperature=1.0, top_k=1), GREEDY._replace(temperature=1.0, top_p=1e-6)):
        assert sample_replies(model, TEMPLATE, PROMPTS, drawn, seed=0) == greedy


def test_top_k_0_draws_from_the_whole_vocabulary_whatever_the_model_folder_says():
    """transformers' own default of 50, or a folder's generation config, must not cut the tail."""
    model = MODELS["llama"]()
    model.model.generation_config.top_k = 1
    model.model.generation_config.repetition_penalty = 1.3
    with torch.no_grad():
        for value in model.model.parameters():
            value.mul_(1e-3)
    settings = SamplingSettings(max_new_tokens=1, batch=500)
    replies = sample_replies(model, TEMPLATE, [PROMPTS[0]] * 1000, settings, seed=0)
    # 266 nearly equally likely tokens: 1000 draws see all but a few.
    assert len({reply.ids[0] for reply in replies}) > 250


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.20
@pytest.mark.parametrize("adapter", [None, {"r": 2, "target_modules": ["q_proj"]}], ids=["plain", "lora"])
def test_what_the_model_folder_says_about_sampling_plays_no_part(adapter):
    expected = sample_replies(MODELS["llama"](), TEMPLATE, PROMPTS, GREEDY, seed=0)
    model = MODELS["llama"]()
    of_the_folder = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, top_k=3)
    model.model.generation_config = of_the_folder
    if adapter is not None:
        model = model.with_adapter(adapter)
    assert sample_replies(model, TEMPLATE, PROMPTS, GREEDY, seed=0) == expected
    # It is still saved with the model.
    assert model.model.generation_config.to_dict() == of_the_folder.to_dict()


def test_progress_counts_every_prompt_once():
    done: list[int] = []
    sample_replies(
        MODELS["gpt2"](), TEMPLATE, PROMPTS, GREEDY._replace(batch=3), seed=0, progress=done.append
    )
    assert done == [3] * (len(PROMPTS) // 3) + [len(PROMPTS) % 3]
    assert len(done) == math.ceil(len(PROMPTS) / 3)


def test_no_prompts_no_replies():
    assert sample_replies(MODELS["llama"](), TEMPLATE, [], GREEDY, seed=0) == []


def test_dropout_is_off_while_sampling():
    model = language_model(tiny_llama(attention_dropout=0.5).train())
    expected = sample_replies(MODELS["llama"](), TEMPLATE, PROMPTS, GREEDY, seed=0)
    assert sample_replies(model, TEMPLATE, PROMPTS, GREEDY, seed=0) == expected
