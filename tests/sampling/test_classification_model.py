"""The task model: the same class probabilities on every path, and in every batch."""

from dataclasses import replace

import pytest
import torch

from tests.sampling.masked import bert, masked_model, masked_tokenizer
from tests.tiny import save_tiny, tiny_gpt2, tiny_llama, tiny_tokenizer
from tokenward.errors import UserError
from tokenward.models.head import SelectiveHead
from tokenward.models.loading import LanguageModel
from tokenward.sampling.classification import MaskedModel, PromptTemplate, TaskModel, load_masked

TOKENIZER = tiny_tokenizer()
WORDS = ["good", " the", "x"]
TEXTS = ["the film", "a good moon and the sun in the sky ", "so", "<|im_end|> is text"]
PROMPTS = [[5, 6, 7], [9], [], [40, 41, 42, 43, 44, 45], [5, 6, 7], [5, 6, 8]]


def causal(model=None, *, layout="shared", head=True):
    model = (model or tiny_llama()).eval()
    return LanguageModel(
        model=model, tokenizer=TOKENIZER, head=SelectiveHead(model.get_output_embeddings()) if head else None,
        layout=layout, fingerprint="", name="tiny",
    )  # fmt: skip


def task(model, template="{sentence} {prompt}", **settings):
    return TaskModel(model=model, template=PromptTemplate(template), verbalizers=WORDS, **settings)


def text_ids(text):
    return TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@torch.no_grad()
def plain(model, rows, words=WORDS, tokenizer=TOKENIZER, places=None):
    """Class log-probabilities by the model's ordinary forward, one row at a time."""
    columns = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
    places = places or [-1] * len(rows)
    logits = [
        model(torch.tensor([row])).logits[0, place, columns] for row, place in zip(rows, places, strict=True)
    ]
    return torch.stack(logits).log_softmax(-1)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("head", [True, False])
def test_a_causal_model_matches_its_ordinary_forward(make, layout, head):
    model = make().eval()
    expected = [plain(model, [text_ids(text.strip()) + prompt for text in TEXTS]) for prompt in PROMPTS]
    found = task(causal(make(), layout=layout, head=head)).class_logprobs(PROMPTS, TEXTS)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(PROMPTS), len(TEXTS)))


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_text_after_the_prompt_is_read_before_the_answer(layout):
    expected = [
        plain(tiny_llama().eval(), [text_ids(text.strip()) + prompt + text_ids(" so:") for text in TEXTS])
        for prompt in PROMPTS
    ]
    found = task(causal(layout=layout), "{sentence} {prompt} so:").class_logprobs(PROMPTS, TEXTS)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=0)


def test_a_prompt_before_the_sentence():
    expected = [
        plain(tiny_llama().eval(), [p + text_ids((" " if p else "") + text.strip()) for text in TEXTS])
        for p in PROMPTS
    ]
    found = task(causal(), "{prompt} {sentence}").class_logprobs(PROMPTS, TEXTS)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("template", ["{sentence} {prompt}", "{prompt} {sentence} so"])
def test_a_value_depends_on_its_prompt_and_text_alone(template, monkeypatch):
    one = task(causal(), template)
    whole = one.class_logprobs(PROMPTS, TEXTS)
    for other in (replace(one, tokens_per_batch=1), replace(one, tokens_per_batch=100)):
        torch.testing.assert_close(other.class_logprobs(PROMPTS, TEXTS), whole, atol=1e-5, rtol=0)
    alone = torch.stack([torch.cat([one.class_logprobs([p], [t])[0] for t in TEXTS]) for p in PROMPTS])
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=0)
    turned = one.class_logprobs(PROMPTS[::-1], TEXTS[::-1]).flip(0, 1)
    torch.testing.assert_close(turned, whole, atol=1e-5, rtol=0)
    monkeypatch.setattr("tokenward.sampling.classification.task_model._ROW_PROMPT_TOKENS", 4)
    torch.testing.assert_close(one.class_logprobs(PROMPTS, TEXTS), whole, atol=1e-5, rtol=0)


def test_the_sentence_is_read_once_for_all_distinct_prompts():
    one = task(causal())
    seen = []
    forward = one.model.model.forward
    one.model.model.forward = lambda **given: seen.append(given["input_ids"]) or forward(**given)
    one.class_logprobs([[1, 2], [3, 4], [5, 6], [3, 4]], ["the film"])
    assert [ids.tolist() for ids in seen] == [[[*text_ids("the film"), 1, 2, 3, 4, 5, 6]]]


