"""The saved model has the number type and the cache setting that the model came with."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

import tokenward
from tests.stages.runs import online_recipe, refusal, run_online
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer
from tokenward.tools.export import export

CAME = {"dtype": "bfloat16", "use_cache": True}


def saved(folder: Path) -> dict:
    config = json.loads((folder / "config.json").read_text())
    return {name: config[name] for name in CAME}


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A model that was saved in bfloat16."""
    folder = save_tiny(tmp_path / "half", tiny_llama(dtype=torch.bfloat16))
    assert saved(folder) == CAME
    return folder


def test_models_of_a_run_are_saved_as_the_model_came(tiny_workplace: Path, half: Path) -> None:
    own = [f"model.name={half}", "model.dtype=auto"]
    run = tokenward.run(tiny_workplace, own, last="policy", quiet=True)
    assert saved(run.path("oracle") / "model") == saved(run.path("policy") / "model") == CAME
    run = tokenward.run(tiny_workplace, [own[0], "run=runs/wide"], last="oracle", quiet=True)
    assert saved(run.path("oracle") / "model") == {"dtype": "float32", "use_cache": True}


def test_a_merged_adapter_has_the_type_of_its_base(tiny_workplace: Path, half: Path) -> None:
    adapter = "model.adapter={r: 4, target_modules: all-linear}"
    run = tokenward.run(
        tiny_workplace, [f"model.name={half}", "model.dtype=auto", adapter], last="policy", quiet=True
    )
    export(str(run.folder), Path("exported"))
    assert saved(Path("exported")) == CAME
    changes = [f"model.name={run.path('policy') / 'model'}", "model.dtype=auto", "run=runs/further"]
    further = tokenward.run(tiny_workplace, changes, last="oracle", quiet=True)
    assert saved(further.path("oracle") / "model") == CAME


def test_a_reward_is_saved_with_the_setting_of_its_body(tmp_path: Path, half: Path, monkeypatch) -> None:
    recipe = online_recipe(tmp_path / "online", half)
    monkeypatch.chdir(recipe.parent)
    run = run_online(recipe, "model.dtype=auto")
    assert saved(run.path("online") / "model") == CAME
    assert saved(run.path("online") / "reward") == {"dtype": "float32", "use_cache": True}


def test_a_model_of_a_script_is_saved_as_it_came(script_folder: Path, half: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(half, dtype="auto")
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    args = TrainingArguments(
        "out", max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    trainer = tokenward.SelectiveTrainer(
        model, args, rows, processing_class=tiny_tokenizer(), objective=tokenward.SimPO()
    )
    assert model.config.use_cache
    trainer.train()
    trainer.save_model("saved")
    assert saved(Path("saved")) == CAME


def test_half_precision_is_refused(tiny_workplace: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "fp16", tiny_llama(dtype=torch.float16))
    error = refusal(tiny_workplace, [f"model.name={folder}", "model.dtype=auto"], last="oracle")
    assert (error.code, error.key) == ("unsupported-dtype", "model.dtype")
