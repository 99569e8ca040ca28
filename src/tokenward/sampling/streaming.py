"""One reply, shown piece by piece while it is drawn, and kept as far as it came when it is stopped."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from tokenward.models.loading import LanguageModel
from tokenward.sampling.sampler import (
    Reply,
    SamplingSettings,
    ends_of,
    generation_config,
    without_folder_settings,
)
from tokenward.tokens.template import Template


class _Pieces(BaseStreamer):
    """Collects ids and shows the text that is certain: a character may take several tokens."""

    def __init__(self, template: Template, show: Callable[[str], None]) -> None:
        self._template, self._show = template, show
        self._prompt_is_next = True
        self.ids: list[int] = []
        self._shown = 0

    def put(self, value: Tensor) -> None:
        """Ids as generate draws them; the first call brings the prompt."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.ids += value.flatten().tolist()
        text = self.text
        if not text.endswith("\ufffd"):
            self._flush(text)

    def end(self) -> None:
        """Nothing more will come."""
        self._flush(self.text)

    @property
    def text(self) -> str:
        """The reply so far."""
        return str(self._template.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _flush(self, text: str) -> None:
        self._show(text[self._shown :])
        self._shown = len(text)


def stream_reply(
    model: LanguageModel,
    template: Template,
    prompt: Sequence[int],
    settings: SamplingSettings,
    *,
    seed: int,
    show: Callable[[str], None],
) -> Reply:
    """One reply; Ctrl-C ends it and what was drawn is kept.

    Args:
        model: Draws it.
        template: Says what ends it.
        prompt: Token ids.
        settings: How to draw; ``stop`` and ``batch`` are not looked at.
        seed: Of torch's generators, which are left as they were.
        show: Called with each new piece of text.
    """
    pieces = _Pieces(template, show)
    ids = torch.tensor([list(prompt)], device=model.device)
    model.model.eval()
    config, ends = generation_config(model, template, settings), ends_of(model, template)
    with torch.random.fork_rng(), torch.inference_mode(), without_folder_settings(model):
        torch.manual_seed(seed)
        try:
            model.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=pieces,
            )
        except KeyboardInterrupt:
            pieces.end()
    ended = any(token in ends for token in pieces.ids)
    return Reply(pieces.ids, pieces.text, ended)
