"""Human error spans: do token scores find the parts of an answer that people marked as wrong?

    OMP_NUM_THREADS=1 python scripts/qa_feedback_credit.py FOLDER --seeds 0 --output qa_feedback_credit

FOLDER holds FineGrainedRLHF's QA feedback (``*.json``): answers with spans that people marked as wrong, and their
corrected answers. A pair is a corrected answer over the original one. A DPO oracle and a token reward (TLM) learn only
from such pairs, without the spans. The answers are split into folds, and each is scored by models that were trained on
the other folds (cross-fitting). Prompts are the questions, without the passages.

Writes OUTPUT.json and OUTPUT.md. Finished trainings are not repeated, so you can add seeds later.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import tokenward
from tokenward.evaluation.credit import KnownResponse, known_response, repeated_credit_figures
from tokenward.evaluation.statistics import Figure, mean_figure
from tokenward.scoring.texts import ScoredResponse
from tokenward.tokens.spans import ByteSpan
from tokenward.types import Span

RECIPE = """\
tokens: {max_prompt_tokens: 128, max_response_tokens: 320}
data: {eval: 0.0}
oracle:
  objective: {name: dpo, beta: 0.1}
  training: {learning_rate: 2.0e-5, num_train_epochs: 1, per_device_train_batch_size: 4, warmup_steps: 4, bf16: true}
reward:
  training: {learning_rate: 5.0e-5, num_train_epochs: 1, per_device_train_batch_size: 4, bf16: true}
scores: {scorer: {name: reward}}
"""
"""Learning rates as in recipes/reviews.yaml and recipes/reward_sepo.yaml; half the batch size, for the smaller data."""

SCORERS = {
    "log_ratio": "DPO oracle, low",
    "reward": "TLM token reward, low",
    "surprisal": "surprisal of the start, high",
    "position": "position, late",
    "random": "random numbers",
}
"""The end of each scorer that points at an error; fixed before anything was measured."""

KINDS = {
    "all": (),
    "irrelevant or redundant": ("Irrelevant", "Redundant"),
    "false or unsupported": ("Wrong-Grounding", "Unverifiable"),
}
"""Kinds of errors to find. Tokens in other errors are excluded."""

AT = (5,)


class Answer(NamedTuple):
    """An answer with the spans that people marked as wrong, and their correction of it."""

    question: str
    text: str
    corrected: str
    errors: list[tuple[int, int, str]]

    @property
    def is_pair(self) -> bool:
        """Whether the correction differs from the answer."""
        return bool(self.corrected) and self.corrected != self.text


class Scored(NamedTuple):
    """An answer with its tokens, a score per token and scorer (high is good), and whether each scorer orders its pair."""

    answer: Answer
    tokens: list[ByteSpan]
    scores: dict[str, list[float]]
    wins: dict[str, float]


def read_answers(folder: Path) -> list[Answer]:
    """Read all answers of a folder's JSON files."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise tokenward.UserError(f"{folder} holds no .json file. Name the folder of the QA feedback data.")
    return [answer_of(row) for file in files for row in json.loads(file.read_text(encoding="utf-8"))]


def answer_of(row: Mapping[str, Any]) -> Answer:
    """An answer from a row of the published data."""
    feedback = row["feedback"]
    errors = [(error["start"], error["end"], error["error type"]) for error in feedback["errors"]]
    return Answer(
        row["question"], row["prediction 1"], feedback["corrected-prediction"].strip(), sorted(errors)
    )


def folds_of(count: int, folds: int, seed: int) -> np.ndarray:
    """The fold of each answer. Fold sizes differ by at most one."""
    return np.random.default_rng(seed).permutation(count) % folds


def score_fold(
    answers: Sequence[Answer], train: Sequence[Answer], folder: Path, seed: int, overrides: Sequence[str]
) -> list[Scored]:
    """Train an oracle and a reward on the pairs of some answers, and score other answers with them."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [
        {"prompt": one.question, "chosen": one.corrected, "rejected": one.text}
        for one in train
        if one.is_pair
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "recipe.yaml").write_text(RECIPE)
    changes = [
        f"run={folder / 'run'}",
        f"data.source={folder / 'pairs.jsonl'}",
        f"seed={seed}",
        *overrides,
    ]
    run = tokenward.run(folder / "recipe.yaml", changes, last="oracle")
    tokenward.run(folder / "recipe.yaml", changes, last="reward")
    found = {name: scored_pairs(answers, run.path(name)) for name in ("oracle", "reward")}
    rng = np.random.default_rng([seed, 1])
    return [
        scored(answer, *parts, rng)
        for answer, *parts in zip(answers, found["oracle"], found["reward"], strict=True)
    ]


def scored_pairs(answers: Sequence[Answer], model: Path) -> list[list[ScoredResponse]]:
    """Each answer, and its correction if it differs, scored by a run's oracle or reward."""
    texts = [
        [(one.question, text) for text in ((one.text, one.corrected) if one.is_pair else (one.text,))]
        for one in answers
    ]
    flat = iter(
        tokenward.TokenScorer.load(model).score_all(
            [text for pair in texts for text in pair], tokens_per_batch=4096
        )
    )
    return [[next(flat) for _ in pair] for pair in texts]


