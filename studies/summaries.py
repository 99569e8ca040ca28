"""Compare reward-weighted likelihood of summaries with two controls, with paired bootstrap intervals.

``token`` is recipes/summaries.yaml, with weights from a learned token reward. ``plain`` is likelihood with the same
normalisation per sequence and no reward. In ``sequence``, every token of a summary has the summary's mean reward. The
updates, their order and the decoding are the same.

    python -m studies.summaries --seeds 0 --output docs/results_summaries.md
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import tokenward
from tokenward.artifacts import read_jsonl
from tokenward.evaluation.statistics import Figure, mean_figure

ARMS = {
    "token": [],
    "plain": ["online.selection={name: all}"],
    "sequence": [
        "online.selection={name: soft, transform: identity, spread: sequence}",
        "online.objective={name: weighted_likelihood, normaliser: length}",
    ],
}
METRICS = ("rouge1", "rouge2", "rougeL", "length")


def values_of(samples: Path, side: int) -> dict[str, dict[str, float]]:
    """For each metric, the value of each test example. Side 0 is before training, 1 after."""
    rows = read_jsonl(samples)
    return {metric: {row["key"]: row["values"][metric][side] for row in rows} for metric in METRICS}


def pooled(values: Sequence[dict[str, float]]) -> np.ndarray:
    """Mean over seeds for each example, in a fixed order. The interval resamples examples."""
    keys = sorted(values[0])
    return np.array([[one[key] for key in keys] for one in values]).mean(0)


def cell(figure: Figure, digits: int = 4) -> str:
    """A figure with its interval."""
    return f"{figure.value:.{digits}f} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"


def main() -> None:
    """Run every arm and seed, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="recipes/summaries.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", default="runs/summaries_study")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, dict[str, float]]]] = {arm: [] for arm in ("before", *ARMS)}
    for seed in arguments.seeds:
        for arm, changes in ARMS.items():
            run = tokenward.run(
                arguments.recipe,
                [f"run={arguments.runs}/{arm}-{seed}", f"seed={seed}", *arguments.overrides, *changes],
            )
            samples = run.path("evaluation") / "samples.jsonl"
            found[arm].append(values_of(samples, 1))
        found["before"].append(values_of(samples, 0))
    lines = table(found)
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(found: dict[str, list[dict[str, dict[str, float]]]]) -> list[str]:
    """Markdown table of each arm, then the paired differences."""
    data = {
        arm: {metric: pooled([values[metric] for values in seeds]) for metric in METRICS}
        for arm, seeds in found.items()
    }
    head = ["| | " + " | ".join(METRICS) + " |", "|---|" + "---|" * len(METRICS)]
    rows = [
        f"| {arm} | " + " | ".join(cell(mean_figure(data[arm][m])) for m in METRICS) + " |" for arm in data
    ]
    differences = [("token", "plain"), ("token", "sequence"), ("sequence", "plain"), ("plain", "before")]
    paired = [
        f"| {a} - {b} | " + " | ".join(cell(mean_figure(data[a][m] - data[b][m])) for m in METRICS) + " |"
        for a, b in differences
    ]
    n = len(next(iter(data["before"].values())))
    return [*head, *rows, *paired, "", f"n = {n} test abstracts, {len(found['before'])} seed(s)."]


if __name__ == "__main__":
    main()
