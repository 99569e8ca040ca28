"""The law of rows: prompt, inserts and reply are exactly what the chat template writes for the whole conversation."""

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
from tokenward.tokens.split import DROPPED, SAID, Note
from tokenward.tokens.template import Style, Template, joined
from tokenward.types import Comparison, Message, Span

LONG = Limits(4000, 4000)
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
"""Asks for a reply with open reasoning unless told otherwise, and writes an empty one for a reply without."""

USER = Message(role="user", content="Say hi.")
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = (
    {"type": "function", "function": {"name": "weather", "description": "It.", "parameters": PARAMETERS}},
)


def said(content: str, **more: object) -> Message:
    return {"role": "assistant", "content": content, **more}  # type: ignore[typeddict-item]


MORE = Message(role="user", content="More")
THOUGHTS = ((said("Hello", reasoning_content="I think"),), (said("No", reasoning_content="Hm."),))
CALLED = said("", tool_calls=CALL)
RAIN = Message(role="tool", name="weather", content="rain")
AGAIN = (said("Hey you"), Message(role="user", content="go on"), said("It rains."))

# fmt: off
CASES: dict[str, dict] = {
    "texts": {"prompt": (USER,), "responses": ("Hello there", "No")},
    "spaces": {"prompt": (USER,), "responses": (" Hello there", "Yes ")},
    "line": {"prompt": (USER,), "responses": ("\nHello", "No\n")},
    "turns": {"prompt": (USER, said("Hi"), MORE), "responses": ("Hello", "No")},
    "thoughts": {"prompt": (USER,), "responses": ("Hello", "No"), "turns": THOUGHTS},
    "call": {"prompt": (USER,), "responses": ("weather", "No"), "tools": TOOLS, "turns": ((CALLED,), None)},
    "several": {"prompt": (USER,), "responses": ("weather", "No"), "tools": TOOLS, "turns": ((CALLED, RAIN, said("It rains.")), None)},
    "asked again": {"prompt": (USER,), "responses": ("Hey you It rains.", "No"), "turns": (AGAIN, None)},
    "begun": {"prompt": (USER, said("Step 1: tea.\n")), "responses": ("Step 2", "No")},
}
# fmt: on


def replied(*messages: Message, other: str = "No") -> dict:
    """A row with these messages as its first reply."""
    return {"prompt": (USER,), "responses": ("first", other), "turns": (messages, None)}


def comparison(**row) -> Comparison:
    return Comparison(key="k", ranks=(0, 1), source="rows.jsonl:1", **row)


def text_of(source: str) -> str:
    """A template by its name in TRL, or as text."""
    shipped = Path(trl.__file__).parent / "chat_templates" / f"{source}.jinja"
    return shipped.read_text(encoding="utf-8") if re.fullmatch(r"\w+", source) else source


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Like Llama 2's: a mark for each space, and one before the first word of a text."""
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
    """Byte-level, with one token for two line breaks, like most models' tokenizers."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u010a", "\u010a"), ("H", "e"), ("\u0120", "He")]
    vocabulary = {token: place for place, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")


TOKENIZERS = {"bytes": tiny_tokenizer, "sentencepiece": sentencepiece_like, "joining": joining}
SOURCES = [*SHIPPED, *MADE]
# Each template with the tokenizer that joins line breaks, and with one of the others.
PAIRS = [
    (source, tokenizer)
    for number, source in enumerate(SOURCES)
    for tokenizer in ("joining", ("bytes", "sentencepiece")[number % 2])
]
_MARK = re.compile(
    r"<[|\uff5c][^<>\n'\"{}]*?[|\uff5c]>|<[a-z]+\|>|<\|[a-z_]+>|<[a-z]+_of_[a-z]+>|</?(?:think|tool_call)>|\[/?INST\]"
)


def template_of(source: str, tokenizer: PreTrainedTokenizerFast, **style) -> Template:
    """A template whose marks are special tokens, except those of reasoning and calls, as in real tokenizers."""
    marks = dict.fromkeys(_MARK.findall(source))
    text = [mark for mark in marks if "think" in mark or "tool_call>" in mark]
    tokenizer.add_special_tokens({"additional_special_tokens": [mark for mark in marks if mark not in text]})
    tokenizer.add_tokens(text)
    tokenizer.chat_template = source
    return Style(**style).template(tokenizer)


def whole_of(template: Template, row: Comparison, place: int) -> list[int]:
    """The ids of the conversation from transformers alone."""
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
        # Up to a trailing line break or eos.
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
            encoded, notes = encode_one(row, template, LONG)
        except UserError as error:
            refused[name] = error.code
            continue
        if encoded is None:  # a template without calls
            assert (name, notes) == ("call", [DROPPED[Note.UNWRITTEN]])
            continue
        check(template, row, encoded)
    # Some templates take no tools, no assistant before a user, or calls in another form.
    assert set(refused) <= {"call", "several", "turns", "asked again", "begun"}
    assert set(refused.values()) <= {"refused-conversation"}


def rows_of(source: str, *, tokenizer=joining, row=None, **style) -> tuple[Template, TokenRow, list[str]]:
    template = template_of(source, tokenizer(), **style)
    encoded, notes = encode_one(row or comparison(**CASES["texts"]), template, LONG)
    assert encoded is not None
    return template, encoded, notes


def parts(template: Template, encoded: TokenRow, place: int = 0) -> list[str]:
    """The prompt, then the assistant's tokens and the inserts in turn, as text."""
    decode, found, before = template.tokenizer.decode, [template.tokenizer.decode(encoded.prompt)], 0
    for insert in encoded.inserts(place):
        found += [decode(encoded.responses[place][before : insert.before]), decode(insert.ids)]
        before = insert.before
    return [*found, decode(encoded.responses[place][before:])]


