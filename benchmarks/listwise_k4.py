"""Cost per response in lists of four, against lists of two and one, on the same prompts: claim ``listwise_k4``.

The prediction shares the prompt and lets each response attend only to the prompt and itself. Any further cost, such as
masked attention between responses, counts against the claim.
"""

import argparse
import random

from transformers import AutoConfig

from benchmarks.folders import folder_of
from benchmarks.model import Cost, Pair, Rates, Shape, shared, training_step, visible_attention
from benchmarks.options import parser, prepared, public, settings_of
from benchmarks.results import Result, report
from benchmarks.statistics import bootstrap, paired_ratio
from benchmarks.turns import Side, Turns, take_turns

SIDES = {4: "plackett_luce", 2: "plackett_luce", 1: "likelihood"}
PROMPTS = 16


def main() -> None:
    """Measure and report."""
    with prepared(parser(__doc__, repetitions=8).parse_args()) as options:
        report(measure(options))


def prompts(seed: int) -> list[Pair]:
    """Lengths similar to conversations, with the same prompts and first responses for every K."""
    rng = random.Random(seed)
    return [Pair(rng.randint(64, 256), tuple(rng.randint(32, 160) for _ in range(4))) for _ in range(PROMPTS)]


def measure(options: argparse.Namespace) -> list[Result]:
    """Cost per response at K = 4 relative to K = 1 and K = 2, divided by the predicted ratio."""
    config = AutoConfig.from_pretrained(folder_of(options.model))
    lengths = [[pair.prompt, list(pair.responses)] for pair in prompts(options.seed)]
    common = settings_of(options, lengths=lengths, ids=config.vocab_size)
    sides = {
        str(size): Side("benchmarks.ours:training", common | {"objective": objective, "responses": size})
        for size, objective in SIDES.items()
    }
    turns = take_turns(sides, repetitions=options.repetitions, warm_up=2)
    settings = {
        "common": public(common) | {"lengths": lengths},
        "sides": {name: facts["settings"] for name, facts in turns.facts.items()},
        "objectives": {str(size): name for size, name in SIDES.items()},
        "rates": turns.rates._asdict(),
    }
    shape = Shape.of(config)
    claims = {"listwise_k4": 1, "listwise_k4_against_k2": 2}
    return [_result(options, turns, shape, claim, size, settings) for claim, size in claims.items()]


def _result(
    options: argparse.Namespace, turns: Turns, shape: Shape, claim: str, size: int, settings: dict
) -> Result:
    four, other = turns.seconds["4"], turns.seconds[str(size)]
    expected = per_response(shape, turns.pairs("4"), turns.rates) / per_response(
        shape, turns.pairs(str(size)), turns.rates
    )
    measured = paired_ratio([value / 4 for value in four], [value / size for value in other])
    quotients = [a / 4 / (b / size) / expected for a, b in zip(four, other, strict=True)]
    low, high = bootstrap(quotients)
    return Result(
        claim=claim,
        target="<= 1.1",
        ratio=measured.value / expected,
        low=low,
        high=high,
        ours={"seconds": four, "cost_per_response_relative_to_the_other": measured.value},
        peer={"seconds": other, "responses": size, "expected_relative_cost": expected},
        repetitions=len(four),
        predicted=1.0,
        settings=settings,
        quick=options.quick,
    )


def per_response(shape: Shape, pairs: list[Pair], rates: Rates, *, batch: int = 4) -> float:
    """Predicted seconds per response over all batches, with the prompt shared and no padding."""
    total = 0.0
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        cost = training_step(shape, shared(part, padded=False))
        total += Cost(cost.products, visible_attention(shape, part), cost.moved).seconds(rates)
    return total / sum(len(pair.responses) for pair in pairs)


if __name__ == "__main__":
    main()
