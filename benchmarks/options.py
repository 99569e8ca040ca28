"""Options that all scripts share, and the settings of the workers."""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.data import LONGEST, PAIRS
from benchmarks.folders import tiny


def parser(description: str | None, *, repetitions: int) -> argparse.ArgumentParser:
    """A parser with the common options."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--model", default="default", help="model to measure")
    made.add_argument("--pairs", default=PAIRS, help="file of preference pairs")
    made.add_argument(
        "--first", type=int, default=64, help="random pairs to leave out, such as those used before"
    )
    made.add_argument("--repetitions", type=int, default=repetitions, help="measurements of each side")
    made.add_argument("--threads", type=int, default=2, help="torch threads of each side")
    made.add_argument("--seed", type=int, default=0, help="random seed")
    made.add_argument("--quick", action="store_true", help="try the script on a tiny model")
    return made


@contextmanager
def prepared(options: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The options; with ``--quick``, with a tiny model and few repetitions."""
    if not options.quick:
        yield options
        return
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        options.model = str(tiny(options.model, Path(folder) / "tiny"))
        options.repetitions = min(options.repetitions, 2)
        yield options


def settings_of(options: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Settings of a worker, as plain JSON: defaults, options, and ``changes``."""
    known: dict[str, Any] = {
        "model": options.model,
        "tokenizer": options.model,
        "pairs": options.pairs,
        "threads": options.threads,
        "seed": options.seed,
        "first": 0 if options.quick else options.first,
        "count": 8 if options.quick else 64,
        "longest": 256 if options.quick else LONGEST,
        "batch": 4,
        "precision": "float32",
        "weights": "float32",
        "device": "cpu",
        "learning_rate": 1e-6,
        "fraction": 0.3,
        "objective": "sepo",
        "lengths": None,
        "ids": 0,
        "responses": None,
        "own": {},
        "peer": {},
    }
    unknown = changes.keys() - known.keys()
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}")
    return known | changes


def public(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings to store in a result, without folders of this machine."""
    shown = dict(settings)
    for name in ("model", "tokenizer", "pairs"):
        if Path(str(shown[name])).is_absolute():
            shown[name] = Path(str(shown[name])).name
    shown["lengths"] = None if shown["lengths"] is None else "generated, see the script"
    return shown
