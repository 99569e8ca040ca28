"""Token rewards for reinforcement learning elsewhere: RTO's, as verl and TRL take them (arXiv 2404.18922)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.scoring.texts import TokenScorer
from tokenward.types import Message


class TokenRewards:
    """Scores of a trained oracle, or of a reward, as rewards: scaled, then clipped, with a reward at the end.

    ``r_t = clip(scale * s_t, -clip, clip)``, and at a response's last token ``+ clip(terminal, -terminal_clip,
    terminal_clip)``. RTO's code clips after it scales, so 0.05 and 0.05 cut log-ratios off at one nat.

    Args:
        scorer: Gives the scores.
        scale: Greater than 0.
        clip: Largest absolute reward of a token; None is no bound.
        terminal_clip: Of the reward at the end, which RTO's code bounds by 10; None is no bound.
    """

    def __init__(
        self,
        scorer: TokenScorer,
        *,
        scale: float = 0.05,
        clip: float | None = 0.05,
        terminal_clip: float | None = 10.0,
    ) -> None:
        if not scale > 0 or not all(bound is None or bound > 0 for bound in (clip, terminal_clip)):
            raise UserError(
                f"scale, clip and terminal_clip must be greater than 0, got {scale}, {clip} and {terminal_clip}. RTO has 0.05, 0.05 "
                "and 10; a bound of None is none."
            )
        self.scorer, self.scale, self.clip, self.terminal_clip = scorer, scale, clip, terminal_clip
        self.__name__ = "tokenward_rewards"  # under which TRL logs it

    @classmethod
    def load(cls, folder: str | Path, *, reference: str | None = None, **settings: Any) -> "TokenRewards":
        """Rewards by a run's oracle or reward, or by any model folder; see :meth:`TokenScorer.load`.

        Args:
            folder: Such as ``runs/NAME/oracle``.
            reference: Where the folder does not name it.
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
        """Rewards of sampled tokens, laid out as verl's ``token_level_rewards``.  -> [b width] float32

        As verl's responses they begin at the left: column t belongs to a response's token t, and what lies behind its end
        is 0.

        Args:
            prompts: Ids of each prompt, without padding.
            responses: Ids of each response, without padding, its end-of-turn token included.
            terminal: A reward of each whole response, added to its last token.
            width: Columns, verl's response length; None is the longest response.

        Raises:
            UserError: an empty prompt or response, or one longer than the width.
        """
        scores = self.scorer.score_ids(prompts, responses)
        return padded(
            [self._scaled(score) for score in scores], self._ends(terminal, len(scores)), width=width
        )

    def __call__(
        self, prompts: Sequence[str | Sequence[Message]], completions: Sequence[Any], **columns: Any
    ) -> list[float]:
        """The sum of each completion's token rewards, as a reward function of TRL gives it.

        Args:
            prompts: Texts or messages.
            completions: Texts, or lists of one message each.
            columns: Not looked at.
        """
        texts = [item if isinstance(item, str) else item[-1]["content"] for item in completions]
        scored = self.scorer.score_all([*zip(prompts, texts, strict=True)])
        return [
            float(self._scaled(torch.tensor([token.score for token in item.tokens])).sum()) for item in scored
        ]

    def _scaled(self, scores: Tensor) -> Tensor:
        return _bounded(self.scale * scores, self.clip)

    def _ends(self, terminal: Sequence[float] | None, count: int) -> Tensor:
        ends = torch.zeros(count) if terminal is None else torch.as_tensor(terminal, dtype=torch.float32)
        if ends.shape != (count,):
            raise UserError(
                f"terminal has the shape {list(ends.shape)} for {count} responses. Give one number for each."
            )
        return _bounded(ends, self.terminal_clip)


def _bounded(values: Tensor, bound: float | None) -> Tensor:
    return values if bound is None else values.clamp(-bound, bound)


def padded(rewards: Sequence[Tensor], ends: Tensor, *, width: int | None = None) -> Tensor:
    """Rewards of each response from the left, 0 behind its end, with a further one at its last token.  -> [b width]

    Args:
        rewards: ``[len]`` each.
        ends: ``[b]``, added at the last token.
        width: Columns; None is the longest response.

    Raises:
        UserError: a response is longer than the width.
    """
    longest = max(map(len, rewards), default=0)
    width = longest if width is None else width
    if longest > width:
        raise UserError(
            f"a response has {longest} tokens and the array {width} columns. Give the width of the responses."
        )
    made = torch.zeros(len(rewards), width)
    for row, (values, end) in enumerate(zip(rewards, ends, strict=True)):
        made[row, : len(values)] = values
        made[row, len(values) - 1] += end
    return made
