"""The online stage: learns a token reward from ranked samples and trains the policy with it, alternately (TLM)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import TrainingArguments

from tokenward.api.training import with_new_adapter
from tokenward.artifacts import StageFolder, fingerprint, user_path, write_jsonl
from tokenward.config import OnlineTable, Recipe
from tokenward.distributed import alone, first_alone, gather, place
from tokenward.models.head_mlp import HeadMLPSettings
from tokenward.models.loading import LanguageModel, absolute_name
from tokenward.models.reward import (
    RewardModel,
    RewardSettings,
    is_reward_folder,
    new_reward_model,
    settings_of_reward,
)
from tokenward.models.sharding import whole_state
from tokenward.models.spread import new_reward_in_first
from tokenward.objectives import SFT, Objective, needs_of
from tokenward.plugins import build
from tokenward.sampling.rollouts import Context, sampled_row, seed_of
from tokenward.sampling.sources import SequenceClassifier
from tokenward.scoring.basic import Reward
from tokenward.scoring.reads import token_values
from tokenward.scoring.texts import TokenScorer, is_scorer_folder, model_of, reference_of
from tokenward.selection import KeepAll, Selector, selector_of
from tokenward.selection.weights import weigh_rows
from tokenward.stages.base import Training, TrainingStage
from tokenward.stages.data import source_fingerprint
from tokenward.stages.reward_learning import DEFAULTS, RewardLearner
from tokenward.stages.run import Run
from tokenward.stages.tasks import EncodedExamples, check_same_tokens, encoded_examples, source_of, task_of
from tokenward.stages.training import (
    SftStage,
    cuts,
    example_prompts,
    fit_stage,
    model_settings,
    scored_by,
    watching,
)
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.template import Template
from tokenward.training.alternating import Alternating, Schedule
from tokenward.training.callbacks import KeepBest
from tokenward.training.passes import Prepare
from tokenward.types import Comparison

_PLANNED_PROMPTS = 256  # a plan counts the rollouts of so many prompts, evenly spaced by length
_DEVICE_BATCH = TrainingArguments.per_device_train_batch_size  # transformers' default
_EVALUATION_KEYS = {"test", "test_limit", "candidates", "best", "manual", "random"}  # of the prompt task


class OnlineSftStage(SftStage):
    """Fine-tune on the references of the examples."""

    def settings(self, run: Run) -> Mapping[str, Any]:
        return {**super().settings(run), "tokens": run.recipe.tokens.model_dump(exclude={"processes"})}

    def inputs(self, run: Run) -> Mapping[str, str]:
        name = run.whole(run.recipe.model.name)
        return {"examples": run.done("examples").identity, "model": run.fingerprint_of(name)}

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        assert run.recipe.sft is not None
        model = run.load(run.whole(run.recipe.model.name))
        template = model.template(run.style)
        train, development = (encoded_examples(run, template, part) for part in ("train", "development"))
        prompts = example_prompts(run, development.contexts)
        return fit_stage(
            run,
            folder,
            model,
            SFT(),
            train.rows,
            run.recipe.sft.training,
            eval_rows=development.rows,
            watch=lambda trained: watching(run, trained, prompts, folder.path),
        )

    def planned(self, run: Run, template: Template) -> Training:
        return self.plan(run, _rows_with_reference(run, template), watched=True)


class OnlineStage(TrainingStage):
    """Run the alternating loop; writes ``model/``, ``reward/``, ``events.jsonl`` and ``history.jsonl``."""

    name, key, title = "online", "online", "the policy"

    def table(self, recipe: Recipe) -> OnlineTable | None:
        return recipe.online

    def settings(self, run: Run) -> Mapping[str, Any]:
        task = run.recipe.prompt_task
        return {
            "online": run.online.model_dump(),
            "reward": run.recipe.reward.model_dump(),
            "prompt_task": None if task is None else task.model_dump(exclude=_EVALUATION_KEYS),
            "tokens": run.recipe.tokens.model_dump(exclude={"processes"}),
            "scores": {"precision": run.recipe.scores.precision},
            **model_settings(run),
        }

    def inputs(self, run: Run) -> Mapping[str, str]:
        inputs = {"model": run.fingerprint_of(run.start_model)}
        if run.recipe.reward.model is not None:
            inputs["reward model"] = run.fingerprint_of(run.recipe.reward.model)
        if run.online.reward is not None:
            inputs["learned reward"] = run.fingerprint_of(model_of(run.online.reward))
            if (reference := reference_of(run.online.reward)) is not None:
                inputs["reference of the reward"] = run.fingerprint_of(reference)
        source = source_of(run) if run.online.source is not None else None
        if isinstance(source, SequenceClassifier):
            inputs["source model"] = run.fingerprint_of(source.model)
        table = run.recipe.prompt_task
        if table is None:
            return {**inputs, "examples": run.done("examples").identity}
        files = fingerprint([source_fingerprint(path) for path in (table.train, table.development)])
        task = run.fingerprint_of(table.model or run.recipe.model.name)
        return {**inputs, "texts": files, "task model": task}

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        cut = cuts(run, folder, run.online.training)
        return OnlineLoop(run, folder, self.objective(run), cut=cut).train()

    def planned(self, run: Run, template: Template) -> Training | None:
        """Rows with references, or rollouts of maximum length; the rows of a prompt task are not counted."""
        online, longest = run.online, run.online.sampling.max_new_tokens
        if run.recipe.prompt_task is not None:
            return None
        if online.objective.name == "reinforce":
            rows = _rollout_rows(
                encoded_examples(run, template, "train", reply=longest), online.rollouts, longest
            )
        else:
            rows = _rows_with_reference(run, template, reply=longest)
        return self.plan(run, rows, watched=True)


def _rows_with_reference(run: Run, template: Template, *, reply: int = 0) -> list[TokenRow]:
    return [row for row in encoded_examples(run, template, "train", reply=reply).rows if row.responses]


def _rollout_rows(examples: EncodedExamples, count: int, length: int) -> list[TokenRow]:
    """Prompts with placeholder replies of maximum length; of many prompts, some."""
    prompts = sorted((context.prompt for context in examples.contexts), key=len, reverse=True)
    size = min(_PLANNED_PROMPTS, len(prompts))
    places = np.unique(np.linspace(0, len(prompts) - 1, size).astype(int))
    made = Comparison(key="", prompt=(), responses=("",) * count, ranks=(0,) * count, source="plan")
    return [TokenRow(made, prompts[place], [[0] * length] * count, [0] * count) for place in places]


def online_policy(run: Run, *, cut: bool = False) -> LanguageModel:
    """The policy before training: whole, with an adapter, or with an MLP before its head; ``cut`` as for :meth:`Run.load`."""
    settings = run.recipe.model.head_mlp
    start = run.load(run.start_model, cut=cut and settings is None)
    if settings is None:
        return with_new_adapter(start, run.recipe.model.adapter, run.recipe.seed)
    return start.with_head_mlp(head_mlp_settings(settings), seed=run.recipe.seed)


def head_mlp_settings(settings: dict[str, Any]) -> HeadMLPSettings:
    """The recipe's ``model.head_mlp``, validated."""
    return build("network", "head_mlp", settings, {"head_mlp": HeadMLPSettings})


