"""Sampling: order, seeds, ends, and the same replies as transformers alone."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    GenerationConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tests.tiny import tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer
from tokenward.models.head import SelectiveHead
from tokenward.models.loading import LanguageModel
from tokenward.sampling import Reply, SamplingSettings, TransformersSampler, sample_replies
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
def test_greedy_replies_are_those_of_transformers_one_prompt_at_a_time_in_every_batch(name):
    model = MODELS[name]()
    replies = sample_replies(model, TEMPLATE, PROMPTS, replace(GREEDY, batch=4), seed=0)
    for batch in (1, 2, 64):
        assert sample_replies(model, TEMPLATE, PROMPTS, replace(GREEDY, batch=batch), seed=0) == replies
    plain = MODELS[name]().model.eval()
    config = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=EOS, pad_token_id=EOS)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        ids = torch.tensor([prompt])
        row = plain.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert reply.ids == row[0, len(prompt) :].tolist()
        assert reply.text == TOKENIZER.decode(reply.ids, skip_special_tokens=True)
        assert reply.ended == (EOS in reply.ids)
    assert len({tuple(reply.ids) for reply in replies}) > 1


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_replies_come_in_the_order_of_the_prompts_and_end_at_eos_although_pad_is_eos(batch):
    """Each prompt's last token says what its reply must be; the lengths are out of order."""
    assert TOKENIZER.pad_token_id == EOS
    model = counting_model(last=99)
    prompts = [[5] * width + [start] for width, start in [(9, 95), (0, 90), (30, 98), (3, 99), (5, 97)]]
    replies = sample_replies(model, TEMPLATE, prompts, replace(GREEDY, batch=batch), seed=0)
    expected = [
        [96, 97, 98, 99, EOS], [91, 92, 93, 94, 95, 96, 97, 98, 99, EOS], [99, EOS], [EOS], [98, 99, EOS],
    ]  # fmt: skip
    assert [reply.ids for reply in replies] == expected
    assert all(reply.ended for reply in replies)
    assert [reply.text for reply in replies] == [TOKENIZER.decode(ids[:-1]) for ids in expected]


def test_a_reply_that_reaches_the_limit_has_not_ended():
    (long, just) = sample_replies(
        counting_model(last=99), TEMPLATE, [[80], [97]], replace(GREEDY, max_new_tokens=3), seed=0
    )
    assert long == Reply([81, 82, 83], TOKENIZER.decode([81, 82, 83]), False)
    assert just == Reply([98, 99, EOS], TOKENIZER.decode([98, 99]), True)


def test_a_reply_stops_at_any_end_that_the_folder_names_beside_the_templates():
    model = counting_model(last=99)
    model.model.generation_config.eos_token_id = [EOS, 97]
    replies = sample_replies(model, TEMPLATE, [[95], [97]], GREEDY, seed=0)
    assert replies == [
        Reply([96, 97], TOKENIZER.decode([96]), True), Reply([98, 99, EOS], TOKENIZER.decode([98, 99]), True)
    ]  # fmt: skip
    assert model.model.generation_config.eos_token_id == [EOS, 97]


def test_a_reply_stops_at_an_end_of_turn_that_is_text():
    tokenizer = tiny_tokenizer()
    end = tokenizer.decode([66, 67])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    template = Template(tokenizer=tokenizer)
    assert not template.ending.special
    (reply,) = sample_replies(counting_model(last=120), template, [[63]], GREEDY, seed=0)
    assert reply == Reply([64, 65, 66, 67], tokenizer.decode([64, 65]), True)


def test_prompts_that_contain_eos_are_not_cut():
    """A chat's earlier turns end with the same token that pads and that ends the reply."""
    replies = sample_replies(counting_model(last=99), TEMPLATE, [[EOS, 7, EOS, 96], [98]], GREEDY, seed=0)
    assert [reply.ids for reply in replies] == [[97, 98, 99, EOS], [99, EOS]]


