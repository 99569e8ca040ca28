"""Prompt and replies out of conversations and transcripts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.data.conversations import (
    from_pair,
    from_shared_beginning,
    from_transcripts,
    is_transcript,
    prompt_of,
    turns,
)
from tokenward.data.fields import Unusable


def said(*contents, system=None):
    """Messages of user and assistant in turn."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def test_turns_of_a_transcript():
    text = "\n\nHuman: one\n\nstill one \n\nAssistant: two\n\nHuman:\n\nAssistant:"
    assert list(turns(text)) == said("one\n\nstill one", "two", "", "")
    assert list(turns("Be kind.\n\nHuman: hi\n\nAssistant: ho")) == said("hi", "ho", system="Be kind.")
    assert list(turns("Human: hi\nHuman: no turn")) == said("hi\nHuman: no turn")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\nHuman: hi", True),
        ("Human: hi\n\nAssistant: ho", True),
        ("Human: hi", False),
        ("What is a \n\nHuman: mark?", False),
        (None, False),
    ],
)
def test_what_counts_as_a_transcript(text, expected):
    assert is_transcript(text) is expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", said("hi")),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: ", said("a", "b", "c")),
        ("\n\nHuman: a\n\nAssistant: It is", said("a", "It is")),  # a reply begun stays in the prompt
        (said("a", "b", "c", system="s"), said("a", "b", "c", system="s")),
    ],
)
def test_prompts(prompt, expected):
    assert list(prompt_of({"prompt": prompt})) == expected


def transcripts(chosen, rejected):
    return {side: "".join(value) for side, value in (("chosen", chosen), ("rejected", rejected))}


def test_hh_takes_all_turns_before_the_last_reply():
    head = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"
    row = transcripts([head, "\n\nAssistant: yes"], [head, "\n\nAssistant: no\n\nno"])
    sides = from_transcripts(row)
    assert list(sides.prompt) == said("a", "b", "c")
    assert (sides.chosen.text, sides.rejected.text) == ("yes", "no\n\nno")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: A\n\nAssistant: c", "no shared prompt"),
        ("plain", "text", "no shared prompt"),
        ("\n\nAssistant: a\n\nAssistant: b", "\n\nAssistant: a\n\nAssistant: c", "no shared prompt"),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: C\n\nAssistant: d",
            "response has several messages",
        ),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c",
            "\n\nHuman: a\n\nAssistant: b",
            "response has several messages",
        ),
        ("\n\nHuman: a\n\nHuman: b", "\n\nHuman: a\n\nAssistant: b", "response is not the assistant's"),
    ],
)
def test_hh_rows_that_do_not_compare_two_replies(chosen, rejected, reason):
    with pytest.raises(Unusable, match=f"^{reason}$"):
        from_transcripts({"chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "replies"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is", (" blue.", " green.")),
        ("The sky is blue.", "The sky is black.", "The sky is", (" blue.", " black.")),  # no word is split
        ("Q: x?\n\nYes", "Q: x?\n\nNo", "Q: x?\n\n", ("Yes", "No")),
        ("Q? Yes", "Q? Yes sir", "Q?", (" Yes", " Yes sir")),
        ("Q? Yes", "Q? Yes", "Q?", (" Yes", " Yes")),
    ],
)
def test_shared_text(chosen, rejected, prompt, replies):
    sides = from_shared_beginning({"chosen": chosen, "rejected": rejected})
    assert list(sides.prompt) == said(prompt)
    assert (sides.chosen.text, sides.rejected.text) == replies


@settings(derandomize=True, deadline=None, max_examples=50)
@given(*[st.text("ab \n", min_size=1, max_size=8)] * 3)
def test_prompt_and_reply_joined_are_the_text_as_given(head, one, other):
    chosen, rejected = head + one, head + other
    try:
        sides = from_shared_beginning({"chosen": chosen, "rejected": rejected})
    except Unusable:
        return
    prompt = sides.prompt[0]["content"]
    assert (prompt + sides.chosen.text, prompt + sides.rejected.text) == (chosen, rejected)
    assert prompt.endswith("\n") or (sides.chosen.text[0], sides.rejected.text[0]) == (" ", " ")


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("blue", "green", "no shared prompt"),
        ("blueish", "blue", "no shared prompt"),
        (" a", " b", "no shared prompt"),
        (said("q", "a"), said("Q", "b"), "no shared prompt"),
        (said("q", "a"), "b", "no shared prompt"),
        (said("q"), said("q", "a"), "no shared prompt"),
        ([], [], "no shared prompt"),
        (said("q", "a", "b"), said("q", "a", "c"), "response does not end with the assistant"),
        (said("q", "a", system="s"), said("Q", "a", system="s"), "no shared prompt"),
    ],
)
def test_beginnings_that_are_not_shared(chosen, rejected, reason):
    with pytest.raises(Unusable, match=f"^{reason}$"):
        from_shared_beginning({"chosen": chosen, "rejected": rejected})


def test_shared_messages_keep_the_system_message_and_earlier_turns():
    row = {
        "chosen": said("a", "b", "c", "yes", system="s"),
        "rejected": said("a", "b", "c", "no", system="s"),
    }
    sides = from_shared_beginning(row)
    assert list(sides.prompt) == said("a", "b", "c", system="s")
    assert (sides.chosen.text, sides.rejected.text) == ("yes", "no")
    same = from_shared_beginning({"chosen": said("a", "b"), "rejected": said("a", "b")})
    assert list(same.prompt) == said("a")


yes, no = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        ("q", "yes", "no", said("q")),
        ("q", yes, no, said("q")),
        ("q", said("q", "yes"), said("q", "no"), said("q")),  # ultrafeedback_binarized
        ("q ", said("q", "yes", system="s"), said("q", "no", system="s"), said("q", system="s")),
        ("q", said("q", "yes"), "no", said("q")),
        (said("q", "a", "r", system="s"), yes, no, said("q", "a", "r", system="s")),
        (
            said("q", system="s"),
            said("q", "yes", system="s"),
            said("q", "no", system="s"),
            said("q", system="s"),
        ),
        (said("q"), "yes", "no", said("q")),
        ("\n\nHuman: q\n\nAssistant:", " yes", " no", said("q")),
    ],
)
def test_pairs(prompt, chosen, rejected, expected):
    sides = from_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert list(sides.prompt) == expected
    assert (sides.chosen.text, sides.rejected.text) == ("yes", "no")


@pytest.mark.parametrize(
    ("prompt", "chosen", "reason"),
    [
        ("q", said("other", "yes"), "prompt differs from the conversation"),
        (said("q"), said("other", "yes"), "response is not the assistant's"),
        (said("q"), said("q"), "empty response"),
        ("q", [], "empty response"),
        ("q", said("yes"), "response is not the assistant's"),
    ],
)
def test_pairs_that_are_no_pairs(prompt, chosen, reason):
    with pytest.raises(Unusable, match=f"^{reason}$"):
        from_pair({"prompt": prompt, "chosen": chosen, "rejected": chosen})
