"""Runs that start from an adapter or train one, and models that no run can start from."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig
from safetensors.torch import load_file, save_file

import tokenward
from tests.manifests import rewritten
from tests.stages.runs import EXAMPLES, lines, online_recipe, refusal
from tests.tiny import move_trained
from tokenward.errors import UserError
from tokenward.models.head_mlp import HeadMLPSettings
from tokenward.models.loading import load_model
from tokenward.stages import run as starts
from tokenward.tools.export import export

IDS = torch.tensor([[13, 14, 70, 71, 72]])
TDPO = "policy.objective={name: tdpo}"
LORA = "model.adapter={r: 2, target_modules: [q_proj, embed_tokens]}"


@torch.no_grad()
def logits(name) -> torch.Tensor:
    return load_model(str(name), device="cpu").model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_folder) -> Path:
    """An adapter as peft saves it: without a tokenizer."""
    model = load_model(str(tiny_folder), device="cpu").with_adapter({"r": 2, "target_modules": "all-linear"})
    move_trained(model.model)
    folder = tmp_path_factory.mktemp("adapter") / "model"
    model.model.save_pretrained(str(folder))
    return folder


def losses(run, stage: str) -> list[float]:
    lines = [json.loads(line) for line in (run.path(stage) / "history.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def changed(adapter: Path, folder: Path, **settings) -> Path:
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize("new", [[], [LORA]], ids=["every weight", "a new adapter"])
def test_run_starts_from_the_merged_weights_of_an_adapter(tiny_workplace, adapter, capsys, new):
    changes = [f"model.name={adapter}", TDPO, *new]
    run = tokenward.run(tiny_workplace, changes, last="policy")
    assert " ".join(capsys.readouterr().out.split()).count(" was merged into ") == 1
    (merged,) = run.path("merged").iterdir()
    torch.testing.assert_close(logits(merged), logits(adapter), rtol=0, atol=1e-4)
    assert losses(run, "oracle")[0] == pytest.approx(math.log(2), abs=1e-7)
    assert losses(run, "policy")[0] == pytest.approx(math.log(2), abs=1e-7)
    policy = load_model(str(run.path("policy") / "model"), device="cpu")
    assert policy.has_adapter == bool(new)
    assert export(str(run.folder), "out").difference < 1e-4


def test_online_run_with_sft_starts_from_an_adapter(tmp_path, adapter, monkeypatch):
    recipe = online_recipe(tmp_path, adapter, EXAMPLES)
    monkeypatch.chdir(tmp_path)
    tables = ["sft={training: {learning_rate: 0.0, max_steps: 1}}", f"reward.model={adapter}"]
    run = tokenward.run(recipe, tables, last="online", quiet=True)
    torch.testing.assert_close(logits(run.path("sft") / "model"), logits(adapter), rtol=0, atol=1e-4)


def test_adapter_that_merges_to_other_numbers_is_refused(tiny_workplace, adapter, monkeypatch):
    monkeypatch.setattr(starts, "TOLERANCE", {"float32": 0.0})
    assert refusal(tiny_workplace, [f"model.name={adapter}"], last="reference").code == "merge-differs"


@pytest.mark.parametrize("base", ["/not/here", "not/here", None])
def test_base_of_an_adapter_must_exist(tiny_workplace, adapter, tmp_path, monkeypatch, base):
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # a request without a network takes a minute
    folder = changed(adapter, tmp_path / "changed", base_model_name_or_path=base)
    for key in ("model.name", "oracle.model", "policy.model", "auxiliary_models.a.model"):
        error = refusal(tiny_workplace, [f"{key}={folder}"])
        assert error.key == key
        assert str(base or "base model") in str(error)
    assert not Path("runs").exists()


def test_models_that_cannot_start_a_run_are_refused(tiny_workplace, tiny_folder, tmp_path):
    PromptTuningConfig(num_virtual_tokens=4).save_pretrained(str(tmp_path / "prompts"))
    assert "PROMPT_TUNING" in str(refusal(tiny_workplace, [f"model.name={tmp_path / 'prompts'}"]))
    model = load_model(str(tiny_folder), device="cpu").with_head_mlp(HeadMLPSettings(hidden=4), seed=0)
    model.save(tmp_path / "network")
    error = refusal(tiny_workplace, [f"model.name={tmp_path / 'network'}"])
    assert (error.code, error.key) == ("cannot-start", "model.name")
    assert f"Use {tiny_folder}." in str(error)


def test_saved_adapter_has_the_absolute_path_of_its_base(tiny_workplace, tiny_folder):
    Path("near").symlink_to(tiny_folder)
    run = tokenward.run(
        tiny_workplace, ["model.name=near", LORA, "oracle.training.max_steps=1"], last="oracle", quiet=True
    )
    saved = json.loads((run.path("oracle") / "model" / "adapter_config.json").read_text())
    assert Path(saved["base_model_name_or_path"]) == tiny_folder.resolve()


def test_export_is_compared_with_the_trained_model(copied_run, capsys):
    """Not with the folder, which may have changed since."""
    path = Path("runs/quickstart/policy/model/model.safetensors")
    weights = load_file(path)
    save_file({name: weight * 1.1 for name, weight in weights.items()}, path, {"format": "pt"})
    with pytest.raises(UserError, match="other content"):
        export("runs/quickstart", "out")
    rewritten(path.parent.parent)  # as if somebody wanted it unnoticed
    with pytest.raises(UserError, match="nats"):
        export("runs/quickstart", "out")
    assert not Path("out").exists()
    Path("runs/quickstart/policy/trained.safetensors").unlink()
    rewritten(path.parent.parent)
    found = export("runs/quickstart", "out")
    assert not found.from_training
    assert found.difference == 0


@pytest.mark.parametrize(
    "more", ["use_dora: true", "init_lora_weights: mica", "trainable_token_indices: [5, 7]"]
)
def test_new_adapter_starts_exactly_at_the_reference(copied_run, more):
    """KTO's divergence is 0 and TDPO's loss ln 2 at the first update; without any rounding."""
    changes = [
        f"model.adapter={{r: 2, target_modules: [q_proj, v_proj], {more}}}",
        "scores.scorer={name: random}",
    ]
    changes += ["policy.training={learning_rate: 0.01, max_steps: 2}"]
    first = []
    for name in ("kto", "tdpo"):
        run = tokenward.run(
            copied_run, [*changes, f"policy.objective={{name: {name}}}"], last="policy", quiet=True
        )
        first.append(lines(run.path("policy") / "history.jsonl")[0])
    assert first[0]["kl"] == 0.0
    assert first[1]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    found = export(str(run.folder), "out")
    assert found.from_training
    assert found.difference < 1e-5
