"""How a tokenizer writes a conversation, exactly as the model sees it when it generates."""

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from tokenward.tokens.bounds import BoundedEnvironment, TooMuchWorkError, apply_chat_template
from tokenward.types import Message

SENTINEL = "tokenward-reply"
"""Placeholder for the text of a reply, to find out what a template writes around it."""

Kind = Literal["chat", "plain"]

_NOW = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
_FIXED = ("messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception")
_SHORTEST_MARK = 3


class Style(NamedTuple):
    """Settings of a template that do not depend on the tokenizer."""

    kind: Kind = "chat"  # chat uses the tokenizer's chat template; plain joins the texts of the messages
    # Variables of the chat template, such as enable_thinking. tools is the default for rows without.
    variables: Mapping[str, Any] = {}
    day: str = ""  # the date, ISO 8601, for a template that writes one; empty for today

    def template(self, tokenizer: PreTrainedTokenizerBase, *, encoder: bool = False) -> "Template":
        """The template of a tokenizer in this style."""
        return Template(
            tokenizer=tokenizer, kind=self.kind, encoder=encoder, variables=self.variables, day=self.day
        )

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> Self:
        """The style that :meth:`facts` described; the default style for a model folder without these facts."""
        variables, day = facts.get("chat_template_kwargs") or {}, facts.get("template_day") or ""
        return cls(facts.get("template", "chat"), variables, day)

    def facts(self) -> dict[str, Any]:
        """The style as facts for a manifest."""
        known = {"chat_template_kwargs": dict(self.variables), "template_day": self.day}
        return {"template": self.kind, **{name: value for name, value in known.items() if value}}


class Ending(NamedTuple):
    """What a template writes after the text of a reply."""

    text: str  # all of it, to the end of the conversation
    turn: str  # the part that ends the turn
    ids: list[int]  # ids of that part; the tokenizer's eos if the template has none
    special: bool  # whether the turn ends with a special token. If not, the tokenizer's eos is added


