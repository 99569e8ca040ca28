"""Which prompts a model answers while it trains, and how."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState

from tokenward.models.loading import LanguageModel
from tokenward.sampling import Reply, SamplingSettings, sample_replies
from tokenward.sampling.rollouts import Context
from tokenward.stages.run import Run
from tokenward.stages.tables import eval_comparisons
from tokenward.tokens.template import Template
from tokenward.training.samples import SAMPLES, AnswerPrompts


class FixedPrompt(NamedTuple):
    """A prompt that is answered while a model trains."""

    key: str
    text: str
    ids: Sequence[int]


def eval_prompts(run: Run, template: Template) -> list[FixedPrompt]:
    """The first of the prompts that the evaluation replies to; none where nothing is held out."""
    if not run.recipe.fixed_prompts:
        return []
    rows, _ = eval_comparisons(run, template).fitting(run.limits)
    found = rows.first_by_key(run.recipe.fixed_prompts)
    return [FixedPrompt(row.comparison.key, row.comparison.prompt[-1]["content"], row.asked) for row in found]


def example_prompts(run: Run, contexts: Sequence[Context]) -> list[FixedPrompt]:
    """The first development examples of an online run."""
    return [
        FixedPrompt(context.example.key, context.example.prompt[-1]["content"], context.prompt)
        for context in contexts[: run.recipe.fixed_prompts]
        if context.example.prompt
    ]


def watching(
    run: Run,
    model: LanguageModel,
    prompts: Sequence[FixedPrompt],
    folder: Path,
    *,
    also: Callable[[int, int], bool] = lambda step, total: False,
) -> AnswerPrompts | None:
    """What looks at a model while it trains; None where there is nothing to reply to.

    Replies are drawn as the evaluation draws them, but from the weights as they are, with the recipe's seed.
    """
    table, context = run.recipe.evaluation, run.limits.context
    prompts = [item for item in prompts if context is None or len(item.ids) + table.max_new_tokens <= context]
    if not prompts:
        return None
    settings = SamplingSettings(
        table.max_new_tokens, table.temperature, table.top_p, table.top_k, table.batch
    )
    template = model.template(run.style)

    def answer() -> list[Reply]:
        return sample_replies(model, template, [item.ids for item in prompts], settings, seed=run.recipe.seed)

    return AnswerPrompts(
        [item.key for item in prompts],
        [item.text for item in prompts],
        answer,
        folder / SAMPLES,
        show=run.display.line,
        also=also,
        main=PartialState().is_main_process,
    )
