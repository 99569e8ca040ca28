"""What the tables of a run must say together where it is guided; looked at before anything is read or trained."""

from functools import partial
from typing import NoReturn

from tokenward.config import OnlineTable
from tokenward.errors import UserError
from tokenward.objectives import PlackettLuce, needs_of, objective_of
from tokenward.plugins import find
from tokenward.sampling.checks import check_temperature
from tokenward.selection import Selector, SoftWeights, scope_of, selector_of, unit_of
from tokenward.stages.base import Checks
from tokenward.stages.online import head_mlp_settings, reads_reward, reward_settings
from tokenward.stages.reward_learning import SAME_AS_POLICY
from tokenward.stages.run import Run
from tokenward.stages.tasks import SAMPLERS, source_of

OVERRIDDEN = {
    "max_steps": "online.reward_steps says how many updates the reward has each time it is learned",
    "num_train_epochs": "online.reward_steps says how many updates the reward has each time it is learned",
    "seed": "the seed of the recipe gives each time that the reward is learned another one",
    "eval_strategy": "online.reward_evals says how often the reward's loss is looked at",
    "eval_steps": "online.reward_evals says how often the reward's loss is looked at",
}
"""Keys of ``reward.training`` that an online run sets itself, and what says so."""


def check_online(run: Run) -> None:
    """What an online run's tables must say together.

    Raises:
        UserError: a table is missing, or two contradict each other.
    """
    recipe = run.recipe
    assert recipe.online is not None
    if (recipe.examples is None) == (recipe.prompt_task is None):
        found = "both" if recipe.examples is not None else "neither"
        raise UserError(
            f"online needs one of the tables examples (prompts with references) and prompt_task (labelled texts), got {found}."
        )
    if recipe.prompt_task is not None and len(recipe.prompt_task.verbalizers) < 2:
        raise UserError(
            f"prompt_task.verbalizers is {recipe.prompt_task.verbalizers}; a classifier needs one word for each of 2 or more "
            "classes."
        )
    if recipe.model.head_mlp is not None and recipe.model.adapter is not None:
        raise UserError("model.head_mlp and model.adapter are two ways to train a part. Leave one out.")
    if recipe.sft is not None and (recipe.examples is None or recipe.examples.references is None):
        raise UserError(
            "sft fine-tunes on the references of examples, and this recipe has none. Name examples.references, or leave the "
            "table sft out."
        )
    _check_sampling(recipe.online)
    _check_reward(run, recipe.online)


def _check_sampling(online: OnlineTable) -> None:
    check_temperature(online.sampling.temperature, "online.sampling.temperature")
    if "" in online.sampling.stop:
        raise UserError(
            "online.sampling.stop holds an empty text, which stands in every reply: each would be over at its first token. "
            "Write stop: [], or texts of one or more characters."
        )


def _check_reward(run: Run, online: OnlineTable) -> None:
    selector = selector_of(online.selection, run.recipe.seed)
    if online.objective.name != "reinforce" and reads_reward(online.objective.name, selector):
        _check_range(run, selector, "online.selection")
        _check_scope(selector)
    if reward_settings(run).unit == "spans":
        raise UserError(
            "reward.head.unit is spans, which are marked in data; the samples of an online run have none. Write unit: sentence, "
            "word or token."
        )


def _check_scope(selector: Selector) -> None:
    """Refuse weights that need more than the references of one optimizer step, all that are weighed together."""
    if unit_of(selector):
        raise UserError(
            f"online.selection pools over {unit_of(selector)}, which the selection of an online run does not know. Leave segment_pool out, "
            "or write reward.head.unit, which gives a word or sentence one reward."
        )
    if scope_of(selector) == "dataset" and not isinstance(selector, SoftWeights):
        raise UserError(
            "online.selection has scope: dataset, and an online run weighs the references of one optimizer step at a time, by a "
            "reward that is learned again. Write scope: batch for those of a step, or response."
        )


