"""Segments of a response: words, sentences and spans, whatever the tokens are."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer
from tests.tokens.rows import encoded
from tokenward.errors import UserError
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.segments import token_segments, with_segments
from tokenward.tokens.spans import ByteSpan, byte_spans, spans_of_ids
from tokenward.types import Comparison, Span

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
UNITS = ["token", "word", "sentence", "spans"]


def pieces(unit: str, text: str, spans=()) -> list[str]:
    """The text of each segment, from the bytes of its tokens."""
    tokens = byte_spans(TOKENIZER, text)
    segments = token_segments(unit, text, tokens, spans).tolist()
    found: dict[int, bytes] = {}
    for number, token in zip(segments, tokens, strict=True):
        found[number] = found.get(number, b"") + text.encode()[token.start : token.end]
    return [piece.decode() for piece in found.values()]


def test_words_by_hand():
    # " the" and " a" are tokens; "tea" is t, e, a; the space before a word is the word's.
    text = "a good tea"
    assert [text[s:e] for s, e in byte_spans(TOKENIZER, text)] == ["a", " ", "good", " ", "t", "e", "a"]
    tokens = byte_spans(TOKENIZER, text)
    assert token_segments("word", text, tokens).tolist() == [0, 1, 1, 2, 2, 2, 2]
    assert token_segments("token", text, tokens).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert token_segments("sentence", text, tokens).tolist() == [0] * 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("the good tea", ["the", " good", " tea"]),
        ("  two  spaces ", ["  two", "  spaces "]),
        ("a\nb\t c", ["a", "\nb", "\t c"]),
        ("日本 語", ["日本", " 語"]),
        ("שלום עולם", ["שלום", " עולם"]),
        ("a\u3000b\u00a0c", ["a", "\u3000b", "\u00a0c"]),
        ("well-known, e.g. 3.14", ["well-known,", " e.g.", " 3.14"]),
        ("   ", ["   "]),
        ("", []),
    ],
)
def test_words_include_the_white_space_before_them(text, words):
    assert pieces("word", text) == words


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", " Two!", " Three?"]),
        ("no mark at all", ["no mark at all"]),
        ("It is 3.14 and a.b. End", ["It is 3.14 and a.b.", " End"]),
        ('He said "no." Then (yes!) he left.', ['He said "no."', " Then (yes!)", " he left."]),
        ("Wait... what?! So.", ["Wait...", " what?!", " So."]),
        ("Wait\u2026 what", ["Wait\u2026", " what"]),
        ("Mr. Fox ran", ["Mr.", " Fox ran"]),  # abbreviations as they fall
        ("line one\nline two\n", ["line one\n", "line two\n"]),
        ("One.\n\nTwo.", ["One.", "\n\nTwo."]),
        ("one\n\ntwo", ["one\n\n", "two"]),
        ("one \n \n two", ["one \n", " \n two"]),
        ("One. \n", ["One. \n"]),
        ("\n\n One. Two", ["\n\n One.", " Two"]),
        ("? Yes. . No", ["?", " Yes.", " .", " No"]),
        ("これは本。あれは？「はい。」終", ["これは本。", "あれは？", "「はい。」", "終"]),
        ("यह है। वह है।", ["यह है।", " वह है।"]),
        ("هل؟ نعم", ["هل؟", " نعم"]),
        ("   ", ["   "]),
        ("", []),
        (".", ["."]),
    ],
)
def test_a_sentence_ends_at_its_mark_or_at_the_end_of_the_line(text, sentences):
    assert pieces("sentence", text) == sentences


@given(
    st.sampled_from(["word", "sentence"]),
    st.lists(st.sampled_from([*"ab.!?\n \t\"')", "。", "！", "é", "👍", "the"]), max_size=14).map("".join),
)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_segments_partition_a_text_and_none_of_them_is_blank(unit, text):
    found = pieces(unit, text)
    assert "".join(found) == text
    assert all(piece.strip() for piece in found) or not text.strip()
    assert token_segments(unit, text, byte_spans(TOKENIZER, text)).diff().ge(0).all()


def test_spans_and_the_gaps_between_them():
    text = "the good tea is here"
    #        0123456789
    spans = [Span(13, 15, -1.0), Span(4, 8, 1.0)]
    assert pieces("spans", text, spans) == ["the ", "good", " tea ", "is", " here"]
    assert pieces("spans", text, [Span(0, 3, 1.0), Span(3, 8, 2.0)]) == ["the", " good", " tea is here"]
    assert pieces("spans", text, [Span(9, 20, 1.0)]) == ["the good ", "tea is here"]
    assert pieces("spans", text, []) == [text]
    # Characters, not bytes: é is two of these.
    assert pieces("spans", "éé good", [Span(3, 7, 1.0)]) == ["éé ", "good"]


def test_a_token_belongs_to_the_segment_of_its_first_letter():
    """ "good" is one token and " the" another: a span begins with the letter and its token with the space."""
    assert pieces("spans", "x the y", [Span(2, 5, 1.0)]) == ["x", " the", " y"]
    assert pieces("spans", "x the y", [Span(1, 5, 1.0)]) == ["x", " the", " y"]
    assert pieces("spans", "x the y", [Span(3, 7, 1.0)]) == ["x the", " y"], "a token is not cut"
    assert pieces("spans", "a   b", [Span(2, 5, 1.0)]) == ["a ", "  b"], (
        "white space alone lies where it lies"
    )
    text = "a👍b"  # the thumb is four bytes and four tokens
    tokens = byte_spans(TOKENIZER, text)
    assert len(tokens) == 6
    assert token_segments("spans", text, tokens, [Span(1, 2, 1.0)]).tolist() == [0, 1, 1, 1, 1, 2]


def marked_tokenizer():
    """A SentencePiece-like vocabulary: the space is a mark before its word, and one is put before the first word."""
    words = ["<unk>", "\u2581the", "\u2581good", "\u2581tea", "</s>"]
    backend = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_spans_are_in_characters_of_the_data_even_if_ids_spell_another_form():
    text, tokenizer = "the good tea", marked_tokenizer()
    row = row_of([1, 2, 3, 4], texts=(text,), spans=((Span(4, 8, 1.0),),))
    assert spans_of_ids(tokenizer, [1, 2, 3, 4])[0] == " the good tea", "a space that the text does not have"
    assert [part.tolist() for part in with_segments("spans", tokenizer, row).segments] == [[0, 1, 2, 2]]
    assert [part.tolist() for part in with_segments("word", tokenizer, row).segments] == [[0, 1, 2, 2]]


@pytest.mark.parametrize("spans", [[Span(0, 4, 1.0), Span(3, 6, 1.0)], [Span(0, 9, 1.0), Span(2, 3, 1.0)]])
def test_overlapping_spans_are_refused(spans):
    with pytest.raises(UserError) as error:
        pieces("spans", "the good tea", spans)
    assert error.value.code == "overlapping-spans"


@pytest.mark.parametrize("unit", UNITS[1:])
def test_eos_tokens_belong_to_the_last_segment(unit):
    text = "One. Two"
    spans, end = byte_spans(TOKENIZER, text), len(text)
    tokens = [*spans, *[ByteSpan(end, end)] * (10 - len(spans))]
    found = token_segments(unit, text, tokens, [Span(0, 4, 1.0)]).tolist()
    assert found == [0] * 4 + [1] * 6
    assert token_segments(unit, "", [ByteSpan(0, 0)]).tolist() == [0]


def row_of(*responses: list[int], texts=None, spans=None) -> TokenRow:
    texts = texts or tuple(TOKENIZER.decode(ids) for ids in responses)
    row = encoded([1, 2], *responses)
    comparison = Comparison(
        key="k", prompt=(), responses=tuple(texts), ranks=row.comparison.ranks, source="s", spans=spans
    )
    return replace(row, comparison=comparison)


def segments_of(unit: str, row: TokenRow) -> list[list[int]]:
    return [part.tolist() for part in with_segments(unit, TOKENIZER, row).segments]


def ids_of(tokens: str) -> list[int]:
    return TOKENIZER.convert_tokens_to_ids(tokens.split())


def test_sampled_ids_can_differ_from_those_of_encoding_their_text():
    """t, h, e and Ġ, a: the tokenizer itself would write one token for each."""
    sampled = [*ids_of("t h e Ġ a Ġ t"), EOS]
    assert TOKENIZER("the a t", add_special_tokens=False)["input_ids"] != sampled[:-1]
    assert segments_of("word", row_of(sampled)) == [[0, 0, 0, 1, 1, 2, 2, 2]]


def test_an_incomplete_character_does_not_shift_what_follows():
    """Ã is the first byte of é; a character that is never finished is one byte of text."""
    sampled = ids_of("a Ã Ġ b Ã © Ġ c Ã")
    text, places = spans_of_ids(TOKENIZER, sampled)
    assert text == "a\x1a bé c\x1a"
    assert places == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 9)]
    assert segments_of("word", row_of(sampled)) == [[0, 0, 1, 1, 1, 1, 2, 2, 2]]


def test_a_byte_that_is_a_space_in_latin_1_is_not_a_space():
    """à is C3 A0, and A0 alone is a no-break space in Latin-1."""
    sampled = TOKENIZER("voilà là", add_special_tokens=False)["input_ids"] + ids_of("Ã")
    assert segments_of("word", row_of(sampled)) == [[0] * 6 + [1] * 5]


def test_a_special_token_in_the_middle_begins_the_next_segment():
    assert segments_of("word", row_of([*ids_of("a"), EOS, *ids_of("Ġ b")])) == [[0, 1, 1, 1]]


def test_spans_of_a_row_are_those_of_its_responses():
    texts = ("the good tea", "bad")
    ids = [TOKENIZER(text, add_special_tokens=False)["input_ids"] + [EOS] for text in texts]
    row = row_of(*ids, texts=texts, spans=((Span(4, 8, 2.0),), ()))
    assert segments_of("spans", row) == [[0, 0, 1, 2, 2, 2, 2, 2], [0, 0, 0, 0]]
    assert segments_of("spans", row_of(*ids, texts=texts)) == [[0] * 8, [0] * 4]


def test_spans_of_a_cut_response_are_those_of_what_is_left():
    ids = TOKENIZER("é good tea", add_special_tokens=False)["input_ids"]
    whole = row_of(ids, texts=("é good tea",), spans=((Span(2, 6, 2.0),),))
    (found,) = segments_of("spans", whole)
    assert found == [0, 0, 0, 1, 2, 2, 2, 2]
    for length in range(1, len(ids)):
        cut = row_of(ids[:length], texts=("é good tea",), spans=((Span(2, 6, 2.0),),))
        assert segments_of("spans", cut) == [found[:length]]


@pytest.mark.parametrize("unit", UNITS)
@given(st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=1, max_size=12))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_any_ids_have_segments_in_their_order(unit, ids):
    found = with_segments(unit, TOKENIZER, row_of(ids)).segments
    if unit == "token":
        assert found is None  # the row is unchanged
        return
    assert len(found[0]) == len(ids)
    assert found[0].diff().ge(0).all()
    assert int(found[0][0]) >= 0
