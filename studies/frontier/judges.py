"""What the judges of the arms know: do they rank held-out pairs, and do they find the words that carry the reward?

    python -m studies.frontier.judges --model FOLDER --seed 0 --page docs/results.md

trains the oracles and the token reward of a seed, unless a run has them, and measures them on its held-out pairs; then it prints
the table of all that is stored. Without ``--model`` only the table is printed.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from studies.frontier.arms import ARMS
from studies.frontier.command import options, worlds
from studies.frontier.runs import Held, judge_of, made_by
from studies.frontier.world import Stories, World
from studies.tables import cell, write
from tokenward import TokenScorer
from tokenward.artifacts import atomic_write
from tokenward.evaluation.credit import KnownResponse, credit_figures, known_response
from tokenward.evaluation.statistics import mean_figure
from tokenward.tokens.spans import spans_of_ids
from tokenward.types import Span

JUDGES = {
    "sepo30": ("oracle of all pairs", "oracle"),
    "sepo30_of_25": ("oracle of 25 % of the pairs", "oracle"),
    "sepo30_of_5": ("oracle of 5 % of the pairs", "oracle"),
    "sepo30_smaller": ("oracle of 2 layers", "oracle"),
    "sepo30_other": ("oracle of the other reward", "oracle"),
    "tlm_sepo": ("TLM's token reward", "reward"),
}
"""Titles and stages of the judges, by an arm that trains them."""

SIDES = ("auroc", "auroc_raising", "auroc_lowering")


def known_words(text: str, value: Callable[[str], float]) -> list[Span]:
    """The words of a text that a reward counts, with what they are worth."""
    found = ((match, value(match.group().lower())) for match in re.finditer(r"[A-Za-z']+", text))
    return [Span(match.start(), match.end(), worth) for match, worth in found if worth]


def measured(world: World, held: Held, scorer: TokenScorer) -> dict[str, Any]:
    """``right``, whether each held-out pair of different rewards is ranked as the reward ranks it, and the AUROC of the token scores.

    A token is positive or negative if it is part of a word that the reward counts so, and the others are neutral.
    """
    pairs, value = held.pairs, world.worth_of_words()
    prompts, replies = pairs.prompts.tolist(), pairs.replies.tolist()
    scores = scorer.score_ids(prompts, replies)
    totals = torch.stack([score.sum() for score in scores]).view(2, -1)
    known = [_known(held.own, ids, score.tolist(), value) for ids, score in zip(replies, scores, strict=True)]
    figures = credit_figures(known)
    return {
        "right": (totals[0] > totals[1])[pairs.differ].int().tolist(),
        **{side: figures[f"credit/{side}/score"].value for side in SIDES},
    }


def _known(
    own: Stories, ids: Sequence[int], scores: Sequence[float], value: Callable[[str], float]
) -> KnownResponse:
    text, tokens = spans_of_ids(own.tokenizer, ids)
    return known_response(text, known_words(text, value), tokens, {"score": scores})


def values_of(world: World, values: Path) -> Path:
    """The file of a seed's judges."""
    return values / world.reward / f"judges-{world.seed}.json"


def measure(world: World, held: Held, names: Sequence[str], file: Path) -> None:
    """Train and measure the judges that a file lacks. What another recipe made is measured again."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in names:
        recipe = made_by(world, ARMS[name], 0.0)
        if found.get(name, {}).get("made_by") == recipe:
            continue
        print(f"{world.reward}, {JUDGES[name][0]}, seed {world.seed}", flush=True)
        scorer = TokenScorer.load(judge_of(world, ARMS[name], JUDGES[name][1]), device="cpu")
        found[name] = {**measured(world, held, scorer), "made_by": recipe}
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(found, indent=1) + "\n")


def lines_of(values: Path, reward: str, seeds: Sequence[int]) -> Iterator[str]:
    """A Markdown table of the judges that were measured with every seed."""
    read = [
        json.loads(values_of(World("", Path(), seed, reward), values).read_text(encoding="utf-8"))
        for seed in seeds
    ]
    yield "| judge | pairs ranked right | AUROC of its token scores | on words that raise the reward | on words that lower it |"
    yield "|---|---|---|---|---|"
    for name, (title, _) in JUDGES.items():
        own = [one[name] for one in read if name in one]
        if len(own) == len(read):
            right = mean_figure(np.concatenate([one["right"] for one in own]))
            yield f"| {title} | {cell(right, 3)} | {' | '.join(_of_seeds([one[side] for one in own]) for side in SIDES)} |"
    count = sum(len(next(iter(one.values()))["right"]) for one in read)
    yield ""
    yield (
        f"Seeds {', '.join(map(str, seeds))}; n = {count} held-out pairs, the best and the worst of four replies. The interval is over pairs; "
        "an AUROC is the mean over seeds, with that of each seed. 0.5 is chance."
    )


def _of_seeds(figures: Sequence[float]) -> str:
    return f"{np.mean(figures):.3f} ({', '.join(f'{one:.3f}' for one in figures)})"


def main() -> None:
    """Measure the missing judges, then print the table."""
    made = options(__doc__)
    made.add_argument("--judge", nargs="+", choices=list(JUDGES), default=list(JUDGES), metavar="NAME")
    chosen = made.parse_args()
    for world in worlds(chosen):
        measure(world, Held(world), chosen.judge, values_of(world, chosen.values))
    lines = list(lines_of(chosen.values, chosen.reward, chosen.seed))
    print("\n".join(lines))
    if chosen.page is not None:
        write(chosen.page, f"{chosen.values.name} {chosen.reward}, judges", lines)


if __name__ == "__main__":
    main()
