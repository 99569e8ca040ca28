"""The worker of the growth claims: one stage of a recipe in a fresh process."""

from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from benchmarks.memory import AnonymousPeak, reset_peak, status_bytes
from benchmarks.workers import Channel, serve
from tokenward.artifacts import Manifest
from tokenward.stages.lists import run_through
from tokenward.stages.run import Run
from tokenward.tools.run import open_run


def side(channel: Channel, settings: dict[str, Any]) -> None:
    """A worker that runs a stage on request, after running it once on a few pairs."""
    with TemporaryDirectory(prefix="bench") as fresh:  # a fresh folder, so that the stage is not finished yet
        carry_out(settings["stage"], open_run(settings["warm"], [f"run={fresh}/run"], quiet=True))
    recipe = Path(settings["recipe"])
    run = open_run(recipe, [f"run={recipe.parent / 'run'}"], quiet=True)

    def measured(request: dict[str, Any]) -> dict[str, Any]:
        reset_peak()
        with AnonymousPeak() as memory:
            started = perf_counter()
            manifest = carry_out(settings["stage"], run)
            seconds = perf_counter() - started
        return {
            "seconds": seconds,
            "train_seconds": float(manifest.facts.get("seconds", 0.0)),
            "anonymous": memory.peak,
            "peak": status_bytes("VmHWM")["VmHWM"],
        }

    serve(channel, {"run": measured}, {})


def carry_out(stage: str, run: Run) -> Manifest:
    """Run a stage, and the stages that it needs."""
    run_through(run, stage)
    return run.done(stage)
