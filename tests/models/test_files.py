"""Whatever loading a model reads is part of its fingerprint, and nothing else is."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save_file

import tokenward
from tests.tiny import make_workplace, move_trained, save_tiny, tiny_llama
from tokenward.artifacts import file_fingerprint, fingerprint
from tokenward.models import files
from tokenward.models.identity import model_fingerprint
from tokenward.models.loading import load_model
from tokenward.stages.online import OnlineStage

WEIGHTS = "model.safetensors"


def as_bin(folder: Path, *, shards: int = 1, seed: int = 0) -> Path:
    """The tiny model with its weights in torch's own format."""
    save_tiny(folder, tiny_llama(seed=seed))
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    names = {name: f"part-{number % shards}.bin" for number, name in enumerate(sorted(weights))}
    for shard in set(names.values()):
        torch.save({name: value for name, value in weights.items() if names[name] == shard}, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_the_fingerprint_of_an_ordinary_folder_is_that_of_its_ordinary_files(tmp_path):
    save_tiny(tmp_path)
    ordinary = {path.name: file_fingerprint(path) for path in tmp_path.iterdir()}
    for name in ("pytorch_model.bin", "training_args.bin", "README.md", "train.py", "checkpoint-1/model.py"):
        write(tmp_path / name, "not read")
    assert model_fingerprint(str(tmp_path)) == fingerprint([fingerprint(ordinary)])


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_in_torchs_format(tmp_path, shards):
    one, same, other = (
        str(as_bin(tmp_path / str(n), shards=shards, seed=seed)) for n, seed in enumerate((0, 0, 1))
    )
    assert model_fingerprint(one) == model_fingerprint(same) != model_fingerprint(other)
    assert load_model(one, device="cpu", packing="none").fingerprint == model_fingerprint(one)


def test_weights_that_an_index_or_the_config_names_in_another_folder(tmp_path):
    save_tiny(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "sub").mkdir()
    save_file(weights, tmp_path / "sub" / "other.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "sub/other.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    before = load_model(str(tmp_path), device="cpu", packing="none").fingerprint
    changed = {name: value + 1 for name, value in weights.items()}
    save_file(changed, tmp_path / "sub" / "other.safetensors", {"format": "pt"})
    assert model_fingerprint(str(tmp_path)) != before
    (tmp_path / "model.safetensors.index.json").unlink()
    edit(tmp_path / "config.json", transformers_weights="sub/other.safetensors")
    named = load_model(str(tmp_path), device="cpu", packing="none").fingerprint
    save_file(weights, tmp_path / "sub" / "other.safetensors", {"format": "pt"})
    assert model_fingerprint(str(tmp_path)) != named


def test_an_adapter_in_torchs_format(tmp_path, tiny_folder):
    adapted = load_model(str(tiny_folder), device="cpu", packing="none").with_adapter(
        {"r": 2, "target_modules": ["q_proj"]}
    )
    move_trained(adapted.model)
    adapted.save(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "adapter_model.bin")
    before = load_model(str(tmp_path), device="cpu", packing="none").fingerprint
    torch.save({name: value + 1 for name, value in weights.items()}, tmp_path / "adapter_model.bin")
    assert model_fingerprint(str(tmp_path)) != before


def test_the_base_of_a_base(tmp_path, tiny_folder):
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    for name, below in (("inner", "base"), ("outer", "inner")):
        write(
            tmp_path / name / "adapter_config.json",
            json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / below)}),
        )
    before = model_fingerprint(str(tmp_path / "outer"))
    write(base / "generation_config.json", "{}")
    after = model_fingerprint(str(tmp_path / "outer"))
    assert before != after
    edit(tmp_path / "inner" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "outer"))
    assert model_fingerprint(str(tmp_path / "outer")) != after  # of each other; loading refuses it


@pytest.mark.parametrize(
    "name",
    [
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "custom_generate/generate.py",
        "vocab.txt",
        "source.spm",
        "bpe.codes",
        "spiece.model",
    ],
)
def test_files_of_tokenizer_templates_and_generation(tmp_path, name):
    save_tiny(tmp_path)
    seen = {model_fingerprint(str(tmp_path))}
    for content in ("{}", "{ }"):
        write(tmp_path / name, content)
        seen.add(model_fingerprint(str(tmp_path)))
    assert len(seen) == 3


@pytest.mark.parametrize("config", ["config.json", "tokenizer_config.json"])
def test_with_code_of_its_own_every_file_beside_it_counts(tmp_path, config):
    save_tiny(tmp_path)
    for name in ("modeling_own.py", "parts/layers.py", "table.bin"):
        write(tmp_path / name, "1")
    plain = model_fingerprint(str(tmp_path))
    edit(
        tmp_path / config,
        auto_map={"AutoModelForCausalLM": "modeling_own.OwnModel", "AutoTokenizer": [None, "x.Y"]},
    )
    seen = {plain, model_fingerprint(str(tmp_path))}
    for name in ("modeling_own.py", "parts/layers.py", "table.bin"):
        write(tmp_path / name, "2")
        seen.add(model_fingerprint(str(tmp_path)))
    assert len(seen) == 5


def test_code_of_another_repository_counts_if_it_may_run(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model")
    edit(tmp_path / "model" / "config.json", auto_map={"AutoConfig": "owner/code--own.Config"})
    commits = iter("aab")
    monkeypatch.setattr(files, "model_info", lambda name: SimpleNamespace(sha=next(commits)))

    def found(*, trust: bool = True) -> str:
        return model_fingerprint(str(tmp_path / "model"), trust_remote_code=trust)

    first, again, moved = found(), found(), found()
    assert first == again != moved
    assert found(trust=False) not in (first, moved)

    def unreachable(name: str) -> None:
        raise httpx2.ConnectError("no network")

    monkeypatch.setattr(files, "model_info", unreachable)
    cached = {("owner/code", "own.py"): str(tmp_path / "snapshots" / "b" / "own.py")}
    monkeypatch.setattr(files, "try_to_load_from_cache", lambda *names: cached.get(names))
    assert found() == moved
    write(tmp_path / "own" / "code.py", "1")
    edit(tmp_path / "model" / "config.json", auto_map={"AutoConfig": f"{tmp_path / 'own'}--code.Config"})
    local = found()
    write(tmp_path / "own" / "code.py", "2")
    assert found() != local


def test_a_stage_runs_again_after_weights_were_replaced(tmp_path, monkeypatch, capsys):
    recipe = make_workplace(tmp_path / "work", as_bin(tmp_path / "model"))
    monkeypatch.chdir(recipe.parent.parent)
    tokenward.run(recipe, last="reference", quiet=True)
    shutil.rmtree(tmp_path / "model")
    as_bin(tmp_path / "model", seed=1)
    tokenward.run(recipe, last="reference")
    assert "reference runs again: input model: changed" in " ".join(capsys.readouterr().out.split())


def test_the_classifier_that_ranks_samples_is_an_input(tmp_path, copied_online):
    change = f"online.source={{name: classifier, model: {save_tiny(tmp_path / 'ranks')}}}"
    run = tokenward.open_run(copied_online, ["run=runs/online", change], quiet=True)
    before = OnlineStage().inputs(run)
    write(tmp_path / "ranks" / "generation_config.json", "{}")
    after = OnlineStage().inputs(run)
    assert [name for name in after if after[name] != before[name]] == ["source model"]
