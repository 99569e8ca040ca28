"""The online stage: learn a token reward from ranked samples and train the policy with it, in turns (TLM)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from tokenward.artifacts import StageFolder, fingerprint, write_jsonl
from tokenward.config import OnlineTable, Recipe
from tokenward.models.head_mlp import HeadMLPSettings
from tokenward.models.loading import LanguageModel, lasting
from tokenward.models.reward import RewardModel, RewardSettings, new_reward_model
from tokenward.objectives import SFT, Objective, needs_of, objective_of
from tokenward.plugins import build
from tokenward.sampling.rollouts import Context, sampled_row, seed_of
from tokenward.scoring.reads import token_values
from tokenward.selection import KeepAll, Selector, selector_of
from tokenward.selection.weights import weigh_rows
from tokenward.stages.base import Training, TrainingStage
from tokenward.stages.data import source_fingerprint
from tokenward.stages.reward_learning import DEFAULTS, RewardLearner
from tokenward.stages.run import Run
from tokenward.stages.tasks import (
    EncodedExamples,
    Task,
    check_same_tokens,
    encoded_examples,
    example_task,
    prompt_task,
)
from tokenward.stages.training import (
    SftStage,
    adapted,
    example_prompts,
    fit_stage,
    model_settings,
    scored_by,
    watching,
)
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.segments import with_segments
from tokenward.tokens.template import Template
from tokenward.training.alternating import Alternating, Schedule
from tokenward.training.callbacks import AnswerPrompts, KeepBest
from tokenward.training.passes import Prepare
from tokenward.types import Comparison

SPACED = 256
"""Prompts whose rollouts are counted in place of all, evenly spaced by length."""

EVALUATED = {"test", "test_limit", "candidates", "best", "manual", "random"}
"""Keys of the prompt task that only its evaluation reads."""


def task_of(run: Run, policy: LanguageModel) -> Task:
    """The task that the recipe describes, with replies from this policy."""
    return example_task(run, policy) if run.recipe.prompt_task is None else prompt_task(run, policy)


class OnlineSftStage(SftStage):
    """Fine-tune on the references of the examples."""

    def settings(self, run: Run) -> Mapping[str, Any]:
        """Its table, the tokens, and the number type."""
        return {**super().settings(run), "tokens": run.recipe.tokens.model_dump(exclude={"processes"})}

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The examples and the model."""
        name = run.whole(run.recipe.model.name)
        return {"examples": run.done("examples").fingerprint, "model": run.fingerprint_of(name)}

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Train."""
        assert run.recipe.sft is not None
        model = run.load(run.whole(run.recipe.model.name))
        template = model.template(run.style)
        train, development = (encoded_examples(run, template, part) for part in ("train", "development"))
        watch = watching(run, model, example_prompts(run, development.contexts), folder.path)
        table = run.recipe.sft.training
        return fit_stage(
            run, folder, model, SFT(), train.rows, table, eval_rows=development.rows, watch=watch
        )

    def planned(self, run: Run, template: Template) -> Training:
        """The references."""
        assert run.recipe.sft is not None
        table, start = run.recipe.sft.training, self.start(run.recipe)
        rows = written_rows(run, template)
        return Training(self.name, self.key, table, rows, SFT(), None, start, watched=True)


class OnlineStage(TrainingStage):
    """Carry out the alternating loop; writes ``model/``, ``reward/``, ``events.jsonl`` and ``history.jsonl``."""

    name, key, title = "online", "online", "the policy"

    def table(self, recipe: Recipe) -> OnlineTable | None:
        """The table ``online``."""
        return recipe.online

    def settings(self, run: Run) -> Mapping[str, Any]:
        """Its table, the reward's, the task, the tokens, and how models are held."""
        assert run.recipe.online is not None
        task = run.recipe.prompt_task
        return {
            "online": run.recipe.online.model_dump(),
            "reward": run.recipe.reward.model_dump(),
            "prompt_task": None if task is None else task.model_dump(exclude=EVALUATED),
            "tokens": run.recipe.tokens.model_dump(exclude={"processes"}),
            "scores": {"precision": run.recipe.scores.precision},
            **model_settings(run),
        }

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The models, and the examples or the texts of the task."""
        return _inputs(run)

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Train in turns."""
        assert run.recipe.online is not None
        return _train(run, folder, run.recipe.online)

    def planned(self, run: Run, template: Template) -> Training | None:
        """The references, or rollouts of full length; a prompt task cannot be counted."""
        online = run.recipe.online
        assert online is not None
        if run.recipe.prompt_task is not None:
            return None
        longest = online.sampling.max_new_tokens
        if online.objective.name == "reinforce":
            examples = encoded_examples(run, template, "train", reply=longest)
            rows = rollout_rows(examples, online.rollouts, longest)
        else:
            rows = written_rows(run, template, reply=longest)
        adapter, start = run.recipe.model.adapter, self.start(run.recipe)
        objective = self.objective(run)
        return Training(self.name, self.key, online.training, rows, objective, adapter, start, watched=True)


