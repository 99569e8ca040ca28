"""Checks across the tables of an online run, made before anything is read or trained."""

from tokenward.config.training import trackers_of
from tokenward.errors import UserError
from tokenward.models.identity import check_places
from tokenward.objectives import PlackettLuce, needs_of, objective_of
from tokenward.sampling.sources import SequenceClassifier
from tokenward.selection import Selector, SoftWeights, scope_of, selector_of, unit_of
from tokenward.stages.base import Checks
from tokenward.stages.online import head_mlp_settings, reads_reward, reward_settings
from tokenward.stages.reward_learning import SAME_AS_POLICY
from tokenward.stages.run import Run
from tokenward.stages.sampling_checks import sampling_checks
from tokenward.stages.tasks import ranks, source_of

_EVALS = "online.reward_evals sets how often the reward is evaluated"
_STEPS = "online.reward_steps sets the number of updates"
_SET_BY_ONLINE = {
    "max_steps": _STEPS,
    "num_train_epochs": _STEPS,
    "seed": "each time the reward is learned, its seed is derived from the recipe's seed",
    "eval_strategy": _EVALS,
    "eval_steps": _EVALS,
}
"""Keys of ``reward.training`` that an online run sets itself."""

ACROSS_TABLES = ("online", "online.patience", "online.objective", "reward.training", "model.head_mlp")
"""Keys of the checks that compare tables. Their errors have the key of what is wrong."""


def online_checks(run: Run) -> Checks:
    """Checks of an online run."""
    online, head_mlp = run.online, run.recipe.model.head_mlp
    checks: Checks = {
        **sampling_checks(run, online, "online"),
        "online.selection": lambda: selector_of(online.selection, run.recipe.seed),
        "online": lambda: _check_tables(run),
        "online.objective": lambda: _check_objective(run),
        "online.patience": lambda: _check_patience(run),
        "reward.training": lambda: _check_reward_training(run),
    }
    if head_mlp is not None:
        checks["model.head_mlp"] = lambda: head_mlp_settings(head_mlp)
    if run.recipe.prompt_task is None and ranks(run):
        checks["online.source"] = lambda: _check_source(run)
    if online.reward is not None:
        checks["online.reward"] = lambda: reward_settings(run)
    return checks


def _check_source(run: Run) -> None:
    source = source_of(run)
    if isinstance(source, SequenceClassifier):
        check_places(model=source.model)


def _check_tables(run: Run) -> None:
    recipe, task = run.recipe, run.recipe.prompt_task
    if (recipe.examples is None) == (task is None):
        found = "both" if task is not None else "neither"
        raise UserError(
            f"an online run needs either examples (prompts with references) or prompt_task (labelled texts), got {found}.",
            code="conflicting-tables" if task is not None else "missing-table",
            key="online",
        )
    if task is not None and len(task.verbalizers) < 2:
        raise UserError(
            f"verbalizers is {task.verbalizers}, and a classifier needs one word for each of 2 or more classes.",
            code="too-few",
            key="prompt_task.verbalizers",
        )
    if recipe.model.head_mlp is not None and recipe.model.adapter is not None:
        message = "head_mlp and adapter both choose which part of the model trains. Remove one."
        raise UserError(message, code="conflicting-keys", key="model.head_mlp")
    if recipe.sft is not None and (recipe.examples is None or recipe.examples.references is None):
        raise UserError(
            "sft trains on the references of the examples, and there are none. Set examples.references, or remove sft.",
            code="missing-key",
            key="sft",
        )
    _check_reward(run)


def _check_reward(run: Run) -> None:
    online = run.online
    selector = selector_of(online.selection, run.recipe.seed)
    if online.objective.name != "reinforce" and reads_reward(online.objective.name, selector):
        _check_range(run, selector, "online.selection")
        _check_scope(selector)
    if reward_settings(run).unit == "spans":
        raise UserError(
            "unit is spans, which come from data, and samples have none. Write unit: sentence, word or token.",
            code="no-spans",
            key="reward.head.unit",
        )


