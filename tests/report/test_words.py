"""Words and sentences as a response's tokens make them, and the words that two responses share."""

from tokenward.report.pieces import SENTENCE, WORD, breaks, shared_words, words
from tokenward.scoring.store import TokenRecord


def record(pieces: list[str], eos: int = 0) -> TokenRecord:
    ends, end = [], 0
    for piece in pieces:
        end += len(piece.encode())
        ends.append(end)
    starts = [0, *ends][: len(ends)] + [end] * eos
    return TokenRecord("0" * 16, list(range(len(pieces) + eos)), starts, ends + [end] * eos, {})


def test_words_and_sentences_begin_with_the_token_that_holds_their_first_letter() -> None:
    pieces = ["It", " was", " go", "od", ".", " So", "\n", "so", "."]
    found = breaks("".join(pieces), record(pieces, eos=1)).tolist()
    both = WORD + SENTENCE
    # A line's end is the white space before the next word, and the end of its own sentence.
    assert found == [both, WORD, WORD, 0, 0, both, WORD, SENTENCE, 0, 0]
    assert words(pieces, breaks("".join(pieces), record(pieces))) == ["It", "was", "good.", "So", "so."]


def test_a_response_that_is_cut_has_the_units_of_what_is_left() -> None:
    assert breaks("one two three", record(["one", " tw"])).tolist() == [WORD + SENTENCE, WORD]
    assert breaks("", record([])).tolist() == []


def test_shared_words_keep_their_order_and_differing_ones_are_left_out() -> None:
    first = ["the", "tea", "was", "good", "and", "hot"]
    second = ["the", "soup", "was", "bad", "and", "hot"]
    assert [tuple(run) for run in shared_words(first, second)] == [(0, 0, 1), (2, 2, 1), (4, 4, 2)]
    assert shared_words(["a"], ["b"]) == []
    assert shared_words([], []) == []