def written_rows(run: Run, template: Template, *, reply: int = 0) -> list[TokenRow]:
    """Training examples that have a reference."""
    return [row for row in encoded_examples(run, template, "train", reply=reply).rows if row.responses]


def rollout_rows(examples: EncodedExamples, count: int, length: int) -> list[TokenRow]:
    """Prompts with replies of full length in place of those that will be drawn; of many prompts, some."""
    prompts = sorted((context.prompt for context in examples.contexts), key=len, reverse=True)
    places = np.unique(np.linspace(0, len(prompts) - 1, min(SPACED, len(prompts))).astype(int))
    made = Comparison(key="", prompt=(), responses=("",) * count, ranks=(0,) * count, source="plan")
    return [TokenRow(made, prompts[place], [[0] * length] * count, [0] * count) for place in places]


def _inputs(run: Run) -> dict[str, str]:
    inputs = {"model": run.fingerprint_of(run.start_model)}
    if run.recipe.reward.model is not None:
        inputs["reward model"] = run.fingerprint_of(run.recipe.reward.model)
    table = run.recipe.prompt_task
    if table is None:
        return {**inputs, "examples": run.done("examples").fingerprint}
    files = fingerprint([source_fingerprint(path) for path in (table.train, table.development)])
    task = run.fingerprint_of(table.model or run.recipe.model.name)
    return {**inputs, "texts": files, "task model": task}


def online_policy(run: Run) -> LanguageModel:
    """The policy before training: whole, with an adapter, or with a network before its head."""
    start = run.load(run.start_model)
    settings = run.recipe.model.head_mlp
    if settings is None:
        return adapted(run, start, run.recipe.model.adapter)
    return start.with_head_mlp(head_mlp_settings(settings), seed=run.recipe.seed)


def head_mlp_settings(settings: dict[str, Any]) -> HeadMLPSettings:
    """The recipe's ``model.head_mlp``, checked."""
    return build("network", "head_mlp", settings, {"head_mlp": HeadMLPSettings})


def reward_settings(run: Run) -> RewardSettings:
    """The recipe's ``reward.head``, checked."""
    return build("reward head", "head", run.recipe.reward.head, {"head": RewardSettings})


def reward_start(run: Run) -> str:
    """The model whose body a token reward starts from."""
    return run.whole(run.recipe.reward.model) if run.recipe.reward.model else run.start_model


def fresh_reward(run: Run) -> RewardModel:
    """The token reward model before it has learned anything."""
    table = run.recipe.model
    return new_reward_model(
        reward_start(run),
        reward_settings(run),
        seed=run.recipe.seed,
        device=table.device,
        attention=table.attention,
        packing=table.packing,
        trust_remote_code=table.trust_remote_code,
    )


def reads_reward(objective_name: str, selector: Selector) -> bool:
    """Whether training looks at a reward at all; plain likelihood does not."""
    return objective_name == "reinforce" or not isinstance(selector, KeepAll)


def _train(run: Run, stage: StageFolder, online: OnlineTable) -> dict[str, Any]:
    policy = online_policy(run)
    task = task_of(run, policy)
    objective = objective_of("objective", online.objective, run.recipe.seed)
    selector = selector_of(online.selection, run.recipe.seed)
    reward = fresh_reward(run) if reads_reward(online.objective.name, selector) else None
    if reward is not None:
        check_same_tokens(policy, reward, "reward.model")
    loop = _loop(run, stage.path, online, policy, reward, task)
    prepare = _prepare(run, online, objective, selector, policy, reward, task)
    facts = fit_stage(
        run,
        stage,
        policy,
        objective,
        task.rows,
        online.training,
        prepare=prepare,
        defaults=DEFAULTS,
        between=loop,
        watch=_watch(run, stage.path, online, policy, task),
    )
    if reward is not None:
        reward.save(stage.path / "reward")
    write_jsonl(stage.path / "events.jsonl", loop.events, ascii=True)
    learned = sum(event["event"] == "reward" for event in loop.events)
    return {
        "start": lasting(run.start_model),
        **facts,
        **scored_by(run),
        "rewards_learned": learned,
        "best_step": loop.best_step,
    }


