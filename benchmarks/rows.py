"""Seconds of each stage and peak memory against the number of rows, from a JSONL file to stored scores.

    python -m benchmarks.rows --sizes 10000 100000 1000000 --folder /tmp/rows

A generated file of preferences goes through data, encoding, pairs, reference and scores of a recipe with a tiny model of
one layer. Each stage runs in a process of its own; the memory is that of this process and its children together, sampled five times a
second. Stopped, it continues with the first stage that was not measured. The table is printed after each stage.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.data import write_synthetic
from benchmarks.folders import tiny
from benchmarks.growth import TOKENIZERS
from benchmarks.results import machine, versions
from tokenward.artifacts import write_json
from tokenward.display import Display
from tokenward.stages.lists import run_through
from tokenward.stages.run import Run
from tokenward.stages.tables import eval_comparisons, tables
from tokenward.tools.run import open_run

SIZES = [10_000, 100_000, 1_000_000]
EVERY_S = 0.2
RECIPE = """\
model: {{name: {model}}}
data: {{source: {source}, eval: 0.05}}
tokens: {{template: plain, max_prompt_tokens: 256, max_response_tokens: 256}}
scores: {{scorer: {{name: surprisal}}}}
"""


def _encoding(run: Run) -> None:
    eval_comparisons(run, run.tokenizer_template(run.recipe.model.name))


def _pairs(run: Run) -> None:
    tables(run, run.tokenizer_template(run.recipe.model.name))


STAGES: dict[str, Callable[[Run], None]] = {
    "data": lambda run: run_through(run, "data"),
    "encoding": _encoding,
    "pairs": _pairs,
    "reference": lambda run: run_through(run, "reference"),
    "scores": lambda run: run_through(run, "scores"),
}
"""What is measured, in this order; each needs those before it."""


class Measured(NamedTuple):
    """One stage at one size.

    Attributes:
        seconds: Of the stage alone, without the start of its process.
        cpu_seconds: Time of all cores together, which a busy machine changes less.
        peak: Peak resident memory of all its processes together, in bytes, mapped files included.
        anonymous: Peak of what the kernel cannot drop: the memory without mapped files.
        moves: Number of steps of its progress bars.
        still: Seconds of the longest time in which none moved.
    """

    seconds: float
    cpu_seconds: float
    peak: int
    anonymous: int
    moves: int
    still: float


def main() -> None:
    """Measure what is not measured yet, and print the table."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of rows")
    made.add_argument("--folder", type=Path, required=True, help="where everything is written")
    made.add_argument("--tokenizer", help="model whose tokenizer the tiny model gets")
    made.add_argument(
        "--result", type=Path, help="file for the measurements (default: results.json in the folder)"
    )
    made.add_argument("--keep", action="store_true", help="keep the data and runs")
    made.add_argument(
        "--stage", choices=STAGES, help=argparse.SUPPRESS
    )  # of a child: run this, measure nothing
    options = made.parse_args()
    if options.stage:
        carry_out(options.stage, options.folder)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.result or options.folder / "results.json"
    known = json.loads(file.read_text())["measured"] if file.is_file() else {}
    tokenizer = options.tokenizer or next(
        name for name in TOKENIZERS if name == "default" or Path(name).is_dir()
    )
    for size in options.sizes:
        place = options.folder / f"rows-{size}"
        for stage in STAGES:
            if stage in known.get(str(size), {}):
                continue
            prepare(place, size, tokenizer)
            known.setdefault(str(size), {})[stage] = measured(stage, place)._asdict()
            about = {"tokenizer": Path(tokenizer).parent.name or tokenizer, "recipe": RECIPE}
            write_json(
                file, {"measured": known, "settings": about, "machine": machine(), "versions": versions()}
            )
            print(table(known), flush=True)
        if not options.keep:
            shutil.rmtree(place, ignore_errors=True)
    print(table(known))


def prepare(place: Path, size: int, tokenizer: str) -> None:
    """Make the data, the tiny model and the recipe of a size, unless they are there."""
    if (place / "recipe.yaml").is_file():
        return
    place.mkdir(parents=True, exist_ok=True)
    write_synthetic(place / "rows.jsonl", size)
    model = tiny(tokenizer, place / "model", width=16, layers=1)
    written = RECIPE.format(model=model, source=place / "rows.jsonl")
    (place / "recipe.yaml").write_text(written)


def carry_out(stage: str, place: Path) -> None:
    """Run one stage in this process, and write how long it took and when its bars moved."""
    display = Display(quiet=True)
    moves: list[float] = []
    run = open_run(place / "recipe.yaml", [f"run={place / 'run'}"], quiet=True)
    run = Run(recipe=run.recipe, display=display)
    started, cpu = time.perf_counter(), time.process_time()
    display.follow = lambda at: moves.append(time.perf_counter() - started)
    STAGES[stage](run)
    seconds = time.perf_counter() - started
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = time.process_time() - cpu + children.ru_utime + children.ru_stime
    still = max(later - before for before, later in pairwise([0.0, *moves, seconds]))
    found = {"seconds": seconds, "cpu_seconds": cpu, "moves": len(moves), "still": still}
    write_json(place / "stage.json", found)


def measured(stage: str, place: Path) -> Measured:
    """Run a stage in a process of its own and watch the memory."""
    command = [sys.executable, "-m", "benchmarks.rows", "--stage", stage, "--folder", str(place)]
    process = subprocess.Popen(command)
    peak = anonymous = 0
    while process.poll() is None:
        found = memory(process.pid)
        peak, anonymous = max(peak, found[0]), max(anonymous, found[1])
        time.sleep(EVERY_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    written = json.loads((place / "stage.json").read_text())
    return Measured(peak=peak, anonymous=anonymous, **written)


def memory(pid: int) -> tuple[int, int]:
    """Resident bytes of a process and its children, and how much of them is not of files."""
    total = private = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            found = process.memory_info()
            total, private = total + found.rss, private + found.rss - found.shared
    except psutil.NoSuchProcess:  # it has just ended
        pass
    return total, private


def table(known: dict[str, dict[str, dict]]) -> str:
    """The measurements as a table in Markdown."""
    lines = [
        "| rows | stage | seconds | rows a second | CPU ms a row | peak memory, MB | of it not files, MB | longest still, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for size, stages in known.items():
        for stage, fields in stages.items():
            found = Measured(**fields)
            cells = [f"{int(size):,}", stage, f"{found.seconds:.1f}", f"{int(size) / found.seconds:,.0f}"]
            cells += [f"{1e3 * found.cpu_seconds / int(size):.3f}"]
            cells += [f"{found.peak / 1e6:,.0f}", f"{found.anonymous / 1e6:,.0f}", f"{found.still:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
