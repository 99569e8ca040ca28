"""Prompts as the model reads them: a single BOS, the template's own end of turn, and clear errors."""

import pytest
from tokenizers import processors

from tests.tiny import CHATML, tiny_tokenizer
from tokenward.errors import UserError
from tokenward.tokens.spans import byte_spans
from tokenward.tokens.template import Template

HELLO = [{"role": "user", "content": "the good"}]
ENDS_LIKE_LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)


def wrapping_tokenizer():
    """A tokenizer that puts BOS before and EOS after every text that it is not told to leave alone."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[("<|im_start|>", tokenizer.bos_token_id), ("<|im_end|>", tokenizer.eos_token_id)],
    )
    return tokenizer


def with_template(text: str | None, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


def test_a_prompt_is_the_template_up_to_the_reply():
    text = "<|im_start|>user\nthe good<|im_end|>\n<|im_start|>assistant\n"
    template = Template(tokenizer=tiny_tokenizer())
    assert template.render(HELLO) == text
    ids = template.prompt_ids(HELLO)
    assert template.tokenizer.decode(ids) == text
    # Marks are one token each.
    assert [ids.count(template.tokenizer.bos_token_id), ids.count(template.tokenizer.eos_token_id)] == [2, 1]


def test_a_prompt_has_one_bos_at_most():
    def text(kind, chat_template=None):
        template = Template(tokenizer=with_template(chat_template, wrapping_tokenizer()), kind=kind)
        return template.tokenizer.decode(template.prompt_ids(HELLO))

    writes_bos = "{{ bos_token }}" + CHATML.replace("<|im_start|>", "#")
    assert text("chat", writes_bos) == "<|im_start|>#user\nthe good<|im_end|>\n#assistant\n"
    assert text("chat", "{{ messages[0]['content'] }}") == "the good"
    assert text("plain") == "<|im_start|>the good"  # the tokenizer's BOS, without its eos
    tokenizer = wrapping_tokenizer()
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    # A BOS that equals eos is not taken for an eos at the end of an empty prompt.
    template = Template(tokenizer=tokenizer, kind="plain")
    assert template.prompt_ids([{"role": "user", "content": ""}]) == [tokenizer.bos_token_id]


def test_a_plain_prompt_joins_the_turns():
    template = Template(tokenizer=tiny_tokenizer(), kind="plain")
    messages = [*HELLO, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why"}]
    assert template.render(messages) == "the good\n\nyes\n\nwhy"


def test_the_text_of_a_reply_has_no_special_tokens():
    template = Template(tokenizer=wrapping_tokenizer(), kind="plain")
    assert template.tokenizer.decode(template.texts_ids(["the good"])[0]) == "the good"
    assert template.texts_ids([""]) == [[]]
    assert template.eos_ids == [template.tokenizer.eos_token_id]
    # A special token that the reply spells is text.
    text = "a<|im_end|>b"
    (ids,) = Template(tokenizer=tiny_tokenizer()).texts_ids([text])
    assert not set(ids) & template.special_ids
    spans = byte_spans(template.tokenizer, text)
    assert (len(spans), spans[-1].end) == (len(ids), len(text))


@pytest.mark.parametrize(
    ("chat_template", "eos"),
    [
        (CHATML, "<|im_end|>"),  # without the line break that only separates turns
        (ENDS_LIKE_LLAMA, " <|im_end|>"),
        (
            "{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}",
            "<|im_end|>",
        ),  # no mark of its own: EOS
        ("{% for m in messages %}{{ m['content'] }}<|im_start|>x<|im_end|>{% endfor %}", "<|im_start|>"),
    ],
)
def test_what_ends_a_reply(chat_template, eos):
    template = Template(tokenizer=with_template(chat_template))
    assert template.tokenizer.decode(template.eos_ids) == eos


def test_an_end_of_turn_of_the_template_is_used_instead_of_the_tokenizers_eos():
    tokenizer = with_template("{% for m in messages %}{{ m['content'] }}<|eot|>{% endfor %}")
    tokenizer.add_tokens(["<|eot|>"], special_tokens=True)
    assert Template(tokenizer=tokenizer).eos_ids == [tokenizer.convert_tokens_to_ids("<|eot|>")]


def test_templates_that_cannot_be_used():
    tokenizer = with_template(None)
    tokenizer.eos_token = None
    with pytest.raises(UserError) as error:
        _ = Template(tokenizer=tokenizer, kind="plain").eos_ids
    assert error.value.code == "no-eos"
    with pytest.raises(UserError, match="template: plain") as error:
        Template(tokenizer=with_template(None))
    assert (error.value.code, error.value.key) == ("no-chat-template", "tokens.template")
    assert Template(tokenizer=with_template(None), kind="plain").render(HELLO) == "the good"
    refusing = Template(tokenizer=with_template("{{ raise_exception('only users') }}"))
    with pytest.raises(UserError, match=r"\[system, user\].*only users") as error:
        refusing.render([{"role": "system", "content": "s"}, *HELLO])
    assert error.value.code == "refused-conversation"


def test_the_fingerprint_depends_on_what_changes_the_ids():
    same = Template(tokenizer=tiny_tokenizer()).fingerprint
    assert Template(tokenizer=tiny_tokenizer()).fingerprint == same
    more = tiny_tokenizer()
    more.add_tokens(["goodness"])
    others = [
        Template(tokenizer=tiny_tokenizer(), kind="plain"),
        Template(tokenizer=with_template(CHATML + " ")),
        Template(tokenizer=more),
        Template(tokenizer=wrapping_tokenizer()),
    ]
    assert len({same, *(other.fingerprint for other in others)}) == 5
