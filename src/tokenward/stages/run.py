"""A run: its recipe, folders, display, and the models that stages start from."""

import shutil
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from tokenward.artifacts import (
    MANIFEST,
    Manifest,
    StageFolder,
    StagePart,
    open_part,
    open_stage,
    read_manifest,
    recorded,
    require,
    user_path,
)
from tokenward.config import OnlineTable, PromptTaskTable, Recipe
from tokenward.display import Display
from tokenward.distributed import first_enters
from tokenward.errors import UserError
from tokenward.models.adapters import merge_adapter
from tokenward.models.default import HUB_NAME
from tokenward.models.identity import (
    ADAPTER_FILE,
    base_config,
    config_of,
    context_length,
    has_encoder,
    is_hub_name,
    missing_base,
    model_fingerprint,
    parts_of,
    resolve,
)
from tokenward.models.loading import OWN, LanguageModel, load_model, load_tokenizer, tokenizer_state
from tokenward.models.record import TOLERANCE, difference, next_log_probabilities
from tokenward.models.reward import RewardModel, load_reward_model
from tokenward.models.spread import load_in_first
from tokenward.plugins import code_fingerprints
from tokenward.sampling import SamplingSettings
from tokenward.tokens.encode import Limits
from tokenward.tokens.template import Style, Template

FOLDER = "merged"
"""Folder of a run for the merged weights of adapters that it starts from."""

AUXILIARY = "auxiliary-"
"""Prefix of the stages that train auxiliary models."""


def check_start(name: str, *, trust_remote_code: bool) -> None:
    """Check that training can start from a model. A name of the hub is checked when a run begins.

    Raises:
        UserError: there is no such folder, the base of an adapter is missing, or the model is an MLP before the head of a
            frozen one.
    """
    if name in ("default", HUB_NAME) or is_hub_name(name):
        return
    resolve(name)
    if not user_path(name).is_dir():
        return
    parts = parts_of(resolve(name))
    if parts.head_mlp is not None:
        raise UserError(
            f"{name} is an MLP before the head of {parts.base}, and training needs ordinary weights. Use {parts.base}.",
            code="cannot-start",
        )
    if parts.adapter is not None:
        try:
            config_of(parts.base, trust_remote_code=trust_remote_code)
        except UserError as error:
            raise missing_base(name, parts.base, error) from error


