"""From messages to token ids, exactly as the model will see them when it generates."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from tokenward.errors import UserError
from tokenward.types import Message

SENTINEL = "tokenward-reply"


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a tokenizer writes a conversation.

    Attributes:
        tokenizer: A fast tokenizer (offsets are needed).
        kind: ``"chat"`` uses the tokenizer's chat template; ``"plain"`` joins the messages' text.
        encoder: Whether an encoder reads the prompt: it keeps the end that its tokenizer writes.
    """

    tokenizer: PreTrainedTokenizerBase
    kind: Literal["chat", "plain"] = "chat"
    encoder: bool = False

    def __post_init__(self) -> None:
        if self.kind == "chat" and not self.tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no chat template, so a prompt cannot be written as "
                "a conversation. Write tokens.template: plain to join prompt and reply as text, or save a "
                "chat_template.jinja beside the tokenizer."
            )

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt as text, up to where the reply begins."""
        if self.kind == "plain":
            return "\n\n".join(message["content"] for message in messages)
        try:
            return self._chat(messages, add_generation_prompt=True)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} refuses a prompt with the roles [{roles}]: {error}. "
                "Change the roles in the data, or write tokens.template: plain."
            ) from error

    def _chat(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        turns = cast(list[dict[str, str]], list(messages))
        settings: Mapping[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(turns, **settings))

    def _encode(self, text: str, *, special: bool) -> list[int]:
        return cast(list[int], self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the prompt, with one BOS at most."""
        return self.rendered_ids([self.render(messages)])[0]

    def rendered_ids(self, rendered: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts that :meth:`render` wrote; many at once cost a fraction of one by one."""
        return [self._open_ended(ids) for ids in self.joint_ids(rendered)]

    def _open_ended(self, ids: list[int]) -> list[int]:
        closing = self.tokenizer.eos_token_id
        # Some tokenizers close every text with EOS; a prompt goes on, unless an encoder reads it.
        if self.kind == "plain" and not self.encoder and ids and ids[-1] == closing and len(ids) > 1:
            ids = ids[:-1]
        return ids

    def joint_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole texts, which begin with a prompt."""
        if not texts:
            return []
        # A chat template writes its own BOS; adding another is a classic mistake.
        encoded = self.tokenizer(list(texts), add_special_tokens=self.kind == "plain")
        return cast(list[list[int]], encoded["input_ids"])

    def response_ids(self, text: str) -> list[int]:
        """Token ids of a reply on its own, closed with the end-of-turn tokens."""
        return self.text_ids(text) + self.closing_ids

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a reply's text alone."""
        return self.texts_ids([text])[0]

    def texts_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of the text of each reply."""
        if not texts:
            return []
        # A reply that spells a special token ("<|im_end|>") is text, not the end of its turn.
        encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
        return cast(list[list[int]], encoded["input_ids"])

    @cached_property
    def closing_ids(self) -> list[int]:
        """What ends a reply: the template's end-of-turn token, or EOS where the template has none."""
        eos = self.tokenizer.eos_token_id
        if self.kind == "chat":
            user: Message = {"role": "user", "content": "tokenward-prompt"}
            reply: Message = {"role": "assistant", "content": SENTINEL}
            suffix = (
                self._chat([user, reply], add_generation_prompt=False).partition(SENTINEL)[2].rstrip("\n")
            )
            ids = self._encode(suffix, special=False)
            special = [index for index, token in enumerate(ids) if token in self.special_ids]
            if special:
                return ids[: special[0] + 1]
        if eos is None:
            raise UserError(
                f"the tokenizer of {self.tokenizer.name_or_path} has neither an end-of-turn token nor an EOS, so a model "
                "could never learn to stop. Set eos_token in its tokenizer_config.json."
            )
        return [cast(int, eos)]

    @cached_property
    def special_ids(self) -> set[int]:
        """Ids that are no text: marks of turns, ends, padding."""
        added = self.tokenizer.added_tokens_decoder
        special = {index for index, token in added.items() if token.special}
        return special | set(self.tokenizer.all_special_ids)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when the same messages would give other ids."""
        backend = self.tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]
        parts = [
            self.kind,
            str(self.tokenizer.chat_template),
            backend,
            *(["encoder"] if self.encoder else []),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def joins_differently(self, messages: Sequence[Message], text: str) -> bool:
        """Whether encoding prompt and reply as one text would give other ids at the boundary."""
        if self.encoder:
            return False  # prompt and reply never stand in one text
        joint = self.joint_ids([self.render(messages) + text])[0]
        apart = self.prompt_ids(messages) + self.text_ids(text)
        return joint[: len(apart)] != apart
