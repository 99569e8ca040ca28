"""Templates: ids that stay as they are, spaces, masks, and what is cut."""

import pytest

from tests.sampling.masked import masked_tokenizer
from tests.tiny import tiny_tokenizer
from tokenward.errors import UserError
from tokenward.sampling.classification import PromptTemplate
from tokenward.sampling.classification.template import TemplateEncoder, special_ends, verbalizer_ids

TOKENIZER = tiny_tokenizer()
WORDS = masked_tokenizer()
PROMPT = [7, 7, 3]


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def row(template, sentence, prompt=PROMPT, *, tokenizer=TOKENIZER, limit=99):
    encoder = TemplateEncoder(PromptTemplate(template), tokenizer, max_sentence_tokens=limit)
    return encoder.fill(sentence, empty_prompt=not prompt).row(prompt)


@pytest.mark.parametrize(
    ("template", "before", "after", "empty"),
    [
        ("{sentence} {prompt}", "the film", "", "the film"),
        ("{sentence}{prompt}", "the film", "", "the film"),
        ("{prompt} {sentence}", "", " the film", "the film"),
        ("{prompt}{sentence}", "", "the film", "the film"),
        ("Text: {sentence} {prompt} It is ", "Text: the film", " It is", "Text: the film It is"),
        ("{sentence}\n\n{prompt}", "the film\n\n", "", "the film\n\n"),
        ("{{a}} {prompt} b {sentence} c", "{a}", " b the film c", "{a} b the film c"),
        ("  {sentence}  {prompt}  ", "the film", "", "the film"),
        ("{prompt}  x{sentence}", "", " xthe film", "xthe film"),
        ("{sentence} {prompt}.", "the film", ".", "the film."),
    ],
)
def test_spaces_go_with_what_follows_them_and_collapse(template, before, after, empty):
    assert row(template, " the film\n") == ids(before) + PROMPT + ids(after)
    assert row(template, "the film", []) == ids(empty)


def test_the_prompt_is_never_encoded_again():
    """Single bytes that a tokenizer would join: "t", "h", "e" would come back as "the"."""
    letters = [token for letter in "the" for token in ids(letter)]
    assert len(letters) == 3
    assert len(ids("the")) == 1
    assert row("{sentence} {prompt}", "a b", letters) == ids("a b") + letters


def test_a_long_sentence_loses_its_end_and_nothing_else_is_cut():
    encoder = TemplateEncoder(
        PromptTemplate("Say {sentence} now: {prompt}"), TOKENIZER, max_sentence_tokens=4
    )
    filled = encoder.fill("abcdefgh")
    assert (filled.before, filled.after, filled.cut) == (ids("Say abcd now:"), [], True)
    assert not encoder.fill("abcd").cut


def test_a_sentence_that_spells_a_special_token_is_text_and_a_template_may_mean_one():
    end = TOKENIZER.eos_token_id
    assert end not in row("{sentence} {prompt}", "so <|im_end|> so")
    assert row("<|im_start|>{sentence}<|im_end|>{prompt}", "a") == [
        TOKENIZER.bos_token_id, *ids("a"), end, *PROMPT,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "expected", "place"),
    [
        ("{sentence} {prompt} {mask} .", "[CLS] bad film {p} [MASK] . [SEP]", 6),
        ("{mask} {prompt} {sentence}", "[CLS] [MASK] {p} bad film [SEP]", 1),
        ("{prompt} it {sentence} was {mask}", "[CLS] {p} it bad film was [MASK] [SEP]", 8),
        ("it was {mask} : {sentence} {prompt}", "[CLS] it was [MASK] : bad film {p} [SEP]", 3),
    ],
)
@pytest.mark.parametrize("prompt", [[7, 7, 3], []])
def test_the_mask_is_where_the_template_has_it(template, expected, place, prompt):
    encoder = TemplateEncoder(PromptTemplate(template), WORDS, max_sentence_tokens=9)
    filled = encoder.fill("bad film", empty_prompt=not prompt)
    known = WORDS.get_vocab()
    wanted = [i for word in expected.split() for i in (prompt if word == "{p}" else [known[word]])]
    assert filled.row(prompt) == wanted
    assert wanted[filled.answer] == WORDS.mask_token_id
    assert filled.answer % len(wanted) == place - (0 if prompt or place in (1, 3) else 3)


def test_a_mask_token_in_the_prompt_is_not_taken_for_the_mask():
    filled = TemplateEncoder(PromptTemplate("{sentence} {prompt} {mask}"), WORDS, max_sentence_tokens=9).fill(
        "bad"
    )
    row = filled.row([WORDS.mask_token_id, 7])
    assert filled.answer % len(row) == 4


def test_the_sentence_is_cut_and_not_the_mask():
    for template in ("{sentence} {prompt} {mask} .", "{mask} {prompt} {sentence}"):
        encoder = TemplateEncoder(PromptTemplate(template), WORDS, max_sentence_tokens=2)
        filled = encoder.fill("bad film bad film bad")
        assert filled.cut
        cut = filled.row(PROMPT)
        assert cut == encoder.fill("bad film").row(PROMPT)
        assert cut[filled.answer] == WORDS.mask_token_id


def test_what_a_tokenizer_puts_around_a_text():
    assert special_ends(TOKENIZER) == ([], [])
    assert special_ends(WORDS) == ([WORDS.cls_token_id], [WORDS.sep_token_id])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{sentence}", "{prompt} 0 times"),
        ("{prompt}", "{sentence} 0 times"),
        ("{sentence} {sentence} {prompt}", "{sentence} 2 times"),
        ("{sentence} {prompt} {prompt}", "{prompt} 2 times"),
        ("{sentence} {prompt} {mask} {mask}", "{mask} 2 times"),
        ("{sentence} {text} {prompt}", "slot {text}"),
        ("{sentence} {} {prompt}", "slot {}"),
        ("{sentence} {prompt!r}", "slot {prompt!r}"),
        ("{sentence:>9} {prompt}", "slot {sentence:>9}"),
        ("{sentence} {prompt", "cannot be parsed"),
    ],
)
def test_a_template_with_other_slots_is_an_error(template, words):
    with pytest.raises(UserError) as caught:
        PromptTemplate(template)
    assert caught.value.code == "invalid-template"
    assert words in str(caught.value)


def test_verbalizers_are_one_token_each():
    assert verbalizer_ids(TOKENIZER, [" the", "good"]) == [ids(" the")[0], ids("good")[0]]
    assert len(ids(" a")) == 1
    for tokenizer, words, message in (
        (TOKENIZER, [" the", " bad"], "' bad' is 4 tokens"),
        (WORDS, ["good", "xxx"], "'xxx' is not in the vocabulary"),
        (WORDS, ["film", " film"], "'film' and ' film' are the same token"),
        (TOKENIZER, ["good"], "['good']"),
        (TOKENIZER, ["the", "a\n"], "Write ' a' with a leading space"),
    ):
        with pytest.raises(UserError) as caught:
            verbalizer_ids(tokenizer, words)
        assert caught.value.code == "invalid-verbalizer"
        assert message in str(caught.value)
