"""A small model that writes such replies as the data has: the default model cut to a third of its layers and fine-tuned."""

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
MODEL_RECIPE = "recipes/studies/weak.yaml"
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


def small_model(chosen: argparse.Namespace, seed: int = 0) -> str:
    """The small model, fine-tuned on the training prompts of a seed; made once."""
    folder = chosen.runs / f"weak-{seed}"
    base = cut("default", chosen.runs / "weak-cut")
    run = open_run(MODEL_RECIPE, [f"run={folder}", f"seed={seed}", f"model.name={base}"], quiet=True)
    run_through(run, "sft")
    return str(run.path("sft") / "model")


def small_outcomes(arms: Sequence[Arm], chosen: argparse.Namespace) -> list[Outcome]:
    """The outcome of the small model and of every arm that trains it, at every seed; all begin with the same weights."""
    return outcomes(RECIPE, arms, chosen, lambda seed: [f"model.name={small_model(chosen)}"])
