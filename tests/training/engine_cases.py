"""Trains the cases of one engine in this process, which is one of two, and keeps what became of them.

    python -m tests.training.engine_cases ENGINE FOLDER ALONE

The cases of an engine train in one start, because a process takes long to begin: a few of them, or all with ``TOKENWARD_ENGINES=all``.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from tests.tiny import tiny_llama
from tests.training.tools import arguments, cheap_collection, language_model, random_rows, with_reference
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel
from tokenward.models.reward import RewardModel, RewardSettings, new_reward_model
from tokenward.models.sharding import in_parts, is_empty, is_first_process
from tokenward.models.spread import load_in_first, new_reward_in_first
from tokenward.objectives import Losses, Objective, PlackettLuce, SePO
from tokenward.objectives.base import ObjectiveModule
from tokenward.objectives.registry import OBJECTIVES
from tokenward.ops.ragged import segment_sum, weighted_sum
from tokenward.plugins import build
from tokenward.sampling import SamplingSettings, sample_replies
from tokenward.tokens.batches import Needs
from tokenward.tokens.template import Style
from tokenward.training.callbacks import AnswerPrompts
from tokenward.training.fit import fit

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
TOGETHER, STEPS, SAVED = 8, 4, 3
"""Comparisons of a step, steps of a training, and the step of the checkpoint that is resumed."""


class ScaledLikelihood:
    """Likelihood times a positive number that a module reads from the states, over the tokens of the step."""

    needs = Needs(states=True, own_denominator=True)

    def make_module(self, width: int, layers: int) -> ObjectiveModule:
        self._scale = nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, 1), nn.Softplus())
        return ObjectiveModule(self._scale, 0.5, 0.0)

    def __call__(self, logp, batch) -> Losses:
        scaled = logp * self._scale(batch.statistics["states"]).squeeze(-1)
        owner = batch.comparison[batch.response]
        total = weighted_sum(scaled, batch.weights, owner, batch.comparisons)
        return Losses(-total, {}, segment_sum(batch.weights, owner, batch.comparisons))


PREPARED: dict[str, list[Any]] = {
    "ddp": [False, False, True, "AdamW"],
    "fsdp2": [True, True, True, "AdamW"],
    "zero2": [False, False, True, "DeepSpeedZeroOptimizer"],
    "zero3": [False, True, True, "DeepSpeedZeroOptimizer_Stage3"],
}
"""What :class:`Look` must find: whether the model is FSDP2's, its weights are in parts and its head runs by tiles; the optimizer."""


def dpo_with_kl() -> Objective:
    terms = [{"name": "dpo"}, {"name": "token_kl", "factor": 0.5}]
    return build("objective", "sum", {"terms": terms}, OBJECTIVES)


MADE = {"sepo": lambda: SePO(gamma=1.0), "dpo + kl": dpo_with_kl, "module": ScaledLikelihood}
OF_REWARD = {"lists": PlackettLuce}


@dataclass(frozen=True)
class Case:
    """What is trained, and with what."""

    weights: str
    objective: str
    head: str
    setting: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.weights, self.objective, self.head, self.setting)))


SETTINGS: dict[str, dict[str, Any]] = {
    "": {},
    "bf16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
    # The only evaluation is at the checkpoint in the middle, so that is the best one.
    "best": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": SAVED},
    "reward": {},
}
CASES = [
    *(Case(*parts) for parts in product(("full", "lora"), MADE, ("tied", "untied"))),
    *(Case("full", "sepo", "tied", name) for name in SETTINGS if name not in ("", "reward")),
    Case("full", "lists", "tied", "reward"),
]
CROSSED = [Case("full", "module", "tied"), Case("lora", "sepo", "untied")]
"""Cases whose checkpoint is resumed with another number of processes, and another engine."""
WITH_REFERENCE = Case("full", "dpo + kl", "untied")
REWARD = Case("full", "lists", "tied", "reward")
CUTTING = ("fsdp2", "zero3")
"""Engines that cut the weights among the processes."""
ALL = os.environ.get("TOKENWARD_ENGINES") == "all"


