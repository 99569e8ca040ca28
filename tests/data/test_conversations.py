"""Prompt and replies from conversations and transcripts."""

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


def talk(*contents, system=None):
    """Alternating messages of user and assistant."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def test_turns_of_a_transcript():
    text = "\n\nHuman: one\n\nstill one \n\nAssistant: two\n\nHuman:\n\nAssistant:"
    assert list(turns(text)) == talk("one\n\nstill one", "two", "", "")
    assert list(turns("Be kind.\n\nHuman: hi\n\nAssistant: ho")) == talk("hi", "ho", system="Be kind.")
    assert list(turns("Human: hi\nHuman: no turn")) == talk("hi\nHuman: no turn")


def test_what_counts_as_a_transcript():
    assert is_transcript("\n\nHuman: hi")
    assert is_transcript("Human: hi\n\nAssistant: ho")
    assert not any(map(is_transcript, ("Human: hi", "What is a \n\nHuman: mark?", None)))


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", talk("hi")),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: ", talk("a", "b", "c")),
        ("\n\nHuman: a\n\nAssistant: It is", talk("a", "It is")),  # the start of a reply stays in the prompt
        (talk("a", "b", "c", system="s"), talk("a", "b", "c", system="s")),
    ],
)
def test_prompts(prompt, expected):
    assert list(prompt_of({"prompt": prompt})) == expected


def test_hh_takes_all_turns_before_the_last_reply():
    head = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"
    row = {"chosen": f"{head}\n\nAssistant: yes", "rejected": f"{head}\n\nAssistant: no\n\nno"}
    sides = from_transcripts(row)
    assert list(sides.prompt) == talk("a", "b", "c")
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
        ("\n\nHuman: a\n\nHuman: b", "\n\nHuman: a\n\nAssistant: b", "response is not the assistant's"),
    ],
)
def test_hh_rows_that_do_not_compare_two_replies(chosen, rejected, reason):
    with pytest.raises(Unusable, match=f"^{reason}$"):
        from_transcripts({"chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "replies"),
    [
        ("The sky is blue.", "The sky is black.", "The sky is", (" blue.", " black.")),  # no word is split
        ("Q: x?\n\nYes", "Q: x?\n\nNo", "Q: x?\n\n", ("Yes", "No")),
        ("Q? Yes", "Q? Yes sir", "Q?", (" Yes", " Yes sir")),
        ("Q? Yes", "Q? Yes", "Q?", (" Yes", " Yes")),
    ],
)
def test_common_beginning_of_texts(chosen, rejected, prompt, replies):
    sides = from_shared_beginning({"chosen": chosen, "rejected": rejected})
    assert list(sides.prompt) == talk(prompt)
    assert (sides.chosen.text, sides.rejected.text) == replies


@settings(derandomize=True, deadline=None, max_examples=50)
@given(*[st.text("ab \n", min_size=1, max_size=8)] * 3)
def test_prompt_and_reply_joined_are_the_original_text(head, one, other):
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
        ("blueish", "blue", "no shared prompt"),
        (" a", " b", "no shared prompt"),
        (talk("q", "a"), talk("Q", "b"), "no shared prompt"),
        (talk("q", "a"), "b", "no shared prompt"),
        (talk("q"), talk("q", "a"), "no shared prompt"),
        ([], [], "no shared prompt"),
        (talk("q", "a", "b"), talk("q", "a", "c"), "response does not end with the assistant"),
        (talk("q", "a", system="s"), talk("Q", "a", system="s"), "no shared prompt"),
    ],
)
def test_no_common_beginning(chosen, rejected, reason):
    with pytest.raises(Unusable, match=f"^{reason}$"):
        from_shared_beginning({"chosen": chosen, "rejected": rejected})


def test_common_messages_include_the_system_message_and_earlier_turns():
    sides = from_shared_beginning(
        {
            side: talk("a", "b", "c", word, system="s")
            for side, word in (("chosen", "yes"), ("rejected", "no"))
        }
    )
    assert list(sides.prompt) == talk("a", "b", "c", system="s")
    assert (sides.chosen.text, sides.rejected.text) == ("yes", "no")
    assert list(from_shared_beginning({"chosen": talk("a", "b"), "rejected": talk("a", "b")}).prompt) == talk(
        "a"
    )


yes, no = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        ("q", "yes", "no", talk("q")),
        ("q", yes, no, talk("q")),
        ("q ", talk("q", "yes", system="s"), talk("q", "no", system="s"), talk("q", system="s")),
        ("q", talk("q", "yes"), "no", talk("q")),
        (talk("q", "a", "r", system="s"), yes, no, talk("q", "a", "r", system="s")),
        (
            talk("q", system="s"),
            talk("q", "yes", system="s"),
            talk("q", "no", system="s"),
            talk("q", system="s"),
        ),
        ("\n\nHuman: q\n\nAssistant:", " yes", " no", talk("q")),
    ],
)
def test_pairs(prompt, chosen, rejected, expected):
    sides = from_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert list(sides.prompt) == expected
    assert (sides.chosen.text, sides.rejected.text) == ("yes", "no")


@pytest.mark.parametrize(
    ("prompt", "chosen", "reason"),
    [
        ("q", talk("other", "yes"), "prompt differs from the conversation"),
        (talk("q"), talk("other", "yes"), "response is not the assistant's"),
        (talk("q"), talk("q"), "empty response"),
        ("q", [], "empty response"),
    ],
)
def test_conversations_that_are_not_a_pair(prompt, chosen, reason):
    with pytest.raises(Unusable, match=f"^{reason}$"):
        from_pair({"prompt": prompt, "chosen": chosen, "rejected": chosen})
