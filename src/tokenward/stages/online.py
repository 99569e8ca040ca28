"""The online stage: learns a token reward from ranked samples and trains the policy with it, alternately (TLM)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenward.api.own_replies import (
    DEVICE_BATCH,
    OwnReplies,
    check_baseline,
    check_same_tokens,
    of_all_processes,
    rewarded,
)
from tokenward.api.training import with_new_adapter
from tokenward.artifacts import StageFolder, fingerprint, user_path, write_jsonl
from tokenward.config import OnlineTable, Recipe
from tokenward.distributed import first_alone
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
from tokenward.sampling.rollouts import seed_of
from tokenward.sampling.sources import SequenceClassifier
from tokenward.scoring.basic import Reward
from tokenward.scoring.texts import TokenScorer, is_scorer_folder, model_of, reference_of
from tokenward.selection import KeepAll, Selector, selector_of
from tokenward.selection.weights import weigh_rows
from tokenward.stages.base import Training, TrainingStage
from tokenward.stages.data import source_fingerprint
from tokenward.stages.own_replies import planned_replies
from tokenward.stages.reward_learning import DEFAULTS, RewardLearner
from tokenward.stages.run import Run
from tokenward.stages.tasks import encoded_examples, source_of, task_of
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
            prompts = [
                context.prompt for context in encoded_examples(run, template, "train", reply=longest).contexts
            ]
            rows = planned_replies(prompts, online.rollouts, longest)
        else:
            rows = _rows_with_reference(run, template, reply=longest)
        return self.plan(run, rows, watched=True)


def _rows_with_reference(run: Run, template: Template, *, reply: int = 0) -> list[TokenRow]:
    return [row for row in encoded_examples(run, template, "train", reply=reply).rows if row.responses]


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
        self._replies: OwnReplies | None = None
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
        if self._replies is not None:
            self._replies.show()
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
        """Turns the rows of a step into training rows: sampled replies with rewards, or references with weights."""
        rewards, task, online = self.rewards, self.task, self.online
        if rewards is None:
            return None

        def weighed(rows: Sequence[TokenRow], step: int) -> list[TokenRow]:
            return weigh_rows(self.selector, rewarded(rewards, rows, self.run.passes["tokens_per_batch"]))

        made: Prepare = weighed
        if online.objective.name == "reinforce":
            check_baseline(self.objective, online.rollouts)
            made = self._replies = OwnReplies(
                samples=task.samples,
                count=online.rollouts,
                rewards=rewards,
                examples={context.example.key: context.example for context in task.train},
                seed=self.run.recipe.seed,
                say=self.run.display.line,
                reference=self.run.load(self.run.start_model) if needs_of(self.objective).reference else None,
                **self.run.passes,
            )
        size = int(online.training.get("per_device_train_batch_size", DEVICE_BATCH))
        return of_all_processes(made, task.rows, size)
