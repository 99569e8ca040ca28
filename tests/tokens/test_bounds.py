"""Chat templates of strangers: bounded in time and memory, and written as transformers writes them otherwise."""

import threading
from typing import Any

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

from tests.tiny import CHATML, tiny_tokenizer
from tokenward.errors import UserError
from tokenward.tokens.bounds import apply_chat_template
from tokenward.tokens.template import Template

MESSAGES: Any = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "x"}]
LISTS = "{% set a = ['ha', 'ha', 'ha'] %}" + "{% set a = [a, a, a, a, a, a, a, a] %}" * 12

BOMBS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "loops in loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "a long text in loops": "{% for a in range(99999) %}{% for b in range(99999) %}" + "x" * 10000 + "{% endfor %}{% endfor %}",
    "doubling by ~": "{% set s = 'x' %}" + "{% set s = s ~ s %}" * 60,
    "doubling by +": "{% set s = 'x' %}" + "{% set s = s + s %}" * 60,
    "doubling by a block": "{% set s = 'x' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60,
    "doubling by join": "{% set s = 'x' %}" + "{% set s = [s, s]|join %}" * 60,
    "doubling by format": "{% set s = 'x' %}" + "{% set s = '%s%s'|format(s, s) %}" * 60,
    "doubling by a list": "{% set s = [1] %}" + "{% set s = s + s %}" * 60 + "{{ s|length }}",
    "times": "{{ 'x' * 10**10 }}",
    "times of a list": "{% set s = [0] * 10**10 %}",
    "power": "{{ 10**(10**10) }}",
    "numbers that grow": "{% set n = 9**999 %}" + "{% set n = n * n %}" * 40,
    "width of %": "{{ '%10000000000d' % 1 }}",
    "width of format": "{{ '{:>10000000000}'.format(1) }}",
    "width of a filter": "{{ 'x'|center(10**10) }}",
    "width of a method": "{{ 'x'.rjust(10**10) }}",
    "indent": "{{ ('a\\n' * 100000)|indent('x' * 100000) }}",
    "replace": "{{ ('a' * 100000)|replace('a', 'x' * 100000) }}",
    "replace of a method": "{{ ('a' * 100000).replace('a', 'x' * 100000) }}",
    "join of a method": "{{ ('x' * 100000).join('a' * 100000) }}",
    "lists of lists": LISTS + "{{ a }}",
    "lists of lists as JSON": LISTS + "{{ a|tojson }}",
    "lists of lists compared": LISTS + LISTS.replace(" a ", " b ").replace("a,", "b,").replace(" a]", " b]") + "{{ a == b }}",
    "slices": "{% set s = 'x' * 10000000 %}{% for i in range(99999) %}{% set t = s[1:] %}{% endfor %}",
    "macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "two macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "long": "x" * 2_000_000,
    "nested": "{% for a in messages %}" * 30 + "{% endfor %}" * 30,
    "sums of lists": "{{ ([range(9999)|list] * 9999)|sum(start=[])|length }}",
    "lorem": "{{ lipsum(n=99999) }}",
}  # fmt: skip


def template(source: str) -> Template:
    tokenizer = tiny_tokenizer()
    tokenizer.name_or_path = "a/strangers/folder"
    tokenizer.chat_template = source
    return Template(tokenizer=tokenizer)


@pytest.mark.parametrize("kind", BOMBS)
def test_a_template_without_end_is_refused_with_its_folder(kind: str) -> None:
    with pytest.raises(UserError) as caught:
        template(BOMBS[kind]).conversation(MESSAGES)
    assert "the chat template of a/strangers/folder" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_also_in_a_thread() -> None:
    found: list[str] = []

    def work() -> None:
        try:
            template(BOMBS["loops in loops"]).conversation(MESSAGES)
        except UserError as error:
            found.append(error.code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["endless-template"]


SOUND = [
    CHATML,
    "{%- set ns = namespace(n=0) -%}{% for m in messages if m.role != 'system' %}{% set ns.n = ns.n + 1 %}{{ loop.index ~ ':' ~ m.content|trim }}"
    "{% if not loop.last %}{{ ', ' }}{% else %}{% break %}{% endif %}{% endfor %}{{ ns.n }}",
    "{% macro say(m, mark='*') %}{{ mark }}{{ m['content'].split(' ')[-1][::-1] }}{{ m|tojson(indent=2) }}{% endmacro %}"
    "{% for m in messages %}{{ say(m, mark='-' * 3) }}{% generation %}{{ m.content[1:] }}{% endgeneration %}{% endfor %}{{ '%s!' % bos_token }}",
    "{% for tool in tools or [] %}{{ tool }}{% endfor %}{{ messages|map(attribute='role')|join(', ') }}{{ '{} {}'.format(1, 2.5) }}{{ 7 // 2 ** 2 }}"
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ none }}{{ missing }}{{ [1] + [2] == [1, 2] }}{{ messages[0] == messages[-1] }}",
]  # fmt: skip


@pytest.mark.parametrize("source", SOUND)
def test_a_sound_template_writes_what_transformers_writes(source: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    settings = {"tools": [{"type": "function", "function": {"name": "f"}}], "tokenize": False}
    for ask in (True, False):
        expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=ask, **settings)
        assert apply_chat_template(tokenizer, MESSAGES, add_generation_prompt=ask, **settings) == expected
    assert len(expected) > 18


def test_a_long_conversation_is_written() -> None:
    long: Any = [
        {"role": "user", "content": "word " * 400_000},
        {"role": "assistant", "content": "x" * 100_000},
    ] * 4
    assert len(template(CHATML).conversation(long)) > 8_000_000


def test_a_pattern_of_the_tokenizer_that_takes_too_long_is_named() -> None:
    found = template(CHATML)
    backend: Any = found.tokenizer
    backend.backend_tokenizer.pre_tokenizer = Split(Regex("(a+)+$"), "isolated")
    long = "a" * 60 + "!"
    for act in (
        found.written_ids,
        lambda text: found.texts_ids([text]),
        lambda text: found.rendered_ids([text]),
    ):
        with pytest.raises(UserError, match="tokenizer of a/strangers/folder") as caught:
            act(long)
        assert caught.value.code == "broken-tokenizer"
