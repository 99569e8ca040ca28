"""Preference sources: values by hand, and every failure as an error with its row."""

import math
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tests.tiny import save_tiny, tiny_tokenizer
from tokenward.errors import UserError
from tokenward.plugins import build
from tokenward.sampling.sources import (
    SOURCES,
    ChrF,
    Length,
    Meteor,
    Rouge,
    RowError,
    SequenceClassifier,
    call_source,
    text,
)
from tokenward.sampling.sources.base import check_source
from tokenward.sampling.sources.text import load_wordnet

REFERENCE = "the cat sat on the mat"


def score(source, completions, shared=None, **columns):
    """As the pipeline calls a source; ``shared`` are references that serve every completion."""
    count = len(completions)
    if shared is not None:
        columns["references"] = [shared] * count
    prompts = ["Say it."] * count
    where = [f"rows.jsonl:{row + 1}" for row in range(count)]
    return call_source("mine", source, prompts, completions, [[1]] * count, columns, where)


@contextmanager
def error(code: str, *words: str):
    with pytest.raises(UserError) as caught:
        yield
    assert caught.value.code == code, caught.value
    for word in words:
        assert word in str(caught.value)


# --- the call


def test_a_function_is_given_what_its_signature_names():
    calls = []

    def few(completions, target):
        calls.append((completions, target))
        return [1, 2.5]

    def everything(prompts, **others):
        calls.append((prompts, others))
        return (3.0, 4.0)

    assert score(few, ["a", "b"], target=["x", "y"], other=[0, 0]) == [1.0, 2.5]
    assert score(everything, ["a", "b"], target=["x", "y"]) == [3.0, 4.0]
    others = {"completions": ["a", "b"], "completion_ids": [[1], [1]], "target": ["x", "y"]}
    assert calls == [(["a", "b"], ["x", "y"]), (["Say it."] * 2, others)]


def test_numbers_of_torch_and_a_parameter_with_a_default_serve():
    assert score(lambda completions, scale=2.0: torch.tensor([0.5, scale]), ["a", "b"]) == [0.5, 2.0]


def test_trls_reward_functions_work():
    from trl.rewards import get_soft_overlong_punishment

    source = get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4)
    found = call_source("trl", source, ["p"] * 3, ["", "", ""], [[1] * 6, [1] * 8, [1] * 11], {}, ["f:1"] * 3)
    assert found == [0, -0.5, -1]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0, math.nan, 2.0], (":2:", "nan")),
        ([1.0, 2.0, -math.inf], (":3:", "-inf")),
        ([None, 1.0, 2.0], (":1:", "None")),
        ([1.0, "3", 2.0], (":2:", "'3'")),
        ([1.0, [2.0], 2.0], (":2:", "list")),
        ([1.0, 10**400, 2.0], (":2:", "int")),
        ([torch.ones(2), 1.0, 2.0], (":1:", "Tensor")),
        ([1.0, 2.0], (":3:", "2 scores for 3")),
        ([1.0] * 4, (":3:", "4 scores for 3")),
        ([], (":1:", "0 scores for 3")),
        ("123", ("'123'", "0 scores for 3")),
        ({"a": 1, "b": 2, "c": 3}, ("dict",)),
        (3.0, ("float",)),
        (None, ("None",)),
        (torch.tensor(1.0), ("Tensor",)),
    ],
)
def test_anything_but_one_finite_number_per_completion_is_an_error_of_its_row(returned, words):
    with error("wrong-scores", *words):
        score(lambda prompts, completions, **columns: returned, ["a", "b", "c"])


@pytest.mark.parametrize(
    ("source", "columns", "code", "word"),
    [
        ([1.0], {}, "source-not-callable", "list"),
        (lambda completions, /: [1.0], {}, "source-signature", "'completions'"),
        (dict.fromkeys, {}, "source-signature", "mine"),
        (lambda completions, label: [1.0], {"target": ["x"]}, "missing-column", "'label'"),
        (lambda completions, **columns: [1.0], {"prompts": ["x"]}, "reserved-column", "'prompts'"),
    ],
)
def test_a_source_that_cannot_be_called_is_an_error(source, columns, code, word):
    with error(code, word):
        score(source, ["a"], **columns)


def test_a_source_is_checked_without_a_call():
    check_source("f", lambda prompts, references: [1.0], ["references"], kind="verifier")
    with error("missing-column", "'answers'"):
        check_source("f", lambda prompts, answers: [1.0], ["references"], kind="verifier")
    with error("source-not-callable"):
        check_source("f", Length, [], kind="verifier")