def test_bfloat16_is_near():
    one = task(causal())
    exact = one.class_logprobs(PROMPTS, TEXTS)
    rough = replace(one, precision="bfloat16").class_logprobs(PROMPTS, TEXTS)
    assert rough.dtype == torch.float32
    assert 1e-4 < (rough - exact).abs().max() < 0.2


def test_a_long_sentence_is_cut_and_counted():
    short = task(causal(), max_sentence_tokens=4)
    texts = ["film star", "film", "of"]
    assert short.sentences_cut(texts) == 1
    found = short.class_logprobs([[5, 6]], texts)
    expected = short.class_logprobs([[5, 6]], ["film", "film", "of"])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("template", "row"),
    [
        ("{sentence} {prompt} {mask} .", "[CLS] {s} {p} [MASK] . [SEP]"),
        ("{mask} : {prompt} {sentence}", "[CLS] [MASK] : {p} {s} [SEP]"),
    ],
)
def test_a_masked_model_matches_its_ordinary_forward(template, row):
    tokenizer, words = masked_tokenizer(), ["bad", "good", "great"]
    texts = ["the film was so bad", "very good", "unknown words"]
    prompts = [[7, 8], [], [4, 4, 9, 10], [1]]
    found = TaskModel(
        model=masked_model(), template=PromptTemplate(template), verbalizers=words, tokens_per_batch=30
    ).class_logprobs(prompts, texts)
    known = tokenizer.get_vocab()
    for p, prompt in enumerate(prompts):
        for x, text in enumerate(texts):
            parts = {"{p}": prompt, "{s}": tokenizer(text, add_special_tokens=False)["input_ids"]}
            ids = [i for word in row.split() for i in parts.get(word, [known.get(word)])]
            place = 1 if row.startswith("[CLS] [MASK]") else len(ids) - 3
            expected = plain(bert(), [ids], words, tokenizer, [place])[0]
            torch.testing.assert_close(found[p, x], expected, atol=1e-4, rtol=0)


def test_a_masked_model_from_a_folder(tmp_path):
    model = masked_model()
    model.model.save_pretrained(tmp_path / "bert")
    model.tokenizer.save_pretrained(tmp_path / "bert")
    loaded = load_masked(str(tmp_path / "bert"), device="cpu")
    settings = {"template": PromptTemplate("{sentence} {prompt} {mask}"), "verbalizers": ["bad", "good"]}
    torch.testing.assert_close(
        TaskModel(model=loaded, **settings).class_logprobs([[7]], ["film"]),
        TaskModel(model=model, **settings).class_logprobs([[7]], ["film"]),
    )


def test_what_is_not_a_masked_model_is_an_error(tmp_path):
    save_tiny(tmp_path / "llama")
    bert().bert.save_pretrained(tmp_path / "bare")
    masked_tokenizer().save_pretrained(tmp_path / "bare")
    for make, code in (
        (lambda: load_masked(str(tmp_path / "llama")), "model-not-loaded"),
        (lambda: load_masked(str(tmp_path / "bare")), "missing-weights"),
        (lambda: MaskedModel(model=bert(), tokenizer=TOKENIZER, name="tiny"), "not-a-masked-model"),
    ):
        with pytest.raises(UserError) as caught:
            make()
        assert caught.value.code == code


def test_template_and_model_must_match():
    template = PromptTemplate("{sentence} {prompt}")
    for make, key in (
        (lambda: task(causal(), "{sentence} {prompt} {mask}"), "template"),
        (lambda: TaskModel(model=masked_model(), template=template, verbalizers=["bad", "good"]), "template"),
        (lambda: task(causal(layout="encoder_decoder")), "model"),
        (lambda: TaskModel(model=causal(), template=template, verbalizers=["good", "bad"]), "verbalizers"),
    ):
        with pytest.raises(UserError) as caught:
            make()
        assert caught.value.key == f"prompt_task.{key}"


def test_texts_that_are_too_long_or_empty_are_errors():
    one = task(causal(tiny_llama(max_position_embeddings=20)))
    with pytest.raises(UserError, match=r"24 tokens.* reads 20") as caught:
        one.class_logprobs([[1] * 4, [1, 2]], ["a", "x" * 20])
    assert caught.value.code == "too-long"
    with pytest.raises(UserError, match="text 1") as caught:
        one.class_logprobs([[1], []], ["a", " "])
    assert caught.value.code == "empty-text"
