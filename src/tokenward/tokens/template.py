"""How a tokenizer writes a conversation, exactly as the model sees it when it generates."""

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self, cast

import jinja2
import jinja2.meta
from jinja2 import nodes
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from tokenward.errors import UserError
from tokenward.types import Message

SENTINEL = "tokenward-reply"
"""Stands in place of a reply's text, to see what a template writes around it."""

Kind = Literal["chat", "plain"]

_NOW = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
_FIXED = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")
_SHORTEST_MARK = 3


class Style(NamedTuple):
    """What decides how a conversation is written, beside the tokenizer.

    Attributes:
        kind: ``chat`` uses the tokenizer's chat template; ``plain`` joins the messages' text.
        variables: Given to the chat template, such as ``enable_thinking``; ``tools`` too, where no row has its own.
        day: The date, ISO 8601, for a template that writes one; empty is today.
    """

    kind: Kind = "chat"
    variables: Mapping[str, Any] = {}
    day: str = ""

    def template(self, tokenizer: PreTrainedTokenizerBase, *, encoder: bool = False) -> "Template":
        """How a tokenizer writes a conversation in this style."""
        return Template(
            tokenizer=tokenizer, kind=self.kind, encoder=encoder, variables=self.variables, day=self.day
        )

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> Self:
        """What :meth:`facts` gave; a folder that says nothing was written by the chat template as it is."""
        return cls(
            facts.get("template", "chat"),
            facts.get("chat_template_kwargs") or {},
            facts.get("template_day") or "",
        )

    def facts(self) -> dict[str, Any]:
        """The same for a manifest."""
        known = {"chat_template_kwargs": dict(self.variables), "template_day": self.day}
        return {"template": self.kind, **{name: value for name, value in known.items() if value}}


