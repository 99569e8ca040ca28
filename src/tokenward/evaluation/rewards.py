"""One number per reply from a reward model: a sequence classifier, or a token reward or an oracle of a run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenward.artifacts import MANIFEST
from tokenward.errors import UserError
from tokenward.models.loading import load_tokenizer
from tokenward.models.places import config_of, resolve
from tokenward.models.reward import is_reward_folder
from tokenward.sampling.sources import SequenceClassifier, call_source
from tokenward.scoring.texts import TokenScorer
from tokenward.types import Example

NO_REPLY = -math.inf
"""Reward of a reply without text. It has no tokens to score, and every other reply wins against it."""

_STAGES = ("eval_reward", "oracle", "reward", "online/reward")


class ReplyRewardModel(NamedTuple):
    """A reward model by its name.

    Attributes:
        name: Folder or hub name.
        scores_tokens: Whether it is a stage's folder with a score per token; otherwise it is a sequence classifier.
    """

    name: str
    scores_tokens: bool


def find_reward_model(name: str) -> ReplyRewardModel:
    """Find out which kind of reward model a name means, without loading its weights.

    Raises:
        UserError: a whole run, a classifier with several labels, or no model at all.
    """
    folder = Path(name).expanduser()
    if (folder / MANIFEST).is_file() or is_reward_folder(folder):
        return ReplyRewardModel(name, scores_tokens=True)
    inside = [stage for stage in _STAGES if (folder / stage).is_dir()]
    if inside and not (folder / "config.json").is_file():
        named = " or ".join(str(folder / stage) for stage in inside)
        raise UserError(f"{name} is a run, which may hold several rewards. Name one of them: {named}.")
    labels = config_of(resolve(name), trust_remote_code=False).num_labels
    if labels != 1:
        raise UserError(
            f"{name} has {labels} labels, and a reward model has one. Name another, or make it a metric: a function of your "
            'own that gives one number per reply, --metric "module:name".'
        )
    return ReplyRewardModel(name, scores_tokens=False)


def rewards(model: ReplyRewardModel, examples: Sequence[Example], replies: Sequence[str]) -> list[float]:
    """The reward of each reply.

    A model that scores tokens gives the mean over the reply's tokens, since a sum would grow with the length, and -inf for a
    reply without text. A sequence classifier reads the prompt's last message and the reply, as a conversation if its
    tokenizer has a chat template.

    Raises:
        UserError: the model cannot be loaded, or a reply does not fit in its context.
    """
    if not model.scores_tokens:
        chat = bool(load_tokenizer(model.name).chat_template)
        source = SequenceClassifier(
            model=model.name, pair="prompt_completion", template_chat=chat, max_tokens=4096
        )
        prompts = [example.prompt[-1]["content"] for example in examples]
        where = [example.source for example in examples]
        return call_source(
            model.name, source, prompts, replies, [()] * len(replies), {}, where, kind="reward model"
        )
    filled = [place for place, reply in enumerate(replies) if reply.strip()]
    scorer = TokenScorer.load(model.name)
    scored = scorer.score_all([(examples[place].prompt, replies[place]) for place in filled])
    found = [NO_REPLY] * len(replies)
    for place, item in zip(filled, scored, strict=True):
        found[place] = item.total / len(item.tokens)
    return found