def cases_of(engine: str) -> Sequence[Case]:
    """Those that train: all, or by default a few with FSDP2 only, so that a run of the tests stays short."""
    if ALL:
        return CASES
    return [*CROSSED, WITH_REFERENCE, REWARD] if engine in ("one", "fsdp2") else []


LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}

ARGUMENTS: dict[str, dict[str, Any]] = {
    "one": {},
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2}},
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
}
for _table in ARGUMENTS.values():
    if "deepspeed" in _table:
        _table["deepspeed"] |= dict.fromkeys(
            (
                "train_batch_size",
                "train_micro_batch_size_per_gpu",
                "gradient_accumulation_steps",
                "gradient_clipping",
            ),
            "auto",
        )


def train(case: Case, folder: Path, engine: str) -> list[str]:
    """Train a case in ``folder`` to its end, or from the checkpoint that lies there; returns what was shown."""
    start, policy = (language_model(tiny_llama(tie_word_embeddings=case.head == "tied")) for _ in range(2))
    rows = with_reference(start, rows_of())
    if case.setting == "reward":
        policy = reward_of(policy, folder / "body", engine)
    elif engine in CUTTING:
        start, policy = (
            read_by_first(model, folder / name) for name, model in (("start", start), ("policy", policy))
        )
    if case.weights == "lora":
        base = folder / "base"  # an adapter names the folder of its base, from which other libraries load it
        if is_first_process():
            policy.save(base)
        PartialState().wait_for_everyone()
        torch.manual_seed(5)
        policy = replace(policy, name=str(base)).with_adapter(LORA)
    if engine == "one":
        policy.save(folder / "start")
    table = {
        "per_device_train_batch_size": TOGETHER // 2 // (1 if engine == "one" else 2),
        "gradient_accumulation_steps": 2,
        "tokens_per_forward": 60,
        "optim": "adamw_torch",
        "adam_epsilon": 1.0,  # so that an update is proportional to its gradient: a wrong denominator shows
        "learning_rate": 0.3,
        "max_grad_norm": 2.0,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": SAVED,
        "save_total_limit": 2,
        **ARGUMENTS[engine],
        **SETTINGS[case.setting],
    }
    reference = None if case.weights == "lora" or case.setting == "reward" else start
    shown = Shown()
    watch = watching(policy, folder, shown.line) if case.setting == "best" else None
    settings = arguments(folder / "checkpoints", **table)
    look = Look(policy)
    fit(
        policy,
        (MADE | OF_REWARD)[case.objective](),
        rows,
        settings,
        folder,
        reference=reference,
        display=shown,
        preview=look,
        watch=watch,
        eval_rows=rows[:3] if case.setting == "best" else (),
    )
    if is_first_process():
        (folder / "engine.json").write_text(json.dumps(look.found))
    return shown.lines


def read_by_first(model: LanguageModel, folder: Path) -> LanguageModel:
    """The same model, of which only the first process has the weights."""
    if is_first_process():
        model.save(folder)
    PartialState().wait_for_everyone()
    found = load_in_first(str(folder))
    check_unread(found.model, found.model)
    return found


def reward_of(model: LanguageModel, folder: Path, engine: str) -> RewardModel:
    """A reward model with the body of a policy, read by the first process alone if the engine cuts weights."""
    if is_first_process():
        model.save(folder)
    PartialState().wait_for_everyone()
    load = new_reward_in_first if engine in CUTTING else new_reward_model
    found = load(str(folder), RewardSettings(hidden=8, gain=1.0), seed=3)
    if engine in CUTTING:
        check_unread(found.model, found.model.backbone)
    return found


def check_unread(module: nn.Module, body: nn.Module) -> None:
    """Check that only the first process has read a body; what the others have there becomes NaN."""
    assert is_empty(module) == (not is_first_process())
    if is_empty(module):
        with pytest.raises(RuntimeError, match="has not spread"):
            module(input_ids=torch.tensor([[1, 2]]))
        for weight in body.parameters():
            weight.data.fill_(math.nan)