def test_the_seed_alone_decides_the_replies_and_the_global_state_is_restored():
    model = MODELS["llama"]()
    drawn = SamplingSettings(max_new_tokens=12, batch=3)
    first = sample_replies(model, TEMPLATE, PROMPTS, drawn, seed=1)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert sample_replies(model, TEMPLATE, PROMPTS, drawn, seed=1) == first
    other = sample_replies(model, TEMPLATE, PROMPTS, drawn, seed=2)
    assert all(one.ids != two.ids for one, two in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


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
    for drawn in (replace(GREEDY, temperature=1.0, top_k=1), replace(GREEDY, temperature=1.0, top_p=1e-6)):
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


def test_dropout_is_off_while_sampling():
    model = language_model(tiny_llama(attention_dropout=0.5).train())
    expected = sample_replies(MODELS["llama"](), TEMPLATE, PROMPTS, GREEDY, seed=0)
    assert sample_replies(model, TEMPLATE, PROMPTS, GREEDY, seed=0) == expected


SMALL = {
    "vocab_size": len(TOKENIZER) + 6, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
# Recurrent layers keep a state in the place of keys and values, and a window keeps the last of them only.
OTHERS = {
    "window": lambda: MistralForCausalLM(MistralConfig(**SMALL, head_dim=8, sliding_window=8)),
    "recurrent": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=266, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.2)
    ),
    "hybrid": lambda: Lfm2ForCausalLM(Lfm2Config(**SMALL, layer_types=["conv", "full_attention"])),
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
}


def sampler(model, **settings) -> TransformersSampler:
    return TransformersSampler(model=model, template=TEMPLATE, settings=replace(GREEDY, **settings))


@pytest.mark.parametrize("batch", [4, 64])
@pytest.mark.parametrize("name", OTHERS)
def test_several_replies_to_a_prompt_are_drawn_as_one_would_be(name, batch):
    """Greedily all of them are the one reply, whether or not the prompt was read once for all."""
    torch.manual_seed(0)
    model = language_model(OTHERS[name]().eval())
    # Prompts of the same length only: states of recurrent layers see the padding.
    prompts = [PROMPTS[2], PROMPTS[2][::-1], [7]] if name in ("llama", "gpt2", "window") else [PROMPTS[2]]
    single = [sample_replies(model, TEMPLATE, [prompt], GREEDY, seed=0)[0] for prompt in prompts]
    groups = sampler(model, batch=batch)(prompts, count=3, seed=0)
    assert groups == [[reply] * 3 for reply in single]


def test_a_sampler_draws_so_many_replies_to_each_prompt():
    model = MODELS["llama"]()
    draw = sampler(model, temperature=1.0, batch=5)
    done: list[int] = []
    first = draw(PROMPTS, count=3, seed=1, progress=done.append)
    assert [len(group) for group in first] == [3] * len(PROMPTS)
    assert sum(done) == 3 * len(PROMPTS)
    assert all(len({tuple(reply.ids) for reply in group}) == 3 for group in first), "no reply comes twice"
    assert draw(PROMPTS, count=3, seed=1) == first
    assert draw(PROMPTS, count=3, seed=2) != first
    assert draw([], count=3, seed=1) == []


def test_it_draws_from_the_weights_of_the_moment():
    model = MODELS["llama"]()
    draw = sampler(model)
    before = draw(PROMPTS[:1], count=2, seed=0)
    with torch.no_grad():
        for value in model.model.parameters():
            value.mul_(-1)
    after = draw(PROMPTS[:1], count=2, seed=0)
    assert before != after
    assert after[0] == sample_replies(model, TEMPLATE, PROMPTS[:1] * 2, GREEDY, seed=0)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.convert_tokens_to_ids(list(text))


def spelled(first: int, count: int) -> str:
    """What the counting model writes from a token on."""
    return str(TOKENIZER.decode(list(range(first, first + count))))


@pytest.mark.parametrize("batch", [1, 64])
def test_a_stop_text_ends_a_reply_and_is_cut_from_its_text(batch):
    """Ids run to the token that completed it; the text ends before it. Letters count: a, b, c ..."""
    model = counting_model(last=199)
    a = ids_of("a")[0]
    settings = replace(GREEDY, stop=("ef", "zz"), batch=batch)
    long, short, other = sample_replies(model, TEMPLATE, [[a], [a + 3], [a + 5]], settings, seed=0)
    assert long == Reply(ids_of("bcdef"), "bcd", True)
    assert short == Reply(ids_of("ef"), "", True)
    assert other == Reply(list(range(a + 6, a + 18)), spelled(a + 6, 12), False)


