"""The world of the study: a small model's own stories, ranked by programmes that know what each word is worth.

Prompts and replies are sampled from the model, so that every method starts from the distribution that its data came from. A reply
is 48 tokens long and never ends before, so that no method can gain by length. Two rewards are known in closed form: the sentiment
of VADER, which few words carry, and a worth of every word, which all of them carry. With a file of conversations, prompts are
their last tokens, and a further reward is what the people who compared their replies taught (:mod:`studies.frontier.people`).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from studies.frontier import people
from studies.frontier.measure import sampled
from tokenward.artifacts import atomic_write
from tokenward.models.identity import model_fingerprint

REPLIES, SPARE = 4, 4
"""Replies that are ranked for each prompt, and the tokens that a training row has beyond a reply: they are cut off, so that no end of
a reply is trained."""


class Size(NamedTuple):
    """How much is sampled, trained and measured.

    Attributes:
        prompt: Sampled tokens of a prompt.
        reply: Tokens of a reply.
        train: Training prompts.
        held: Held-out prompts.
        pairs: How many of the held-out prompts give a pair, the best and the worst of their replies.
        limited: How many of them are sampled often, for best-of-N sampling.
        best_of: The largest N, a power of two.
        points: Measured points of a training.
        updates: Updates of an online training.
        asked: Prompts of such an update, with :data:`ROLLOUTS` replies each.
        slower: By what the learning rates of judges are divided.
    """

    prompt: int = 12
    reply: int = 48
    train: int = 1450
    held: int = 512
    pairs: int = 256
    limited: int = 256
    best_of: int = 512
    points: int = 8
    updates: int = 128
    asked: int = 64
    slower: float = 1.0


ROLLOUTS = 4
"""Replies of an online training to each prompt of an update."""

SIZES = {
    "whole": Size(),
    "small": Size(
        prompt=8,
        reply=16,
        train=192,
        held=256,
        pairs=24,
        limited=64,
        best_of=32,
        points=2,
        updates=20,
        asked=16,
        slower=5.0,
    ),
}
SIZES["conversations"] = SIZES["small"]._replace(prompt=32)
"""Sizes by name: ``small`` is for models that are hundreds of times as large, ``conversations`` has longer prompts."""


@cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def words_of(text: str) -> list[str]:
    """Words of a text, in lower case."""
    return re.findall(r"[a-z']+", text.lower())


@cache
def worth(word: str) -> int:
    """What a word is worth to the dense reward: -1, 0 or 1, by a hash of its letters."""
    return hashlib.sha256(word.encode()).digest()[0] % 3 - 1


def vader(text: str) -> float:
    """Compound sentiment of a text, -1 to 1."""
    return float(_vader().polarity_scores(text)["compound"])


def dense(text: str) -> float:
    """Mean worth of the words of a text, -1 to 1; every word counts."""
    found = [worth(word) for word in words_of(text)]
    return float(np.mean(found)) if found else 0.0


REWARDS: dict[str, Callable[[str], float]] = {"vader": vader, "dense": dense}
PEOPLE = "people"
"""Name of the reward that a file of conversations teaches."""


class World(NamedTuple):
    """The data of a seed.

    Attributes:
        model: Folder of the model that every policy starts from.
        folder: Where the data are.
        seed: Of the samples, and of every training.
        reward: Name of the reward that ranks the replies.
        size: How much is sampled, trained and measured.
        opening: How every prompt begins; empty is the first token of a text.
        conversations: A file of compared replies in Anthropic's HH format, whose prompts are asked in place of sampled ones.
    """

    model: str
    folder: Path
    seed: int
    reward: str
    size: Size = SIZES["whole"]
    opening: str = ""
    conversations: Path | None = None

    @property
    def stories(self) -> "Stories":
        """The start of this world's policies."""
        return Stories(self.model, self.seed, self.size, self.opening, self.conversations)

    @property
    def rewards(self) -> dict[str, Callable[[str], float]]:
        """The rewards of a text that this world has."""
        return (
            REWARDS if self.conversations is None else {**REWARDS, PEOPLE: people.reward(self.conversations)}
        )

    def rewarded(self, text: str) -> float:
        """The reward that ranks the replies."""
        return self.rewards[self.reward](text)

    def worth_of_words(self) -> Callable[[str], float]:
        """What a word is worth to the reward; 0 if it does not count."""
        if self.reward == "dense":
            return worth
        if self.reward == PEOPLE and self.conversations is not None:
            known = people.worths(self.conversations)
        else:
            known = _vader().lexicon
        return lambda word: float(known.get(word, 0.0))

    @property
    def rows(self) -> Path:
        """The training rows: a prompt and its replies, with their rewards."""
        return self.folder / f"{self.reward}.jsonl"

    @property
    def other(self) -> "World":
        """The same samples, ranked by the other reward."""
        return self._replace(reward=next(name for name in REWARDS if name != self.reward))

    @property
    def about(self) -> dict[str, Any]:
        """What the samples depend on."""
        size, told = self.size, self.conversations
        return {
            "model": model_fingerprint(self.model),
            "seed": self.seed,
            "sizes": [size.prompt, size.reply, size.train, size.held],
            "opening": self.opening,
            "conversations": "" if told is None else people.digest(told),
        }

    @property
    def prompts(self) -> list[list[int]]:
        """The training prompts, as token ids."""
        return json.loads((self.folder / "samples.json").read_text(encoding="utf-8"))["prompts"]

    @property
    def held(self) -> dict[str, Any]:
        """Held-out prompts and four replies to each, as token ids."""
        return json.loads((self.folder / "held.json").read_text(encoding="utf-8"))

    def make(self) -> None:
        """Sample prompts and replies, unless that has been done, and rank the replies."""
        own, train = self.stories, self.size.train
        samples, about = self.folder / "samples.json", self.folder / "world.json"
        known = json.loads(about.read_text(encoding="utf-8")) if about.exists() else None
        if known != self.about and (known or samples.exists()):
            raise SystemExit(
                f"{self.folder} has the samples of another world. Give these a folder of their own: --runs."
            )
        if not samples.exists():
            found = own.rows(train + self.size.held)
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(about, json.dumps(self.about))
            held = {name: rows[train:] for name, rows in found.items()}
            atomic_write(self.folder / "held.json", json.dumps(held))
            atomic_write(samples, json.dumps({name: rows[:train] for name, rows in found.items()}))
        if not self.rows.exists():
            found = json.loads(samples.read_text(encoding="utf-8"))
            lines = [
                json.dumps({
                    "prompt": own.text(prompt),
                    "responses": [own.reply(prompt, ids) for ids in replies],
                    "scores": [self.rewarded(own.reply(prompt, ids[: self.size.reply])) for ids in replies],
                })
                for prompt, replies in zip(found["prompts"], found["replies"], strict=True)
            ]  # fmt: skip
            atomic_write(self.rows, "\n".join(lines) + "\n")


