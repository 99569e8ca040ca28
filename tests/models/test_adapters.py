"""A new adapter changes nothing, a disabled one leaves the base, and both survive saving, loading and merging."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, PeftModel

from tests.models.plain import plain_logprobs, token_logprobs
from tests.tiny import move_trained, save_tiny, tiny_gpt2, tiny_llama, tiny_t5
from tests.tokens.rows import encoded
from tests.training.tools import language_model
from tokenward.errors import UserError
from tokenward.models import adapters
from tokenward.models.adapters import REFUSED, STARTS, lora_config, merged
from tokenward.models.identity import model_sizes
from tokenward.models.loading import LanguageModel, load_model
from tokenward.tokens.batches import collate

ALL = {"r": 2, "target_modules": "all-linear"}
FEW = {"r": 2, "target_modules": ["q_proj"]}
KINDS = {
    "gaussian": {**ALL, "init_lora_weights": "gaussian"},
    "mica": {**ALL, "init_lora_weights": "mica"},
    "rslora": {**ALL, "use_rslora": True},
    "dora": {**ALL, "use_dora": True},
    "patterns": {**ALL, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 2}},
    "one layer": {**FEW, "layers_to_transform": [1], "layers_pattern": "layers"},
    "all but": {**ALL, "exclude_modules": ["q_proj"]},
    "norms": {**FEW, "modules_to_save": ["norm"]},
    "parameters": {**FEW, "target_parameters": ["mlp.up_proj.weight"]},
    "embedding": {"r": 2, "target_modules": ["embed_tokens"]},
    "head": {"r": 2, "target_modules": ["lm_head"]},
    "both": {"r": 2, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "both as one": {"r": 2, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "whole embedding": {**FEW, "modules_to_save": ["embed_tokens"]},
    "whole head": {**FEW, "modules_to_save": ["lm_head"]},
    "both whole": {**FEW, "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {**FEW, "trainable_token_indices": [13, 14]},
    "tokens of both": {**FEW, "trainable_token_indices": {"embed_tokens": [13, 14], "lm_head": [13, 14]}},
}
ON_EMBEDDINGS = list(KINDS)[list(KINDS).index("embedding") :]
CASES = [
    *((kind, True) for kind in KINDS),
    *((kind, False) for kind in ON_EMBEDDINGS if kind != "both as one"),
]
SUPPORTED = {
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "use_dora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "trainable_token_indices", "target_parameters", "ensure_weight_tying", "task_type",
}  # fmt: skip
"""Fields of peft.LoraConfig that do what peft documents."""
ROW = encoded([13, 14, 70, 71], [5, 13, 200], [14, 9], [72])
IDS = torch.tensor([[13, 14, 70, 71, 72, 13, 200]])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base with tied embeddings, and one without."""
    place = tmp_path_factory.mktemp("bases")
    return {
        tied: save_tiny(place / str(tied), tiny_llama(tie_word_embeddings=tied)) for tied in (True, False)
    }


def adapted(folder, kind: str) -> LanguageModel:
    return load_model(str(folder), device="cpu").with_adapter(KINDS[kind])


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_adapter_law_and_saving_and_merging(folders, tmp_path, kind, tied):
    """Saving and loading is exact, merging up to rounding."""
    base = logits(load_model(str(folders[tied]), device="cpu").model)
    model = adapted(folders[tied], kind)
    assert torch.equal(logits(model.model), base)
    trainable = sum(weight.numel() for weight in model.model.parameters() if weight.requires_grad)
    assert model_sizes(str(folders[tied]), adapter=KINDS[kind]).trained == trainable
    move_trained(model.model)
    with model.model.disable_adapter():
        assert torch.equal(logits(model.model), base)
    trained = logits(model.model)
    assert (trained - base).abs().max() > 0.1
    model.save(tmp_path / "adapter")
    again = load_model(str(tmp_path / "adapter"), device="cpu")
    assert torch.equal(logits(again.model), trained)
    merged(again.model, "it").save_pretrained(tmp_path / "whole")
    again.tokenizer.save_pretrained(tmp_path / "whole")
    whole = load_model(str(tmp_path / "whole"), device="cpu")
    assert not whole.has_adapter
    torch.testing.assert_close(logits(whole.model), trained, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "tied"), [("gaussian", True), *(case for case in CASES if case[0] in ON_EMBEDDINGS)]
)
def test_adapted_model_has_plain_numbers_and_gradients(folders, kind, tied):
    model = adapted(folders[tied], kind)
    move_trained(model.model)
    model.model.eval()
    expected_logp = plain_logprobs(model.model, [ROW])
    expected_logp.sum().backward()
    weights = {name: weight for name, weight in model.model.named_parameters() if weight.requires_grad}
    expected = {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for layout in ("shared", "separate"):
        model.model.zero_grad()
        logp = token_logprobs(model.model, model.head, collate([ROW], layout=layout, pad_id=0))
        torch.testing.assert_close(logp, expected_logp, rtol=0, atol=2e-5)
        logp.sum().backward()
        found = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * largest)


