"""Small models that write such replies as the data has: the default model cut to a third of its layers and fine-tuned."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from studies.arms import Arm, Outcome, outcomes
from tokenward.models.loading import load_tokenizer
from tokenward.models.places import resolve
from tokenward.pipeline import open_run
from tokenward.pipeline.stages import run_through

KEEP_EVERY = 3
RECIPE = "recipes/studies/small.yaml"


def cut(source: str, folder: Path) -> Path:
    """A model with every third layer of another, the first and the last included; made once."""
    if (folder / "config.json").exists():
        return folder
    model = AutoModelForCausalLM.from_pretrained(resolve(source), dtype=torch.float32)
    layers = model.model.layers
    count = len(layers) // KEEP_EVERY
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


def weak_model(chosen: argparse.Namespace, seed: int) -> str:
    """The cut model, fine-tuned on the preferred replies of a seed's training prompts."""
    return _fine_tuned(chosen, "recipes/studies/weak.yaml", "sft", seed)


def small_model(chosen: argparse.Namespace) -> str:
    """The cut model, fine-tuned on good and bad replies alike, so that it writes both."""
    return _fine_tuned(chosen, "recipes/studies/small_start.yaml", "oracle", 0)


def _fine_tuned(chosen: argparse.Namespace, recipe: str, stage: str, seed: int) -> str:
    base = cut("default", chosen.runs / "weak-cut")
    folder = chosen.runs / f"{Path(recipe).stem}-{seed}"
    run = open_run(recipe, [f"run={folder}", f"seed={seed}", f"model.name={base}"], quiet=True)
    run_through(run, stage)
    return str(run.path(stage) / "model")


def small_outcomes(arms: Sequence[Arm], chosen: argparse.Namespace) -> list[Outcome]:
    """The outcome of the small model and of every arm that trains it, at every seed; all begin with the same weights."""
    return outcomes(RECIPE, arms, chosen, lambda seed: [f"model.name={small_model(chosen)}"])