def explained(template: Template, note: Note, row: Comparison) -> str:
    (line,) = explanations(template, {note: row}, {SAID[note]: 1})
    assert line.startswith("  1 row, such as rows.jsonl:1: ")
    return line


def test_text_of_the_template_before_a_reply_is_read_and_not_trained():
    template, encoded, notes = rows_of(THINKS)
    assert parts(template, encoded)[-3:] == ["", "\n\n</think>\n\n", "Hello there<|im_end|>"]
    # The generation prompt ends with one line break; a row has two, which are one token.
    assert parts(template, encoded)[0].endswith("<|im_start|>assistant\n<think>")
    assert template.tokenizer.decode(encoded.asked).endswith("<|im_start|>assistant\n<think>\n")
    assert notes == [SAID[Note.OPENING], SAID[Note.PRELUDE]]
    assert encoded.eos == [1, 1]
    row = encoded.comparison
    assert "assistant\\n<think>\\n" in (line := explained(template, Note.OPENING, row))
    assert "enable_thinking" in line
    assert repr("\n\n</think>\n\n") in explained(template, Note.PRELUDE, row)


def test_variables_reach_the_template_and_change_the_fingerprint():
    template, encoded, notes = rows_of(THINKS, variables={"enable_thinking": False})
    assert parts(template, encoded)[0].endswith("assistant\n<think>\n\n</think>\n\n")
    assert parts(template, encoded)[1:] == ["Hello there<|im_end|>"]
    assert (encoded.asked, notes) == (encoded.prompt, [])
    assert template.fingerprint != template_of(THINKS, joining()).fingerprint
    dated = [template_of(MADE["llama3_dated"], joining(), day=f"2026-02-0{day}") for day in (3, 4)]
    assert "Today: 03 Feb 2026\n" in dated[0].render([USER])
    assert dated[0].fingerprint != dated[1].fingerprint


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
        (THINKS, CASES["thoughts"], ["I think\n</think>\n\nHello<|im_end|>"]),  # reasoning is the assistant's
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
        # The template does not see weights.
        (
            "{% for m in messages %}{{ m.content }}{{ m.weight }}<|im_end|>{% endfor %}",
            replied(said("Hello", weight=1)),
            ["Hello<|im_end|>"],
        ),
        # Consecutive eos tokens all end a reply.
        (
            CHATML.replace("<|im_end|>", "<|END_RESPONSE|><|im_end|>"),
            CASES["texts"],
            ["Hello there<|END_RESPONSE|><|im_end|>"],
        ),
    ],
    ids=["reasoning", "weight 0", "begun", "two in a row", "weight unseen", "two ends"],
)
def test_what_is_read_and_what_is_trained(source, row, expected):
    template, encoded, _ = rows_of(source, row=comparison(**row))
    assert parts(template, encoded)[-len(expected) :] == expected
    assert encoded.eos[0] == (2 if "END_RESPONSE" in source else 1)


def test_messages_of_others_are_read_and_have_no_values():
    template, encoded, _ = rows_of(CHATML, row=comparison(**CASES["asked again"]))
    between = f"\n<|im_start|>user\ngo on<|im_end|>{ASKED}"
    assert parts(template, encoded)[1:] == ["Hey you<|im_end|>", between, "It rains.<|im_end|>"]
    text, spans, own = spelled(template.tokenizer, encoded, 0)
    assert not own
    raw = text.encode()
    assert b"".join(raw[span.start : span.end] for span in spans) == b"Hey you<|im_end|>It rains."
    assert spans[-1] == (len(raw), len(raw))


