"""Training an arm with the command that everybody has, and measuring the checkpoints that it leaves."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel

from studies.arms import START
from studies.frontier import people
from studies.frontier.arms import ARMS, LAYERS, ONLINE, ORACLE, REWARD, Arm
from studies.frontier.measure import divergence, logps_of, of_tokens, sampled
from studies.frontier.world import REPLIES, ROLLOUTS, SPARE, World, words_of
from studies.small import cut
from tokenward import TokenScorer
from tokenward.artifacts import atomic_file, atomic_write, fingerprint
from tokenward.models.identity import model_fingerprint
from tokenward.stages.lists import carry_out, run_through
from tokenward.stages.run import Run
from tokenward.stages.tables import tables
from tokenward.tools.run import open_run

BATCH, GROUPS = 8, 4
"""Pairs of an update, and distilled rows for each training prompt."""

LEAST = 0.001
"""Smallest difference of the rewards in a pair: VADER rounds to a tenth of it."""

REFITTED = 1.0e-3
"""Learning rate with which a model that lost layers learns the likelihood of replies."""


def recipe_of(world: World, arm: Arm, rate: float, points: Sequence[int], rows: Path) -> dict[str, Any]:
    """The whole recipe of an arm on a file of rows."""
    body, size = json.loads(json.dumps(arm.body)), world.size  # tables of their own
    shared = {
        "seed": world.seed,
        "model": {"name": world.model, "device": "cpu"},
        "tokens": {
            "template": "plain",
            "max_prompt_tokens": 64,
            "max_response_tokens": size.reply,
            "too_long": "truncate",
            "processes": 1,
        },
        "evaluation": {"prompts": 1},
        "fixed_prompts": 0,
    }
    training = {"per_device_train_batch_size": BATCH, "lr_scheduler_type": "constant"}
    schedule = "linear" if arm.online or arm.falls else "constant"
    saved = {
        "learning_rate": ONLINE if arm.online else rate,
        "max_steps": points[-1],
        "save_strategy": "steps",
        "save_steps": points[0],
        "save_total_limit": len(points),
    }
    scoring, rewarding = (
        {**training, **table, "learning_rate": table["learning_rate"] / size.slower}
        for table in (ORACLE, REWARD["training"])
    )
    if "oracle" in body:
        body["oracle"]["training"] = {**scoring, **body["oracle"].get("training", {})}
    if body["scores"]["scorer"]["name"] == "reward":
        head = {} if body["policy"]["selection"]["name"] == "soft" else REWARD["head"]
        # On less data the reward trains for as many updates, as a policy on pairs does.
        longer = {"num_train_epochs": arm.epochs * rewarding["num_train_epochs"]}
        body["reward"] = {"head": head, "training": rewarding | longer}
    for table in body.get("auxiliary_models", {}).values():
        if "training" in table:
            table["training"] = {**scoring, **table["training"]}
    body["policy"]["training"] = {**training, **saved, "lr_scheduler_type": schedule}
    if arm.online:
        body["policy"]["objective"]["kl"] = rate
        body["policy"]["training"] |= {"per_device_train_batch_size": size.asked}
        sampling = {"max_new_tokens": size.reply, "top_k": 0, "batch": size.asked * ROLLOUTS}
        body["policy"] |= {"rollouts": ROLLOUTS, "sampling": sampling}
    data = {"source": str(rows.resolve()), "eval": 0, "min_gap": LEAST, "pairs": arm.pairs}
    data |= {} if arm.part == 100 else {"limit": size.train * arm.part // 100}
    return {**shared, "data": data, **body}


def trained(world: World, arm: Arm, rate: float) -> list[Path]:
    """Train an arm's policy, and return the models at its points."""
    rows, names = world.rows, _models(world, arm)
    if arm.judge:
        judge = _run_to(world, recipe_of(world, _judge(arm), rate, [1], rows), arm.judge)
        rows, names = distilled(world, judge), {"ORACLE": str(judge / "model")}
    points = world.size.points
    step = world.size.updates // points
    if not arm.online:
        pairs = arm.epochs * _pairs(world, _named(recipe_of(world, arm, rate, [1], rows), names))
        step = pairs // BATCH // points
    steps = [step * place for place in range(1, points + 1)]
    recipe = _named(recipe_of(world, arm, rate, steps, rows), names)
    recipe["policy"]["training"]["save_total_limit"] = (
        1000  # a slow training saves by the clock too: no point may be lost
    )
    policy = _run_to(world, recipe, "policy")
    return [policy / "checkpoints" / f"checkpoint-{step}" for step in steps]


