"""``tokenward chat RUN``: chat with a trained model, and compare its replies with those of its start model."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cached_property

from rich.table import Table
from rich.text import Text

from tokenward.artifacts import atomic_write, user_path
from tokenward.display import Display, printable
from tokenward.errors import UserError
from tokenward.models.identity import check_places
from tokenward.models.loading import LanguageModel
from tokenward.sampling import Reply, SamplingSettings
from tokenward.sampling.checks import check_temperature
from tokenward.sampling.sampler import stream_reply
from tokenward.tools.finished import finished_model
from tokenward.tools.run import quiet_libraries
from tokenward.types import Message

SETTINGS = {"temperature": float, "top_p": float, "top_k": int, "max_new_tokens": int, "seed": int}
"""Settings of ``/set``, with their types."""

HELP = """/retry          draw another reply to the last message
/undo           remove the last message and its reply
/before         reply to the last message with the start model too, side by side
/system TEXT    start a new conversation with this system message, or without one
/set NAME=VALUE change temperature, top_p, top_k, max_new_tokens or seed; without arguments, show them
/save FILE      add the conversation to a file of JSON lines
/exit           quit, like Ctrl-D; Ctrl-C stops a reply and keeps the text so far"""


def chat(target: str, *, start: str | None = None, display: Display | None = None) -> None:
    """Chat with a model on standard input until it ends. ``/before`` uses ``start``, by default the run's start model.

    Raises:
        UserError: there is no such model.
    """
    quiet_libraries()
    Conversation(target, start=start, display=display or Display()).run(_lines())


def _lines() -> Iterator[str]:
    """Lines that a person types, or that come through a pipe."""
    mark = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(mark)
        except EOFError:
            return


class Conversation:
    """A conversation with one model."""

    def __init__(self, target: str, *, start: str | None, display: Display) -> None:
        self._finished = finished_model(target)
        check_places(start=start)
        self._start_name = start or self._finished.start
        self._display = display
        self._model = self._finished.load()
        self._template = self._model.template(self._finished.style)
        self._settings, self._seed = SamplingSettings(max_new_tokens=256, temperature=0.7, top_p=0.95), 0
        self._messages: list[Message] = []

    def run(self, lines: Iterator[str]) -> None:
        """Answer each line. A mistake prints a message and does not end the conversation."""
        self._display.line(f"{self._finished.name}  (/help)")
        while True:
            try:
                line = next(lines, "/exit").strip()
                if line == "/exit":
                    return
                if line:
                    self._answer(line)
            except UserError as error:
                self._display.line(f"error: {error}")
            except KeyboardInterrupt:
                return  # stream_reply handles Ctrl-C during a reply

    def _answer(self, line: str) -> None:
        if not line.startswith("/"):
            self._messages.append(Message(role="user", content=line))
            self._reply()
            return
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self._display.line(HELP),
            "retry": self._retry,
            "undo": self._undo,
            "before": self._before,
            "system": self._system,
            "set": self._set,
            "save": self._save,
        }
        name, _, argument = line[1:].partition(" ")
        if name not in commands:
            known = ", ".join(f"/{key}" for key in (*commands, "exit"))
            raise UserError(f"there is no command /{name}. Commands: {known}.", code="unknown-name")
        commands[name](argument.strip())

    def _reply(self) -> None:
        reply = self._sample(
            self._model,
            lambda piece: self._display.console.print(Text(printable(piece)), end="", soft_wrap=True),
        )
        self._display.line("" if reply.ended else " ...")
        self._messages.append(Message(role="assistant", content=reply.text))

    def _sample(self, model: LanguageModel, show: Callable[[str], None]) -> Reply:
        prompt = self._template.prompt_ids(self._messages)
        return stream_reply(model, self._template, prompt, self._settings, seed=self._seed, show=show)

    def _remove_reply(self) -> None:
        if not self._messages or self._messages[-1]["role"] != "assistant":
            raise UserError("there is no reply yet. Write a message first.", code="no-reply")
        self._messages.pop()

    def _retry(self, _: str) -> None:
        self._remove_reply()
        self._seed += 1
        self._reply()

    def _undo(self, _: str) -> None:
        self._remove_reply()
        self._display.line(f"removed: {self._messages.pop()['content']}")

    @cached_property
    def _start(self) -> LanguageModel:
        if self._start_name is None:
            raise UserError(
                f"{self._finished.name} does not name its start model. Start the chat with --start MODEL.",
                code="unknown-start",
            )
        return self._finished.load(self._start_name)

    def _before(self, _: str) -> None:
        models = (self._start, self._model)
        self._remove_reply()
        replies = [self._sample(model, lambda piece: None) for model in models]
        self._messages.append(Message(role="assistant", content=replies[1].text))
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column("before", ratio=1)
        table.add_column("after", ratio=1)
        table.add_row(*(Text(reply.text) for reply in replies))
        self._display.console.print(table)

    def _system(self, text: str) -> None:
        self._messages = [Message(role="system", content=text)] if text else []
        self._display.line("new conversation")

    def _set(self, text: str) -> None:
        if text:
            name, _, value = (part.strip() for part in text.partition("="))
            number = _setting(name, value)
            if name == "seed":
                self._seed = int(number)
            else:
                self._settings = replace(self._settings, **{name: number})
        known = {**asdict(self._settings), "seed": self._seed}
        self._display.line("  ".join(f"{key}={known[key]:g}" for key in SETTINGS))

    def _save(self, name: str) -> None:
        path = user_path(name)
        if not name or not path.parent.is_dir():
            problem = f"there is no folder {path.parent}" if name else "/save needs a file"
            raise UserError(
                f"{problem}. Name a file in an existing folder: /save chat.jsonl.", code="missing-file"
            )
        record = {"model": self._finished.name, "messages": self._messages}
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        atomic_write(path, f"{before}{json.dumps(record, ensure_ascii=False)}\n")
        self._display.line(f"added to {path}")


def _setting(name: str, text: str) -> float:
    """The value of a sampling setting, checked."""
    if name not in SETTINGS:
        raise UserError(
            f"there is no setting {name!r}. Settings: {', '.join(SETTINGS)}. Example: /set temperature=0.7.",
            code="unknown-name",
        )
    try:
        value = SETTINGS[name](text)
    except ValueError as error:
        kind = "a whole number" if SETTINGS[name] is int else "a number"
        raise UserError(f"{name} must be {kind}, got {text!r}.", code="invalid-value") from error
    if name == "temperature" and value != 0:
        check_temperature(value, "temperature")
    if value < (name == "max_new_tokens") or (name == "top_p" and not 0 < value <= 1):
        bounds = {"top_p": "in (0, 1]", "max_new_tokens": "at least 1"}.get(name, "at least 0")
        raise UserError(f"{name} must be {bounds}, got {value:g}.", code="out-of-range")
    return value
