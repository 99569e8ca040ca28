"""What the study's commands have in common: the options that say which worlds, and the worlds that they say."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from studies.arms import VALUES
from studies.frontier import SEEDS
from studies.frontier.world import PEOPLE, REWARDS, SIZES, World
from tokenward.models.identity import resolve


def options(about: str | None) -> argparse.ArgumentParser:
    """A parser with the options of a world, and the folder of the values."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--model", help="folder of the model, or default; without it, only the table is printed"
    )
    made.add_argument("--seed", type=int, nargs="+", default=list(SEEDS))
    made.add_argument("--reward", choices=[*REWARDS, PEOPLE], default="vader")
    made.add_argument("--size", choices=list(SIZES), default="whole", help="how much is sampled and trained")
    made.add_argument(
        "--opening", default="", help="how every prompt begins, for a model that begins a text with no token"
    )
    made.add_argument(
        "--conversations",
        type=Path,
        help="compared replies in HH's format, which give the prompts, and the reward people",
    )
    made.add_argument("--runs", type=Path, default=Path("runs/frontier"))
    made.add_argument("--values", type=Path, default=VALUES / "frontier")
    made.add_argument("--page", type=Path, help="page with the study's markers, docs/results.md")
    return made


def worlds(chosen: argparse.Namespace) -> Iterator[World]:
    """The world of each seed, with its samples; none without a model. No other process may work on it at the same time.

    Raises:
        SystemExit: Another process does.
    """
    torch.set_num_threads(1)
    for seed in chosen.seed if chosen.model else ():
        model, folder, size = resolve(chosen.model), chosen.runs / str(seed), SIZES[chosen.size]
        world = World(model, folder, seed, chosen.reward, size, chosen.opening, chosen.conversations)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / ".lock", timeout=0):  # two processes would read each other's checkpoints
                world.make()
                yield world
        except Timeout:
            raise SystemExit(
                f"Another process works on {folder}. Wait for it, or give --runs another folder."
            ) from None
