"""The law of rows: prompt, what stands between and reply are what the chat template writes for the whole conversation."""

import re
from pathlib import Path

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.tiny import CHATML, tiny_tokenizer
from tokenward.errors import UserError
from tokenward.tokens.encode import Limits, encode_one, explanations
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.segments import moved, spelled
from tokenward.tokens.split import SAID, Note
from tokenward.tokens.template import Style, Template, joined
from tokenward.types import Comparison, Message, Span

SHIPPED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
MADE = {
    "llama2": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} "
    "{{ eos_token }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}"
    "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "phi": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "command_r": "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|><|{{ 'CHATBOT' if m.role == 'assistant' else 'USER' }}"
    "_TOKEN|>{{ m.content.strip() }}<|END_OF_TURN_TOKEN|>{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|>"
    "<|CHATBOT_TOKEN|>{% endif %}",
    "llama3_dated": "{{ bos_token }}Today: {{ strftime_now('%d %b %Y') }}\n{% for m in messages %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant"
    "<|end_header_id|>\n\n{% endif %}",
    "no_question": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "chatml": CHATML,
}
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)
"""Asks with an open thought unless it is told not to, and writes an empty one where there is none."""

USER = Message(role="user", content="Say hi.")
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "It.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
)


def said(content: str, **more: object) -> Message:
    return {"role": "assistant", "content": content, **more}  # type: ignore[typeddict-item]


CASES: dict[str, dict] = {
    "texts": {"prompt": (USER,), "responses": ("Hello there", "No")},
    "spaces": {"prompt": (USER,), "responses": (" Hello there", "Yes ")},
    "line": {"prompt": (USER,), "responses": ("\nHello", "No\n")},
    "turns": {
        "prompt": (USER, said("Hi"), Message(role="user", content="More")),
        "responses": ("Hello", "No"),
    },
    "thoughts": {
        "prompt": (USER,),
        "responses": ("Hello", "No"),
        "turns": ((said("Hello", reasoning_content="I think"),), (said("No", reasoning_content="Hm."),)),
    },
    "call": {
        "prompt": (USER,),
        "responses": ("weather", "No"),
        "tools": TOOLS,
        "turns": ((said("", tool_calls=CALL),), None),
    },
    "several": {
        "prompt": (USER,),
        "responses": ("weather", "No"),
        "tools": TOOLS,
        "turns": (
            (
                said("", tool_calls=CALL),
                Message(role="tool", name="weather", content="rain"),
                said("It rains."),
            ),
            None,
        ),
    },
    "asked again": {
        "prompt": (USER,),
        "responses": ("Hey you It rains.", "No"),
        "turns": ((said("Hey you"), Message(role="user", content="go on"), said("It rains.")), None),
    },
    "begun": {"prompt": (USER, said("Step 1: tea.\n")), "responses": ("Step 2", "No")},
}


def replied(*messages: Message, other: str = "No") -> dict:
    """A row whose first reply are these messages."""
    return {"prompt": (USER,), "responses": ("first", other), "turns": (messages, None)}


def comparison(**row) -> Comparison:
    return Comparison(key="k", ranks=(0, 1), source="rows.jsonl:1", **row)


