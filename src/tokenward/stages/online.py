"""The online stage: learn a token reward from ranked samples and train the policy with it, in turns (TLM)."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from tokenward.artifacts import Manifest, StageFolder, atomic_write, fingerprint
from tokenward.config import OnlineTable
from tokenward.models.head_mlp import HeadMLPSettings
from tokenward.models.loading import LanguageModel, lasting
from tokenward.models.reward import RewardModel, RewardSettings, new_reward_model
from tokenward.objectives import SFT, Objective, needs_of, objective_of
from tokenward.plugins import build
from tokenward.sampling.rollouts import Context, sampled_row, seed_of
from tokenward.scoring.values import token_values
from tokenward.selection import KeepAll, Selector, selector_of
from tokenward.selection.weights import weigh_rows
from tokenward.stages.data import source_fingerprint
from tokenward.stages.fit import fit
from tokenward.stages.prompt_task import prompt_task
from tokenward.stages.reward_learning import DEFAULTS, RewardLearner
from tokenward.stages.run import Run
from tokenward.stages.tasks import Task, check_same_tokens, encoded_examples, example_task
from tokenward.stages.training import adapted, model_settings, scored_by
from tokenward.stages.watch import example_prompts, watching
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.segments import with_segments
from tokenward.training.alternating import Alternating, Schedule
from tokenward.training.best import KeepBest
from tokenward.training.collator import Prepare
from tokenward.training.samples import AnswerPrompts

EVALUATED = {"test", "test_limit", "candidates", "best", "manual", "random"}
"""Keys of the prompt task that only its evaluation reads."""


def task_of(run: Run, policy: LanguageModel) -> Task:
    """The task that the recipe describes, with replies from this policy."""
    return example_task(run, policy) if run.recipe.prompt_task is None else prompt_task(run, policy)


def train_online_sft(run: Run) -> Manifest | None:
    """Fine-tune the recipe's model on the examples' references; nothing if the recipe has no ``sft`` table."""
    table = run.recipe.sft
    if table is None:
        return None
    name = run.whole(run.recipe.model.name)
    settings = {
        "sft": table.model_dump(),
        "tokens": run.recipe.tokens.model_dump(exclude={"processes"}),
        "model": {"dtype": run.recipe.model.dtype},
        "seed": run.recipe.seed,
    }
    inputs = {"examples": run.done("examples").fingerprint, "model": run.fingerprint_of(name)}
    with run.stage("sft", settings, inputs) as stage:
        if not stage.done:
            model = run.load(name)
            template = model.template(run.style)
            parts = [encoded_examples(run, template, part) for part in ("train", "development")]
            watch = watching(run, model, example_prompts(run, parts[1].contexts), stage.path)
            stage.complete(
                **fit(
                    run,
                    stage,
                    model,
                    SFT(),
                    parts[0].rows,
                    table.training,
                    eval_rows=parts[1].rows,
                    watch=watch,
                )
            )
    return run.done("sft")


def train_online(run: Run) -> Manifest:
    """Carry out the alternating loop; writes ``model/``, ``reward/``, ``events.jsonl`` and ``history.jsonl``."""
    online = run.recipe.online
    assert online is not None
    task = run.recipe.prompt_task
    settings = {
        "online": online.model_dump(),
        "reward": run.recipe.reward.model_dump(),
        "prompt_task": None if task is None else task.model_dump(exclude=EVALUATED),
        "tokens": run.recipe.tokens.model_dump(exclude={"processes"}),
        "scores": {"precision": run.recipe.scores.precision},
        **model_settings(run),
    }
    with run.stage("online", settings, _inputs(run)) as stage:
        if not stage.done:
            _train(run, stage, online)
    return run.done("online")


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


def _train(run: Run, stage: StageFolder, online: OnlineTable) -> None:
    policy = online_policy(run)
    task = task_of(run, policy)
    objective = objective_of("objective", online.objective, run.recipe.seed)
    selector = selector_of(online.selection, run.recipe.seed)
    reward = fresh_reward(run) if reads_reward(online.objective.name, selector) else None
    if reward is not None:
        check_same_tokens(policy, reward, "reward.model")
    loop = _loop(run, stage.path, online, policy, reward, task)
    prepare = _prepare(run, online, objective, selector, policy, reward, task)
    facts = fit(
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
    atomic_write(stage.path / "events.jsonl", "".join(json.dumps(event) + "\n" for event in loop.events))
    learned = sum(event["event"] == "reward" for event in loop.events)
    stage.complete(
        start=lasting(run.start_model),
        **facts,
        **scored_by(run),
        rewards_learned=learned,
        best_step=loop.best_step,
    )


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
    return watching(run, policy, example_prompts(run, task.development), folder, also=schedule.looks_at)


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
