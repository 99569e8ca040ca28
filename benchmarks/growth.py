"""Time per pair and peak memory against the number of pairs: claims ``growth_training`` and ``growth_scoring``.

A generated preference file of growing size goes through the stages of a recipe with a tiny model: data, reference
values, and a fixed number of training steps. Each stage of each size runs in a separate process. The process first
runs the stage on a few pairs, so that one-time costs are not counted.
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
model: {{name: {model}}}
data: {{source: {source}, eval: 0.1}}
tokens: {{template: plain, max_prompt_tokens: 256, max_response_tokens: 256}}
scores: {{scorer: {{name: surprisal}}}}
policy:
  training: {{max_steps: {steps}, per_device_train_batch_size: {batch}, learning_rate: 1.0e-4}}
"""


class Measured(NamedTuple):
    """Measurements of a stage at one size.

    Attributes:
        seconds: Time of the whole stage.
        train_seconds: Time of its training steps; 0 for stages without training.
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
    made.add_argument("--tokenizer", help="model whose tokenizer the tiny model gets")
    options = made.parse_args()
    sizes = options.sizes or (QUICK_SIZES if options.quick else SIZES)
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        report(measure(options, sizes, Path(folder)))


def measure(options: argparse.Namespace, sizes: list[int], folder: Path) -> list[Result]:
    """Measure all stages at all sizes repeatedly, and report medians."""
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
    """Median of each quantity over the repetitions."""
    return Measured(*(median(values) for values in zip(*measured, strict=True)))


def workplace(folder: Path, model: Path, size: int) -> Path:
    """Make a folder with data of a given size and its recipe."""
    place = folder / f"pairs-{size}"
    place.mkdir()
    write_synthetic(place / "pairs.jsonl", size)
    recipe = place / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model, source=place / "pairs.jsonl", steps=STEPS, batch=BATCH))
    return recipe


def run_stage(options: argparse.Namespace, stage: str, recipe: Path, warm: Path) -> Measured:
    """Run one stage in a fresh process. Earlier processes have made its inputs."""
    settings = {"threads": options.threads, "stage": stage, "recipe": str(recipe), "warm": str(warm)}
    with Worker("benchmarks.stages:side", settings) as worker:
        return Measured(**worker.ask("run"))


def per_pair(stage: str, measured: list[Measured], sizes: list[int]) -> list[float]:
    """Seconds per pair of a stage, without the training steps of a training stage."""
    return [(item.seconds - item.train_seconds) / size for item, size in zip(measured, sizes, strict=True)]


def results(
    options: argparse.Namespace, found: dict[str, list[Measured]], sizes: list[int], settings: dict[str, Any]
) -> list[Result]:
    """Rise of time per pair or step, and of memory, with the size."""
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