def text_of(source: str) -> str:
    """A template, by the name that trl ships it under or as it is."""
    shipped = Path(trl.__file__).parent / "chat_templates" / f"{source}.jinja"
    return shipped.read_text(encoding="utf-8") if re.fullmatch(r"\w+", source) else source


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Writes a mark for each space, and one before the first word of a text, as Llama 2's does."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    letters += [chr(code) for code in range(33, 127)]
    merges = [("H", "e"), ("\u2581", "He"), ("l", "l"), ("N", "o"), ("\u2581", "No")]
    vocabulary = {token: place for place, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def joining() -> PreTrainedTokenizerFast:
    """Byte-level, with one token for two line breaks, as most models' tokenizers have."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u010a", "\u010a"), ("H", "e"), ("\u0120", "He")]
    vocabulary = {token: place for place, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")


TOKENIZERS = {"bytes": tiny_tokenizer, "sentencepiece": sentencepiece_like, "joining": joining}
SOURCES = [*SHIPPED, *MADE]
# Each template with the tokenizer that joins line breaks, as most do, and with one of the others.
PAIRS = [
    (source, tokenizer)
    for number, source in enumerate(SOURCES)
    for tokenizer in ("joining", ("bytes", "sentencepiece")[number % 2])
]
_MARK = re.compile(
    r"<[|\uff5c][^<>\n'\"{}]*?[|\uff5c]>|<[a-z]+\|>|<\|[a-z_]+>|<[a-z]+_of_[a-z]+>|</?(?:think|tool_call)>|\[/?INST\]"
)


def template_of(source: str, tokenizer: PreTrainedTokenizerFast, **style) -> Template:
    """A template whose marks are special tokens, but those of thoughts and calls, as in real tokenizers."""
    marks = dict.fromkeys(_MARK.findall(source))
    text = [mark for mark in marks if "think" in mark or "tool_call>" in mark]
    tokenizer.add_special_tokens({"additional_special_tokens": [mark for mark in marks if mark not in text]})
    tokenizer.add_tokens(text)
    tokenizer.chat_template = source
    return Style(**style).template(tokenizer)


def whole_of(template: Template, row: Comparison, place: int) -> list[int]:
    """What transformers alone makes of the conversation."""
    messages = [dict(message) for message in joined(row.prompt, row.reply(place))]
    for message in messages if template._takes_parts else ():
        message["content"] = [{"type": "text", "text": message["content"]}]
    chat_template = template._dated(template.tokenizer.get_chat_template(None, list(row.tools) or None))
    return template.tokenizer.apply_chat_template(
        messages,
        tools=list(row.tools) or None,
        return_dict=False,
        chat_template=chat_template,
        **template.variables,
    )


def check(template: Template, row: Comparison, encoded: TokenRow) -> None:
    ends = {template.tokenizer.eos_token, template.tokenizer.decode(template.eos_ids).strip(), ""}
    for place in range(len(row.responses)):
        whole = whole_of(template, row, place)
        ids, own = encoded.whole(place)
        mine = [*encoded.prompt, *ids]
        same = next(
            (at for at, both in enumerate(zip(mine, whole, strict=False)) if both[0] != both[1]), len(whole)
        )
        # But for a trailing line break or end.
        assert template.tokenizer.decode(mine[same:]).strip() in ends
        assert template.tokenizer.decode(whole[same:]).strip() in ends
        assert [ids[at] for at in own] == encoded.responses[place]


@pytest.mark.parametrize(("source", "tokenizer"), PAIRS, ids=lambda item: getattr(item, "stem", item))
def test_rows_are_what_the_template_writes(source, tokenizer):
    text = MADE[source] if source in MADE else source.read_text(encoding="utf-8")
    template = template_of(text, TOKENIZERS[tokenizer](), day="2026-02-03")
    refused: dict[str, str] = {}
    for name, case in CASES.items():
        row = comparison(**case)
        try:
            encoded, notes = encode_one(row, template, Limits(4000, 4000))
        except UserError as error:
            refused[name] = str(error)
            continue
        if encoded is None:  # a template that knows no calls
            assert (name, notes) == ("call", ["dropped: the template writes nothing of a reply"])
            continue
        check(template, row, encoded)
    # Some templates take no tools, no assistant before a user, or calls in another form.
    assert set(refused) <= {"call", "several", "turns", "asked again", "begun"}
    assert all("refuses" in reason for reason in refused.values())


def rows_of(source: str, *, tokenizer=joining, row=None, **style) -> tuple[Template, TokenRow, list[str]]:
    template = template_of(source, tokenizer(), **style)
    encoded, notes = encode_one(row or comparison(**CASES["texts"]), template, Limits(4000, 4000))
    assert encoded is not None
    return template, encoded, notes


def parts(template: Template, encoded: TokenRow, place: int = 0) -> list[str]:
    """The prompt, then context and the assistant's own in turn, as text."""
    decode, found, before = template.tokenizer.decode, [template.tokenizer.decode(encoded.prompt)], 0
    for insert in encoded.inserts(place):
        found += [decode(encoded.responses[place][before : insert.before]), decode(insert.ids)]
        before = insert.before
    return [*found, decode(encoded.responses[place][before:])]


def test_what_the_template_writes_before_a_reply_is_read_and_not_trained():
    template, encoded, notes = rows_of(THINKS)
    assert parts(template, encoded)[-3:] == ["", "\n\n</think>\n\n", "Hello there<|im_end|>"]
    # Asked with an open thought and one line break; a row has two, which are one token.
    assert parts(template, encoded)[0].endswith("<|im_start|>assistant\n<think>")
    assert template.tokenizer.decode(encoded.asked).endswith("<|im_start|>assistant\n<think>\n")
    assert notes == [
        "note: the template begins a reply in another way than it asks for one",
        "note: the template writes something before a reply",
    ]
    assert encoded.eos == [1, 1]


def test_variables_reach_the_template_and_change_the_fingerprint():
    template, encoded, notes = rows_of(THINKS, variables={"enable_thinking": False})
    assert parts(template, encoded)[0].endswith("assistant\n<think>\n\n</think>\n\n")
    assert parts(template, encoded)[1:] == ["Hello there<|im_end|>"]
    assert encoded.asked == encoded.prompt
    assert notes == []
    assert template.fingerprint != template_of(THINKS, joining()).fingerprint


def test_variables_without_effect_are_refused():
    for variable in ("enable_thinkin", "add_generation_prompt", "tokenize"):
        with pytest.raises(UserError, match=variable) as error:
            template_of(THINKS, joining(), variables={variable: True})
        assert (error.value.code, error.value.key) == ("unknown-variable", "tokens.chat_template_kwargs")


ASKED = "\n<|im_start|>assistant\n"
GO_ON = Message(role="user", content="go on")


@pytest.mark.parametrize(
    ("source", "row", "expected"),
    [
        (THINKS, CASES["thoughts"], ["I think\n</think>\n\nHello<|im_end|>"]),  # a thought is the assistant's
        (
            CHATML,
            replied(said("Hey you", weight=0), GO_ON, said("It rains.")),
            [f"Hey you<|im_end|>\n<|im_start|>user\ngo on<|im_end|>{ASKED}", "It rains.<|im_end|>"],
        ),
        (
            CHATML,
            CASES["begun"],
            [f"<|im_start|>user\nSay hi.<|im_end|>{ASKED}Step 1: tea.\n", "Step 2<|im_end|>"],
        ),
        (CHATML, replied(said("One"), said("Two")), ["One<|im_end|>", ASKED, "Two<|im_end|>"]),
        # A weight is not shown to the template, and ends in a row all close a reply.
        (
            "{% for m in messages %}{{ m.content }}{{ m.weight }}<|im_end|>{% endfor %}",
            replied(said("Hello", weight=1)),
            ["Hello<|im_end|>"],
        ),
        (
            CHATML.replace("<|im_end|>", "<|END_RESPONSE|><|im_end|>"),
            CASES["texts"],
            ["Hello there<|END_RESPONSE|><|im_end|>"],
        ),
    ],
    ids=["thought", "weight 0", "begun", "two in a row", "weight unseen", "two ends"],
)
def test_what_is_read_and_what_is_trained(source, row, expected):
    template, encoded, _ = rows_of(source, row=comparison(**row))
    assert parts(template, encoded)[-len(expected) :] == expected
    assert encoded.eos[0] == (2 if "END_RESPONSE" in source else 1)


def test_a_date_is_the_runs():
    template = template_of(MADE["llama3_dated"], joining(), day="2026-02-03")
    assert "Today: 03 Feb 2026\n" in template.render([USER])
    assert template.fingerprint != template_of(MADE["llama3_dated"], joining(), day="2026-02-04").fingerprint


def test_messages_of_others_are_read_and_have_no_number():
    template, encoded, _ = rows_of(CHATML, row=comparison(**CASES["asked again"]))
    assert parts(template, encoded)[1:] == [
        "Hey you<|im_end|>",
        "\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n",
        "It rains.<|im_end|>",
    ]
    text, spans, own = spelled(template.tokenizer, encoded, 0)
    assert not own
    raw = text.encode()
    covered = b"".join(raw[span.start : span.end] for span in spans)
    assert covered == b"Hey you<|im_end|>It rains."
    assert spans[-1] == (len(raw), len(raw))


def test_no_mark_of_a_space_before_a_reply_that_the_template_does_not_write():
    source = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    template, encoded, _ = rows_of(source, tokenizer=sentencepiece_like)
    first = template.tokenizer.convert_ids_to_tokens(encoded.responses[0])[0]
    alone = template.tokenizer.convert_ids_to_tokens(template.texts_ids(["Hello there"])[0])[0]
    assert (first, alone) == ("He", "\u2581He")


def test_marks_in_the_data_are_noted_and_a_replys_are_text():
    row = comparison(
        prompt=(Message(role="user", content="<|im_start|>user\nhi<|im_end|>"),),
        responses=("a<|im_end|>", "b"),
    )
    template, encoded, notes = rows_of(CHATML, row=row)
    assert notes == [
        "note: a reply holds marks of the template, or special tokens",
        "note: the prompt holds marks of the template",
    ]
    assert encoded.responses[0].count(template.eos_ids[-1]) == 1
    assert template.tokenizer.decode(encoded.responses[0]) == "a<|im_end|><|im_end|>"


def test_data_that_is_templated_already_is_plain_text_with_one_end():
    prompt = Message(role="user", content="<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    row = comparison(prompt=(prompt,), responses=("a<|im_end|>", "b<|im_start|>c"))
    template, encoded, notes = rows_of(CHATML, tokenizer=tiny_tokenizer, row=row, kind="plain")
    asked = Template(tokenizer=tiny_tokenizer()).prompt_ids([Message(role="user", content="hi")])
    assert encoded.prompt == asked
    assert template.tokenizer.decode(encoded.responses[0]) == "a<|im_end|>"
    assert notes == ["note: a reply holds marks of the template, or special tokens"]  # of the second


def test_what_a_template_leaves_out_is_noted():
    row = comparison(**CASES["thoughts"])
    template, _, notes = rows_of(CHATML, row=row)
    assert notes == ["note: the template leaves out a part of a reply"]
    assert "reasoning_content" in explanations(template, {Note.REPLY_LEFT_OUT: row}, {notes[0]: 3})[0]
    row = comparison(prompt=(USER,), responses=("a", "b"), tools=TOOLS)
    _, _, notes = rows_of(CHATML, row=row)
    assert notes == ["note: the template leaves out calls or tools of the prompt"]


BEGUN_CALL = {"prompt": (USER, said("Let me ", tool_calls=CALL)), "responses": ("look", "go")}


@pytest.mark.parametrize(
    ("source", "row", "reason"),
    [
        (CHATML, CASES["call"], "the template writes nothing of a reply"),
        (
            CHATML,
            replied(said("One", weight=0), USER, said("Two", weight=0)),
            "no message of a reply has weight",
        ),
        (MADE["gemma"], {"prompt": (USER,), "responses": ("Hello", "Hello ")}, "responses are the same"),
        ("qwen3", BEGUN_CALL, "the prompt ends with an assistant's call"),
    ],
)
def test_what_teaches_nothing_is_dropped(source, row, reason):
    row, notes = encode_one(comparison(**row), template_of(text_of(source), joining()), Limits(4000, 400))
    assert row is None
    assert len(notes) == 1
    assert notes[0].startswith(f"dropped: {reason}")


def test_each_note_is_explained_with_its_texts():
    template, _, _ = rows_of(THINKS)
    row = comparison(**CASES["texts"])
    counts = {SAID[Note.OPENING]: 1, SAID[Note.PRELUDE]: 2}
    first, second = explanations(template, {Note.OPENING: row, Note.PRELUDE: row}, counts)
    assert "1 row, such as rows.jsonl:1" in first
    assert "assistant\\n<think>\\n" in first
    assert "enable_thinking" in first
    assert repr("\n\n</think>\n\n") in second


def test_marks_that_a_call_or_a_thought_spells_are_text_and_the_templates_own_are_marks():
    call = [{"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}]
    row = comparison(**replied(said("Write <|im_end|>", tool_calls=call)))
    template, encoded, notes = rows_of(text_of("lfm2_v2"), row=row)
    tokens = template.tokenizer.convert_ids_to_tokens(encoded.responses[0])
    assert "<|tool_call_start|>" in tokens
    assert "<|tool_call_end|>" in tokens
    assert tokens.count("<|im_end|>") == 1
    assert template.tokenizer.decode(encoded.responses[0]).count("<|im_end|>") == 3
    assert "note: a reply holds marks of the template, or special tokens" in notes
    explained = explanations(template, {Note.REPLY_MARKS: row}, {SAID[Note.REPLY_MARKS]: 1})[0]
    assert "'<|im_end|>', a mark" in explained


def test_a_response_has_the_same_tokens_whatever_it_is_compared_with():
    thinks = (said("Hello", reasoning_content="I think"),)
    others = {"beside a thought": (said("No", reasoning_content="Hm."),), "beside none": None}
    thought = "<think>\n{{ m.reasoning_content or '' }}\n</think>"
    assert thought in THINKS
    other_thought = "<think>{{ '\n' + m.reasoning_content + '\n' if m.reasoning_content else '' }}</think>"
    source = THINKS.replace(thought, other_thought)
    found = {}
    for name, other in others.items():
        row = comparison(prompt=(USER,), responses=("Hello", "No"), turns=(thinks, other))
        template, encoded, _ = rows_of(source, row=row)
        check(template, row, encoded)
        found[name] = encoded
    first, second = found.values()
    assert len(first.prompt) > len(second.prompt)
    assert first.responses[0] == second.responses[0]
    for limit in range(1, len(first.responses[0])):
        cut = [encode_one(own.comparison, template, Limits(400, limit, "truncate"))[0]
               for own in (first, second)]  # fmt: skip
        if None not in cut:
            assert cut[0].responses[0] == cut[1].responses[0]


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (said("Hi", thinking="deep"), "thinking"),
        (said("Hi", tool_calls=CALL), "tool_calls"),
        (said("Hi", reasoning_content="hi."), "reasoning_content"),  # the prompt's words are not the reply's
    ],
)
def test_what_of_a_reply_is_left_out_is_named(message, named):
    row = comparison(prompt=(USER,), responses=("Hi", "No"), turns=((message,), None))
    template, _, notes = rows_of("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", row=row)
    assert "note: the template leaves out a part of a reply" in notes
    assert named in explanations(template, {Note.REPLY_LEFT_OUT: row}, {SAID[Note.REPLY_LEFT_OUT]: 1})[0]


def test_messages_that_the_template_passes_over_are_named():
    source = (
        "{% for m in messages %}{% if m.role != 'critic' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    row = comparison(prompt=(USER, Message(role="critic", content="Too short."), USER), responses=("a", "b"))
    template, _, notes = rows_of(source, row=row)
    assert notes == ["note: the template leaves out calls or tools of the prompt"]
    assert "a message of critic" in explanations(template, {Note.PROMPT_LEFT_OUT: row}, {notes[0]: 1})[0]


def test_white_space_at_a_replys_end_is_the_replys_where_places_are_trimmed():
    tokenizer = joining()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    template = template_of(CHATML, tokenizer)
    encoded, _ = encode_one(
        comparison(prompt=(USER,), responses=("Hello  ", " x")), template, Limits(400, 400)
    )
    assert template.tokenizer.decode(encoded.responses[0]) == "Hello  <|im_end|>"
    assert encoded.eos == [1, 1]


def test_white_space_that_a_template_cuts_off_is_no_text_of_the_reply():
    template, encoded, _ = rows_of(
        MADE["gemma"], row=comparison(prompt=(USER,), responses=("Hello \n", "  No"))
    )
    for place, text in enumerate(("Hello", "No")):
        shown, spans, _ = spelled(template.tokenizer, encoded, place)
        covered = b"".join(shown.encode()[span.start : span.end] for span in spans)
        assert covered == text.encode()
        assert spans[-1] == (len(shown.encode()),) * 2


def test_spans_of_a_reply_are_not_those_of_the_thought_before_it():
    spans = [Span(0, 4, 1.0)]
    (found,) = moved(spans, "good", "<think>\nNot good idea\n</think>\n\ngood", "f:1")
    assert found == Span(32, 36, 1.0)


def test_an_end_that_is_text_is_followed_by_eos():
    tokenizer = joining()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} ###\n{% endfor %}"
    template = Template(tokenizer=tokenizer)
    assert not template.ending.special
    assert tokenizer.decode(template.eos_ids) == " ###<|eos|>"
    encoded, _ = encode_one(comparison(**CASES["texts"]), template, Limits(400, 400))
    assert tokenizer.decode(encoded.responses[1]) == "No ###<|eos|>"


def test_a_cut_response_ends_with_a_token_of_the_assistants():
    row = comparison(**CASES["asked again"])
    template = template_of(CHATML, joining())
    whole, _ = encode_one(row, template, Limits(400, 400))
    sizes = [whole.size(0)]
    for limit in range(1, whole.size(0)):
        cut, notes = encode_one(row, template, Limits(400, limit, "truncate"))
        assert "note: response truncated" in notes
        ids, own = cut.whole(0)
        assert ids == whole.whole(0)[0][: len(ids)]
        assert own[-1] == len(ids) - 1 < limit
        assert not cut.eos[0]
        sizes.append(len(ids))
    assert max(sizes[1:]) == whole.size(0) - 1