def test_an_exception_in_a_custom_function_is_not_caught():
    with pytest.raises(ZeroDivisionError):
        score(lambda completions: [1 / len(text) for text in completions], ["a", ""])


def test_a_plain_function_by_module_and_name(tmp_path, monkeypatch):
    (tmp_path / "my_preferences.py").write_text(
        "def short(prompts, completions, **columns):\n    return [-len(text) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert score(build("source", "my_preferences:short", {}, SOURCES), ["a", "bcd"]) == [-1.0, -3.0]


def test_the_metrics_of_the_evaluation_serve_as_sources():
    source = build("source", "tokenward.evaluation.replies:distinct_2", {}, SOURCES)
    assert score(source, ["a b a b", "a b c"]) == pytest.approx([2 / 3, 1.0])


def test_length_by_hand():
    source = build("source", "length", {"words": 3}, SOURCES)
    assert score(source, ["one two three", "one", "", "a b c d e"]) == [0.0, -2.0, -3.0, -2.0]
    with error("invalid-setting", "-1"):
        Length(words=-1)


# --- metrics against references


@pytest.mark.parametrize(
    ("settings", "completion", "expected"),
    [
        # Shared words the, cat, the: 3 of 4 and of 6; the longest common subsequence is the same three.
        ({"type": "rouge1"}, "the cat the dog", 2 * 3 / (4 + 6)),
        ({"type": "rouge1", "measure": "precision"}, "the cat the dog", 3 / 4),
        ({"type": "rouge1", "measure": "recall"}, "the cat the dog", 3 / 6),
        # Pairs "the cat", "cat the", "the dog" share one with the reference's five.
        ({"type": "rouge2"}, "the cat the dog", 2 * 1 / (3 + 5)),
        ({}, "the cat the dog", 2 * 3 / (4 + 6)),
        # All words of the reference backwards: "the on the" or "the sat the" is the longest in order.
        ({}, "mat the on sat cat the", 3 / 6),
        ({"type": "rouge1"}, "mat the on sat cat the", 1.0),
        # Each line of the reply is found in order, so together they cover the reference; as one text, half of it.
        ({"type": "rougeLsum"}, "on the mat\nthe cat sat", 1.0),
        ({}, "on the mat\nthe cat sat", 3 / 6),
        ({}, "", 0.0),
        ({}, " \n", 0.0),
        ({}, "unlike", 0.0),
    ],
)
def test_rouge_by_hand(settings, completion, expected):
    source = build("source", "rouge", settings, SOURCES)
    assert score(source, [completion], [REFERENCE]) == pytest.approx([expected])


def test_rouge_stems_unless_told_otherwise():
    assert score(Rouge(), ["jumping cats"], ["jumped cat"]) == [0.5 + 0.5]
    assert score(Rouge(stemmer=False), ["jumping cats"], ["jumped cat"]) == [0.0]


def test_several_references_count_as_their_best_or_their_mean():
    references = ["a b", "a c d e f g"]
    # Against "a b": 2 of 2 and 2. Against the other: 1 of 2 and of 6, 2 / 8.
    assert score(Rouge(type="rouge1"), ["a b"], references) == [1.0]
    assert score(Rouge(type="rouge1", several="mean"), ["a b"], references) == pytest.approx([(1 + 0.25) / 2])


def test_each_completion_has_its_own_references():
    columns = {"references": [["good day"], ["bad night"]]}
    assert score(Rouge(), ["bad night", "bad night"], **columns) == [0.0, 1.0]


def test_chrf_by_hand():
    # Up to 2 characters: a, b, c and ab, bc against a, b, d and ab, bd: 2 of 3 and 1 of 2; precision equals recall.
    expected = 100 * (2 / 3 + 1 / 2) / 2
    assert score(ChrF(characters=2), ["abc"], ["abd"]) == pytest.approx([expected])
    assert score(ChrF(), [REFERENCE, "", "xyz"], [REFERENCE]) == pytest.approx([100.0, 0.0, 0.0])


def test_chrf_is_sacrebleus():
    import sacrebleu

    references = ["Die Katze saß auf der Matte.", "Auf der Matte saß die Katze."]
    texts = ["Die Katze lag auf der Matte", "eine Matte", "猫"]
    plain = [sacrebleu.sentence_chrf(t, references).score for t in texts]
    plus = [sacrebleu.sentence_chrf(t, references, word_order=2).score for t in texts]
    assert score(ChrF(), texts, references) == plain
    assert score(ChrF(words=2), texts, references) == plus
    assert plain != plus


METRICS = [Rouge(), Meteor(), ChrF()]


def test_an_unusable_reference_is_an_error_of_its_row():
    """Even if the completion is empty."""
    for source in METRICS:
        for references, row, word in (
            ([["x"], [" "]], ":2:", "' '"),
            ([["x"], ["y", ""]], ":2:", "''"),
            ([["x"], [None]], ":2:", "None"),
            ([[], ["x"]], ":1:", "[]"),
            (["x", "y"], ":1:", "'x'"),
        ):
            with error("invalid-references", row, word):
                score(source, ["", ""], references=references)
        with error("missing-column", "references", "target, document"):
            score(source, ["a"], target=["x"], document=["y"])
    with pytest.raises(RowError, match="row 1: references"):
        ChrF()(["p", "p"], ["a", "b"], references=[["x"], []])
    with error("invalid-setting", "characters 0"):
        ChrF(characters=0)


def test_a_reference_without_words_for_rouge_is_an_error_and_not_0():
    with error("invalid-references", "rougeL needs 1 words"):
        score(Rouge(), ["猫"], ["猫が座った"])
    with error("invalid-references", "rouge2 needs 2 words"):
        score(Rouge(type="rouge2"), ["cat"], ["cat"])


def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    for kind, module in ((Rouge, "rouge_score"), (Meteor, "nltk"), (ChrF, "sacrebleu")):
        with monkeypatch.context() as patch:
            for name in [name for name in sys.modules if name.partition(".")[0] == module] + [module]:
                patch.setitem(sys.modules, name, None)
            with pytest.raises(UserError, match=rf"{module}.*tokenward\[eval\]"):
                score(kind(), ["a"], ["b"])


def test_without_wordnet_the_error_names_both_packages_and_an_alternative(tmp_path, monkeypatch):
    import nltk.data

    monkeypatch.setattr(nltk.data, "path", [])
    with error("missing-data", "nltk", "wordnet-base", "rouge"):
        load_wordnet(tmp_path)


class OnePair:
    """Stands for a WordNet that knows one pair of synonyms."""

    def synsets(self, word):
        return [self] if word == "puss" else []

    def lemmas(self):
        return [self]

    def name(self):
        return "cat"


def test_meteor_by_hand_on_a_planted_dictionary(monkeypatch):
    monkeypatch.setattr(text, "load_wordnet", OnePair)
    reference = "the cat sat on my mat"
    # "The puss sat": three of three and of six, P = 1 and R = 1 / 2, so F = P R / (0.9 P + 0.1 R) = 0.5 / 0.95.
    # They are one run, so the penalty is 0.5 * (1 / 3)^3; that of all six words is 0.5 * (1 / 6)^3.
    # "sat the": P = 1, R = 1 / 3 in two runs, penalty 0.5 * (2 / 2)^3.
    expected = [1 - 0.5 / 6**3, 0.5 / 0.95 * (1 - 0.5 / 3**3), (1 / 3) / (0.9 + 0.1 / 3) * 0.5, 0.0, 0.0]
    found = score(Meteor(), [reference, "The puss sat", "sat the", "dogs", ""], [reference])
    assert found == pytest.approx(expected)
    mean = score(Meteor(several="mean"), ["The puss sat"], [reference, "dogs bark"])
    assert mean == pytest.approx([expected[1] / 2])


def test_meteor_splits_sentences_and_their_punctuation(monkeypatch):
    monkeypatch.setattr(text, "load_wordnet", OnePair)
    # Five tokens each, the inner full stop among them; all match in one run.
    assert score(Meteor(), ["It ended. Why?"], ["It ended. Why?"]) == pytest.approx([1 - 0.5 / 5**3])
    # Were "ended." one word, only three of four would match.
    assert score(Meteor(), ["It ended"], ["It ended. Why?"]) == pytest.approx(
        [0.4 / (0.9 + 0.1 * 0.4) * (1 - 0.5 / 2**3)]
    )


def test_meteor_with_a_real_dictionary():
    source = Meteor()
    try:
        load_wordnet()
    except UserError:
        pytest.skip("WordNet's dictionary is not installed")
    hypothesis = (
        "It is a guide to action which ensures that the military always obeys the commands of the party"
    )
    reference = "It is a guide to action that ensures that the military will forever heed Party commands"
    # nltk's own example; and two synonyms.
    assert score(source, [hypothesis], [reference]) == pytest.approx([0.6944], abs=5e-5)
    assert score(source, ["a big car"], ["a big auto"]) == pytest.approx([1 - 0.5 / 3**3])


# --- classifiers

WORDS = ["good", "bad", "film", "the", "very", "what", "think"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, BERT's marks around a text and between a pair."""
    marks = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(marks + WORDS)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def bert_config(**settings) -> BertConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertConfig(
        **{"vocab_size": 11, "max_position_embeddings": 64, "initializer_range": 0.5, **sizes, **settings}
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    names = {0: "negative", 1: "neutral", 2: "positive"}
    config = bert_config(id2label=names, label2id={name: i for i, name in names.items()})
    BertForSequenceClassification(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def llama_reward(folder: Path, **settings) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=1,
        initializer_range=0.2,
        **settings,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> Path:
    return llama_reward(tmp_path_factory.mktemp("reward"), pad_token_id=tiny_tokenizer().pad_token_id)


def logits_of(folder: Path, *ids: list[int], types: list[int] | None = None) -> torch.Tensor:
    """What transformers alone gives for one text."""
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    extra = {} if types is None else {"token_type_ids": torch.tensor([types])}
    with torch.inference_mode():
        return model(input_ids=torch.tensor([*ids]), **extra).logits[0]


REPLIES = ["good film", "the bad bad film", "", "very good", "[SEP] film"]


@pytest.mark.parametrize("label", ["positive", 2])
def test_a_classifier_gives_the_probability_of_its_label(bert, label):
    source = build("source", "classifier", {"model": str(bert), "label": label}, SOURCES)
    found = score(source, REPLIES[:2])
    # [CLS] good film [SEP], and so on.
    texts = [[1, 4, 6, 2], [1, 7, 5, 5, 6, 2]]
    assert found == pytest.approx([logits_of(bert, ids).softmax(-1)[2].item() for ids in texts], abs=1e-6)
    assert source.truncated == 0


def test_the_logit_on_request_and_sigmoid_where_labels_do_not_exclude_each_other(bert, tmp_path):
    logits = logits_of(bert, [1, 4, 6, 2])
    source = SequenceClassifier(model=str(bert), label="negative", score="logit")
    assert score(source, ["good film"]) == pytest.approx([logits[0].item()], abs=1e-6)
    model = BertForSequenceClassification.from_pretrained(bert)
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    several = SequenceClassifier(model=str(tmp_path), label="negative")
    assert score(several, ["good film"]) == pytest.approx([logits[0].sigmoid().item()], abs=1e-6)


def test_scores_do_not_depend_on_the_batch_or_the_order(bert, reward):
    for folder, replies, label in ((bert, REPLIES, "positive"), (reward, ["a", "good moon", "x" * 30], None)):
        together = score(SequenceClassifier(model=str(folder), label=label), replies)
        alone = score(SequenceClassifier(model=str(folder), label=label, batch=1), replies)
        turned = score(SequenceClassifier(model=str(folder), label=label, batch=2), replies[::-1])[::-1]
        assert together == pytest.approx(alone, abs=1e-6)
        assert together == pytest.approx(turned, abs=1e-6)
        assert len({round(value, 4) for value in together}) == len(replies)


def test_prompt_and_completion_are_the_tokenizers_pair(bert):
    source = SequenceClassifier(model=str(bert), label=2, pair="prompt_completion")
    found = call_source("c", source, ["what think"], ["good film"], [[1]], {}, ["f:1"])
    ids, types = [1, 9, 10, 2, 4, 6, 2], [0, 0, 0, 0, 1, 1, 1]
    assert found == pytest.approx([logits_of(bert, ids, types=types).softmax(-1)[2].item()], abs=1e-6)


def test_a_mark_that_a_reply_spells_is_text(bert):
    # "[", "SEP", "]" are three unknown words here, not the end of the text.
    source = SequenceClassifier(model=str(bert), label=2)
    found = score(source, ["[SEP] film"])
    assert found == pytest.approx([logits_of(bert, [1, 3, 3, 3, 6, 2]).softmax(-1)[2].item()], abs=1e-6)


def test_a_confident_classifier_still_tells_replies_apart(bert, tmp_path):
    model = BertForSequenceClassification.from_pretrained(bert)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 0.0, 25.0]))
    model.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    source = SequenceClassifier(model=str(tmp_path), label="positive")
    assert len(set(score(source, ["good film", "the bad bad film", "very good"]))) == 3


def test_a_reward_model_gives_its_number_for_the_conversation(reward):
    tokenizer = tiny_tokenizer()
    model = LlamaForSequenceClassification.from_pretrained(reward).eval()
    source = SequenceClassifier(model=str(reward), pair="prompt_completion", template_chat=True)
    found = call_source("r", source, ["Hi"], ["the good"], [[1]], {}, ["f:1"])
    written = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nthe good<|im_end|>\n"
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0, 0].item()
    assert found == pytest.approx([expected], abs=1e-6)
    # The prompt counts.
    assert call_source("r", source, ["Ho"], ["the good"], [[1]], {}, ["f:1"]) != found