class Ending(NamedTuple):
    """What a template writes after a reply's text.

    Attributes:
        text: As it is written, to the end of the conversation.
        turn: The part of it that ends the turn.
        ids: Up to the end of the turn; EOS where the template has none.
        special: Whether the turn ends with a special token; if not, EOS follows it.
    """

    text: str
    turn: str
    ids: list[int]
    special: bool


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a tokenizer writes a conversation.

    Attributes:
        tokenizer: A fast tokenizer (offsets are needed).
        kind: ``"chat"`` uses the tokenizer's chat template; ``"plain"`` joins the messages' text.
        encoder: Whether an encoder reads the prompt: it keeps the end that its tokenizer writes.
        variables: See :class:`Style`.
        day: So too.
    """

    tokenizer: PreTrainedTokenizerBase
    kind: Kind = "chat"
    encoder: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])
    day: str = ""

    def __post_init__(self) -> None:
        if self.kind == "plain":
            return
        if not self.tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no chat template, so a prompt cannot be written as "
                "a conversation. Write tokens.template: plain to join prompt and reply as text, or save a "
                "chat_template.jinja beside the tokenizer."
            )
        self._check_variables()

    def _check_variables(self) -> None:
        own = set(inspect.signature(self.tokenizer.apply_chat_template).parameters) | set(_FIXED)
        taken = sorted(set(self.variables) & own - {"tools", "documents"})
        if taken:
            raise UserError(
                f"tokens.chat_template_kwargs: {taken[0]} is decided by tokenward, row by row. Leave it out."
            )
        read = self._read_variables
        unknown = sorted(set(self.variables) - read - {"tools", "documents"})
        if unknown:
            known = ", ".join(self.choices) or "none"
            raise UserError(
                f"tokens.chat_template_kwargs: the chat template of {self.tokenizer.name_or_path} does not read {unknown[0]}, so it "
                f"would change nothing. Variables that it reads: {known}."
            )

    @cached_property
    def _read_variables(self) -> set[str]:
        """Names that the chat template reads."""
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        names: set[str] = set()
        for source in self._sources:
            # Marks of transformers' own, which jinja does not know.
            bare = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
            try:
                parsed = environment.parse(bare)
                asked = {
                    test.node.name
                    for test in parsed.find_all(nodes.Test)
                    if isinstance(test.node, nodes.Name)
                }
                made = {name.name for name in parsed.find_all(nodes.Name) if name.ctx != "load"}
                # What a template makes itself is no variable of its caller's, unless it asks whether there is one.
                names |= jinja2.meta.find_undeclared_variables(parsed) - (made - asked)
            except jinja2.TemplateSyntaxError as error:
                raise UserError(
                    f"the chat template of {self.tokenizer.name_or_path} cannot be read: {error}. Mend its "
                    "chat_template.jinja, or write tokens.template: plain."
                ) from error
        return names

    @property
    def choices(self) -> list[str]:
        """Variables that the chat template reads and a recipe may give."""
        fixed = {*_FIXED, *self.tokenizer.special_tokens_map}
        return sorted(self._read_variables - fixed) if self.kind == "chat" else []

    @property
    def _sources(self) -> list[str]:
        found: Any = self.tokenizer.chat_template
        return list(found.values()) if isinstance(found, dict) else [str(found)]

    @property
    def writes_date(self) -> bool:
        """Whether the chat template writes today's date."""
        return self.kind == "chat" and any("strftime_now" in source for source in self._sources)

    @property
    def writes_clock(self) -> bool:
        """Whether the chat template writes the clock's time in a form that cannot be put in beforehand."""
        return self.writes_date and any("strftime_now(" in _NOW.sub("", source) for source in self._sources)

    # Writing

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt as text, up to where the reply begins.

        A prompt that ends with an assistant's message is left open there: the reply goes on with it.

        Raises:
            UserError: the template refuses the conversation.
        """
        if self.kind == "plain":
            return "\n\n".join(message["content"] for message in messages)
        if messages and messages[-1]["role"] == "assistant":
            return self.around(messages, tools)[0]
        return self.conversation(messages, tools, ask=True)

    def around(
        self, prompt: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, begun: bool = True
    ) -> tuple[str, str]:
        """What is written before and after the text of a reply to a prompt.

        Args:
            prompt: What comes before it.
            tools: What the assistant may call.
            begun: Whether an assistant's message that ends the prompt goes on in the reply.

        Raises:
            UserError: the template refuses the conversation, or does not write the reply.
        """
        if self.kind == "plain":
            return self.render(prompt), ""
        reply = Message(role="assistant", content=SENTINEL)
        whole = self.conversation(joined(prompt, (reply,)) if begun else [*prompt, reply], tools)
        before, found, after = whole.rpartition(SENTINEL)
        if not found:
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} does not write the assistant's reply. Mend its "
                "chat_template.jinja, or write tokens.template: plain."
            )
        return before, after

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, ask: bool = False
    ) -> str:
        """A conversation as the chat template writes it.

        Args:
            messages: At least one.
            tools: What the assistant may call.
            ask: Add what asks for the assistant's reply.

        Raises:
            UserError: the template refuses it.
        """
        return self._chat([self._shown(message) for message in messages], tools, ask=ask)

    def _shown(self, message: Message) -> dict[str, Any]:
        """A message as the chat template takes it."""
        shown: dict[str, Any] = {key: value for key, value in message.items() if key != "weight"}
        if self._takes_parts:
            shown["content"] = [{"type": "text", "text": message["content"]}]
        return shown

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the chat template writes a content only as a list of parts, as those of vision models do."""
        asked: dict[str, Any] = {"role": "user", "content": SENTINEL}
        parts = {"role": "user", "content": [{"type": "text", "text": SENTINEL}]}
        return not self._writes(asked) and self._writes(parts)

    def _writes(self, message: dict[str, Any]) -> bool:
        try:
            return SENTINEL in self._chat([message], ())
        except UserError:  # what it writes is asked, not whether it can be asked
            return False

    def _chat(
        self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], *, ask: bool = False
    ) -> str:
        settings: dict[str, Any] = dict(self.variables)
        given: Any = settings.pop("tools", None)
        own: Any = [dict(tool) for tool in tools] or given
        source = self.tokenizer.get_chat_template(None, own)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=own,
                    chat_template=self._dated(source),
                    tokenize=False,
                    add_generation_prompt=ask,
                    **settings,
                )
            )
        # What a template does to a value that it does not expect can fail in any of these ways.
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} refuses a conversation with the roles [{roles}]: {error}. "
                "Change the roles in the data, or write tokens.template: plain."
            ) from error

    def _dated(self, source: str) -> str:
        """The template with the run's date in place of the clock's, so that a run writes the same text throughout."""
        if "strftime_now" not in source:
            return source
        day = date.fromisoformat(self.day) if self.day else date.today()
        return _NOW.sub(lambda match: json.dumps(day.strftime(match["format"])), source)

    @cached_property
    def ending(self) -> Ending:
        """What ends a reply."""
        if self.kind == "plain":
            return Ending("", "", [self._eos], True)
        text = self.around([Message(role="user", content="tokenward-prompt")])[1]
        written = text.rstrip("\n")
        (encoding,) = self.encodings([written])
        count = self.ends_after(encoding.ids)
        if count:
            return Ending(text, written[: encoding.offsets[count - 1][1]], encoding.ids[:count], True)
        if not written.strip():
            return Ending(text, "", [self._eos], True)
        return Ending(text, written, [*encoding.ids, self._eos], False)

    def ends_after(self, ids: Sequence[int]) -> int:
        """Tokens up to the end of the turn, of those after a reply's text: the first special ones; 0 if there is none."""
        first = next((place for place, token in enumerate(ids) if token in self.special_ids), None)
        if first is None:
            return 0
        last = first
        while last < len(ids) and ids[last] in self.special_ids:
            last += 1
        return last

    @property
    def eos_ids(self) -> list[int]:
        """What ends a reply: the template's end-of-turn tokens, or EOS where the template has none."""
        return self.ending.ids

    @property
    def eos(self) -> int | None:
        """The tokenizer's own end of a text, where it has one."""
        return cast("int | None", self.tokenizer.eos_token_id)

    @property
    def _eos(self) -> int:
        if self.eos is None:
            raise UserError(
                f"the tokenizer of {self.tokenizer.name_or_path} has neither an end-of-turn token nor an EOS, so a model "
                "could never learn to stop. Set eos_token in its tokenizer_config.json."
            )
        return self.eos

    def without_end(self, text: str) -> str:
        """A plain reply without the end that its text may bring: the row writes one."""
        end = str(self.tokenizer.eos_token or "")
        bare = text.rstrip("\n")
        return bare.removesuffix(end) if end and bare.endswith(end) else text

    @cached_property
    def special_ids(self) -> set[int]:
        """Ids that are no text: marks of turns, ends, padding."""
        added = self.tokenizer.added_tokens_decoder
        special = {index for index, token in added.items() if token.special}
        return special | set(self.tokenizer.all_special_ids)

    @cached_property
    def special_marks(self) -> re.Pattern[str]:
        """Finds special tokens in a text."""
        names = {str(self.tokenizer.convert_ids_to_tokens(token)) for token in self.special_ids}
        return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")

    @cached_property
    def marks(self) -> re.Pattern[str] | None:
        """Finds the marks of this template in a text that should hold none; of plain text special tokens."""
        if self.kind == "plain":
            return self.special_marks if self.special_ids else None
        asked = self.render([Message(role="user", content=SENTINEL)])
        found = {str(self.tokenizer.convert_ids_to_tokens(token)) for token in self.special_ids}
        # Marks that are no special tokens, as Zephyr's <|user|>.
        found |= {part.strip() for part in (*asked.split(SENTINEL), self.ending.text)}
        known = {mark for mark in found if len(mark) >= _SHORTEST_MARK and not mark.isalnum()}
        return re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True)))) if known else None

    # Ids

    def written_ids(self, text: str) -> list[int]:
        """Token ids of a piece of what the template writes, its marks as such."""
        return cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Token ids of the prompt, with one BOS at most."""
        return self.rendered_ids([self.render(messages, tools)])[0]

    def rendered_ids(self, rendered: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts that :meth:`render` wrote; many at once cost a fraction of one by one."""
        if not rendered:
            return []
        # A chat template writes its own BOS; adding another is a classic mistake.
        encoded = self.tokenizer(list(rendered), add_special_tokens=self.kind == "plain")
        return [self._open_ended(ids) for ids in cast(list[list[int]], encoded["input_ids"])]

    def _open_ended(self, ids: list[int]) -> list[int]:
        # Some tokenizers close every text with EOS; a prompt goes on, unless an encoder reads it.
        if self.kind == "plain" and not self.encoder and ids and ids[-1] == self.eos and len(ids) > 1:
            ids = ids[:-1]
        return ids

    def response_ids(self, text: str) -> list[int]:
        """Token ids of a reply on its own, closed with the end-of-turn tokens."""
        return self.text_ids(text) + self.eos_ids

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a reply's text alone."""
        return self.texts_ids([text])[0]

    def texts_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of the text of each reply, on its own."""
        if not texts:
            return []
        # A reply that spells a special token ("<|im_end|>") is text, not the end of its turn.
        encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
        return cast(list[list[int]], encoded["input_ids"])

    def encodings(self, texts: Sequence[str]) -> list[Encoding]:
        """Texts as tokens with the characters of each, without anything before or after them."""
        return self._bare.encode_batch(list(texts), add_special_tokens=False) if texts else []

    def spelling(self, texts: Sequence[str]) -> list[Encoding]:
        """As :meth:`encodings`, of texts in which special tokens are text."""
        self._bare.encode_special_tokens = True
        try:
            return self.encodings(texts)
        finally:
            self._bare.encode_special_tokens = False

    @cached_property
    def _bare(self) -> Tokenizer:
        """The tokenizer without its last step, which adds tokens and cuts spaces off the places that it gives."""
        bare = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        bare.post_processor = None
        bare.no_padding()
        bare.no_truncation()
        return bare

    @cached_property
    def first_ids(self) -> list[int]:
        """What the tokenizer writes before a text of its own accord, such as BOS; a chat template writes it itself."""
        if self.kind == "chat":
            return []
        bare = self.written_ids("a")
        whole = self.rendered_ids(["a"])[0]
        return whole[: len(whole) - len(bare)] if whole[-len(bare) :] == bare else []

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the same messages would give other ids."""
        backend = self.tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]
        parts = [
            self.kind,
            str(self.tokenizer.chat_template),
            backend,
            *(["encoder"] if self.encoder else []),
            *([json.dumps(dict(self.variables), sort_keys=True)] if self.variables else []),
            *([self.day] if self.writes_date else []),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def joined(prompt: Sequence[Message], reply: Sequence[Message]) -> list[Message]:
    """A prompt and its reply as one conversation; an assistant's message that ends the prompt goes on in the reply."""
    if not prompt or prompt[-1]["role"] != "assistant" or not reply:
        return [*prompt, *reply]
    begun, first = prompt[-1], reply[0]
    whole = {**begun, **first, "content": begun["content"] + first["content"]}
    return [*prompt[:-1], cast(Message, whole), *reply[1:]]