def test_every_field_of_peft_is_supported_or_refused():
    """A new field in a new version of peft fails here and must be added to one of the two."""
    assert SUPPORTED | REFUSED.keys() == {field.name for field in dataclasses.fields(LoraConfig)}
    assert not SUPPORTED & REFUSED.keys()
    tested = {case["init_lora_weights"] for case in KINDS.values() if "init_lora_weights" in case}
    assert set(STARTS) == {True, *tested}


def test_unsupported_settings_are_refused_with_their_key():
    others = ("pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "orthogonal", "lora_ga", "Gaussian")
    wrong = [(name, "x") for name in REFUSED] + [("task_type", "SEQ_CLS")]
    wrong += [("init_lora_weights", start) for start in (False, *others, 1, None)]
    for name, value in wrong:
        with pytest.raises(UserError) as error:
            lora_config({"r": 2, name: value}, encoder_decoder=False)
        assert (error.value.code, error.value.key) == ("unsupported-adapter", f"adapter.{name}")
        assert REFUSED.get(name, "") in str(error.value)
    for name in REFUSED:
        lora_config({"r": 2, name: getattr(LoraConfig(), name)}, encoder_decoder=False)
    assert lora_config({"task_type": "CAUSAL_LM"}, encoder_decoder=False).task_type == "CAUSAL_LM"


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal", False])
def test_the_law_is_checked_on_the_model(monkeypatch, folders, start):
    """If the list of values let a wrong one pass."""
    monkeypatch.setattr(adapters, "STARTS", (True, start))
    with pytest.raises(UserError, match="with the new adapter") as error:
        load_model(str(folders[True]), device="cpu").with_adapter({**ALL, "init_lora_weights": start})
    assert error.value.code == "unsupported-adapter"


def test_the_law_finds_trained_biases(monkeypatch):
    monkeypatch.delitem(REFUSED, "bias")
    with (
        pytest.raises(UserError, match="without the trained adapter"),
        pytest.warns(UserWarning, match="does not produce the same output as the base model"),
    ):
        language_model(tiny_gpt2()).with_adapter({"r": 2, "bias": "all", "fan_in_fan_out": True})


@pytest.mark.parametrize(
    "settings", [{"rank": 4}, {"r": 4, "target_modules": ["nowhere"]}, KINDS["both as one"]]
)
def test_adapter_that_peft_rejects(folders, settings):
    with pytest.raises(UserError) as error:
        load_model(str(folders[False]), device="cpu").with_adapter(settings)
    assert (error.value.code, error.value.key) == ("invalid-adapter", "adapter")


def test_encoder_decoder_can_have_an_adapter(tmp_path):
    folder = save_tiny(tmp_path / "t5", tiny_t5())
    model = load_model(str(folder), device="cpu").with_adapter({"r": 2, "target_modules": ["q", "v"]})
    assert isinstance(model.model, PeftModel)
    assert model.model.peft_config["default"].base_model_name_or_path == str(folder.resolve())