@dataclass(frozen=True, kw_only=True)
class Run:
    """A recipe being carried out.

    Attributes:
        recipe: The checked recipe.
        display: Where progress is shown.
        suspected: Stages whose files were found damaged: each file is compared when they are opened.
    """

    recipe: Recipe
    display: Display = field(default_factory=lambda: Display(quiet=True))
    suspected: set[str] = field(default_factory=set[str])
    _templates: dict[Hashable, Template] = field(
        default_factory=dict[Hashable, Template], repr=False, compare=False
    )

    @property
    def folder(self) -> Path:
        """The run's folder, which holds a folder per stage.

        Raises:
            UserError: the recipe's ``run`` cannot be a path.
        """
        return user_path(self.recipe.run)

    def path(self, stage: str) -> Path:
        """Folder of a stage."""
        return self.folder / stage

    @property
    def online(self) -> OnlineTable:
        """The table ``online``; only for online runs."""
        assert self.recipe.online is not None
        return self.recipe.online

    @property
    def prompt_task(self) -> PromptTaskTable:
        """The table ``prompt_task``; only for runs that have it."""
        assert self.recipe.prompt_task is not None
        return self.recipe.prompt_task

    @property
    def reply_settings(self) -> SamplingSettings:
        """How the evaluation samples replies."""
        table = self.recipe.evaluation
        return SamplingSettings(
            table.max_new_tokens, table.temperature, table.top_p, table.top_k, table.batch
        )

    @property
    def passes(self) -> dict[str, Any]:
        """Arguments of every forward pass that computes values per token."""
        table = self.recipe.scores
        return {"precision": table.precision, "tokens_per_batch": table.tokens_per_batch}

    def done(self, stage: str) -> Manifest:
        """Manifest of a finished stage.

        Raises:
            UserError: it has not finished, or was made from other data or models than the run's other folders hold now.
        """
        manifest = require(self.path(stage), stage)
        manifest.check({name: known for name in manifest.inputs if (known := self._holds(name))})
        return manifest

    def verify(self, stages: Iterable[str]) -> None:
        """Compare every file of some finished stages, and of the stages that those were made from, with the manifests.

        Raises:
            DamagedFiles: a file is missing, or is not what the stage wrote.
        """
        waiting, seen = list(stages), set[str]()
        while waiting:
            name = waiting.pop()
            if name in seen or not self._holds(name):
                continue
            seen.add(name)
            manifest = read_manifest(self.path(name))
            manifest.check_files(self.path(name))
            waiting += manifest.inputs

    def _holds(self, name: str) -> str:
        """Identity of the stage that a folder holds now; empty if the run has no such stage."""
        folder = self.path(name)
        if not (folder / MANIFEST).is_file() or read_manifest(folder).stage != name:
            return ""
        return require(folder, name).identity

    @contextmanager
    def stage(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        *,
        layout: int = 1,
        part: StagePart | None = None,
    ) -> Iterator[StageFolder]:
        """Open a stage's folder, or one part of it, and show whether it runs, resumes or is already done.

        The file of a ``"module:Name"`` in the settings becomes an input, so that editing it runs the stage again.
        """
        inputs = {**inputs, **code_fingerprints(settings)}
        whole = partial(open_stage, verify=name in self.suspected)
        opened = whole if part is None else partial(open_part, part=part)
        given: dict[str, Any] = {
            "stage": name,
            "settings": dict(settings),
            "inputs": inputs,
            "format": layout,
        }
        with first_enters(lambda: opened(self.path(name), **given)) as stage:
            if stage.done:
                self.display.heading(name, "already done, nothing has changed")
                for file, problem in stage.manifest.damage(stage.path).items():
                    self.display.line(f"  {stage.path / file} {problem}. Nothing is computed from it")
            elif part is not None:
                self.display.heading(name, f"part {part}")
            elif stage.resuming:
                self.display.heading(name, "resumes where it stopped")
            else:
                self.display.heading(name, f"runs again: {'; '.join(stage.changed)}" if stage.changed else "")
            yield stage
        self.display.tell(ended=True)

    def tokenizer_template(self, name: str) -> Template:
        """The template of a model, without loading the weights."""
        trust, style, state = self.recipe.model.trust_remote_code, self.style, tokenizer_state(name)
        key = (name, str(style), state)
        if key not in self._templates or not state:
            tokenizer = load_tokenizer(name, trust_remote_code=trust)
            encoder = has_encoder(name, trust_remote_code=trust)
            self._templates[key] = style.template(tokenizer, encoder=encoder)
        return self._templates[key]

    @property
    def style(self) -> Style:
        """How conversations are rendered. A template that writes the date gets the day on which the run started."""
        table = self.recipe.tokens
        return Style(table.template, table.chat_template_kwargs, self._day)

    @property
    def _day(self) -> str:
        folders = [self.path(stage) for stage in ("data", "examples")]
        return next((read_manifest(f).created[:10] for f in folders if (f / MANIFEST).is_file()), "")

    def load(
        self, name: str, *, dtype: str | None = None, attention: str | None = None, cut: bool = False
    ) -> LanguageModel:
        """Load a model with the recipe's settings; ``cut`` for a training that cuts its weights among the processes."""
        table = self.recipe.model
        return (load_in_first if cut else load_model)(
            name,
            dtype=dtype or table.dtype,
            device=table.device,
            attention=attention or table.attention,
            packing=table.packing,
            trust_remote_code=table.trust_remote_code,
        )

    def load_reward(self, folder: str) -> RewardModel:
        """Load a token reward model with the recipe's settings."""
        table = self.recipe.model
        return load_reward_model(
            folder, dtype=table.dtype, device=table.device, attention=table.attention, packing=table.packing
        )

    def whole(self, name: str) -> str:
        """A model with whole weights: the model itself, or the run's folder with its adapter merged into the base.

        Raises:
            UserError: the adapter cannot be merged, or the merged model computes other log-probabilities.
        """
        if not (user_path(name) / ADAPTER_FILE).is_file():
            return name
        kind = "-own" if self.recipe.model.dtype == OWN else ""
        target = self.folder / FOLDER / f"{self.fingerprint_of(name)[:16]}{kind}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f".lock-{FOLDER}"):  # jobs that write parts of the scores begin at once
            if target.is_dir():
                try:
                    require(target, FOLDER).check_files(target)
                    return str(target)
                except UserError as error:
                    self.display.line(f"  the merged model is made again: {error}")
                    shutil.rmtree(target)
            return self._merge(name, target)

    def _merge(self, name: str, target: Path) -> str:
        table = self.recipe.model

        def load(folder: str) -> LanguageModel:
            trust = table.trust_remote_code
            return load_model(folder, device=table.device, packing="none", trust_remote_code=trust)

        model = load(name)
        before = next_log_probabilities(model, model.template(self.style))
        scratch = target.with_name(f"{target.name}.tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        merged = cast(PreTrainedModel, merge_adapter(cast(PeftModel, model.model), name))
        base = base_config(name, trust_remote_code=table.trust_remote_code)
        if table.dtype == OWN and base.dtype is not None:
            nn.Module.to(merged, base.dtype)
        merged.save_pretrained(scratch)
        tolerance = TOLERANCE["bfloat16" if merged.dtype == torch.bfloat16 else "float32"]
        model.tokenizer.save_pretrained(scratch)
        again = load(str(scratch))
        found = difference(before, next_log_probabilities(again, again.template(self.style)))
        if not found <= tolerance:
            raise UserError(
                f"merging the adapter {name} into its base changes log-probabilities by up to {found:.3g} nats. Use a model with "
                "whole weights.",
                code="merge-differs",
            )
        made = Manifest.begin(FOLDER, {"dtype": table.dtype}, {"model": self.fingerprint_of(name)}, 1)
        made.finished({"difference": found}, recorded(scratch)).write(scratch)
        scratch.rename(target)
        self.display.line(
            f"  {name} is an adapter on {parts_of(resolve(name)).base}. It was merged into {target}, from which this run starts "
            f"(log-probabilities differ by at most {found:.2g} nats)"
        )
        return str(target)

    @property
    def limits(self) -> Limits:
        """Maximum lengths, and the shortest context of all models that read the rows."""
        table = self.recipe.tokens
        # The SFT model has the context of the model that it starts from, and need not exist yet.
        base = self.recipe.model.name
        recipe = self.recipe
        tables = (recipe.oracle, recipe.reward, recipe.policy, *recipe.auxiliary_models.values())
        names = {table.model or base for table in tables}
        trust = self.recipe.model.trust_remote_code
        contexts = [context_length(name, trust_remote_code=trust) for name in names]
        context = min((length for length in contexts if length is not None), default=None)
        return Limits(table.max_prompt_tokens, table.max_response_tokens, table.too_long, context)

    @property
    def start_model(self) -> str:
        """The SFT model if the recipe has that stage, otherwise the recipe's model."""
        sft = str(self.path("sft") / "model")
        return sft if self.recipe.sft is not None else self.whole(self.recipe.model.name)

    @property
    def reference_model(self) -> str:
        """The model that the oracle starts from and is compared with."""
        return self.whole(self.recipe.oracle.model) if self.recipe.oracle.model else self.start_model

    @property
    def policy_start(self) -> str:
        """The model that the policy starts from."""
        return self.whole(self.recipe.policy.model) if self.recipe.policy.model else self.start_model

    def fingerprint_of(self, model: str) -> str:
        """Fingerprint of a model's files."""
        return model_fingerprint(model, trust_remote_code=self.recipe.model.trust_remote_code)
