"""Can a weak oracle supervise a strong policy? The default model cut to a third of its layers, against self-supervision.

    python -m studies.weak_to_strong --page docs/results.md --pictures docs/pictures

The small model keeps every third layer and is fine-tuned on the preferred replies for a few epochs; then it is oracle and
reference at once, and the whole default model is the policy. The control of the same cost draws its tokens at random.
"""

import argparse
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from studies.arms import Arm, options, outcomes
from studies.selection import ARMS as SELECTIONS
from studies.selection import RECIPE
from studies.tables import publish
from tokenward.models.loading import load_tokenizer
from tokenward.models.places import resolve
from tokenward.pipeline import open_run
from tokenward.pipeline.stages import run_through

SELF, RANDOM = Arm("whole model as oracle"), Arm("random 30 %", SELECTIONS[1].changes)
KEEP_EVERY = 3
WEAK_RECIPE = "recipes/studies/weak.yaml"


def cut(source: str, folder: Path) -> Path:
    """A model with every third layer of another, the first and the last included."""
    model = AutoModelForCausalLM.from_pretrained(resolve(source), dtype=torch.float32)
    layers = model.model.layers
    count = len(layers) // KEEP_EVERY
    kept = torch.linspace(0, len(layers) - 1, count).round().int().tolist()
    model.model.layers = nn.ModuleList([layers[number] for number in kept])
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers = count
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return folder


def weak_model(chosen: argparse.Namespace, seed: int) -> str:
    """The small model, fine-tuned; made once a seed."""
    folder = chosen.runs / f"weak-{seed}"
    if not (folder / "sft" / "manifest.json").exists():
        cut("default", chosen.runs / "weak-cut")
    run = open_run(
        WEAK_RECIPE, [f"run={folder}", f"seed={seed}", f"model.name={chosen.runs / 'weak-cut'}"], quiet=True
    )
    run_through(run, "sft")
    return str(run.path("sft") / "model")


def main() -> None:
    """Run what is missing, then show the table."""
    chosen = options(__doc__).parse_args()
    weak = Arm("a third of it as oracle", lambda seed: [f"oracle.model={weak_model(chosen, seed)}"])
    found = outcomes(RECIPE, [SELF, weak, RANDOM], chosen)
    publish("weak_to_strong", found, chosen, against=SELF.name, title="A smaller oracle: reward against KL")


if __name__ == "__main__":
    main()