def head_settings(run: Run) -> RewardSettings:
    """The recipe's ``reward.head``, validated."""
    return build("reward head", "head", run.recipe.reward.head, {"head": RewardSettings})


def reward_settings(run: Run) -> RewardSettings:
    """Settings of the reward that the run learns, or of the one that ``online.reward`` names; an oracle's is without bounds."""
    folder = None if run.recipe.online is None else run.recipe.online.reward
    if folder is None:
        return head_settings(run)
    model = model_of(folder)
    if is_scorer_folder(user_path(folder)) and not is_reward_folder(Path(model)):
        return RewardSettings(bound="none")
    return settings_of_reward(model, key="online.reward")


def reward_start(run: Run) -> str:
    """The model that initializes the body of a token reward."""
    return run.whole(run.recipe.reward.model) if run.recipe.reward.model else run.start_model


def fresh_reward(run: Run, *, cut: bool = False) -> RewardModel:
    """The token reward model before training; ``cut`` as for :meth:`Run.load`."""
    table = run.recipe.model
    return (new_reward_in_first if cut else new_reward_model)(
        reward_start(run),
        reward_settings(run),
        seed=run.recipe.seed,
        device=table.device,
        attention=table.attention,
        packing=table.packing,
        trust_remote_code=table.trust_remote_code,
    )


