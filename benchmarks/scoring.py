"""Scoring passes against the published pattern and TRL's reference pass: claims ``scoring_fp32``, ``scoring_bf16``."""

import argparse
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from transformers import AutoConfig

from benchmarks.folders import folder_of
from benchmarks.model import Layout, Pair, Rates, Shape, scoring_pass, separate, shared
from benchmarks.options import parser, prepared, public, settings_of
from benchmarks.results import Result, report
from benchmarks.statistics import paired_ratio
from benchmarks.turns import machine_rates, order
from benchmarks.workers import Worker

SIDES = {
    "ours": "benchmarks.passes:ours",
    "ours_bf16": "benchmarks.passes:ours",
    "published": "benchmarks.passes:published",
    "trl": "benchmarks.passes:trl_reference",
}
GROUP = 16
"""Number of pairs scored in one repetition; the next repetition takes the following ones."""

CLOSE = 1e-3
"""Largest allowed relative difference of a response's sum between the sides in float32."""

CLAIMS = {
    "scoring_fp32": (">= 4.0", "ours", "published"),
    "scoring_fp32_against_trl": (">= 3.0", "ours", "trl"),
    "scoring_bf16": ("reported", "ours_bf16", "ours"),
}


def main() -> None:
    """Measure and report."""
    with prepared(parser(__doc__, repetitions=5).parse_args()) as options:
        report(measure(options))


def measure(options: argparse.Namespace, **changes: Any) -> list[Result]:
    """Measure all sides in turns on the same responses."""
    settings = settings_of(options, **changes)
    group = min(GROUP, settings["count"])
    rates = machine_rates(settings)
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(function, settings | _precision(name)))
            for name, function in SIDES.items()
        }
        for worker in workers.values():
            worker.ask("score", start=0, stop=2)
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
        for number in range(options.repetitions):
            start = number * group % settings["count"]
            for name in order(list(SIDES), number):
                answers[name].append(workers[name].ask("score", start=start, stop=start + group))
        memory = {name: worker.ask("memory") for name, worker in workers.items()}
        facts = {name: worker.facts for name, worker in workers.items()}
    shown = {
        "common": public(settings),
        "sides": {name: item["settings"] for name, item in facts.items()},
        "differences": differences(answers),
        "memory": memory,
        "rates": rates._asdict(),
        "pairs_per_repetition": group,
        "models": {"ours": 2, "ours_bf16": 2, "published": 2, "trl": 1},
    }
    pairs = [Pair(prompt, tuple(responses)) for prompt, responses, _ in facts["ours"]["lengths"]]
    shape = Shape.of(AutoConfig.from_pretrained(folder_of(options.model)))
    predicted = predictions(shape, pairs, group, rates)
    return [
        _result(options, claim, *words, answers=answers, predicted=predicted.get(words[2]), settings=shown)
        for claim, words in CLAIMS.items()
    ]


def _precision(name: str) -> dict[str, str]:
    return {"precision": "bfloat16" if name.endswith("bf16") else "float32"}


def _result(
    options: argparse.Namespace,
    claim: str,
    target: str,
    ours: str,
    peer: str,
    *,
    answers: Mapping[str, list[dict[str, Any]]],
    predicted: float | None,
    settings: dict[str, Any],
) -> Result:
    models = settings["models"]
    # Per model, because TRL's pass covers only the reference.
    mine, theirs = ([answer["seconds"] / models[name] for answer in answers[name]] for name in (ours, peer))
    ratio = paired_ratio(theirs, mine)
    return Result(
        claim=claim,
        target=target,
        ratio=ratio.value,
        low=ratio.low,
        high=ratio.high,
        ours={"side": ours, "seconds_per_model": mine},
        peer={"side": peer, "seconds_per_model": theirs, "ratio_of_sums": ratio.overall},
        repetitions=len(mine),
        predicted=predicted,
        settings=settings,
        quick=options.quick,
    )


def differences(answers: Mapping[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Largest relative difference of a response's sum to tokenward's in float32.

    Raises:
        ValueError: The sides do not compute the same values, so comparing their times would mean nothing.
    """
    found = {}
    for name in ("published", "trl", "ours_bf16"):
        found[name] = 0.0
        for mine, theirs in zip(answers["ours"], answers[name], strict=True):
            for ours, other in zip(mine["sums"], theirs["sums"], strict=True):
                # TRL's side scores only the reference; its second list is empty.
                pairs = zip(ours, other, strict=True) if other else ()
                for difference in (abs(a - b) / abs(a) for a, b in pairs):
                    # Not "difference > CLOSE", which is False for NaN.
                    if name != "ours_bf16" and not difference <= CLOSE:
                        raise ValueError(
                            f"{name} computes other values than tokenward: they differ by {difference:.2%}"
                        )
                    found[name] = max(found[name], difference)
    return found


def predictions(shape: Shape, pairs: list[Pair], group: int, rates: Rates) -> dict[str, float]:
    """Ratios predicted by the cost model, over all pairs."""
    ours = published = trl = 0.0
    for start in range(0, len(pairs), group):
        part = pairs[start : start + group]
        ours += scoring_pass(shape, shared(part, padded=False)).seconds(rates)
        for pair in part:
            for length in pair.responses:
                row = Layout((pair.prompt + length,), pair.prompt + length)
                # Logits, their copy in log_softmax, and its reads.
                published += scoring_pass(shape, row, logit_passes=5, saves=True).seconds(rates)
        for first in range(0, len(part), 8):
            trl += scoring_pass(shape, separate(part[first : first + 8]), logit_passes=6).seconds(rates)
    return {"published": published / ours, "trl": trl / ours}


if __name__ == "__main__":
    main()
