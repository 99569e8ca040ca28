"""What the tables of a run must say together where it is guided; looked at before anything is read or trained."""

from tokenward.config import GuidanceTable
from tokenward.errors import UserError
from tokenward.objectives import PlackettLuce, is_pairwise
from tokenward.pipeline.context import Run
from tokenward.pipeline.guidance_stage import reward_settings
from tokenward.pipeline.train_stages import objective_of


def check_guided(run: Run) -> None:
    """What a guided run's tables must say together.

    Raises:
        UserError: a table is missing, or two contradict each other.
    """
    recipe = run.recipe
    assert recipe.guidance is not None
    if (recipe.examples is None) == (recipe.prompt_task is None):
        found = "both" if recipe.examples is not None else "neither"
        raise UserError(
            f"guidance needs one of the tables examples (prompts with references) and prompt_task (labelled texts), got {found}."
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
    if reward_settings(run).unit == "spans":
        raise UserError(
            "reward.head.unit is spans, which are marked in data; the samples of a guided run have none. Write unit: sentence, "
            "word or token."
        )


def check_not_guided(run: Run) -> None:
    """What only a guided run can have.

    Raises:
        UserError: the recipe has it.
    """
    if run.recipe.model.head_mlp is not None:
        raise UserError(
            "model.head_mlp is trained by a guided run, and this recipe has no table guidance. Leave it out, or write "
            "model.adapter to train a part of the model."
        )


def check_objective(run: Run, guidance: GuidanceTable) -> None:
    """What a guided run's objective must say together with its task.

    Raises:
        UserError: it has nothing to learn from there.
    """
    recipe, name = run.recipe, guidance.objective.name
    objective = objective_of("objective", guidance.objective)
    if is_pairwise(objective) or isinstance(objective, PlackettLuce):
        raise UserError(
            f"guidance.objective {name} compares written replies, and a guided run has one reference or samples of its own. "
            "Write objective: {name: weighted_likelihood}, or {name: reinforce}."
        )
    if recipe.prompt_task is not None and name != "reinforce":
        raise UserError(
            f"a prompt_task has no written prompts to learn the likelihood of, so guidance.objective cannot be {name}. Write "
            "objective: {name: reinforce, entropy: 0.125}."
        )
    if recipe.examples is not None and recipe.examples.references is None and name != "reinforce":
        raise UserError(
            f"guidance.objective {name} learns from references, and examples.references names no column. Name it, or write "
            "objective: {name: reinforce}."
        )
