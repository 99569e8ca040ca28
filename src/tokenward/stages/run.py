"""What every stage of a run needs: the recipe, the folders, the screen, and the models that a stage starts from."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import PreTrainedModel

from tokenward.artifacts import MANIFEST, Manifest, StageFolder, open_stage, read_manifest, require
from tokenward.config import Recipe
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.models.adapters import merged
from tokenward.models.identity import (
    ADAPTER_FILE,
    config_of,
    context_length,
    has_encoder,
    model_fingerprint,
    no_base,
    parts_of,
    resolve,
)
from tokenward.models.loading import (
    TOLERANCE,
    LanguageModel,
    difference,
    load_model,
    load_tokenizer,
    next_log_probabilities,
)
from tokenward.models.reward import RewardModel, load_reward_model
from tokenward.plugins import code_fingerprints
from tokenward.tokens.encode import Limits
from tokenward.tokens.template import Style, Template

FOLDER = "merged"
"""Beside the stages of a run: the whole weights of adapters that it starts from."""


def is_adapter(name: str) -> bool:
    """Whether a model is a folder with a PEFT adapter."""
    return (Path(name).expanduser() / ADAPTER_FILE).is_file()


def whole_start(
    name: str,
    run: Path,
    *,
    style: Style,
    device: str,
    trust_remote_code: bool,
    say: Callable[[str], object],
) -> str:
    """A model with whole weights: what was named, or a folder in the run with its adapter merged into its base.

    Args:
        name: The model, as the recipe says it.
        run: The run's folder.
        style: How its prompts are written.
        device: Where to compute.
        trust_remote_code: Run code that comes with the model.
        say: Shows a line.

    Raises:
        UserError: the adapter cannot be merged, or says something else when it is.
    """
    if not is_adapter(name):
        return name
    target = run / FOLDER / model_fingerprint(name)[:16]
    if target.is_dir():
        return str(target)
    model = load_model(name, device=device, packing="none", trust_remote_code=trust_remote_code)
    before = next_log_probabilities(model, model.template(style))
    scratch = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    cast(PreTrainedModel, merged(cast(PeftModel, model.model), name)).save_pretrained(scratch)
    model.tokenizer.save_pretrained(scratch)
    again = load_model(str(scratch), device=device, packing="none", trust_remote_code=trust_remote_code)
    found = difference(before, next_log_probabilities(again, again.template(style)))
    if not found <= TOLERANCE["float32"]:
        raise UserError(
            f"the adapter {name} merged into its base says something else: log-probabilities differ by up to {found:.3g} nats. "
            "Name a whole model."
        )
    scratch.rename(target)
    say(
        f"  {name} is an adapter on {parts_of(resolve(name)).base}: it was merged into whole weights, {target}, from which this "
        f"run starts (log-probabilities differ by {found:.2g} nats at most)"
    )
    return str(target)


def check_start(name: str, *, trust_remote_code: bool) -> None:
    """Refuse what no training can start from, before a stage has run.

    Raises:
        UserError: the base of an adapter is not there, or the model is a network before a frozen one's head.
    """
    if not Path(name).expanduser().is_dir():
        return
    parts = parts_of(resolve(name))
    if parts.head_mlp is not None:
        raise UserError(
            f"{name} is a network before the head of {parts.base}, and training starts from whole weights. Name {parts.base}."
        )
    if parts.adapter is not None:
        try:
            config_of(parts.base, trust_remote_code=trust_remote_code)
        except UserError as error:
            raise UserError(no_base(name, parts.base, error)) from error


AUXILIARY = "auxiliary-"
"""Before the name of an auxiliary model, in the name of the stage that trains it."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A recipe being carried out.

    Attributes:
        recipe: The checked recipe.
        display: Where progress is shown.
    """

    recipe: Recipe
    display: Display = field(default_factory=lambda: Display(quiet=True))

    @property
    def folder(self) -> Path:
        """The run's folder; each stage has one of its own inside."""
        return Path(self.recipe.run).expanduser()

    def path(self, stage: str) -> Path:
        """Folder of a stage."""
        return self.folder / stage

    def done(self, stage: str) -> Manifest:
        """Manifest of a finished stage, made from what the stages before it hold now.

        Raises:
            UserError: it has not finished, or its folder was made from another data set, tokenizer or model
                than the folders beside it hold.
        """
        manifest = require(self.path(stage), stage)
        manifest.check({name: known for name in manifest.inputs if (known := self._holds(name))})
        return manifest

    def _holds(self, name: str) -> str:
        """Fingerprint of what the folder of a stage holds now; empty if there is no such stage here."""
        folder = self.path(name)
        if not (folder / MANIFEST).is_file() or read_manifest(folder).stage != name:
            return ""
        return require(folder, name).fingerprint

    @contextmanager
    def stage(
        self, name: str, settings: Mapping[str, Any], inputs: Mapping[str, str], *, layout: int = 1
    ) -> Iterator[StageFolder]:
        """Open a stage's folder, and say on screen whether it runs, goes on or is done already.

        Args:
            name: Of the stage.
            settings: Everything of the recipe that its output depends on. Of a ``"module:Name"`` in it the file is an
                input too, so that another function under the same name is not taken for what was there.
            inputs: Fingerprints of what it reads.
            layout: Version of what it writes.
        """
        inputs = {**inputs, **code_fingerprints(settings)}
        with open_stage(
            self.path(name), stage=name, settings=dict(settings), inputs=inputs, format=layout
        ) as stage:
            if stage.done:
                self.display.heading(name, "done already, nothing that it depends on has changed")
            elif stage.resuming:
                self.display.heading(name, "goes on where it was stopped")
            else:
                self.display.heading(name, f"runs again: {'; '.join(stage.changed)}" if stage.changed else "")
            yield stage

    def tokenizer_template(self, name: str) -> Template:
        """The template of a model, without loading its weights."""
        trust = self.recipe.model.trust_remote_code
        tokenizer = load_tokenizer(name, trust_remote_code=trust)
        encoder = has_encoder(name, trust_remote_code=trust)
        return self.style.template(tokenizer, encoder=encoder)

    @property
    def style(self) -> Style:
        """How conversations are written; a template that writes the date writes that on which the run began."""
        table = self.recipe.tokens
        return Style(table.template, table.chat_template_kwargs, self._day)

    @property
    def _day(self) -> str:
        begun = (
            self.path(stage) for stage in ("data", "examples") if (self.path(stage) / MANIFEST).is_file()
        )
        return next((read_manifest(folder).created[:10] for folder in begun), "")

    def load(self, name: str, *, dtype: str | None = None, attention: str | None = None) -> LanguageModel:
        """Load a model with the recipe's settings."""
        table = self.recipe.model
        return load_model(
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
        """What a stage trains from where the recipe names this model: of an adapter, its merged weights."""
        table = self.recipe.model
        return whole_start(
            name,
            self.folder,
            style=self.style,
            device=table.device,
            trust_remote_code=table.trust_remote_code,
            say=self.display.line,
        )

    @property
    def limits(self) -> Limits:
        """Longest prompt and response; every model that reads them must have the positions."""
        table = self.recipe.tokens
        # The SFT model has the positions of the model that it was made from, and need not exist yet.
        base = self.recipe.model.name
        tables = (
            self.recipe.oracle,
            self.recipe.reward,
            self.recipe.policy,
            *self.recipe.auxiliary_models.values(),
        )
        names = {table.model or base for table in tables}
        trust = self.recipe.model.trust_remote_code
        contexts = [context_length(name, trust_remote_code=trust) for name in names]
        context = min((length for length in contexts if length is not None), default=None)
        return Limits(table.max_prompt_tokens, table.max_response_tokens, table.too_long, context)

    @property
    def start_model(self) -> str:
        """What the policy starts from: the SFT model if the recipe has that stage."""
        sft = str(self.path("sft") / "model")
        return sft if self.recipe.sft is not None else self.whole(self.recipe.model.name)

    @property
    def reference_model(self) -> str:
        """What the oracle starts from and is compared with."""
        return self.whole(self.recipe.oracle.model) if self.recipe.oracle.model else self.start_model

    @property
    def policy_start(self) -> str:
        """What the policy starts from."""
        return self.whole(self.recipe.policy.model) if self.recipe.policy.model else self.start_model

    def fingerprint_of(self, model: str) -> str:
        """Fingerprint of a model's files."""
        return model_fingerprint(model)
