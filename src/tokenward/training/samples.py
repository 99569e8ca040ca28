"""Replies to a few fixed prompts while a model trains, so that a change can be read and not only measured."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenward.artifacts import read_jsonl, write_jsonl
from tokenward.sampling import Reply

SAMPLES = "samples.jsonl"
PROMPT_SHOWN, REPLY_SHOWN = 40, 120
"""Characters of a prompt and of a reply in a line on screen."""


class AnswerPrompts(TrainerCallback):
    """Answers the same prompts with the same random numbers before training, at each evaluation and at the end.

    Each look adds a line a prompt to ``samples.jsonl``: ``{"step", "key", "prompt", "reply", "ended"}``. The
    training is not touched: ``answer`` must leave torch's generators as it found them.

    Args:
        keys: A stable name for each prompt.
        prompts: The text of each, to show and to store.
        answer: Replies of the model as it is now, one a prompt.
        path: The file.
        show: Called with each line for the screen.
        also: ``f(step, total)``: whether to look after an update that no evaluation follows.
        main: Whether this process writes and shows; every process must answer, or one would wait for the others.
    """

    def __init__(
        self,
        keys: Sequence[str],
        prompts: Sequence[str],
        answer: Callable[[], Sequence[Reply]],
        path: Path,
        *,
        show: Callable[[str], None],
        also: Callable[[int, int], bool] = lambda step, total: False,
        main: bool = True,
    ) -> None:
        self._keys, self._prompts, self._answer, self._path = keys, prompts, answer, path
        self._show, self._also, self._main = show, also, main
        self._lines: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look before the first update; after a stop, keep what was seen up to the checkpoint."""
        if not state.global_step:
            self.look(0)
        elif self._path.is_file():
            self._lines = [line for line in read_jsonl(self._path) if line["step"] <= state.global_step]

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look beside the figures."""
        self.look(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look where ``also`` says so."""
        if self._also(state.global_step, state.max_steps):
            self.look(state.global_step)

    def look(self, step: int) -> None:
        """Answer the prompts after so many updates, unless that was done."""
        if any(line["step"] == step for line in self._lines):
            return
        replies = self._answer()
        found = [
            {"step": step, "key": key, "prompt": prompt, "reply": reply.text, "ended": reply.ended}
            for key, prompt, reply in zip(self._keys, self._prompts, replies, strict=True)
        ]
        self._lines += found
        if not self._main:
            return
        write_jsonl(self._path, self._lines)
        self._show(f"  replies after {step} steps" if step else "  replies before training")
        for line in found:
            self._show(
                f"    {_one_line(line['prompt'], PROMPT_SHOWN)} -> {_one_line(line['reply'], REPLY_SHOWN)}"
            )


def _one_line(text: str, longest: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."
