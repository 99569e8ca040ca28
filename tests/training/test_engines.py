"""Each engine of several processes makes the update of one process, and what it saves is an ordinary folder.

The processes of an engine start once and train all their cases (:mod:`tests.training.engine_cases`); FSDP2 and DeepSpeed run on the
CPU, over gloo. By default FSDP2 trains a few of the cases, with ``TOKENWARD_ENGINES=all`` (``make test-all``) each engine all of them, which takes minutes. Without a GPU, mixed precision in float16 and DeepSpeed's own optimizers for offloaded weights are not tested.
"""

import json
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from tests.training.engine_cases import CASES, CROSSED, ENGINES, PREPARED, Case, cases_of, resume, train_all
from tests.training.tools import in_two_processes, largest_difference
from tokenward.artifacts import read_jsonl

WITHIN = 1e-6
"""Largest difference of a weight from that of one process; float32 rounds weights of about 1 to 1e-7."""
COARSE = 6e-3
"""The same in bfloat16, to which engines cast at different places: whole weights, or what goes into a product."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """What one process makes of the cases."""
    folder = tmp_path_factory.mktemp("alone")
    train_all(folder, "one")
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory, alone):
    """``f(engine)``: what two processes make of them."""

    @cache
    def launched(engine: str) -> Path:
        folder = tmp_path_factory.mktemp(engine)
        command = [sys.executable, "-m", "tests.training.engine_cases", engine, str(folder), str(alone)]
        in_two_processes(command, folder)
        return folder

    return launched


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_makes_the_update_of_one_process(engine, case, alone, together):
    needed(engine, case)
    mine, theirs = alone / str(case), together(engine) / str(case)
    trained, start = (
        weights_in(theirs / "begun at 0"),
        weights_in(mine / "start"),
    )
    alike = COARSE if case.setting == "bf16" else WITHIN
    assert largest_difference(weights_in(mine / "begun at 0"), trained) < alike
    assert max(float((trained[name] - start[name]).abs().max()) for name in start) > 10 * alike
    assert largest_difference(trained, weights_in(theirs / "model")) == 0  # resumed in the middle
    of_engine, in_parts, tiled, optimizer = PREPARED[engine]
    expected = [of_engine, in_parts, tiled and case.setting != "reward", optimizer]
    assert json.loads((theirs / "engine.json").read_text()) == expected
    if case.setting == "best":  # which also samples
        assert read_jsonl(mine / "samples.jsonl") == read_jsonl(theirs / "samples.jsonl")
    check_loads(theirs / "model", case)


@pytest.mark.parametrize("case", CROSSED, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_goes_on_with_another_number_of_processes(engine, case, alone, together, tmp_path):
    """From two processes to one and back, and from one engine to another; DeepSpeed's optimizer is cut for its processes."""
    needed(engine, case)
    whole = weights_in(alone / str(case) / "begun at 0")
    resume(case, together(engine), tmp_path, "one")
    for place in (tmp_path / f"{case} crossed", together(engine) / f"{case} crossed"):
        if engine.startswith("zero"):
            assert (place / "refused.txt").read_text().startswith("unusable-checkpoint")
        else:
            assert largest_difference(whole, weights_in(place / "model")) < WITHIN
            assert not [*place.glob("checkpoints/*/translated")]


def needed(engine: str, case: Case) -> None:
    """Skip what is left out by default, and where the engine's library is missing."""
    if case not in cases_of(engine):
        pytest.skip("run with TOKENWARD_ENGINES=all")
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a saved model, and of the objective's modules beside it."""
    files = [*folder.glob("*.safetensors"), *folder.parent.glob("auxiliary.safetensors")]
    assert files
    return {name: weight for file in files for name, weight in load_file(file).items()}


def check_loads(folder: Path, case: Case) -> None:
    """Other libraries load the folder, and find what is written in it."""
    kind = AutoPeftModelForCausalLM if case.weights == "lora" else AutoModelForCausalLM
    if case.setting == "reward":
        kind = AutoModel
    state = kind.from_pretrained(folder).state_dict()
    saved = load_file(next(folder.glob("*model.safetensors")))
    assert ("lm_head.weight" in saved) == (case.head == "untied" and case.weights == "full")
    for name, weight in saved.items():
        name = name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
        assert torch.equal(state[name], weight)