def _check_range(run: Run, selector: Selector, where: str) -> None:
    """Refuse weights in proportion to rewards that may be negative; training would find out hours later."""
    low, _ = reward_settings(run).range
    if isinstance(selector, SoftWeights) and selector.transform != "exp" and low < 0:
        raise UserError(
            f"{where} has transform: {selector.transform}, which needs rewards greater than 0, and those of reward.head may be "
            f"anything from {low:g}. Write transform: exp with a temperature, or give reward.head a bound (softplus or sigmoid) "
            "with low: 1.0e-8."
        )


def unused_settings(run: Run) -> dict[str, str]:
    """Keys of an online recipe that nothing would read, each with what is wrong about it."""
    online, found = run.recipe.online, {}
    assert online is not None
    if online.patience is not None and online.evaluate_every is None:
        found["online.patience"] = (
            f"online.patience is {online.patience}, but the policy is never looked at. Write online.evaluate_every: the "
            "updates between two looks, or leave patience out."
        )
    if online.reward_patience is not None and online.reward_evals == 0:
        found["online.reward_patience"] = (
            f"online.reward_patience is {online.reward_patience}, but the reward is never looked at. Raise "
            "online.reward_evals, or leave reward_patience out."
        )
    for key in SAME_AS_POLICY:
        own = run.recipe.reward.training.get(key)
        if own is not None and own != online.training.get(key, False):
            found[f"reward.training.{key}"] = (
                f"reward.training.{key} is {str(own).lower()}, and the policy's is not: the two train in one process, which has one "
                "number type. Write the same in online.training, or leave it out of reward.training."
            )
    for key in run.recipe.reward.training:
        if key in OVERRIDDEN:
            found[f"reward.training.{key}"] = (
                f"reward.training.{key} has no say in an online run: {OVERRIDDEN[key]}. Leave it out."
            )
    return found


def check_not_online(run: Run) -> None:
    """What only an online run can have, and what a selection needs of a reward.

    Raises:
        UserError: the recipe has it, or the two do not fit.
    """
    if run.recipe.scores.scorer.name == "reward":
        _check_range(run, selector_of(run.recipe.policy.selection, run.recipe.seed), "policy.selection")
    if run.recipe.model.head_mlp is not None:
        raise UserError(
            "model.head_mlp is trained by an online run, and this recipe has no table online. Leave it out, or write "
            "model.adapter to train a part of the model."
        )


def check_objective(run: Run, online: OnlineTable) -> None:
    """What an online run's objective must say together with its task.

    Raises:
        UserError: it has nothing to learn from there.
    """
    recipe, name = run.recipe, online.objective.name
    objective = objective_of("objective", online.objective)
    if needs_of(objective).pairwise or isinstance(objective, PlackettLuce):
        raise UserError(
            f"online.objective {name} compares written replies, and an online run has one reference or samples of its own. "
            "Write objective: {name: weighted_likelihood}, or {name: reinforce}."
        )
    if recipe.prompt_task is not None and name != "reinforce":
        raise UserError(
            f"a prompt_task has no written prompts to learn the likelihood of, so online.objective cannot be {name}. Write "
            "objective: {name: reinforce, entropy: 0.125}."
        )
    if recipe.examples is not None and recipe.examples.references is None and name != "reinforce":
        raise UserError(
            f"online.objective {name} learns from references, and examples.references names no column. Name it, or write "
            "objective: {name: reinforce}."
        )


def online_checks(run: Run, table: OnlineTable) -> Checks:
    """What can be refused of an online run before anything is read."""
    checks: Checks = {
        "online.sampler": lambda: find("sampler", table.sampler.name, SAMPLERS),
        "online.selection": lambda: selector_of(table.selection, run.recipe.seed),
        "online": lambda: check_online(run),
        "online.objective": lambda: check_objective(run, table),
        **{key: partial(_refuse, problem) for key, problem in unused_settings(run).items()},
    }
    head_mlp = run.recipe.model.head_mlp
    if head_mlp is not None:
        checks["model.head_mlp"] = lambda: head_mlp_settings(head_mlp)
    if run.recipe.prompt_task is None:
        checks["online.source"] = lambda: source_of(run)
    return checks


def _refuse(problem: str) -> NoReturn:
    raise UserError(problem)