@dataclass(frozen=True, kw_only=True)
class Template:
    """Writes conversations for a tokenizer.

    Attributes:
        tokenizer: A fast tokenizer, because offsets are needed.
        kind: See :class:`Style`.
        encoder: Whether an encoder reads the prompt. It then keeps the eos that its tokenizer adds.
        variables: See :class:`Style`.
        day: See :class:`Style`.

    Raises:
        UserError: The tokenizer has no chat template, or ``variables`` are not those of the chat template.
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
                f"the tokenizer of {self._name} has no chat template. Use template: plain, which joins prompt and reply as they are "
                '(in a script: tokens=TokenSettings(template="plain")), or save a chat_template.jinja in the tokenizer\'s folder.',
                code="no-chat-template",
                key="tokens.template",
            )
        reserved = {*inspect.signature(self.tokenizer.apply_chat_template).parameters, *_FIXED}
        for name in sorted(set(self.variables) - {"tools", "documents"}):
            if name in reserved:
                problem = "is set by tokenward for each row. Leave it out."
            elif name not in self._read_variables:
                known = ", ".join(self.choices) or "none"
                problem = (
                    f"is not read by the chat template of {self._name}. Variables that it reads: {known}."
                )
            else:
                continue
            raise UserError(f"{name} {problem}", code="unknown-variable", key="tokens.chat_template_kwargs")

    @property
    def _name(self) -> str:
        return self.tokenizer.name_or_path

    @cached_property
    def _read_variables(self) -> set[str]:
        """Names of the variables that the chat template reads."""
        environment = BoundedEnvironment(extensions=["jinja2.ext.loopcontrols"])
        names: set[str] = set()
        for source in self._sources:
            # {% generation %} is an extension of transformers that jinja does not know.
            bare = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
            try:
                parsed = environment.parse(bare)
                tests = (test.node for test in parsed.find_all(nodes.Test))
                tested = {node.name for node in tests if isinstance(node, nodes.Name)}
                assigned = {name.name for name in parsed.find_all(nodes.Name) if name.ctx != "load"}
                # A variable that the template assigns is its own, unless it tests whether the caller gave one.
                names |= jinja2.meta.find_undeclared_variables(parsed) - (assigned - tested)
            except (TooMuchWorkError, RecursionError) as error:
                raise self._endless(error) from error
            except jinja2.TemplateSyntaxError as error:
                raise self._broken(error) from error
        return names

    @property
    def choices(self) -> list[str]:
        """Names of the variables that can be set."""
        fixed = {*_FIXED, *self.tokenizer.special_tokens_map}
        return sorted(self._read_variables - fixed) if self.kind == "chat" else []

    @property
    def _sources(self) -> list[str]:
        found: Any = self.tokenizer.chat_template
        return list(found.values()) if isinstance(found, dict) else [str(found)]

    @property
    def written_day(self) -> str:
        """The date that the template writes, ISO 8601; empty if it writes none."""
        return (self.day or date.today().isoformat()) if self._writes_date else ""

    @property
    def _writes_date(self) -> bool:
        return self.kind == "chat" and any("strftime_now" in source for source in self._sources)

    @property
    def writes_clock(self) -> bool:
        """Whether the chat template writes the time in a computed form, which ``day`` cannot fix."""
        return self._writes_date and any("strftime_now(" in _NOW.sub("", source) for source in self._sources)

    # Writing

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt as text, up to where the reply begins.

        If the last message is the assistant's, it is left open, and the reply continues it.

        Raises:
            UserError: The template refuses the conversation.
        """
        if self.kind == "plain":
            return "\n\n".join(message["content"] for message in messages)
        if messages and messages[-1]["role"] == "assistant":
            return self.around(messages, tools)[0]
        return self.conversation(messages, tools, ask=True)

    def around(
        self, prompt: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, begun: bool = True
    ) -> tuple[str, str]:
        """The text before and after a reply to a prompt.

        Args:
            prompt: The messages before the reply.
            tools: The tools that the assistant may call.
            begun: Whether the reply continues an assistant message at the end of the prompt.

        Raises:
            UserError: The template refuses the conversation, or does not write the reply.
        """
        if self.kind == "plain":
            return self.render(prompt), ""
        reply = Message(role="assistant", content=SENTINEL)
        whole = self.conversation(joined(prompt, (reply,)) if begun else [*prompt, reply], tools)
        before, found, after = whole.rpartition(SENTINEL)
        if not found:
            raise UserError(
                f"the chat template of {self._name} does not write the assistant's reply. Fix its chat_template.jinja, or use "
                "template: plain.",
                code="broken-chat-template",
                key="tokens.template",
            )
        return before, after

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, ask: bool = False
    ) -> str:
        """A conversation as the chat template writes it, with ``ask`` followed by the start of the assistant's turn.

        Raises:
            UserError: The template refuses the conversation.
        """
        shown: list[dict[str, Any]] = []
        for message in messages:
            shown.append({key: value for key, value in message.items() if key != "weight"})
            if self._takes_parts:
                shown[-1]["content"] = [{"type": "text", "text": message["content"]}]
        return self._chat(shown, tools, ask=ask)

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the chat template writes content only as a list of parts, as those of vision models do."""
        parts = [{"type": "text", "text": SENTINEL}]
        return not self._writes(SENTINEL) and self._writes(parts)

    def _writes(self, content: Any) -> bool:
        try:
            return SENTINEL in self._chat([{"role": "user", "content": content}], ())
        except UserError as error:
            if error.code == "endless-template":
                raise
            return False

    def _chat(
        self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], *, ask: bool = False
    ) -> str:
        settings: dict[str, Any] = dict(self.variables)
        default: Any = settings.pop("tools", None)
        used: Any = [dict(tool) for tool in tools] or default
        settings["chat_template"] = self._dated(self.tokenizer.get_chat_template(None, used))
        try:
            return str(
                apply_chat_template(
                    self.tokenizer,
                    messages,
                    tools=used,
                    tokenize=False,
                    add_generation_prompt=ask,
                    **settings,
                )
            )
        except (TooMuchWorkError, RecursionError, MemoryError) as error:
            raise self._endless(error) from error
        except (
            jinja2.TemplateSyntaxError,
            SyntaxError,
        ) as error:  # the latter from Python, for blocks that are nested too deep
            raise self._broken(error) from error
        # A template can fail in any of these ways on a value that it does not expect.
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
        ) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"the chat template of {self._name} refuses a conversation with the roles [{roles}]: {error}. Change the roles "
                "in the data, or use template: plain.",
                code="refused-conversation",
                key="tokens.template",
            ) from error

    def _broken(self, error: Exception) -> UserError:
        return UserError(
            f"the chat template of {self._name} has a syntax error: {error}. Fix its chat_template.jinja, or use template: plain.",
            code="broken-chat-template",
            key="tokens.template",
        )

    def _endless(self, error: BaseException) -> UserError:
        problem = (
            "it calls itself without end"
            if isinstance(error, RecursionError)
            else str(error) or "it needs too much memory"
        )
        return UserError(
            f"the chat template of {self._name} is refused: {problem}. Fix its chat_template.jinja, or use template: plain.",
            code="endless-template",
            key="tokens.template",
        )

    def _dated(self, source: str) -> str:
        """The template with the date of the run instead of the clock's, so that all rows of a run get the same text."""
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
        """Number of ids after a reply's text up to the end of the turn, its first special tokens; 0 if there are none."""
        special = [token in self.special_ids for token in ids]
        if True not in special:
            return 0
        first = special.index(True)
        return special.index(False, first) if False in special[first:] else len(ids)

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end a reply: the template's eos tokens, or the tokenizer's if the template has none."""
        return self.ending.ids

    @property
    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {self._name} has no eos token, and its template has none either, so a model could not learn "
                "to stop. Set eos_token in its tokenizer_config.json.",
                code="no-eos",
            )
        return cast(int, self.tokenizer.eos_token_id)

    def without_end(self, text: str) -> str:
        """A plain reply without the eos that its text may end with, because the row adds one."""
        end = self._end
        bare = text.rstrip("\n")
        return bare.removesuffix(end) if end and bare.endswith(end) else text

    @cached_property
    def _end(self) -> str:
        return str(self.tokenizer.eos_token or "")

    @cached_property
    def special_ids(self) -> set[int]:
        """Ids that are not text: marks of turns, eos, padding."""
        added = self.tokenizer.added_tokens_decoder
        special = {index for index, token in added.items() if token.special}
        return special | set(self.tokenizer.all_special_ids)

    @cached_property
    def _special_tokens(self) -> set[str]:
        return {str(self.tokenizer.convert_ids_to_tokens(token)) for token in self.special_ids}

    @cached_property
    def special_marks(self) -> re.Pattern[str]:
        """Finds special tokens in a text."""
        return _any_of(self._special_tokens)

    @cached_property
    def marks(self) -> re.Pattern[str] | None:
        """Finds marks of this template in a text that should not have any; special tokens for plain text."""
        if self.kind == "plain":
            return self.special_marks if self.special_ids else None
        around = self.render([Message(role="user", content=SENTINEL)]).split(SENTINEL)
        # Some templates have marks that are not special tokens, such as Zephyr's <|user|>.
        found = self._special_tokens | {part.strip() for part in (*around, self.ending.text)}
        known = {mark for mark in found if len(mark) >= _SHORTEST_MARK and not mark.isalnum()}
        return _any_of(known) if known else None

    # Ids

    def written_ids(self, text: str) -> list[int]:
        """Ids of a piece of the template's text, in which special tokens are special."""
        with self._tokenizing():
            return cast(list[int], self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @contextmanager
    def _tokenizing(self) -> Iterator[None]:
        """The tokenizers library gives a pattern up that takes too long, by a panic, which is no ordinary exception."""
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise UserError(
                f"the tokenizer of {self._name} cannot tokenize a text: {str(error)[:200]}. A pattern in its tokenizer.json may take time "
                "without end; get the folder anew.",
                code="broken-tokenizer",
            ) from None

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Ids of the prompt, with at most one BOS."""
        return self.rendered_ids([self.render(messages, tools)])[0]

    def rendered_ids(self, rendered: Sequence[str]) -> list[list[int]]:
        """Ids of prompts written by :meth:`render`. Many at once are much faster than one by one."""
        if not rendered:
            return []
        # A chat template writes its own BOS, and the tokenizer would add a second one.
        with self._tokenizing():
            encoded = self.tokenizer(list(rendered), add_special_tokens=self.kind == "plain")
        return [self._open_ended(ids) for ids in cast(list[list[int]], encoded["input_ids"])]

    def _open_ended(self, ids: list[int]) -> list[int]:
        # Some tokenizers add eos to every text, but only an encoder's prompt ends there.
        closed = len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id
        return ids[:-1] if closed and self.kind == "plain" and not self.encoder else ids

    def texts_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the text of each reply on its own. Special tokens in it are text: "<|im_end|>" does not end the turn."""
        if not texts:
            return []
        with self._tokenizing():
            encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
        return cast(list[list[int]], encoded["input_ids"])

    def encodings(self, texts: Sequence[str], *, special: bool = True) -> list[Encoding]:
        """Texts as tokens with their offsets, without added tokens. Without ``special``, special tokens are text."""
        if not texts:
            return []
        self._bare.encode_special_tokens = not special
        with self._tokenizing():
            return self._bare.encode_batch(list(texts), add_special_tokens=False)

    @cached_property
    def _bare(self) -> Tokenizer:
        """The tokenizer without post-processing, which adds tokens and trims spaces off the offsets."""
        bare = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        bare.post_processor = None
        bare.no_padding()
        bare.no_truncation()
        return bare

    @cached_property
    def first_ids(self) -> list[int]:
        """Ids that the tokenizer adds before a plain text, such as BOS. A chat template writes its own."""
        if self.kind == "chat":
            return []
        bare = self.written_ids("a")
        whole = self.rendered_ids(["a"])[0]
        return whole[: len(whole) - len(bare)] if whole[-len(bare) :] == bare else []

    @cached_property
    def fingerprint(self) -> str:
        """A hash that changes if the same messages would give other ids."""
        backend = self.tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]
        parts = [
            self.kind,
            str(self.tokenizer.chat_template),
            backend,
            *(["encoder"] if self.encoder else []),
            *([json.dumps(dict(self.variables), sort_keys=True)] if self.variables else []),
            *([self.day] if self._writes_date else []),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _any_of(marks: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of some marks, or nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or "(?!)")


def joined(prompt: Sequence[Message], reply: Sequence[Message]) -> list[Message]:
    """Prompt and reply as one conversation. The reply continues an assistant message at the end of the prompt."""
    if not prompt or prompt[-1]["role"] != "assistant" or not reply:
        return [*prompt, *reply]
    begun, first = prompt[-1], reply[0]
    whole = {**begun, **first, "content": begun["content"] + first["content"]}
    return [*prompt[:-1], cast(Message, whole), *reply[1:]]
