"""Scores of one prompt's replies to ranks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tokenward.data.parsers import dense
from tokenward.sampling.sampler import Reply

ONE = "dropped: one response"
TIED = "dropped: all responses tied"


class Group(NamedTuple):
    """The K replies to one prompt, in the order in which they were drawn.

    Attributes:
        ids: Their token ids.
        texts: Their texts.
        ended: Whether the model ended each, or the token limit did.
        scores: What the preference source gave each; higher is better.
    """

    ids: list[list[int]]
    texts: list[str]
    ended: list[bool]
    scores: list[float]


class RankedGroup(NamedTuple):
    """A group that can teach an order.

    Attributes:
        row: Of its prompt.
        group: Its replies.
        ranks: One per reply, dense; 0 is the best, equal scores are a tie.
    """

    row: int
    group: Group
    ranks: tuple[int, ...]


class RankedGroups(NamedTuple):
    """What was kept, and how many groups were dropped.

    Attributes:
        rows: The groups with at least two ranks, in their prompts' order.
        counts: Groups dropped by reason, which are named ``dropped: one response`` and
            ``dropped: all responses tied``; reasons that did not occur are left out.
    """

    rows: list[RankedGroup]
    counts: dict[str, int]


def ranked(prompt_rows: Sequence[int], replies: Sequence[Reply], scores: Sequence[float]) -> RankedGroups:
    """Replies and their scores, as a source was given them, to ranked groups.

    Replies that say the same are kept: they have the same score, so they are a tie.

    Args:
        prompt_rows: Row of each reply's prompt; equal rows are one group, which need not stand together.
        replies: The replies.
        scores: One finite number per reply; higher is better.
    """
    groups: dict[int, Group] = {}
    for row, reply, score in zip(prompt_rows, replies, scores, strict=True):
        group = groups.setdefault(row, Group([], [], [], []))
        group.ids.append(reply.ids)
        group.texts.append(reply.text)
        group.ended.append(reply.ended)
        group.scores.append(score)
    return rank_groups(groups)


def rank_groups(groups: Mapping[int, Group]) -> RankedGroups:
    """Ranks of groups by their scores; a group that shows no order is dropped and counted.

    Args:
        groups: By the row of their prompt.
    """
    rows: list[RankedGroup] = []
    counts: Counter[str] = Counter()
    for row, group in groups.items():
        ranks = dense([-score for score in group.scores])
        if len(ranks) < 2:
            counts[ONE] += 1
        elif max(ranks) == 0:
            counts[TIED] += 1
        else:
            rows.append(RankedGroup(row, group, ranks))
    return RankedGroups(rows, dict(counts))
