"""Each engine of several processes makes the update of one process, and what it saves is an ordinary folder.

The processes of an engine start once and train all their cases (:mod:`tests.training.engine_cases`); FSDP2 and DeepSpeed run on the
CPU, over gloo. Without a GPU, mixed precision in float16 and DeepSpeed's own optimizers for offloaded weights are not tested.
"""

import json
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.training.engine_cases import CASES, ENGINES, PREPARED, Case, train_all
from tests.training.tools import in_two_processes, largest_difference

WITHIN = 1e-6
"""Largest difference of a weight from that of one process; float32 rounds weights of about 1 to 1e-7."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """What one process makes of all cases."""
    folder = tmp_path_factory.mktemp("alone")
    train_all(folder, "one")
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """``f(engine)``: what two processes make of them."""

    @cache
    def launched(engine: str) -> Path:
        folder = tmp_path_factory.mktemp(engine)
        in_two_processes([sys.executable, "-m", "tests.training.engine_cases", engine, str(folder)], folder)
        return folder

    return launched


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_makes_the_update_of_one_process(engine, case, alone, together):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    mine, theirs = alone / str(case), together(engine) / str(case)
    trained = weights_in(theirs / "begun at 0")
    assert largest_difference(weights_in(mine / "begun at 0"), trained) < WITHIN
    assert largest_difference(weights_in(mine / "start"), trained) > 1e-3
    assert largest_difference(trained, weights_in(theirs / "model")) == 0  # resumed in the middle
    assert json.loads((theirs / "engine.json").read_text()) == PREPARED[engine]
    check_loads(theirs / "model", case)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a saved model, and of the objective's modules beside it."""
    files = [*folder.glob("*.safetensors"), *folder.parent.glob("auxiliary.safetensors")]
    assert files
    return {name: weight for file in files for name, weight in load_file(file).items()}


def check_loads(folder: Path, case: Case) -> None:
    """Other libraries load the folder, and find what is written in it."""
    kind = AutoPeftModelForCausalLM if case.weights == "lora" else AutoModelForCausalLM
    state = kind.from_pretrained(folder).state_dict()
    saved = load_file(next(folder.glob("*.safetensors")))
    assert ("lm_head.weight" in saved) == (case.head == "untied" and case.weights == "full")
    for name, weight in saved.items():
        name = name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
        assert torch.equal(state[name], weight)