class Stories:
    """Prompts and replies of a model."""

    def __init__(
        self,
        model: str,
        seed: int,
        size: Size = SIZES["whole"],
        opening: str = "",
        conversations: Path | None = None,
    ) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self._seed, self._size, self._opening, self._conversations = seed, size, opening, conversations

    @cached_property
    def banned(self) -> list[int]:
        """Special tokens, which are never sampled."""
        return sorted(self.tokenizer.all_special_ids)

    def text(self, ids: Sequence[int]) -> str:
        """The text of a prompt."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def reply(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text of a reply, with the space before its first word."""
        return self.text([*prompt, *ids])[len(self.text(prompt)) :]

    def _written(self, ids: Sequence[int]) -> bool:
        """Whether the tokenizer reads the text of some ids as these ids."""
        return self.tokenizer(self.text(ids))["input_ids"] == list(ids)

    @cached_property
    def _first(self) -> list[int]:
        """What the tokenizer writes before every text."""
        return list(self.tokenizer("")["input_ids"])

    def rows(self, count: int) -> dict[str, list[Any]]:
        """Different prompts, and replies to each, all of which the tokenizer reads as they were sampled.

        Returns:
            ``prompts``, each with the opening, and ``replies``, :data:`REPLIES` for each.

        Raises:
            SystemExit: The model cannot begin without an opening, or gave too few prompts.
        """
        known, size = set[tuple[int, ...]](), self._size
        prompts, replies = list[list[int]](), list[list[list[int]]]()
        for draw, drawn in enumerate(self._drawn(min(512, count // 3))):
            fresh = [
                list(ids)
                for ids in dict.fromkeys(map(tuple, drawn))
                if ids not in known and self._written(ids)
            ]
            if not fresh:
                continue
            known |= set(map(tuple, fresh))
            repeated = torch.tensor(fresh).repeat_interleave(REPLIES + 3, 0)
            made = sampled(
                self.model, repeated, size.reply + SPARE, self.banned, seed=(self._seed, draw, 1)
            ).ids.view(len(fresh), REPLIES + 3, -1)
            for prompt, own in zip(fresh, made.tolist(), strict=True):
                good = [ids for ids in own if self._written([*prompt, *ids])][:REPLIES]
                if len(good) == REPLIES:
                    prompts.append(prompt)
                    replies.append(good)
            if len(prompts) >= count:
                return {"prompts": prompts[:count], "replies": replies[:count]}
        raise SystemExit(
            f"{self.model.name_or_path} gave {len(prompts)} of {count} prompts with {REPLIES} replies."
        )

    def _drawn(self, count: int) -> Iterator[list[list[int]]]:
        """Prompts, up to so many at a time: the last tokens of conversations, or the opening and sampled tokens."""
        size, start = self._size, self.tokenizer(self._opening)["input_ids"]
        if self._conversations is not None:
            texts = list(dict.fromkeys(pair.prompt for pair in people.comparisons(self._conversations)))
            np.random.default_rng([self._seed, 0, 0]).shuffle(texts)
            whole = [ids for text in texts if len(ids := self.tokenizer(text)["input_ids"]) >= size.prompt]
            for first in range(0, len(whole), count):
                yield [[*self._first, *ids[-size.prompt :]] for ids in whole[first : first + count]]
            return
        if not start:
            raise SystemExit(
                f"the tokenizer of {self.model.name_or_path} begins a text with no token. Give --opening TEXT."
            )
        for draw in range(64):
            firsts = sampled(
                self.model,
                torch.tensor([start] * count),
                size.prompt,
                self.banned,
                seed=(self._seed, draw, 0),
            ).ids
            yield [[*start, *ids] for ids in firsts.tolist()]


def best_of(world: World, file: Path) -> dict[str, list[float]]:
    """Expected reward of the best of N samples of the start, for the first held-out prompts; measured once, for all rewards.

    Returns:
        For each N, a power of two, its values over prompts, from ``size.best_of`` samples of each without bias.
    """
    if not file.exists():
        own, size = world.stories, world.size
        prompts, texts = torch.tensor(world.held["prompts"][: size.limited]), list[list[str]]()
        for draw in range(0, size.best_of, 2):
            both = prompts.repeat(2, 1)  # as many as are fast
            ids = sampled(own.model, both, size.reply, own.banned, seed=(world.seed, draw, 2)).ids.tolist()
            replies = [own.reply(*one) for one in zip(both.tolist(), ids, strict=True)]
            texts += [replies[: size.limited], replies[size.limited :]]
        found = dict[str, dict[str, list[float]]]()
        for name, reward in world.rewards.items():
            rewards = np.sort([[reward(text) for text in row] for row in zip(*texts, strict=True)])
            numbers = [2**power for power in range(size.best_of.bit_length())]
            found[name] = {
                str(n): (rewards @ order_weights(size.best_of, n)).round(4).tolist() for n in numbers
            }
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(found))
    known = json.loads(file.read_text(encoding="utf-8"))
    if world.reward not in known:
        raise SystemExit(
            f"{file} was made without the reward {world.reward}. Give these values a folder of their own: --values."
        )
    return known[world.reward]


def order_weights(count: int, best: int) -> np.ndarray:
    """Weights of ``count`` sorted samples whose sum is the expected largest of ``best`` of them, drawn without replacement.

    The sample at place i (from 1) is the largest with probability C(i - 1, best - 1) / C(count, best).
    """
    chance = np.zeros(count)
    chance[-1] = best / count
    for place in range(
        count - 1, best - 1, -1
    ):  # C(i - 2, best - 1) / C(i - 1, best - 1) = (i - best) / (i - 1)
        chance[place - 1] = chance[place] * (place + 1 - best) / place
    return chance


def best_of_kl(best: int) -> float:
    """Largest KL of best-of-N sampling to the start, in nats (arXiv 2401.01879): log N - (N - 1) / N."""
    return float(np.log(best) - (best - 1) / best)