def judge_of(world: World, arm: Arm, stage: str) -> Path:
    """Train the ``oracle`` or the ``reward`` that an arm's tokens are scored by; returns its folder."""
    names = _models(world, arm)
    if "ORACLE" in names:
        return Path(names["ORACLE"]).parent
    return _run_to(world, _named(recipe_of(world, arm, 0.0, [1], world.rows), names), stage)


def _models(world: World, arm: Arm) -> dict[str, str]:
    """Folders of the models from elsewhere that an arm's recipe names; they are made."""
    if arm.scored_by == "smaller":
        _smaller(world)
        return {"SMALLER": str(world.folder / "smaller" / "oracle" / "model")}
    if arm.scored_by == "other":
        other = world.other
        other.make()
        folder = _run_to(other, recipe_of(other, ARMS["sepo30"], 0.0, [1], other.rows), "oracle")
        return {"ORACLE": str(folder / "model")}
    return {}


def _named(recipe: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A recipe with the folders of its models in place of their names."""
    for table in (recipe.get("oracle", {}), *recipe.get("auxiliary_models", {}).values()):
        if "model" in table:
            table["model"] = names.get(table["model"], table["model"])
    return recipe


def _smaller(world: World) -> None:
    """Make the start of a smaller oracle: some layers of the model, trained for the likelihood of all replies."""
    folder = cut(world.model, world.folder / "cut", LAYERS)
    arm = ARMS["sepo30"]._replace(pairs="all")
    recipe = recipe_of(world, arm, 0.0, [1], world.rows)
    recipe["model"]["name"] = str(folder)
    recipe["oracle"] = {
        "objective": {"name": "weighted_likelihood", "sides": "both"},
        "training": {**recipe["oracle"]["training"], "learning_rate": REFITTED},
    }
    run_through(_opened(world, recipe, "smaller"), "oracle")


def _judge(arm: Arm) -> Arm:
    """The arm whose oracle or reward, learned from all pairs, ranks the replies that another arm is distilled from."""
    return ARMS["sepo30" if arm.judge == "oracle" else "tlm_sepo"]._replace(pairs="all")


def made_by(
    world: World, arm: Arm, rate: float, model: str | None = None, conversations: str | None = None
) -> str:
    """Digest of the model and of all that an arm trains with, but for the seed and the places of files.

    Args:
        world: The data of a seed.
        arm: The arm.
        rate: Its learning rate, or KL factor.
        model: Fingerprint of the model; None reads its folder.
        conversations: Digest of the world's conversations; None reads its file, if it has one.
    """
    if conversations is None and world.conversations is not None:
        conversations = people.digest(world.conversations)
    recipes = [
        recipe_of(world, one, rate, [1], world.rows) for one in (arm, *([_judge(arm)] if arm.judge else []))
    ]
    for recipe in recipes:
        del recipe["seed"], recipe["model"], recipe["data"]["source"]
    size = world.size
    constants: list[Any] = [size.prompt, size.reply, SPARE, size.train, size.held, REPLIES, size.points]
    constants += [size.updates] if arm.online else [GROUPS]
    constants += [world.opening] if world.opening else []
    constants += [conversations] if conversations else []
    constants += [LAYERS, REFITTED] if arm.scored_by == "smaller" else []
    constants += [arm.epochs] if arm.epochs > 1 and not arm.online else []
    return fingerprint([model or model_fingerprint(world.model), constants, recipes])


def _opened(world: World, recipe: dict[str, Any], name: str = "") -> Run:
    """The run of a recipe. Recipes of one data file share a run, so its data, reference values and oracle are made once."""
    parts = (Path(recipe["data"]["source"]).stem, recipe["data"]["pairs"], recipe["data"].get("limit"))
    name = name or "-".join(str(part) for part in parts if part is not None)
    file = world.folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return open_run(str(file), [f"run={world.folder / name}"], quiet=True)


def _pairs(world: World, recipe: dict[str, Any]) -> int:
    """How many pairs a recipe trains on."""
    run = _opened(world, recipe)
    run_through(run, "data")
    return tables(run, run.tokenizer_template(run.recipe.model.name)).counts["train"]["kept"]


def _run_to(world: World, recipe: dict[str, Any], stage: str) -> Path:
    """Carry out a recipe to one of its stages; returns the stage's folder."""
    run = _opened(world, recipe)
    run_through(run, "scores" if stage == "policy" else stage)
    if stage == "policy":
        carry_out(run, stage)
    for old in run.folder.glob(".previous/policy-*"):
        shutil.rmtree(old)
    return run.path(stage)


def distilled(world: World, judge: Path) -> Path:
    """Rows of replies that the start gives to the training prompts, ranked by the sum of their token rewards; made once.

    Args:
        world: The data of a seed.
        judge: Folder of an oracle or a reward, which gives the token rewards.
    """
    file = (
        world.folder / f"{world.reward}-by-{judge.name}-{model_fingerprint(str(judge / 'model'))[:8]}.jsonl"
    )
    if file.exists():
        return file
    own, scorer, reply = world.stories, TokenScorer.load(judge), world.size.reply
    prompts = torch.tensor(world.prompts)
    lines = []
    for group in range(GROUPS):
        asked = prompts.repeat_interleave(REPLIES, 0)
        made = sampled(own.model, asked, reply + SPARE, own.banned, seed=(world.seed, group, 4)).ids.tolist()
        texts = [
            (own.text(prompt), own.reply(prompt, ids))
            for prompt, ids in zip(asked.tolist(), made, strict=True)
        ]
        scores = [sum(token.score for token in found.tokens[:reply]) for found in scorer.score_all(texts)]
        for first in range(0, len(texts), REPLIES):
            part = slice(first, first + REPLIES)
            row = {
                "prompt": texts[first][0],
                "responses": [reply for _, reply in texts[part]],
                "scores": scores[part],
            }
            lines.append(json.dumps(row))
    atomic_write(file, "\n".join(lines) + "\n")
    return file


class Pairs(NamedTuple):
    """Held-out pairs: first the best reply to each of some prompts, then the worst.

    Attributes:
        prompts: ``[2n, p]``.
        replies: ``[2n, t]``.
        differ: ``[n]``, whether the best reply has a higher reward than the worst.
    """

    prompts: torch.Tensor
    replies: torch.Tensor
    differ: torch.Tensor


class Held:
    """The held-out prompts, and what the start does there.

    Attributes:
        own: The start.
        pairs: The best and the worst reply to some prompts.
    """

    def __init__(self, world: World) -> None:
        self._world, self.own = world, world.stories
        held, pairs = world.held, world.size.pairs
        self._prompts = torch.tensor(held["prompts"])
        replies = torch.tensor(held["replies"])[:pairs, :, : world.size.reply]
        rewards = [
            [self._reward(prompt, ids) for ids in own]
            for prompt, own in zip(held["prompts"][:pairs], replies.tolist(), strict=True)
        ]
        rows, (high, best), (low, worst) = (
            torch.arange(len(replies)),
            torch.tensor(rewards).max(1),
            torch.tensor(rewards).min(1),
        )
        self.pairs = Pairs(
            self._prompts[:pairs].repeat(2, 1),
            torch.cat([replies[rows, best], replies[rows, worst]]),
            high > low,
        )

    def _reward(self, prompt: Sequence[int], ids: Sequence[int]) -> float:
        return self._world.rewarded(self.own.reply(prompt, ids))

    def measured(self, model: PreTrainedModel | None = None) -> dict[str, np.ndarray]:
        """One number per held-out prompt: ``reward`` and ``kl``; and means: ``distinct``, ``chosen``, ``rejected``.

        Args:
            model: The policy; None is the start itself.
        """
        start, banned = self.own.model, self.own.banned
        policy = start if model is None else model
        made = sampled(
            policy, self._prompts, self._world.size.reply, banned, seed=(self._world.seed, 3), keep=True
        )
        assert made.logp is not None
        kl = divergence(made.logp, logps_of(start, self._prompts, made.ids, banned))
        texts = [
            self.own.reply(prompt, ids)
            for prompt, ids in zip(self._prompts.tolist(), made.ids.tolist(), strict=True)
        ]
        logp = logps_of(policy, self.pairs.prompts, self.pairs.replies, banned)
        best, worst = of_tokens(logp, self.pairs.replies).chunk(2)
        words = [words_of(text) for text in texts]
        return {
            "reward": np.array([self._world.rewarded(text) for text in texts]),
            "kl": kl.numpy(),
            "distinct": np.mean([len(set(own)) / max(len(own), 1) for own in words]),
            "chosen": best.mean().numpy(),
            "rejected": worst.mean().numpy(),
        }


def values_file(values: Path, reward: str, arm: str, seed: int) -> Path:
    """The file of an arm's measurements."""
    return values / reward / f"{arm}-{seed}.npz"


def measure(world: World, held: Held, arm: Arm, rates: Sequence[float], file: Path) -> None:
    """Train and measure an arm at the learning rates that its file lacks.

    The file has an array ``RATE/QUANTITY`` of ``[points, prompts]`` or ``[points]`` for each, and :func:`made_by` as
    ``RATE/made_by``. What another recipe made is measured again.
    """
    for rate in rates:
        known, recipe = stored(file), made_by(world, arm, rate)
        if str(known.get(f"{rate:g}/made_by", "")) == recipe:
            continue
        print(
            f"{world.reward}, {arm.title}, seed {world.seed}, {'KL factor' if arm.online else 'learning rate'} {rate:g}",
            flush=True,
        )
        points = []
        for folder in trained(world, arm, rate):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            points.append(held.measured(model))
        shutil.rmtree(folder.parent)
        for name in points[0]:
            known[f"{rate:g}/{name}"] = compact([point[name] for point in points])
        known[f"{rate:g}/made_by"] = np.array(recipe)
        save(file, known)


def stored(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a file; none if there is no file."""
    if not file.exists():
        return {}
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def save(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as written:
        np.savez_compressed(written, **arrays)


def start_of(world: World, held: Held, values: Path) -> None:
    """Measure the start, once.

    Raises:
        SystemExit: The values are those of another model, or of samples that depend on something else.
    """
    file, about = values_file(values, world.reward, START, world.seed), world.about
    known = stored(file)
    facts = {"made_by": about["model"], "world": fingerprint(about), "conversations": about["conversations"]}
    if any(str(known.get(f"0/{name}", fact)) != fact for name, fact in facts.items()):
        raise SystemExit(
            f"{values} has values of another model or of other samples than {world.model} has in {world.folder}. Give these a folder of "
            "their own: --values."
        )
    if not known:
        known = {f"0/{name}": compact([value]) for name, value in held.measured().items()}
        save(file, {**known, **{f"0/{name}": np.array(fact) for name, fact in facts.items()}})


def compact(points: Sequence[np.ndarray]) -> np.ndarray:
    """Values of several points in half precision, which is finer than their intervals."""
    return np.stack(points).astype(np.float16)


__all__ = ["Held", "judge_of", "measure", "start_of", "stored", "trained", "values_file"]
