"""What a judge allows: the most reward that a policy could have at a distance from the start, if it followed the judge exactly.

Among all policies at the same KL to the start, the one with the highest mean score is the start's distribution times ``exp(b score)``,
normalised for each prompt (the optimum of reward minus a KL penalty, which DPO and REINFORCE share). It is computed here by
weighting replies of the start, without any training: first with the reward itself as the score, then with the sums of what a judge
gives the tokens. What a training gets less than that is lost in training; what the judge's optimum has less than the reward's is
lost by the judge.

    python -m studies.frontier.reachable --model FOLDER --seed 0 1 2 --page docs/results.md
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from studies.frontier.arms import ARMS
from studies.frontier.command import options, worlds
from studies.frontier.curves import Measured, figure
from studies.frontier.judges import JUDGES
from studies.frontier.measure import sampled
from studies.frontier.runs import judge_of, made_by
from studies.frontier.world import World
from studies.tables import cell, write
from tokenward import TokenScorer
from tokenward.artifacts import atomic_write
from tokenward.evaluation.statistics import mean_figure

AT, REPLIES = 2.0, 128
"""The distance, nats a reply, and the replies of the start to each prompt: the largest KL that they can show is the log of their number."""

FOLLOWED = {"sepo30": "rl_oracle", "tlm_sepo": "rl_reward"}
"""Judges by an arm that trains them, and the method whose reward they are."""

ITSELF = "reward"


def best_at(scores: np.ndarray, rewards: np.ndarray, kl: float) -> np.ndarray:
    """Mean reward of each prompt under ``exp(b score)``, with the b that gives a mean KL.  [n, k], [n, k] -> [n]"""
    scores = scores - scores.max(1, keepdims=True)
    low, high = 0.0, 1.0e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _divergence(_weights(middle * scores)) < kl else (low, middle)
    return (_weights(low * scores) * rewards).sum(1)


def _weights(logits: np.ndarray) -> np.ndarray:
    found = np.exp(logits)
    return found / found.sum(1, keepdims=True)


def _divergence(weights: np.ndarray) -> float:
    """Mean KL of weights over replies to the same weight for all, nats."""
    ratio = np.maximum(weights * weights.shape[1], np.finfo(float).tiny)
    return float((weights * np.log(ratio)).sum(1).mean())


def values_of(world: World, values: Path) -> Path:
    """The file of a seed."""
    return values / world.reward / f"reachable-{world.seed}.json"


def measure(world: World, file: Path) -> None:
    """Sample, score and store what a seed's file lacks. What another recipe made is measured again."""
    recipes = {name: made_by(world, ARMS[name], 0.0) for name in FOLLOWED}
    if file.exists() and json.loads(file.read_text(encoding="utf-8"))["made_by"] == recipes:
        return
    own, size = world.stories, world.size
    asked = torch.tensor(world.held["prompts"][: size.limited]).repeat_interleave(REPLIES, 0)
    made = sampled(own.model, asked, size.reply, own.banned, seed=(world.seed, 5)).ids
    prompts, replies = asked.tolist(), made.tolist()
    texts = (own.reply(prompt, ids) for prompt, ids in zip(prompts, replies, strict=True))
    rewards = np.array([world.rewarded(text) for text in texts]).reshape(-1, REPLIES)
    found = {ITSELF: best_at(rewards, rewards, AT)}
    for name in FOLLOWED:
        print(f"{world.reward}, {JUDGES[name][0]}, seed {world.seed}", flush=True)
        scorer = TokenScorer.load(judge_of(world, ARMS[name], JUDGES[name][1]), device="cpu")
        sums = [float(score.sum()) for score in scorer.score_ids(prompts, replies)]
        found[name] = best_at(np.array(sums).reshape(-1, REPLIES), rewards, AT)
    lists = {name: np.round(value, 4).tolist() for name, value in found.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps({**lists, "made_by": recipes}) + "\n")


def lines_of(values: Path, reward: str, seeds: Sequence[int]) -> Iterator[str]:
    """A Markdown table of what the judges allow, and what the methods that follow them have."""
    files = [values_of(World("", Path(), seed, reward), values) for seed in seeds]
    read = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    measured = Measured(values, reward, seeds)
    yield f"| judge | its optimum at {AT:g} nats | REINFORCE by it |"
    yield "|---|---|---|"
    for name in (ITSELF, *FOLLOWED):
        own = np.concatenate([one[name] for one in read])
        title = "the reward itself" if name == ITSELF else JUDGES[name][0]
        trained = measured.rewards(FOLLOWED[name], AT) if name in FOLLOWED else None
        reached = "–" if trained is None else cell(figure(trained, measured.prompts), 3)
        yield f"| {title} | {cell(mean_figure(own), 3)} | {reached} |"
    yield ""
    yield (
        f"Seeds {', '.join(map(str, seeds))}; n = {sum(len(one[ITSELF]) for one in read)} prompts with {REPLIES} replies of the start each for an optimum, whose interval is over "
        "prompts."
    )


def main() -> None:
    """Measure the missing seeds, then print the table."""
    chosen = options(__doc__).parse_args()
    for world in worlds(chosen):
        measure(world, values_of(world, chosen.values))
    lines = list(lines_of(chosen.values, chosen.reward, chosen.seed))
    print("\n".join(lines))
    if chosen.page is not None:
        write(chosen.page, f"{chosen.values.name} {chosen.reward}, reachable", lines)


if __name__ == "__main__":
    main()