def scored(
    answer: Answer, oracle: list[ScoredResponse], reward: list[ScoredResponse], rng: np.random.Generator
) -> Scored:
    """The scores of all scorers, with high meaning good."""
    tokens = oracle[0].tokens
    scores = {
        "log_ratio": [token.score for token in tokens],
        "reward": [token.score for token in reward[0].tokens],
        "surprisal": [token.values["reference_logp"] for token in tokens],
        "position": [-float(index) for index in range(len(tokens))],
        "random": rng.random(len(tokens)).tolist(),
    }
    wins = {}
    if answer.is_pair:
        # As in training: a DPO reward is a sum over tokens, this token reward a mean.
        wins["log_ratio"] = float(oracle[1].total > oracle[0].total)
        means = [response.total / len(response.tokens) for response in reward]
        wins["reward"] = float(means[1] > means[0])
        lengths = [len(response.tokens) for response in oracle]
        wins["shorter"] = float(lengths[1] < lengths[0])
    return Scored(answer, [ByteSpan(token.start, token.end) for token in tokens], scores, wins)


def of_kind(one: Scored, kinds: Sequence[str]) -> KnownResponse:
    """An answer's tokens, with value -1 in errors of these kinds. Tokens only in other errors are excluded."""
    wanted = [Span(start, end, -1.0) for start, end, kind in one.answer.errors if not kinds or kind in kinds]
    every = [Span(start, end, -1.0) for start, end, _ in one.answer.errors]
    known = known_response(one.answer.text, wanted, one.tokens, one.scores)
    marked = known_response(one.answer.text, every, one.tokens, {}).values
    keep = [
        index
        for index, (mine, other) in enumerate(zip(known.values, marked, strict=True))
        if mine or not other
    ]
    return KnownResponse(
        [known.values[index] for index in keep],
        {name: [values[index] for index in keep] for name, values in known.scores.items()},
    )


def figures_of(repeats: Sequence[Sequence[Scored]], resamples: int) -> dict[str, dict[str, Figure]]:
    """For each kind of error, how well the low end of each scorer finds it."""
    found = {}
    for kind, types in KINDS.items():
        known = [[of_kind(one, types) for one in answers] for answers in repeats]
        figures = repeated_credit_figures(known, at=AT, resamples=resamples)
        found[kind] = {name: figure for name, figure in figures.items() if "_lowering/" in name}
        shares = [float(np.mean(np.asarray(one.values) < 0)) for one in known[0] if any(one.values)]
        found[kind]["share of tokens in an error, answers with one"] = mean_figure(shares)
    for name in WINS:
        by_answer = [[one.wins[name] for one in same if one.wins] for same in zip(*repeats, strict=True)]
        found["all"][f"pairs/{name}"] = mean_figure([np.mean(values) for values in by_answer if values])
    return found


WINS = ("log_ratio", "reward", "shorter")


def shown(figure: Figure) -> str:
    """A figure with its interval."""
    return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def table(figures: Mapping[str, Mapping[str, Figure]]) -> list[str]:
    """Markdown tables, one per kind of error, with a row per scorer."""
    columns = ("auroc", "average_precision", "precision", *(f"precision_at_{k}" for k in AT))
    heads = ("AUROC", "average precision", "precision at k = errors", *(f"precision at {k}" for k in AT))
    lines = []
    for kind, found in figures.items():
        share = found["share of tokens in an error, answers with one"]
        n = found["credit/auroc_lowering/random"].n
        lines += [
            f"Errors: {kind}. n = {n} answers, {share.n} with such an error; in these answers, {share.value:.3f} of the tokens are in one.",
            "",
            f"| scorer, and the end that points at an error | {' | '.join(heads)} |",
            "|---|" + "---|" * len(heads),
        ]
        for name, label in SCORERS.items():
            cells = [shown(found[f"credit/{column}_lowering/{name}"]) for column in columns]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    pairs = figures["all"]
    lines.append(
        "Share of eval pairs with the correction first: "
        + ", ".join(f"{name} {shown(pairs[f'pairs/{name}'])}" for name in WINS)
        + f" (n = {pairs['pairs/shorter'].n})."
    )
    return lines


def main() -> None:
    """Train, score, and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--limit", type=int, help="use only the first answers")
    parser.add_argument("--runs", type=Path, default=Path("runs/qa_feedback"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("runs/qa_feedback/credit"))
    arguments = parser.parse_args()
    answers = read_answers(arguments.folder)[: arguments.limit]
    repeats = []
    for seed in arguments.seeds:
        fold = folds_of(len(answers), arguments.folds, seed)
        done: dict[int, Scored] = {}
        for number in range(arguments.folds):
            eval_rows = np.flatnonzero(fold == number).tolist()
            rest = [answers[index] for index in np.flatnonzero(fold != number).tolist()]
            folder = arguments.runs / f"seed-{seed}" / f"fold-{number}"
            own = score_fold([answers[index] for index in eval_rows], rest, folder, seed, arguments.overrides)
            done |= dict(zip(eval_rows, own, strict=True))
        repeats.append([done[index] for index in range(len(answers))])
    figures = figures_of(repeats, arguments.resamples)
    text = "\n".join(table(figures)) + "\n"
    record = {
        "answers": len(answers),
        "pairs": sum(answer.is_pair for answer in answers),
        "seeds": arguments.seeds,
        "folds": arguments.folds,
        "overrides": arguments.overrides,
        "figures": {
            kind: {name: figure._asdict() for name, figure in found.items()}
            for kind, found in figures.items()
        },
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    arguments.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
