"""Runs that start from an adapter's folder, and what no run can start from."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig
from safetensors.torch import load_file, save_file

import tokenward
from tests.stages.runs import EXAMPLES, guided_recipe, refused
from tests.tiny import move_trained
from tokenward.errors import UserError
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


@pytest.mark.parametrize("new", [[], [LORA]], ids=["every weight", "a new adapter"])
def test_a_run_starts_from_an_adapter(tiny_workplace, adapter, capsys, new):
    """Its merged weights are the reference, and what a new adapter stands on."""
    changes = [f"model.name={adapter}", TDPO, *new]
    run = tokenward.run(tiny_workplace, changes, last="policy")
    assert " ".join(capsys.readouterr().out.split()).count("was merged into whole weights") == 1
    (merged,) = run.path("merged").iterdir()
    torch.testing.assert_close(logits(merged), logits(adapter), rtol=0, atol=1e-4)
    assert losses(run, "oracle")[0] == pytest.approx(math.log(2), abs=1e-7)
    assert losses(run, "policy")[0] == pytest.approx(math.log(2), abs=1e-7)
    policy = load_model(str(run.path("policy") / "model"), device="cpu")
    assert policy.has_adapter == bool(new)
    assert export(str(run.folder), "out").difference < 1e-4


def test_so_do_sft_and_a_guided_run(tmp_path, adapter, monkeypatch):
    recipe = guided_recipe(tmp_path, adapter, EXAMPLES)
    monkeypatch.chdir(tmp_path)
    tables = ["sft={training: {learning_rate: 0.0, max_steps: 1}}", f"reward.model={adapter}"]
    run = tokenward.run(recipe, tables, last="online", quiet=True)
    torch.testing.assert_close(logits(run.path("sft") / "model"), logits(adapter), rtol=0, atol=1e-4)


def test_an_adapter_that_is_merged_wrongly_is_refused(tiny_workplace, adapter, monkeypatch):
    monkeypatch.setattr(starts, "TOLERANCE", {"float32": 0.0})
    message = refused(tiny_workplace, [f"model.name={adapter}"], last="reference")
    assert "merged into its base says something else: log-probabilities differ by up to" in message


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("/not/here", "is an adapter on /not/here, which cannot be found: .* base_model_name_or_path in"),
        ("not/here", "is an adapter on not/here, which cannot be found: .* base_model_name_or_path in"),
        (None, "does not name its base model"),
    ],
)
def test_the_base_of_an_adapter_must_be_there(tiny_workplace, adapter, tmp_path, monkeypatch, base, message):
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # asking takes a minute where there is no network
    folder = changed(adapter, tmp_path / "changed", base_model_name_or_path=base)
    for key in ("model.name", "oracle.model", "policy.model", "auxiliary_models.a.model"):
        with pytest.raises(UserError, match=rf"(?s)^--set {key}: .*{message}"):
            tokenward.run(tiny_workplace, [f"{key}={folder}"], last="data", quiet=True)
    assert not Path("runs").exists()


def test_an_adapter_of_prompts_is_refused(tiny_workplace, tmp_path):
    PromptTuningConfig(num_virtual_tokens=4).save_pretrained(str(tmp_path))
    message = refused(tiny_workplace, [f"model.name={tmp_path}"], last="data")
    assert "is of the type PROMPT_TUNING, which adds its own tokens before every prompt" in message


def test_a_network_before_a_head_is_no_start(tiny_workplace, tiny_folder, tmp_path):
    from tokenward.models.head_mlp import HeadMLPSettings

    model = load_model(str(tiny_folder), device="cpu").with_head_mlp(HeadMLPSettings(hidden=4), seed=0)
    model.save(tmp_path / "network")
    message = refused(tiny_workplace, [f"model.name={tmp_path / 'network'}"], last="data")
    assert f"training starts from whole weights. Name {tiny_folder}." in message


def test_a_saved_adapter_names_its_base_from_everywhere(tiny_workplace, tiny_folder):
    Path("near").symlink_to(tiny_folder)
    run = tokenward.run(
        tiny_workplace, ["model.name=near", LORA, "oracle.training.max_steps=1"], last="oracle", quiet=True
    )
    saved = json.loads((run.path("oracle") / "model" / "adapter_config.json").read_text())
    assert Path(saved["base_model_name_or_path"]) == tiny_folder.resolve()


def test_an_export_is_compared_with_what_trained(copied_run, capsys):
    """Not with the folder, which may have become another model since."""
    path = Path("runs/quickstart/policy/model/model.safetensors")
    weights = load_file(path)
    save_file({name: weight * 1.1 for name, weight in weights.items()}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"differ by up to [\d.]+ nats from those at the end of the training"):
        export("runs/quickstart", "out")
    assert not Path("out").exists()
    Path("runs/quickstart/policy/trained.safetensors").unlink()
    found = export("runs/quickstart", "out")
    assert not found.from_training
    assert found.difference == 0


def changed(adapter: Path, folder: Path, **settings) -> Path:
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder
