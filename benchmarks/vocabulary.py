"""Peak memory of a SePO step against the size of the vocabulary: claim ``vocabulary``.

Models with two layers of the default model's width have heads of 32, 128 and 256 thousand tokens. The head's weights,
gradients and moments must grow. Any further growth is compared with one tensor of all logits.
"""

import argparse
import tempfile
from pathlib import Path

from transformers import AutoConfig

from benchmarks.folders import cut_down
from benchmarks.model import FLOAT, Pair, full_logits, shared
from benchmarks.options import parser, prepared, public, settings_of
from benchmarks.results import Result, report
from benchmarks.workers import Worker

SIZES = [32_000, 128_000, 256_000]
LAYERS, STEPS = 2, 3
PAIRS = [Pair(192, (160, 160))] * 4


def main() -> None:
    """Measure and report."""
    with prepared(parser(__doc__, repetitions=1).parse_args()) as options:
        report([measure(options)])


def measure(options: argparse.Namespace) -> Result:
    """Growth of the peak memory of fresh processes from the smallest to the largest vocabulary."""
    peaks, shown = [], {}
    for size in SIZES:
        memory, shown = peak(options, size)
        peaks.append(memory)
    positions = shared(PAIRS).tokens
    width = shown["width"]
    grown = excess(peaks[0]["VmHWM"], peaks[-1]["VmHWM"], width=width, sizes=(SIZES[0], SIZES[-1]))
    logits = full_logits(positions, SIZES[-1] - SIZES[0])
    return Result(
        claim="vocabulary",
        target="<= 0.1",
        ratio=grown / logits,
        low=grown / logits,
        high=grown / logits,
        ours={"vocabularies": SIZES, "memory": peaks},
        peer={"bytes_that_all_logits_would_add": logits, "positions": positions},
        repetitions=1,
        predicted=None,
        settings={"layers": LAYERS, "steps": STEPS, **shown},
        quick=options.quick,
    )


def excess(first: int, last: int, *, width: int, sizes: tuple[int, int]) -> int:
    """Growth of the peak in bytes beyond the head's weights, gradients and two moments."""
    state = 4 * FLOAT * width * (sizes[1] - sizes[0])
    return last - first - state


def peak(options: argparse.Namespace, size: int) -> tuple[dict[str, int], dict]:
    """Peak memory of a fresh process after a few steps."""
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        source = cut_down(options.model, Path(folder) / "cut", layers=LAYERS, vocabulary=size)
        lengths = [list(pair) for pair in PAIRS]
        settings = settings_of(options, lengths=lengths, ids=SIZES[0])
        with Worker("benchmarks.ours:training", settings | {"model": str(source)}) as worker:
            before = worker.ask("memory")["RssAnon"]
            for _ in range(STEPS):
                worker.ask("step")
            memory = worker.ask("memory")
        width = AutoConfig.from_pretrained(source).hidden_size
    facts = {"common": public(settings), "sides": worker.facts["settings"], "width": width}
    return memory | {"RssAnonBeforeSteps": before}, facts


if __name__ == "__main__":
    main()
