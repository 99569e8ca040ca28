"""Time per pair and peak memory against the number of pairs: claims ``growth_training`` and ``growth_scoring``.

A made preference file of growing size goes through the stages of a recipe with a tiny model: data, reference
values, and a fixed number of training steps. Each stage of each size is a process of its own, which first does the
same on a few pairs, so that what a process pays once is not counted as the pairs' cost.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.data import write_synthetic
from benchmarks.folders import tiny
from benchmarks.options import parser
from benchmarks.results import Result, report
from benchmarks.statistics import rise
from benchmarks.workers import Worker

SIZES = [1_000, 10_000, 100_000]
QUICK_SIZES = [100, 300]
WARM_UP_PAIRS = 64
STAGES = ["data", "reference", "policy"]
STEPS, BATCH = 200, 8
TOKENIZERS = ["../shared/data/stories260K/hf", "default"]
RECIPE = """\
run: {run}
model: {{name: {model}}}
data: {{source: {source}, eval: 0.1}}
tokens: {{template: plain, max_prompt_tokens: 256, max_response_tokens: 256}}
scores: {{scorer: {{name: surprisal}}}}
policy:
  training: {{max_steps: {steps}, per_device_train_batch_size: {batch}, learning_rate: 1.0e-4}}
"""


class Measured(NamedTuple):
    """A stage at one size.

    Attributes:
        seconds: Of the whole stage.
        train_seconds: Of its training steps alone; 0 for stages that train nothing.
        anonymous: Peak of ``RssAnon`` in bytes.
        peak: ``VmHWM`` in bytes.
    """

    seconds: float
    train_seconds: float
    anonymous: int
    peak: int


def main() -> None:
    """Measure and report."""
    made = parser(__doc__, repetitions=3)
    made.add_argument("--sizes", type=int, nargs="+", help="numbers of pairs")
    made.add_argument("--tokenizer", help="whose tokenizer the tiny model has")
    options = made.parse_args()
    sizes = options.sizes or (QUICK_SIZES if options.quick else SIZES)
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        report(measure(options, sizes, Path(folder)))


def measure(options: argparse.Namespace, sizes: list[int], folder: Path) -> list[Result]:
    """All stages at all sizes, again and again; of each the median counts."""
    tokenizer = options.tokenizer or next(
        name for name in TOKENIZERS if name == "default" or Path(name).is_dir()
    )
    model = tiny(tokenizer, folder / "model")
    warm = workplace(folder, model, WARM_UP_PAIRS)
    taken: dict[tuple[str, int], list[Measured]] = {(stage, size): [] for stage in STAGES for size in sizes}
    for _ in range(options.repetitions):
        for size in sizes:
            recipe = workplace(folder, model, size)
            for stage in STAGES:
                taken[stage, size].append(run_stage(options, stage, recipe, warm))
            shutil.rmtree(recipe.parent)
    found = {stage: [middle(taken[stage, size]) for size in sizes] for stage in STAGES}
    settings = {
        "sizes": sizes,
        "tokenizer": Path(tokenizer).parent.name if Path(tokenizer).is_dir() else tokenizer,
        "model": "Llama of random weights, two layers of 32",
        "training_steps": STEPS,
        "pairs_per_step": BATCH,
        "recipe": RECIPE,
    }
    return results(options, found, sizes, settings)


def middle(measured: list[Measured]) -> Measured:
    """The median of each quantity over the repetitions."""
    return Measured(*(median(values) for values in zip(*measured, strict=True)))


def workplace(folder: Path, model: Path, size: int) -> Path:
    """A folder with data of a size and its recipe."""
    place = folder / f"pairs-{size}"
    place.mkdir()
    write_synthetic(place / "pairs.jsonl", size)
    recipe = place / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(run=place / "run", model=model, source=place / "pairs.jsonl", steps=STEPS, batch=BATCH)
    )
    return recipe


def run_stage(options: argparse.Namespace, stage: str, recipe: Path, warm: Path) -> Measured:
    """One stage in a fresh process; what the stage reads was made by the processes before it."""
    settings = {"threads": options.threads, "stage": stage, "recipe": str(recipe), "warm": str(warm)}
    with Worker("benchmarks.stages:side", settings) as worker:
        return Measured(**worker.ask("run"))


def per_pair(stage: str, measured: list[Measured], sizes: list[int]) -> list[float]:
    """Seconds per pair of a stage; of a training stage, those of preparing its pairs, without its steps."""
    return [(item.seconds - item.train_seconds) / size for item, size in zip(measured, sizes, strict=True)]


def results(
    options: argparse.Namespace, found: dict[str, list[Measured]], sizes: list[int], settings: dict[str, Any]
) -> list[Result]:
    """How far time per piece and memory rise with the size, for training and for what comes before it."""
    step = [item.train_seconds / STEPS for item in found["policy"]]
    times = {
        "growth_training": step,
        "growth_training_preparation": per_pair("policy", found["policy"], sizes),
        "growth_data": per_pair("data", found["data"], sizes),
        "growth_scoring": per_pair("reference", found["reference"], sizes),
    }
    stages = {
        "growth_training": "policy",
        "growth_training_preparation": "policy",
        "growth_data": "data",
        "growth_scoring": "reference",
    }
    made = [
        _result(options, claim, "<= 1.15", rise(values), {"seconds": values}, settings)
        for claim, values in times.items()
    ]
    for claim in ("growth_training", "growth_data", "growth_scoring"):
        measured = found[stages[claim]]
        ratio = rise([item.anonymous for item in measured])
        raw = {"anonymous": [item.anonymous for item in measured], "peak": [item.peak for item in measured]}
        made.append(_result(options, f"{claim}_memory", "<= 1.05", ratio, raw, settings))
    return made


def _result(
    options: argparse.Namespace, claim: str, target: str, ratio: float, ours: dict, settings: dict[str, Any]
) -> Result:
    return Result(
        claim=claim,
        target=target,
        ratio=ratio,
        low=ratio,
        high=ratio,
        ours=ours,
        peer=None,
        repetitions=options.repetitions,
        predicted=1.0,
        settings=settings,
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