def test_a_template_that_writes_its_own_marks_gets_no_others(bert, tmp_path):
    BertForSequenceClassification.from_pretrained(bert).save_pretrained(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "[CLS]{% for m in messages %} {{ m['content'] }} [SEP]{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    source = SequenceClassifier(model=str(tmp_path), label=0, pair="prompt_completion", template_chat=True)
    found = call_source("c", source, ["what think"], ["good film"], [[1]], {}, ["f:1"])
    expected = logits_of(bert, [1, 9, 10, 2, 4, 6, 2]).softmax(-1)[0].item()
    assert found == pytest.approx([expected], abs=1e-6)


def test_a_reward_model_without_a_padding_id_reads_the_same(reward, tmp_path):
    bare = llama_reward(tmp_path / "bare")
    replies = ["a", "good moon", "x" * 30]
    assert score(SequenceClassifier(model=str(bare)), replies) == pytest.approx(
        score(SequenceClassifier(model=str(reward)), replies), abs=1e-6
    )


def test_a_text_that_is_too_long_loses_its_end_and_is_counted(bert):
    source = SequenceClassifier(model=str(bert), label="positive", max_tokens=4)
    whole, cut, same = score(source, ["good film", "good film the very bad", "good"])
    assert cut == pytest.approx(whole, abs=1e-6)
    assert same != pytest.approx(whole, abs=1e-3)
    assert source.truncated == 1
    score(source, ["the the the", "good"])
    assert source.truncated == 2


def test_the_models_own_limit_is_kept(bert):
    source = SequenceClassifier(model=str(bert), label="positive", max_tokens=1000)
    (found,) = score(source, ["good " * 200])
    (limit,) = score(source, ["good " * 62])
    assert found == pytest.approx(limit, abs=1e-6)
    assert source.truncated == 1


def test_a_label_that_is_not_there_is_refused_with_those_that_are(bert):
    for label, words in (
        (None, ("0: negative", "positive")),
        ("Positive", ("'positive'",)),
        (3, "3"),
        (-1, ("-1",)),
    ):
        with error("unknown-label", *words):
            score(SequenceClassifier(model=str(bert), label=label), ["good"])


def test_a_random_head_is_refused(tmp_path):
    encoder = tmp_path / "encoder"
    BertModel(bert_config()).save_pretrained(encoder)
    word_tokenizer().save_pretrained(encoder)
    language_model = save_tiny(tmp_path / "language_model")
    for folder in (encoder, language_model):
        with error("missing-weights"):
            score(SequenceClassifier(model=str(folder), label=0), ["good"])


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no model folder"):
        score(SequenceClassifier(model=str(tmp_path / "none"), label=0), ["good"])
    (tmp_path / "config.json").write_text("{}")
    with error("model-not-loaded"):
        score(SequenceClassifier(model=str(tmp_path), label=0), ["good"])


def test_nothing_to_read_is_an_error_of_its_row(reward):
    with error("empty-text", "rows.jsonl:2:", "mine"):
        score(SequenceClassifier(model=str(reward)), ["good", ""])


def test_settings_that_cannot_work_are_refused_before_loading(bert):
    for settings, code in (
        ({"template_chat": True}, "conflicting-settings"),
        ({"batch": 0}, "invalid-setting"),
        ({"device": "gpu"}, "unsupported-device"),
    ):
        with error(code):
            SequenceClassifier(model=str(bert), **settings)
    with pytest.raises(UserError, match="'truncated'"):
        build("source", "classifier", {"model": str(bert), "truncated": 3}, SOURCES)
    source = SequenceClassifier(model=str(bert), label=0, pair="prompt_completion", template_chat=True)
    with error("no-chat-template"):
        score(source, ["good"])