def _check_scope(selector: Selector) -> None:
    """Weights may only depend on the references of one optimizer step, which are weighed together."""
    if unit_of(selector):
        raise UserError(
            f"the selection pools over {unit_of(selector)}, which an online run cannot. Remove segment_pool, or set "
            "reward.head.unit to give each word or sentence one reward.",
            code="unsupported-unit",
            key="online.selection",
        )
    if scope_of(selector) == "dataset" and not isinstance(selector, SoftWeights):
        raise UserError(
            "scope is dataset, but an online run weighs the references of one optimizer step at a time, because the reward is "
            "learned again. Write scope: batch for all references of a step, or scope: response.",
            code="unsupported-scope",
            key="online.selection",
        )


def _check_range(run: Run, selector: Selector, key: str) -> None:
    """Weights proportional to rewards need positive rewards, which training would notice hours later."""
    low, _ = reward_settings(run).range
    if isinstance(selector, SoftWeights) and selector.transform != "exp" and low < 0:
        raise UserError(
            f"transform: {selector.transform} needs positive rewards, and those of reward.head range from {low:g}. Write transform: "
            "exp with a temperature, or give reward.head a bound (softplus or sigmoid) with low: 1.0e-8.",
            code="negative-rewards",
            key=key,
        )


def _check_patience(run: Run) -> None:
    for key, needed, missing in (
        ("patience", "evaluate_every", run.online.evaluate_every is None),
        ("reward_patience", "reward_evals", run.online.reward_evals == 0),
    ):
        if getattr(run.online, key) is not None and missing:
            raise UserError(
                f"{key} has no effect without evaluations. Set online.{needed}, or remove {key}.",
                code="unused-key",
                key=f"online.{key}",
            )


def _check_reward_training(run: Run) -> None:
    table = run.recipe.reward.training
    for key in SAME_AS_POLICY:
        own = table.get(key)
        if own is not None and own != run.online.training.get(key, False):
            raise UserError(
                f"{key} is {str(own).lower()} for the reward but not for the policy. Both train in one process, which has one "
                f"mixed precision. Write the same in online.training, or remove it here.",
                code="conflicting-keys",
                key=f"reward.training.{key}",
            )
    both = [name for name in trackers_of(table) if name in trackers_of(run.online.training)]
    for name in both:
        if name != "tensorboard":
            raise UserError(
                f"the policy and its reward train in one process, in which {name} has one record, so their losses would be one "
                "curve. Remove report_to here: the report and online/events.jsonl have the reward's losses. With tensorboard "
                "each has its own.",
                code="conflicting-keys",
                key="reward.training.report_to",
            )
    for key in table:
        if key in _SET_BY_ONLINE:
            raise UserError(
                f"{key} has no effect in an online run: {_SET_BY_ONLINE[key]}. Remove it.",
                code="unused-key",
                key=f"reward.training.{key}",
            )


def check_not_online(run: Run) -> None:
    """Checks of a run on comparisons that share rules with online runs.

    Raises:
        UserError: the selection does not fit the reward, or the recipe has a key of online runs.
    """
    if run.recipe.scores.scorer.name == "reward":
        _check_range(run, selector_of(run.recipe.policy.selection, run.recipe.seed), "policy.selection")
    if run.recipe.model.head_mlp is not None:
        raise UserError(
            "only an online run trains head_mlp, and this recipe has no online table. Remove it, or set model.adapter to train a "
            "part of the model.",
            code="unused-key",
            key="model.head_mlp",
        )


def _check_objective(run: Run) -> None:
    recipe, name, key = run.recipe, run.online.objective.name, "online.objective"
    objective = objective_of("objective", run.online.objective)
    if needs_of(objective).pairwise or isinstance(objective, PlackettLuce):
        raise UserError(
            f"{name} compares written replies, and an online run has one reference or its own samples. Use {{name: "
            "weighted_likelihood} or {name: reinforce}.",
            code="wrong-objective",
            key=key,
        )
    if name == "reinforce":
        return
    if recipe.prompt_task is not None:
        raise UserError(
            f"{name} needs written prompts, and a prompt_task has none. Use {{name: reinforce, entropy: 0.125}}.",
            code="wrong-objective",
            key=key,
        )
    if recipe.examples is not None and recipe.examples.references is None:
        raise UserError(
            f"{name} learns from references, and examples.references names no column. Set it, or use {{name: reinforce}}.",
            code="missing-key",
            key="examples.references",
        )