def test_the_first_of_several_stop_texts_counts():
    model, a = counting_model(last=199), ids_of("a")[0]
    for stops, text in ((("g", "d"), "bc"), (("cde", "d"), "bc"), (("cd", "d"), "b")):
        (reply,) = sample_replies(model, TEMPLATE, [[a]], replace(GREEDY, stop=stops), seed=0)
        assert reply == Reply(ids_of("bcd"), text, True), stops


@pytest.mark.parametrize("stop", ["ab", "x"])
def test_a_stop_text_that_the_reply_alone_does_not_contain_does_not_end_it(stop):
    """ "ab" would be complete with the reply's first letter; "x" would come after the model's own end."""
    model, a = counting_model(last=ids_of("e")[0]), ids_of("a")[0]
    (reply,) = sample_replies(model, TEMPLATE, [[a]], replace(GREEDY, stop=(stop,)), seed=0)
    assert reply == Reply([*ids_of("bcde"), EOS], "bcde", True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_fixed_length_is_kept_exactly_and_without_special_tokens(name):
    model = MODELS[name]() if name in MODELS else t5_model()
    with torch.no_grad():  # make the special tokens likely
        table = model.model.get_input_embeddings().weight
        table[[TOKENIZER.bos_token_id, EOS]] *= 3
    settings = SamplingSettings(max_new_tokens=5, fixed_length=True, stop=("e",))
    replies = sample_replies(model, TEMPLATE, PROMPTS * 10, settings, seed=0)
    assert {len(reply.ids) for reply in replies} == {5}
    assert not {token for reply in replies for token in reply.ids} & TEMPLATE.special_ids
    assert not any(reply.ended for reply in replies)
    assert all(reply.text == TOKENIZER.decode(reply.ids) for reply in replies)
    assert any("e" in reply.text for reply in replies), "nothing ends it, a stop text neither"
    free = sample_replies(
        model, TEMPLATE, PROMPTS * 10, replace(settings, fixed_length=False, stop=()), seed=0
    )
    assert any(reply.ended for reply in free), "without it special tokens are drawn"


def test_a_fixed_length_has_no_token_that_the_tokenizer_lacks():
    """A model whose rows go beyond its tokenizer's tokens would draw them too."""
    model = language_model(tiny_llama(vocab_size=2 * len(TOKENIZER)))
    settings = SamplingSettings(max_new_tokens=5, fixed_length=True)
    replies = sample_replies(model, TEMPLATE, PROMPTS * 5, settings, seed=0)
    assert max(token for reply in replies for token in reply.ids) < len(TOKENIZER)


def t5_model() -> LanguageModel:
    model = tiny_t5().eval()
    return LanguageModel(
        model=model, tokenizer=TOKENIZER, head=SelectiveHead(model.lm_head), layout="encoder_decoder",
        fingerprint="", name="tiny t5", start_id=EOS,
    )  # fmt: skip


def test_stop_texts_of_an_encoder_decoder():
    model = t5_model()
    plain = sample_replies(model, TEMPLATE, PROMPTS[:1], GREEDY, seed=0)[0]
    stop = plain.text[2:4]
    assert stop
    (reply,) = sample_replies(model, TEMPLATE, PROMPTS[:1], replace(GREEDY, stop=(stop,)), seed=0)
    assert reply.text == plain.text[: plain.text.index(stop)]
    assert reply.ids == plain.ids[: len(reply.ids)]
    assert reply.ended


def test_bfloat16_draws_from_a_copy_and_leaves_the_policy_in_float32():
    model = MODELS["llama"]()
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    coarse = TransformersSampler(model=model, template=TEMPLATE, settings=GREEDY, precision="bfloat16")
    found = coarse(PROMPTS, count=2, seed=0)
    assert [len(group) for group in found] == [2] * len(PROMPTS)
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())
    assert model.dtype == torch.float32
    expected = sampler(model)(PROMPTS, count=2, seed=0)
    firsts = [[reply.ids[0] for group in groups for reply in group] for groups in (found, expected)]
    same = sum(one == other for one, other in zip(*firsts, strict=True))
    assert same >= len(PROMPTS), "the same model, a little coarser"
