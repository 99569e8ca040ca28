"""Which method gets how much reward at which distance from the start?

    python -m studies.frontier --model FOLDER --arm sepo30 --seed 0

trains one arm with one seed at its learning rates and measures it at eight points of each training; then it prints the table
of all that is stored. Without ``--arm`` all arms are run. FOLDER is stories260K in transformers' format, or any other model,
whose values need a folder of their own (``--values``). Values of an older recipe are measured again.

    python -m studies.frontier --model default --size small --opening "I watched the film and" --arm dpo --runs RUNS --values VALUES

does the same for the default model, with fewer and shorter replies; each world needs folders of its own.
"""

from pathlib import Path

from studies.frontier.arms import ARMS
from studies.frontier.command import options, worlds
from studies.frontier.curves import Measured
from studies.frontier.runs import Held, measure, start_of, values_file
from studies.frontier.tables import draw, lines_of, short_lines
from studies.frontier.world import best_of
from studies.tables import write

TITLE = "Reward against the distance from the start"


def main() -> None:
    """Run the missing arms, then print the table."""
    made = options(__doc__)
    made.add_argument(
        "--arm", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="NAME", help=", ".join(ARMS)
    )
    made.add_argument("--rate", type=float, nargs="+", help="learning rates, in place of the arm's own")
    made.add_argument(
        "--chosen-on", type=int, nargs="+", help="seeds that choose the learning rates; otherwise --seed"
    )
    made.add_argument("--short", type=Path, help="page for the differences to DPO alone, docs/methods.md")
    made.add_argument("--picture", type=Path, help="file of the picture")
    made.add_argument("--draw", nargs="+", choices=list(ARMS), metavar="NAME", help="arms of the picture")
    chosen = made.parse_args()
    for world in worlds(chosen):
        held = Held(world)
        start_of(world, held, chosen.values)
        best_of(world, chosen.values / f"best_of-{world.seed}.json")
        for name in chosen.arm:
            arm, file = ARMS[name], values_file(chosen.values, chosen.reward, name, world.seed)
            measure(world, held, arm, chosen.rate or arm.rates, file)
    found = Measured(chosen.values, chosen.reward, chosen.seed, chosen.chosen_on)
    lines = lines_of(found)
    print("\n".join(lines))
    study = f"{chosen.values.name} {chosen.reward}"
    if chosen.page is not None:
        write(chosen.page, study if chosen.chosen_on is None else f"{study}, confirmed", lines)
    if chosen.short is not None:
        write(chosen.short, study, short_lines(found))
    if chosen.picture is not None:
        draw(
            found,
            chosen.draw or [name for name in ARMS if found.has(name)],
            chosen.picture,
            TITLE,
            chosen.reward,
        )


if __name__ == "__main__":
    main()
