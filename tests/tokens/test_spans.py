"""Which bytes each token covers, for a byte-level, a byte-fallback and GPT-2's vocabulary."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer
from tokenward.errors import UserError
from tokenward.tokens.spans import ByteSpan, byte_spans, span_values, spans_of_ids
from tokenward.types import Span

DATA = Path(__file__).parents[3] / "shared" / "data"
STORIES = DATA / "stories260K" / "hf"
GPT2 = DATA / "gpt2_tokenizer"

HARD = [
    "the good",
    " two  spaces ",
    "日本語",
    "👩‍👩‍👧",
    "שלום עולם",
    "e\u0301",
    "\n\t\r\n",
    "\x00",
    "ﬁ½",
    "A\u200fB",
    "\u2581",
]
texts = st.one_of(
    st.text(max_size=20),
    st.lists(st.sampled_from([*HARD, "a", " ", ".", "th", "é"]), max_size=8).map("".join),
)


@cache
def tokenizer(name: str):
    """One of the tokenizers under test. Skips the test if its files are missing."""
    if name == "tiny":
        return tiny_tokenizer()
    folder = {"stories": STORIES, "gpt2": GPT2}[name]
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    if name == "stories":
        return AutoTokenizer.from_pretrained(folder)
    return GPT2Tokenizer(vocab=str(GPT2 / "vocab.json"), merges=str(GPT2 / "merges.txt"))


def spans_of(name: str, text: str) -> list[tuple[int, int]]:
    return [tuple(span) for span in byte_spans(tokenizer(name), text)]


@pytest.mark.parametrize("name", ["tiny", "stories", "gpt2"])
@given(texts)
@settings(derandomize=True, deadline=None, max_examples=50)
def test_spans_are_contiguous_and_cover_the_text(name, text):
    spans = spans_of(name, text)
    assert len(spans) == len(tokenizer(name)(text, add_special_tokens=False)["input_ids"])
    edges = [0, *(end for _, end in spans)]
    assert [start for start, _ in spans] == edges[:-1]
    assert edges[-1] == len(text.encode())


@pytest.mark.parametrize("name", ["tiny", "gpt2"])
def test_each_byte_level_token_spells_its_bytes(name):
    # Decoded to the end of each token: a check that does not know the byte alphabet.
    chosen = tokenizer(name)
    for text in HARD:
        ids = chosen(text, add_special_tokens=False)["input_ids"]
        decoded = [chosen.decode(ids[:n], clean_up_tokenization_spaces=False) for n in range(1, len(ids) + 1)]
        assert decoded == [text.encode()[:end].decode(errors="replace") for _, end in spans_of(name, text)]
        assert spans_of_ids(chosen, ids) == (text, byte_spans(chosen, text))


def test_byte_level_spans_by_hand():
    # " the" is one token; "é" is two bytes and two tokens; "in" is one.
    assert spans_of("tiny", "x the") == [(0, 1), (1, 5)]
    assert spans_of("tiny", "éin") == [(0, 1), (1, 2), (2, 4)]
    assert spans_of("tiny", "") == []
    # Special tokens in the text are read as letters.
    assert spans_of("tiny", "a<|im_end|>b") == [(index, index + 1) for index in range(12)]


def test_byte_fallback_spans_by_hand():
    # Pieces: "▁" (added, no text), "é", then one piece per byte of the characters that the vocabulary lacks.
    assert spans_of("stories", "é日") == [(0, 0), (0, 2), (2, 3), (3, 4), (4, 5)]
    # "▁h", "i", "▁", "▁there": the added space is cut off, the written ones belong to what follows.
    assert spans_of("stories", "hi  there") == [(0, 1), (1, 2), (2, 3), (3, 9)]


def test_a_space_mark_in_the_text_is_text():
    # U+2581, three bytes, comes back from the tokenizer as a space: "▁a", "▁b" and "▁", "▁", "a".
    assert spans_of("stories", "a\u2581b") == [(0, 1), (1, 5)]
    assert spans_of("stories", " \u2581a")[-1] == (1, 5)


def lowering_tokenizer():
    """A tokenizer whose normalizer changes the text, so that its tokens do not spell it."""
    backend = Tokenizer(models.WordLevel({"straße": 0, "日本": 1, "b": 2, "[unk]": 3}, unk_token="[unk]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[unk]")


def test_character_offsets_are_used_if_a_normalizer_changes_the_text():
    # S t r a ß(2) e = 7 bytes, a space, two characters of 3 bytes, a space, B
    spans = byte_spans(lowering_tokenizer(), "Straße 日本 B")
    assert spans == [ByteSpan(0, 7), ByteSpan(8, 14), ByteSpan(15, 16)]


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False
        name_or_path = "old/model"

    with pytest.raises(UserError, match="old/model") as error:
        byte_spans(Slow(), "x")
    assert error.value.code == "slow-tokenizer"


def test_span_values_by_hand():
    text = "é good end"
    tokens = byte_spans(tokenizer("tiny"), text)
    # é is two tokens of a byte; then " ", "good", " ", "e", "n", "d"
    assert tokens == [(0, 1), (1, 2), (2, 3), (3, 7), (7, 8), (8, 9), (9, 10), (10, 11)]
    # Characters, not bytes: 2 to 6 is "good", 7 to 10 is "end".
    spans = [Span(2, 6, 1.5), Span(7, 10, -2.0)]
    assert span_values(spans, text, tokens) == [0.0, 0.0, 0.0, 1.5, 0.0, -2.0, -2.0, -2.0]


def test_a_token_has_the_value_of_the_span_that_it_overlaps_most():
    tokens = [ByteSpan(0, 10)]
    text = "0123456789"
    assert span_values([Span(0, 4, 1.0), Span(4, 10, 2.0)], text, tokens) == [2.0]
    assert span_values([Span(0, 5, 1.0), Span(5, 10, 2.0)], text, tokens) == [1.0]
    assert span_values([Span(8, 10, 5.0), Span(0, 1, 9.0)], text, tokens) == [5.0]
    # Tokens without text have no value.
    tokens = [ByteSpan(0, 1), ByteSpan(1, 1), ByteSpan(1, 2), ByteSpan(2, 2)]
    assert span_values([Span(0, 2, 3.0)], "ab", tokens) == [3.0, 0.0, 3.0, 0.0]
    assert span_values([Span(1, 1, 3.0)], "ab", tokens) == [0.0] * 4


def test_byte_fallback_ids_spell_the_text_after_its_added_space():
    for text in ("hi  there", "é日", "a b"):
        ids = tokenizer("stories")(text, add_special_tokens=False)["input_ids"]
        spelled, spans = spans_of_ids(tokenizer("stories"), ids)
        assert spelled == " " + text
        assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
        assert spans[-1].end == len(spelled.encode())


def test_special_tokens_and_ids_beyond_the_tokenizer_spell_nothing():
    chosen = tokenizer("tiny")
    ids = [chosen.bos_token_id, *chosen("the a", add_special_tokens=False)["input_ids"], chosen.eos_token_id]
    # <|im_start|>, "the", " a", <|im_end|>
    assert spans_of_ids(chosen, ids) == ("the a", [(0, 0), (0, 3), (3, 5), (5, 5)])
    assert spans_of_ids(chosen, ids[-1:], special=True) == ("<|im_end|>", [(0, 10)])
    assert spans_of_ids(chosen, []) == ("", [])
    # Vocabularies are often padded to a round number of rows, and a model can sample the padding.
    beyond = [ord("a") - 33, len(chosen) + 3, ord("b") - 33]
    assert spans_of_ids(chosen, beyond) == ("ab", [(0, 1), (1, 1), (1, 2)])


@pytest.mark.parametrize("name", ["tiny", "gpt2"])
@given(st.lists(st.integers(0, 255), max_size=12))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_any_ids_spell_as_many_bytes_as_their_spans_say(name, ids):
    text, spans = spans_of_ids(tokenizer(name), ids)
    edges = [0, *(end for _, end in spans)]
    assert [start for start, _ in spans] == edges[:-1]
    assert edges[-1] == len(text.encode())
    # The stand-in of each stray byte is one byte, so what is whole is where decoding puts it too.
    assert text.replace("\x1a", "") == tokenizer(name).decode(
        ids, clean_up_tokenization_spaces=False
    ).replace("\ufffd", "").replace("\x1a", "")