def _loop(
    run: Run,
    folder: Path,
    online: OnlineTable,
    policy: LanguageModel,
    reward: RewardModel | None,
    task: Task,
) -> Alternating:
    best = KeepBest(policy.model, larger_is_better=True, patience=online.patience)
    learner = None if reward is None else RewardLearner(run, folder / "reward_learning", reward, task)

    def judged(step: int) -> dict[str, float]:
        contexts = task.development[: online.development]
        seed = seed_of(run.recipe.seed, "look")  # the same draws at each look narrow their differences
        _, scores = task.samples.draw(contexts, count=online.evaluation_samples, seed=seed)
        values = [value for group in scores for value in group]
        return {"score": sum(values) / len(values)}

    return Alternating(
        Schedule(every=online.every, until=online.until, evaluate_every=online.evaluate_every),
        learn=learner,
        reward=None if reward is None else reward.model,
        evaluate=judged if online.evaluate_every is not None else None,
        best=best,
        show=run.display.line,
    )


def _watch(
    run: Run, folder: Path, online: OnlineTable, policy: LanguageModel, task: Task
) -> AnswerPrompts | None:
    """Replies to development prompts whenever the policy is looked at; the prompts of a prompt task are no replies."""
    if run.recipe.prompt_task is not None:
        return None
    schedule = Schedule(evaluate_every=online.evaluate_every)
    return watching(run, policy, example_prompts(run, task.development), folder, also=schedule.evaluates_at)


def _prepare(
    run: Run,
    online: OnlineTable,
    objective: Objective,
    selector: Selector,
    policy: LanguageModel,
    reward: RewardModel | None,
    task: Task,
) -> Prepare | None:
    """What becomes of a step's rows: samples with rewards, or weights of the written response."""
    if reward is None:
        return None
    if online.objective.name != "reinforce":
        return lambda rows, step: weigh_rows(selector, _rewarded(run, reward, rows))
    reference = run.load(run.start_model) if needs_of(objective).reference else None
    examples = {context.example.source: context.example for context in task.train}

    def sampled(rows: Sequence[TokenRow], step: int) -> list[TokenRow]:
        contexts = [Context(examples[row.comparison.source], row.prompt) for row in rows]
        # Processes may hold the same prompt, as in a prompt task, and must not draw the same replies to it.
        seed = seed_of(run.recipe.seed, "rollout", step, PartialState().process_index)
        prompts = [context.prompt for context in contexts]
        replies = task.samples.sampler(prompts, count=online.rollouts, seed=seed)
        empty = len(prompts) * online.rollouts - sum(map(len, replies))
        if empty:
            run.display.line(f"  step {step}: {empty} empty replies dropped")
        drawn = [sampled_row(context, group) for context, group in zip(contexts, replies, strict=True)]
        scored = _rewarded(run, reward, drawn)
        return scored if reference is None else _with_reference(run, reference, scored)

    return sampled


def _rewarded(run: Run, reward: RewardModel, rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Rows with the reward of each token as its score."""
    rows = [with_segments(reward.settings.unit, reward.tokenizer, row) for row in rows]
    values = token_values(reward, rows, **_pass_settings(run))
    return [replace(row, scores=value, segments=None) for row, value in zip(rows, values, strict=True)]


def _with_reference(run: Run, reference: LanguageModel, rows: Sequence[TokenRow]) -> list[TokenRow]:
    values = token_values(reference, rows, **_pass_settings(run))
    return [replace(row, reference_logp=value) for row, value in zip(rows, values, strict=True)]


def _pass_settings(run: Run) -> dict[str, Any]:
    return {"precision": run.recipe.scores.precision, "tokens_per_batch": run.recipe.scores.tokens_per_batch}
