"""Train the arms of a study, and measure and store what their policies do on the eval prompts."""

import argparse
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tokenward.evaluation.replies import METRICS, apply_metric, divergence, reply_rows
from tokenward.models.loading import LanguageModel
from tokenward.plugins import find
from tokenward.stages.evaluation import measures_of, prompts_to_answer
from tokenward.stages.lists import carry_out, run_through
from tokenward.stages.run import Run
from tokenward.tools.run import open_run

VALUES = Path(__file__).parent / "values"
"""Stored measurements, one file per arm and seed. Tables are made from them without training again."""

START = "start"
"""Name of the arm without training: the model that every policy starts from."""


class Arm(NamedTuple):
    """One policy of a study.

    Attributes:
        name: Name in tables and pictures.
        changes: Differences to the study's recipe, as ``a.b=value``; or a function from the seed to them.
        recipe: Recipe, if it is not the study's.
        before: Trains the models that the changes name, given the seed. Called before the arm is measured.
    """

    name: str
    changes: Sequence[str] | Callable[[int], Sequence[str]] = ()
    recipe: str | None = None
    before: Callable[[int], object] | None = None


class Outcome(NamedTuple):
    """Measurements of one policy.

    Attributes:
        arm: Name of the arm.
        seed: Seed of the run.
        values: For each quantity, one number per eval prompt. All arms of a seed have the same prompts.
        facts: Facts of its training: seconds, steps, kept shares, displacement.
        recipe: Recipe of the run.
        changes: Changes to the recipe.
    """

    arm: str
    seed: int
    values: dict[str, list[float]]
    facts: dict[str, Any]
    recipe: str = ""
    changes: Sequence[str] = ()


def options(description: str | None) -> argparse.ArgumentParser:
    """The command line of every study."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--runs", type=Path, default=Path("runs/studies"), help="folder of the runs")
    made.add_argument("--values", type=Path, default=VALUES, help="folder of the stored measurements")
    made.add_argument("--set", dest="overrides", action="append", default=[], help="a.b=value for every arm")
    made.add_argument("--page", type=Path, help="page with the study's markers")
    made.add_argument("--pictures", type=Path, help="folder for the picture, docs/pictures")
    return made


def outcomes(
    recipe: str,
    arms: Sequence[Arm],
    chosen: argparse.Namespace,
    always: Sequence[str] = (),
    before: Callable[[int], object] | None = None,
) -> list[Outcome]:
    """Return the outcome of the start and of every arm for every seed, from stored measurements if there are any.

    Arms of a recipe share one run folder per seed, so data, oracle and scores are made once.

    Args:
        recipe: The study's recipe.
        arms: Its arms.
        chosen: From :func:`options`.
        always: Changes for the start and every arm.
        before: Trains the models that ``always`` names, given the seed.
    """
    found = []
    for seed in chosen.seeds:
        for arm in (Arm(START), *arms):
            path = arm.recipe or recipe
            folder = chosen.runs / f"{Path(path).stem}-{seed}"
            own = arm.changes(seed) if callable(arm.changes) else arm.changes
            changes = [f"run={folder}", f"seed={seed}", *always, *chosen.overrides, *own]
            needed = [each for each in (before, arm.before) if each is not None]
            found.append(_kept(chosen.values, path, changes, arm.name, seed, needed))
    return found


def _kept(
    folder: Path,
    recipe: str,
    changes: Sequence[str],
    name: str,
    seed: int,
    needed: Sequence[Callable[[int], object]],
) -> Outcome:
    """The stored outcome of an arm, which is measured first if necessary."""
    file = values_file(folder, recipe, [*changes, *(["the start"] if name == START else [])])
    if not file.exists():
        print(f"{name}, seed {seed}: {' '.join(changes)}", flush=True)
        for train in needed:
            train(seed)
        values, facts = _measured(open_run(recipe, changes, quiet=True), trained=name != START)
        folder.mkdir(parents=True, exist_ok=True)
        record = {"recipe": recipe, "changes": list(changes), "values": values, "facts": facts}
        file.write_text(json.dumps(record) + "\n", encoding="utf-8")
    record = json.loads(file.read_text(encoding="utf-8"))
    return Outcome(name, seed, record["values"], record["facts"], recipe, changes)


def values_file(folder: Path, recipe: str, changes: Sequence[str]) -> Path:
    """File of a measurement. Its name is a hash of the recipe's settings (not its comments) and of the changes."""
    settings = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
    text = json.dumps([settings, *changes], sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _measured(run: Run, *, trained: bool) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Measure replies of the policy, or of its start, to the eval prompts: metrics, length, whether they end, KL."""
    run_through(run, "scores" if trained else "data")
    if trained:
        carry_out(run, "policy")
    start = run.load(run.policy_start, dtype=run.recipe.evaluation.precision)
    model = (
        run.load(str(run.path("policy") / "model"), dtype=run.recipe.evaluation.precision)
        if trained
        else start
    )
    found = _values(run, model, start)
    if not trained:
        return found, {}
    kept = ("seconds", "cpu_seconds", "steps", "kept", "displacement")
    facts = {key: run.done("policy").facts.get(key) for key in kept}
    for old in run.folder.glob(".previous/policy-*"):
        shutil.rmtree(old)  # a study has dozens of policies; measured ones are not needed
    return found, facts


def _values(run: Run, model: LanguageModel, start: LanguageModel) -> dict[str, list[float]]:
    template = start.template(run.recipe.tokens.template)
    prompts = prompts_to_answer(run, template)
    replies = measures_of(run).replies(model, template, prompts, "replies")
    found = {
        name: apply_metric(
            name,
            find("metric", name, METRICS),
            [row.comparison.prompt[-1]["content"] for row in prompts],
            [reply.text for reply in replies],
            [reply.ids for reply in replies],
            columns={},
            where=[row.comparison.source for row in prompts],
        )
        for name in run.recipe.evaluation.metrics
    }
    found["length"] = [float(len(reply.ids)) for reply in replies]
    found["ended"] = [float(reply.ended) for reply in replies]
    if model is start:
        return found | {"kl": [0.0] * len(prompts)}
    kl = divergence(model, start, reply_rows(prompts, replies))
    return found | {"kl": [float(value.sum()) for value in kl]}