def watching(policy, folder: Path, show) -> AnswerPrompts:
    """Samples replies while the model trains, which must leave it able to train."""
    prompts, settings = ([1, 2, 3], [4, 5], [1, 2, 3]), SamplingSettings(max_new_tokens=3, batch=2)
    template = policy.template(Style())

    def answer():
        return sample_replies(policy, template, prompts, settings, seed=0)

    main = is_first_process()
    return AnswerPrompts("abc", "abc", answer, folder / "samples.jsonl", show=show, main=main)


class Look(TrainerCallback):
    """Notes what an engine has made of the model: of its class, weights and head, and of the optimizer."""

    def __init__(self, policy) -> None:
        self._policy = policy

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs: Any) -> None:
        weight = next(weight for weight in model.parameters() if weight.requires_grad)
        head = self._policy.head if isinstance(self._policy, LanguageModel) else None
        tiled = head is not None and head.linear is not None
        self.found = [
            isinstance(model, FSDPModule),
            in_parts(weight),
            tiled,
            type(optimizer.optimizer).__name__,
        ]


class Shown(Display):
    """A display that keeps its lines."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        self.lines.append(text)


def rows_of():
    generator = torch.Generator().manual_seed(0)

    def weights(row):
        return [(torch.rand(len(ids), generator=generator) + 0.3) for ids in row.responses]

    return [replace(row, weights=weights(row)) for row in random_rows(11)]


def shard_on_cpu() -> None:
    """Have accelerate prepare FSDP on a CPU, where it would silently run DDP."""
    plain = AcceleratorState.__init__

    def patched(self, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = patched
    FSDPModule.set_requires_gradient_sync = _whole_gradients


def _whole_gradients(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("without an exchange after a pass, each process holds the whole gradient")


def exchange_by_gloo() -> None:
    """Keep DeepSpeed from compiling its own exchange between processes of a CPU, which takes a minute and a compiler."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def train_all(folder: Path, engine: str) -> None:
    """Each case twice: from its start in ``CASE/begun at 0``, and from its checkpoint in ``CASE/model``."""
    with cheap_collection():
        for case in cases_of(engine):
            _train_twice(case, folder / str(case), engine)


def _train_twice(case: Case, place: Path, engine: str) -> None:
    shown = train(case, place, engine)
    checked = any(line.startswith("  first rows: loss 0.6931") for line in shown)
    assert checked == (case.objective == "dpo + kl"), shown
    if is_first_process():
        (place / "model").rename(place / "begun at 0")
        # Of the newest checkpoint, the file that the last process has written.
        max((place / f"checkpoints/checkpoint-{STEPS}").glob("rng_state*.pth")).unlink()
    PartialState().wait_for_everyone()
    shown = train(case, place, engine)
    assert f"  resuming from step {SAVED} of {STEPS}" in shown, shown
    assert any("It is now damaged" in line for line in shown) == is_first_process(), shown


def resume(case: Case, begun: Path, folder: Path, engine: str) -> None:
    """Go on from the checkpoint of another training in ``CASE/model``; writes why it is refused, if it is."""
    place, checkpoint = folder / f"{case} crossed", f"checkpoints/checkpoint-{SAVED}"
    if is_first_process():
        shutil.copytree(begun / str(case) / checkpoint, place / checkpoint)
    PartialState().wait_for_everyone()
    try:
        assert f"  resuming from step {SAVED} of {STEPS}" in train(case, place, engine)
    except UserError as error:
        (place / "refused.txt").write_text(f"{error.code}: {error}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, target, other = sys.argv[1], *map(Path, sys.argv[2:])
    if name == "fsdp2":
        shard_on_cpu()
    if name.startswith("zero"):
        exchange_by_gloo()
    train_all(target, name)
    for crossed in CROSSED:
        resume(crossed, other, target, name)
    torch.distributed.destroy_process_group()
