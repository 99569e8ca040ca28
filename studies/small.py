"""Small models for the studies: a third of the default model's layers, fine-tuned on replies of the data."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from studies.arms import Arm, Outcome, outcomes
from tokenward.models.identity import resolve
from tokenward.models.loading import load_tokenizer
from tokenward.stages.lists import run_through
from tokenward.tools.run import open_run

KEEP_EVERY = 3
RECIPE = "recipes/studies/small.yaml"


def cut(source: str, folder: Path, count: int | None = None) -> Path:
    """Make a model from some evenly spaced layers of another, by default a third of them, unless it exists."""
    if (folder / "config.json").exists():
        return folder
    model = AutoModelForCausalLM.from_pretrained(resolve(source), dtype=torch.float32)
    layers = model.model.layers
    count = count or len(layers) // KEEP_EVERY
    kept = torch.linspace(0, len(layers) - 1, count).round().int().tolist()
    model.model.layers = nn.ModuleList([layers[number] for number in kept])
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers = count
    scratch = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch)
    load_tokenizer(source).save_pretrained(scratch)
    scratch.rename(folder)
    return folder


class Tuned(NamedTuple):
    """The cut model after fine-tuning.

    Attributes:
        runs: Folder of the runs.
        recipe: Recipe that trains it.
        stage: Stage that writes it.
        seed: Seed of the training.
    """

    runs: Path
    recipe: str
    stage: str
    seed: int = 0

    @property
    def _run(self) -> Path:
        return self.runs / f"{Path(self.recipe).stem}-{self.seed}"

    @property
    def folder(self) -> str:
        """Folder of the trained model."""
        return str(self._run / self.stage / "model")

    def make(self) -> None:
        """Train it, unless it exists."""
        base = cut("default", self.runs / "weak-cut")
        changes = [f"run={self._run}", f"seed={self.seed}", f"model.name={base}"]
        run_through(open_run(self.recipe, changes, quiet=True), self.stage)


def weak_model(runs: Path, seed: int) -> Tuned:
    """A model fine-tuned on the preferred replies to a seed's training prompts."""
    return Tuned(runs, "recipes/studies/weak.yaml", "sft", seed)


def small_model(runs: Path) -> Tuned:
    """A model fine-tuned on both good and bad replies, so that it writes both."""
    return Tuned(runs, "recipes/studies/small_start.yaml", "oracle")


def small_outcomes(arms: Sequence[Arm], chosen: argparse.Namespace) -> list[Outcome]:
    """The outcomes of the small model and of every arm that trains it, for every seed. All start from the same weights."""
    start = small_model(chosen.runs)
    return outcomes(RECIPE, arms, chosen, [f"model.name={start.folder}"], lambda seed: start.make())