def reads_reward(objective_name: str, selector: Selector) -> bool:
    """Whether training uses a reward; likelihood with weight 1 for every token does not."""
    return objective_name == "reinforce" or not isinstance(selector, KeepAll)


class OnlineLoop:
    """The training of an online policy and its reward; ``cut`` as for :meth:`Run.load`."""

    def __init__(self, run: Run, stage: StageFolder, objective: Objective, *, cut: bool = False) -> None:
        self.run, self.stage, self.online, self.objective = run, stage, run.online, objective
        self.policy = online_policy(run, cut=cut)
        self.task = task_of(run, self.policy)
        self.selector = selector_of(self.online.selection, run.recipe.seed)
        self._empty = 0
        reads = reads_reward(self.online.objective.name, self.selector)
        folder = self.online.reward
        self.learned = fresh_reward(run) if reads and folder is None else None
        self.rewards: TokenScorer | None = None
        if reads and folder is not None:
            self.rewards = TokenScorer.load(folder, device=run.recipe.model.device)
        elif self.learned is not None:
            self.rewards = TokenScorer({"reward": self.learned}, Reward(), run.style, run.passes["precision"])
        for model in () if self.rewards is None else self.rewards.models.values():
            key = "reward.model" if folder is None else "online.reward"
            check_same_tokens(self.policy, model, "reward model", key)

    def train(self) -> dict[str, Any]:
        """Train; returns the facts of the stage."""
        run, online, folder = self.run, self.online, self.stage.path
        callback, looks = self._callback(), Schedule(evaluate_every=online.evaluate_every).evaluates_at
        # The prompts of a prompt task are not replied to.
        prompts = [] if run.recipe.prompt_task else example_prompts(run, self.task.development)
        facts = fit_stage(
            run,
            self.stage,
            self.policy,
            self.objective,
            self.task.rows,
            online.training,
            prepare=self.prepare(),
            defaults=DEFAULTS,
            between=callback,
            watch=lambda policy: watching(run, policy, prompts, folder, also=looks),
        )
        if self._empty:
            run.display.line(f"  empty replies that did not train: {self._empty}")
        weights = None if self.learned is None else whole_state(self.learned.model)
        first_alone(lambda: self._write(callback, weights))
        learned = sum(event["event"] == "reward" for event in callback.events)
        start = {"start": absolute_name(run.start_model)}
        return {
            **start,
            **facts,
            **scored_by(run),
            "rewards_learned": learned,
            "best_step": callback.best_step,
        }

    def _write(self, callback: Alternating, weights: dict[str, Tensor] | None) -> None:
        if self.learned is not None:
            self.learned.save(self.stage.path / "reward", weights)
        write_jsonl(self.stage.path / "events.jsonl", callback.events, ascii=True)

    def _callback(self) -> Alternating:
        online, reward = self.online, self.learned
        learner = None if reward is None else RewardLearner(self.run, self.stage, reward, self.task)
        return Alternating(
            Schedule(every=online.every, until=online.until, evaluate_every=online.evaluate_every),
            learn=learner,
            reward=None if reward is None else reward.model,
            evaluate=self._evaluate if online.evaluate_every is not None else None,
            best=KeepBest(self.policy.model, larger_is_better=True, patience=online.patience),
            show=self.run.display.line,
        )

    def _evaluate(self, step: int) -> dict[str, float]:
        contexts = self.task.development[: self.online.development]
        # The same random numbers in every evaluation reduce the variance of their differences.
        seed = seed_of(self.run.recipe.seed, "look")
        _, scores = self.task.samples.draw(contexts, count=self.online.evaluation_samples, seed=seed)
        values = [value for group in scores for value in group]
        return {"score": sum(values) / len(values)}

    def prepare(self) -> Prepare | None:
        """Turns the rows of a step into training rows: sampled replies with rewards, or references with weights.

        Every process makes all rows of the step, in shares, and takes its own, so they are those of one process.
        """
        made = self._prepare()
        if made is None or alone():
            return made

        def own(rows: Sequence[TokenRow], step: int) -> Sequence[TokenRow]:
            known = {row.comparison.source: row for row in self.task.rows}
            every, mine = self._of_step([row.comparison.source for row in rows])
            found = made([known[source] for source in every], step)
            return [found[number] for number in mine]

        return own

    def _of_step(self, sources: list[str]) -> tuple[list[str], list[int]]:
        """The rows of a step in all processes, in the order of one process, and the places of those of this one."""
        size = int(self.online.training.get("per_device_train_batch_size", _DEVICE_BATCH))
        shares = [[rows[i : i + size] for i in range(0, len(rows), size)] for rows in gather(sources)]
        every: list[str] = []
        mine: list[int] = []
        for batch in range(max(map(len, shares))):
            for rank, share in enumerate(shares):
                rows = share[batch] if batch < len(share) else []
                mine += range(len(every), len(every) + len(rows)) if rank == place().rank else []
                every += rows
        return every, mine

    def _prepare(self) -> Prepare | None:
        rewards = self.rewards
        if rewards is None:
            return None
        if self.online.objective.name != "reinforce":
            return lambda rows, step: weigh_rows(self.selector, self._rewarded(rewards, rows))
        reference = self.run.load(self.run.start_model) if needs_of(self.objective).reference else None
        examples = {context.example.source: context.example for context in self.task.train}

        def sampled(rows: Sequence[TokenRow], step: int) -> list[TokenRow]:
            contexts = [Context(examples[row.comparison.source], row.prompt) for row in rows]
            scored = self._rewarded(rewards, self._sampled(contexts, step))
            return scored if reference is None else _with_reference(self.run, reference, scored)

        return sampled

    def _sampled(self, contexts: Sequence[Context], step: int) -> list[TokenRow]:
        # The last number was that of a process; it stays, so that the replies to a seed stay.
        seed = seed_of(self.run.recipe.seed, "rollout", step, 0)
        prompts = [context.prompt for context in contexts]
        replies = self.task.samples.replies(prompts, count=self.online.rollouts, seed=seed)
        empty = len(prompts) * self.online.rollouts - sum(map(len, replies))
        if empty and not self._empty:
            self.run.display.line(
                f"  step {step}: {empty} of {len(prompts) * self.online.rollouts} replies are empty and do not train. Further ones are "
                "counted, and their number is shown at the end"
            )
        self._empty += empty
        return [sampled_row(context, group) for context, group in zip(contexts, replies, strict=True)]

    def _rewarded(self, rewards: TokenScorer, rows: Sequence[TokenRow]) -> list[TokenRow]:
        """Rows with the reward of each token as its score."""
        values = rewards.of_rows(rows, tokens_per_batch=self.run.passes["tokens_per_batch"], shared=True)
        return [replace(row, scores=value) for row, value in zip(rows, values, strict=True)]


def _with_reference(run: Run, reference: LanguageModel, rows: Sequence[TokenRow]) -> list[TokenRow]:
    values = token_values(reference, rows, shared=True, **run.passes)
    return [replace(row, reference_logp=value) for row, value in zip(rows, values, strict=True)]