def test_no_space_mark_before_a_reply_if_the_template_does_not_write_a_space():
    source = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    template, encoded, _ = rows_of(source, tokenizer=sentencepiece_like)
    first = template.tokenizer.convert_ids_to_tokens(encoded.responses[0])[0]
    alone = template.tokenizer.convert_ids_to_tokens(template.texts_ids(["Hello there"])[0])[0]
    assert (first, alone) == ("He", "\u2581He")


def test_marks_in_the_data_are_noted_and_those_of_a_reply_are_text():
    prompt = Message(role="user", content="<|im_start|>user\nhi<|im_end|>")
    row = comparison(prompt=(prompt,), responses=("a<|im_end|>", "b"))
    template, encoded, notes = rows_of(CHATML, row=row)
    assert notes == [SAID[Note.REPLY_MARKS], SAID[Note.PROMPT_MARKS]]
    assert encoded.responses[0].count(template.eos_ids[-1]) == 1
    assert template.tokenizer.decode(encoded.responses[0]) == "a<|im_end|><|im_end|>"
    # The same in a call, beside the template's own marks.
    call = [{"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}]
    row = comparison(**replied(said("Write <|im_end|>", tool_calls=call)))
    template, encoded, notes = rows_of(text_of("lfm2_v2"), row=row)
    tokens = template.tokenizer.convert_ids_to_tokens(encoded.responses[0])
    assert {"<|tool_call_start|>", "<|tool_call_end|>"} <= set(tokens)
    assert tokens.count("<|im_end|>") == 1
    assert template.tokenizer.decode(encoded.responses[0]).count("<|im_end|>") == 3
    assert SAID[Note.REPLY_MARKS] in notes
    assert "'<|im_end|>', a mark" in explained(template, Note.REPLY_MARKS, row)


def test_data_that_already_has_the_template_is_plain_text_with_one_eos():
    prompt = Message(role="user", content="<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    row = comparison(prompt=(prompt,), responses=("a<|im_end|>", "b<|im_start|>c"))
    template, encoded, notes = rows_of(CHATML, tokenizer=tiny_tokenizer, row=row, kind="plain")
    chat = Template(tokenizer=tiny_tokenizer()).prompt_ids([Message(role="user", content="hi")])
    assert encoded.prompt == chat
    assert template.tokenizer.decode(encoded.responses[0]) == "a<|im_end|>"
    assert notes == [SAID[Note.REPLY_MARKS]]  # of the second


def test_plain_text_of_several_turns_is_noted():
    system = Message(role="system", content="Be kind.")
    row = comparison(prompt=(system, USER, said("Hi"), USER), responses=("a", "b"))
    template, _, notes = rows_of(CHATML, row=row, kind="plain")
    assert notes == [SAID[Note.ROLES_LEFT_OUT]]
    assert "(system, user, assistant, user) are joined" in explained(template, Note.ROLES_LEFT_OUT, row)
    assert rows_of(CHATML, row=row)[2] == []
    for single in ((USER,), (system, USER)):
        assert rows_of(CHATML, row=comparison(prompt=single, responses=("a", "b")), kind="plain")[2] == []


ONLY_CONTENT = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
NO_CRITIC = (
    "{% for m in messages %}{% if m.role != 'critic' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
CRITIC = (USER, Message(role="critic", content="Too short."), USER)


@pytest.mark.parametrize(
    ("source", "row", "note", "named"),
    [
        (CHATML, CASES["thoughts"], Note.REPLY_LEFT_OUT, "reasoning_content"),
        (ONLY_CONTENT, replied(said("Hi", thinking="deep")), Note.REPLY_LEFT_OUT, "thinking"),
        (ONLY_CONTENT, replied(said("Hi", tool_calls=CALL)), Note.REPLY_LEFT_OUT, "tool_calls"),
        # The words of the prompt are not the reply's.
        (
            ONLY_CONTENT,
            replied(said("Hi", reasoning_content="hi.")),
            Note.REPLY_LEFT_OUT,
            "reasoning_content",
        ),
        (CHATML, {**CASES["texts"], "tools": TOOLS}, Note.PROMPT_LEFT_OUT, "tools"),
        (NO_CRITIC, {"prompt": CRITIC, "responses": ("a", "b")}, Note.PROMPT_LEFT_OUT, "a message of critic"),
    ],
)
def test_what_the_template_leaves_out_is_noted_and_named(source, row, note, named):
    row = comparison(**row)
    template, _, notes = rows_of(source, row=row)
    assert notes == [SAID[note]]
    assert named in explained(template, note, row)


BEGUN_CALL = {"prompt": (USER, said("Let me ", tool_calls=CALL)), "responses": ("look", "go")}


@pytest.mark.parametrize(
    ("source", "row", "reason"),
    [
        (CHATML, CASES["call"], DROPPED[Note.UNWRITTEN]),
        (CHATML, replied(said("One", weight=0), USER, said("Two", weight=0)), DROPPED[Note.WEIGHTLESS]),
        (
            MADE["gemma"],
            {"prompt": (USER,), "responses": ("Hello", "Hello ")},
            "dropped: responses have the same tokens",
        ),
        ("qwen3", BEGUN_CALL, DROPPED[Note.BEGUN]),
    ],
)
def test_rows_without_information_are_dropped(source, row, reason):
    assert encode_one(comparison(**row), template_of(text_of(source), joining()), LONG) == (None, [reason])


def test_a_response_has_the_same_tokens_whatever_it_is_compared_with():
    thinks = (said("Hello", reasoning_content="I think"),)
    thought = "<think>\n{{ m.reasoning_content or '' }}\n</think>"
    assert thought in THINKS
    other_thought = "<think>{{ '\n' + m.reasoning_content + '\n' if m.reasoning_content else '' }}</think>"
    found = []
    for other in ((said("No", reasoning_content="Hm."),), None):
        row = comparison(prompt=(USER,), responses=("Hello", "No"), turns=(thinks, other))
        template, encoded, _ = rows_of(THINKS.replace(thought, other_thought), row=row)
        check(template, row, encoded)
        found.append(encoded)
    first, second = found
    assert len(first.prompt) > len(second.prompt)
    assert first.responses[0] == second.responses[0]
    for limit in range(1, len(first.responses[0])):
        limits = Limits(400, limit, "truncate")
        cut = [encode_one(own.comparison, template, limits)[0] for own in found]
        if None not in cut:
            assert cut[0].responses[0] == cut[1].responses[0]


def test_white_space_at_the_end_of_a_reply_is_kept_even_if_the_tokenizer_trims_offsets():
    tokenizer = joining()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    template = template_of(CHATML, tokenizer)
    encoded, _ = encode_one(comparison(prompt=(USER,), responses=("Hello  ", " x")), template, LONG)
    assert template.tokenizer.decode(encoded.responses[0]) == "Hello  <|im_end|>"
    assert encoded.eos == [1, 1]


def test_white_space_that_a_template_strips_is_not_text_of_the_reply():
    row = comparison(prompt=(USER,), responses=("Hello \n", "  No"))
    template, encoded, _ = rows_of(MADE["gemma"], row=row)
    for place, text in enumerate(("Hello", "No")):
        shown, spans, _ = spelled(template.tokenizer, encoded, place)
        assert b"".join(shown.encode()[span.start : span.end] for span in spans) == text.encode()
        assert spans[-1] == (len(shown.encode()),) * 2


def test_spans_of_a_reply_are_not_located_in_the_reasoning_before_it():
    (found,) = moved([Span(0, 4, 1.0)], "good", "<think>\nNot good idea\n</think>\n\ngood", "f:1")
    assert found == Span(32, 36, 1.0)
    with pytest.raises(UserError, match="f:1") as error:
        moved([Span(0, 4, 1.0)], "good", "bad", "f:1")
    assert error.value.code == "unplaced-spans"


def test_an_end_of_turn_that_is_text_is_followed_by_eos():
    tokenizer = joining()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} ###\n{% endfor %}"
    template = Template(tokenizer=tokenizer)
    assert not template.ending.special
    assert tokenizer.decode(template.eos_ids) == " ###<|eos|>"
    encoded, _ = encode_one(comparison(**CASES["texts"]), template, LONG)
    assert tokenizer.decode(encoded.responses[1]) == "No ###<|eos|>"


def test_a_truncated_response_ends_with_a_token_of_the_assistant():
    row = comparison(**CASES["asked again"])
    template, whole, _ = rows_of(CHATML, row=row)
    sizes = [whole.size(0)]
    for limit in range(1, whole.size(0)):
        cut, notes = encode_one(row, template, Limits(400, limit, "truncate"))
        assert "note: response truncated to max_response_tokens" in notes
        ids, own = cut.whole(0)
        assert ids == whole.whole(0)[0][: len(ids)]
        assert own[-1] == len(ids) - 1 < limit
        assert not cut.eos[0]
        sizes.append(len(ids))
    assert max(sizes[1:]) == whole.size(0) - 1
