"""The comparisons of a run in the tokens of an oracle whose tokenizer or chat template is not the policy's."""

from tokenward.api.transfer import OtherTokens, other_templates
from tokenward.api.values import frozen_values
from tokenward.scoring.scorers import Scorer
from tokenward.stages.auxiliary import scorer_of
from tokenward.stages.run import Run
from tokenward.stages.tables import tables
from tokenward.tokens.template import Template


def other_template(run: Run, scorer: Scorer) -> tuple[Template, frozenset[str]] | None:
    """The template of the models that read other tokens than the policy, and their names; None if all read the same.

    The tokenizers are those of the models that the recipe names, so nothing has to be trained to know them.

    Raises:
        UserError: the scores cannot go from their tokens to those of the policy.
    """
    own = policy_template(run)
    read = {value.model for value in frozen_values(scorer) if value.model != "data"}
    templates = {model: run.tokenizer_template(_named(run, model)) for model in sorted({"reference", *read})}
    return other_templates(templates, own, scorer)


def policy_template(run: Run) -> Template:
    """The template of the policy."""
    return run.tokenizer_template(_made(run, run.recipe.policy.model))


def _made(run: Run, name: str | None) -> str:
    """A model that the recipe names, or the start of the run; the recipe's model until the SFT stage has made that one."""
    if name is not None:
        return run.whole(name)
    waits = run.recipe.sft is not None and not (run.path("sft") / "model").is_dir()
    return run.recipe.model.name if waits else run.start_model


def _named(run: Run, model: str) -> str:
    """The model with the tokenizer of a model that scorers read."""
    base = _made(run, run.recipe.oracle.model)
    if model == "reward":
        return _made(run, run.recipe.reward.model)
    auxiliary = run.recipe.auxiliary_models.get(model)
    return (auxiliary.model if auxiliary is not None else None) or base


def other_tokens(run: Run) -> OtherTokens | None:
    """The run's comparisons in the tokens of the models that its scorer reads; None if the policy reads the same.

    Raises:
        UserError: as :func:`other_template`.
    """
    found = other_template(run, scorer_of(run))
    if found is None:
        return None
    (template, models), own = found, policy_template(run)
    return OtherTokens(
        template=template,
        models=models,
        rows=tables(run, template).everything,
        own=tables(run, own).everything,
        own_template=own,
    )


def judge_start(run: Run) -> str:
    """The model that the eval reward model is trained from: the oracle's, unless the policy's replies have other tokens."""
    base = _made(run, run.recipe.oracle.model)
    same = run.tokenizer_template(base).fingerprint == policy_template(run).fingerprint
    return run.reference_model if same else run.policy_start
