"""``tokenward chat RUN``: talk with a trained model, and hear what it would have said before."""

import json
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tokenward.artifacts import atomic_write
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel
from tokenward.sampling import Reply, SamplingSettings
from tokenward.sampling.checks import check_temperature
from tokenward.sampling.sampler import stream_reply
from tokenward.tools.finished import finished_model
from tokenward.tools.run import quiet_libraries
from tokenward.types import Message

SETTINGS: dict[str, Callable[[str], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "max_new_tokens": int,
    "seed": int,
}

HELP = """/retry          another reply to the last message
/undo           take the last message and its reply back
/before         the last message answered by the start model too, side by side
/system TEXT    begin anew with this system message; without text, with none
/set NAME=VALUE temperature, top_p, top_k, max_new_tokens or seed; without, show them
/save FILE      write the conversation as JSON lines
/exit           or Ctrl-D; Ctrl-C stops a reply and keeps what was said"""


def chat(target: str, *, start: str | None = None, display: Display | None = None) -> None:
    """Talk with a model on standard input until it ends.

    Args:
        target: Folder of a run or a stage, a model folder, or a hub name.
        start: What ``/before`` asks; None takes what the run says.
        display: Where replies are shown.

    Raises:
        UserError: there is no such model.
    """
    quiet_libraries()
    Conversation(target, start=start, display=display or Display()).talk(_lines())


def _lines() -> Iterator[str]:
    """Lines that a person types, or that come through a pipe."""
    mark = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(mark)
        except EOFError:
            return


class Conversation:
    """A conversation with one model.

    Args:
        target: See :func:`chat`.
        start: See :func:`chat`.
        display: Where replies are shown.
    """

    def __init__(self, target: str, *, start: str | None, display: Display) -> None:
        self._finished = finished_model(target)
        self._start_name = start or self._finished.start
        self._display = display
        self._model = self._finished.load()
        self._template = self._model.template(self._finished.style)
        self._settings, self._seed = SamplingSettings(max_new_tokens=256, temperature=0.7, top_p=0.95), 0
        self.messages: list[Message] = []

    @cached_property
    def _start(self) -> LanguageModel:
        if self._start_name is None:
            raise UserError(
                f"{self._finished.name} does not say what it was trained from. Begin again with --start MODEL."
            )
        return self._finished.load(self._start_name)

    def talk(self, lines: Iterator[str]) -> None:
        """Answer each line; a mistake costs a message, not the conversation."""
        self._display.line(f"{self._finished.name}  (/help)")
        while True:
            try:
                line = next(lines, "/exit").strip()
                if line == "/exit":
                    return
                if line:
                    self.take(line)
            except UserError as error:
                self._display.line(f"error: {error}")
            except KeyboardInterrupt:
                return  # between two replies there is nothing to stop but the conversation

    def take(self, line: str) -> None:
        """A message, or a command.

        Raises:
            UserError: the command does not exist or cannot be done now.
        """
        if not line.startswith("/"):
            self.messages.append(Message(role="user", content=line))
            self._answer()
            return
        name, _, argument = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self._display.line(HELP),
            "retry": self._retry,
            "undo": self._undo,
            "before": self._before,
            "system": self._system,
            "set": self._set,
            "save": self._save,
        }
        if name not in commands:
            raise UserError(
                f"there is no command /{name}. Known: {', '.join(f'/{key}' for key in commands)}, /exit."
            )
        commands[name](argument.strip())

    def _answer(self) -> None:
        reply = self._reply(self._model, self._show_piece)
        self._display.line("" if reply.ended else " ...")
        self.messages.append(Message(role="assistant", content=reply.text))

    def _show_piece(self, piece: str) -> None:
        self._display.console.print(Text(piece), end="", soft_wrap=True)

    def _reply(self, model: LanguageModel, show: Callable[[str], None]) -> Reply:
        prompt = self._template.prompt_ids(self.messages)
        return stream_reply(model, self._template, prompt, self._settings, seed=self._seed, show=show)

    def _without_reply(self) -> None:
        """Take the last reply back."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UserError("nothing was said yet. Write a message first.")
        self.messages.pop()

    def _retry(self, _: str) -> None:
        self._without_reply()
        self._seed += 1
        self._answer()

    def _undo(self, _: str) -> None:
        self._without_reply()
        said = self.messages.pop()
        self._display.line(f"taken back: {said['content']}")

    def _before(self, _: str) -> None:
        start = self._start
        self._without_reply()
        replies = [self._reply(model, lambda piece: None) for model in (start, self._model)]
        self.messages.append(Message(role="assistant", content=replies[1].text))
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column("before", ratio=1)
        table.add_column("now", ratio=1)
        table.add_row(*(Text(reply.text) for reply in replies))
        self._display.console.print(table)

    def _system(self, text: str) -> None:
        self.messages = [Message(role="system", content=text)] if text else []
        self._display.line("a new conversation")

    def _set(self, text: str) -> None:
        name, _, value = (part.strip() for part in text.partition("="))
        if text:
            self._change(name, value)
        known = {**self._settings._asdict(), "seed": self._seed}
        self._display.line("  ".join(f"{key}={known[key]:g}" for key in SETTINGS))

    def _change(self, name: str, value: str) -> None:
        if name not in SETTINGS:
            raise UserError(
                f"there is no setting {name!r}. Known: {', '.join(SETTINGS)}. Write /set temperature=0.7."
            )
        try:
            number = SETTINGS[name](value)
        except ValueError as error:
            raise UserError(
                f"{name} is {value!r}, which is no number of its kind. Write /set temperature=0.7."
            ) from error
        _check(name, number)
        if name == "seed":
            self._seed = number
        else:
            self._settings = self._settings._replace(**{name: number})

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("name a file: /save talk.jsonl")
        path = Path(name).expanduser()
        if not path.parent.is_dir():
            raise UserError(f"there is no folder {path.parent}. Make it, or name another file.")
        record = {"model": self._finished.name, "messages": self.messages}
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        atomic_write(path, f"{before}{json.dumps(record, ensure_ascii=False)}\n")
        self._display.line(f"added to {path}")


def _check(name: str, value: float) -> None:
    """Refuse a value that nothing can be drawn with."""
    if name == "temperature" and value != 0:
        check_temperature(value, "temperature")
    least = {"top_p": 0.0, "top_k": 0, "max_new_tokens": 1, "seed": 0, "temperature": 0.0}[name]
    if value < least or (name == "top_p" and not 0 < value <= 1):
        bounds = "in (0, 1]" if name == "top_p" else f"at least {least:g}"
        raise UserError(f"{name} is {value:g}, and it must be {bounds}.")
