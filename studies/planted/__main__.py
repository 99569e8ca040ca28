"""The command line of the study."""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import studies.planted
from studies.planted.learning import METHODS, OWN, Cell, Cells, Method, Sizes, run, soft
from studies.planted.tables import (
    accuracy_table,
    credits_of,
    difference_table,
    length_table,
    picture,
    pooled,
    shown,
    sweep_table,
    table,
)
from studies.planted.worlds import WORLDS
from studies.tables import write

TUNING_SEED = 1000
TUNED = {
    "mean": ("average", "sum", "sum, no bound"),
    "sum": ("sum", "average"),
    "keyword": ("softmax 0.1", "softmax 0.1, neutral", "average", "softmax 2 (published)"),
    "worst": ("softmin 0.1", "softmin 0.1, neutral", "average", "softmin 2 (published)"),
}
"""For each case, the methods whose learning rates are compared."""


def tune(sizes: Sizes) -> str:
    """Tables of learning rates and temperatures on the tuning seed."""
    rates, temperatures = (3e-3, 1e-2, 3e-2), (0.03, 0.1, 0.3, 1.0, 2.0)

    def accuracy(case: str, method: Method) -> str:
        return f"{run(case, method, TUNING_SEED, sizes).accuracy.mean():.3f}"

    by_rate = [
        [case, name, *(accuracy(case, METHODS[name]._replace(learning_rate=rate)) for rate in rates)]
        for case, names in TUNED.items()
        for name in names
    ]
    by_temperature = [
        [
            case,
            OWN[case] + (", neutral" if neutral else ""),
            bound,
            *(
                accuracy(case, soft(OWN[case], temperature, neutral=neutral)._replace(bound=bound))
                for temperature in temperatures
            ),
        ]
        for case, neutral, bound in itertools.product(
            ("keyword", "worst"), (False, True), ("softplus", "none")
        )
    ]
    rate_head = ["case", "aggregate", *(f"learning rate {rate:g}" for rate in rates)]
    temperature_head = ["case", "aggregate", "bound", *(f"temperature {value:g}" for value in temperatures)]
    return table(rate_head, by_rate) + "\n\n" + table(temperature_head, by_temperature)


def study(seeds: Sequence[int], sizes: Sizes) -> tuple[Cells, dict[str, list[Cell]]]:
    """Run every case with every method over the seeds, and every method untrained."""
    cells = {}
    for case in WORLDS:
        for name, method in METHODS.items():
            cells[case, name] = [run(case, method, seed, sizes) for seed in seeds]
            print(f"{case:8} {name:22} {shown(pooled(cells[case, name]))}", flush=True)
    untrained = sizes._replace(steps=0)
    fresh = {
        name: [run("mean", method, seed, untrained) for seed in seeds] for name, method in METHODS.items()
    }
    return cells, fresh


def main() -> None:
    """Run the study and write its tables and picture."""
    parser = argparse.ArgumentParser(
        description=studies.planted.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--output", type=Path, default=Path("docs/pictures"), help="folder of planted.png")
    parser.add_argument("--page", type=Path, help="Markdown file with the study's markers")
    parser.add_argument("--steps", type=int, default=Sizes().steps)
    parser.add_argument(
        "--groups", type=int, default=Sizes().groups, help="training groups per case and seed"
    )
    parser.add_argument("--tune", action="store_true", help="compare settings on the tuning seed, and stop")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    sizes, seeds = Sizes(groups=chosen.groups, steps=chosen.steps), range(chosen.seeds)
    if chosen.tune:
        print(tune(sizes))
        return
    begun = time.monotonic()
    cells, fresh = study(seeds, sizes)
    parts = {
        "Rank accuracy on the eval groups": accuracy_table(cells),
        "Matching aggregate minus the best other": difference_table(cells),
        "Share of eval pairs in which the longer sequence has the higher value": length_table(cells, fresh),
        "Token rewards against planted scores": credits_of(cells, seeds, sizes),
        "Group size at an equal number of ranked sequences": sweep_table(seeds, sizes),
    }
    tables = "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items())
    print(tables)
    print(f"\n{time.monotonic() - begun:.0f} seconds")
    picture(cells, chosen.output / "planted.png")
    if chosen.page:
        write(chosen.page, "planted", tables.splitlines())


if __name__ == "__main__":
    main()
