"""Token rewards for reinforcement learning with verl or TRL (RTO, arXiv 2404.18922)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.plugins import check_positive
from tokenward.scoring.texts import TokenScorer
from tokenward.types import Message


class TokenRewards:
    """Scores of a trained oracle or reward model as token rewards, with an optional reward of the whole response.

    ``r_t = clip(scale * s_t, -clip, clip)``, plus ``clip(terminal, -terminal_clip, terminal_clip)`` at the last token. As
    in RTO's code, clipping comes after scaling: the defaults cut log-ratios off at one nat.

    Args:
        scorer: Gives the scores.
        scale: Greater than 0.
        clip: Largest absolute reward of a token; None is no limit.
        terminal_clip: Largest absolute reward of a response; None is no limit.

    Raises:
        UserError: A number is not greater than 0.
    """

    def __init__(
        self,
        scorer: TokenScorer,
        *,
        scale: float = 0.05,
        clip: float | None = 0.05,
        terminal_clip: float | None = 10.0,
    ) -> None:
        given = {"scale": scale, "clip": clip, "terminal_clip": terminal_clip}
        check_positive(**{name: value for name, value in given.items() if value is not None})
        self.scorer, self.scale, self.clip, self.terminal_clip = scorer, scale, clip, terminal_clip
        self.__name__ = "tokenward_rewards"  # TRL logs a reward function under its name

    @classmethod
    def load(cls, folder: str | Path, *, reference: str | None = None, **settings: Any) -> "TokenRewards":
        """Load the oracle or reward model of a run, or a model folder; see :meth:`TokenScorer.load`.

        Args:
            folder: Such as ``runs/NAME/oracle``.
            reference: The reference of an oracle, if the folder does not name it.
            settings: ``scale``, ``clip`` and ``terminal_clip``.
        """
        return cls(TokenScorer.load(folder, reference=reference), **settings)

    def of_ids(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        terminal: Sequence[float] | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Rewards of sampled tokens in the layout of verl's ``token_level_rewards``.

        Args:
            prompts: Ids of each prompt, without padding.
            responses: Ids of each response, without padding but with its end-of-turn token.
            terminal: A reward of each whole response, added at its last token.
            width: Number of columns (verl's response length), by default that of the longest response.

        Returns:
            ``[b width]`` float32: column ``t`` is the response's token ``t``, and 0 after its end.

        Raises:
            UserError: A prompt or response is empty, or longer than ``width``.
        """
        scores = self.scorer.score_ids(prompts, responses)
        ends = (
            torch.zeros(len(scores)) if terminal is None else torch.as_tensor(terminal, dtype=torch.float32)
        )
        if ends.shape != (len(scores),):
            raise UserError(
                f"terminal has shape {list(ends.shape)} for {len(scores)} responses. Give one number for each.",
                code="wrong-shape",
            )
        rewards = [_clipped(self.scale * score, self.clip) for score in scores]
        return pad_rewards(rewards, _clipped(ends, self.terminal_clip), width=width)

    def __call__(
        self, prompts: Sequence[str | Sequence[Message]], completions: Sequence[Any], **columns: Any
    ) -> list[float]:
        """The sum of each completion's token rewards; the signature is that of a TRL reward function.

        Args:
            prompts: Texts or messages.
            completions: Texts, or lists of one message each.
            columns: Ignored.
        """
        texts = [item if isinstance(item, str) else item[-1]["content"] for item in completions]
        scored = self.scorer.score_all([*zip(prompts, texts, strict=True)])
        scores = (torch.tensor([token.score for token in item.tokens]) for item in scored)
        return [float(_clipped(self.scale * score, self.clip).sum()) for score in scores]


def _clipped(values: Tensor, bound: float | None) -> Tensor:
    return values if bound is None else values.clamp(-bound, bound)


def pad_rewards(rewards: Sequence[Tensor], ends: Tensor, *, width: int | None = None) -> Tensor:
    """Lay out rewards ``[len]`` of responses as rows padded with 0, ``ends [b]`` added at the last token.  -> [b width]"""
    longest = max(map(len, rewards), default=0)
    width = longest if width is None else width
    if longest > width:
        raise UserError(
            f"a response has {longest} tokens, more than the width of {width} columns.", code="wrong-shape"
        )
    padded = torch.zeros(len(rewards), width)
    for row, (values, end) in enumerate(zip(rewards, ends, strict=True)):
        padded[row, : len(values)] = values
        padded[row, len(values) - 1] += end
    return padded
