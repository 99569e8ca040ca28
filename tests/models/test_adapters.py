"""The law of an adapter: at its start nothing, and left out always the base; and the same after a folder and after merging."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, PeftModel

from tests.models.plain import plain_logprobs
from tests.tiny import move_trained, save_tiny, tiny_gpt2, tiny_llama, tiny_t5
from tests.tokens.rows import encoded
from tests.training.tools import language_model
from tokenward.errors import UserError
from tokenward.models import adapters
from tokenward.models.adapters import REFUSED, STARTS, TAKEN, lora_config, merged
from tokenward.models.forward import token_logprobs
from tokenward.models.identity import model_sizes
from tokenward.models.loading import LanguageModel, load_model
from tokenward.tokens.batches import collate

ALL = {"r": 2, "target_modules": "all-linear"}
FEW = {"r": 2, "target_modules": ["q_proj"]}
KINDS = {
    "plain": ALL,
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
ON_EMBEDDINGS = ("embedding", "head", "both", "both as one", "whole embedding", "whole head", "both whole", "tokens", "tokens of both")  # fmt: skip
CASES = [
    *((kind, True) for kind in KINDS),
    *((kind, False) for kind in ON_EMBEDDINGS if kind != "both as one"),
]
ROW = encoded([13, 14, 70, 71], [5, 13, 200], [14, 9], [72])
IDS = torch.tensor([[13, 14, 70, 71, 72, 13, 200]])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base whose embeddings share a weight, and one whose do not."""
    place = tmp_path_factory.mktemp("bases")
    return {
        tied: save_tiny(place / str(tied), tiny_llama(tie_word_embeddings=tied)) for tied in (True, False)
    }


def adapted(folder, kind: str) -> LanguageModel:
    return load_model(str(folder), device="cpu").with_adapter(KINDS[kind])


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_an_adapter_begins_at_the_base_and_leaves_it_alone(folders, tmp_path, kind, tied):
    """And what is loaded again says the same to the bit; what is merged, to rounding."""
    base = logits(load_model(str(folders[tied]), device="cpu").model)
    model = adapted(folders[tied], kind)
    assert torch.equal(logits(model.model), base)
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


@pytest.mark.parametrize(("kind", "tied"), [case for case in CASES if case[0] in ON_EMBEDDINGS])
def test_adapters_on_embeddings_give_plain_numbers_and_gradients(folders, kind, tied):
    model = adapted(folders[tied], kind)
    move_trained(model.model)
    model.model.eval()
    plain_logprobs(model.model, [ROW]).sum().backward()
    weights = {name: weight for name, weight in model.model.named_parameters() if weight.requires_grad}
    expected = {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for layout in ("shared", "separate"):
        model.model.zero_grad()
        batch = collate([ROW], layout=layout, pad_id=0)
        logp = token_logprobs(model.model, model.head, batch)
        torch.testing.assert_close(logp, plain_logprobs(model.model, [ROW]), rtol=0, atol=2e-5)
        logp.sum().backward()
        found = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * largest)


def test_every_field_of_peft_is_decided():
    """A new version of peft with another field fails here: somebody must decide what a recipe may say with it."""
    assert TAKEN | REFUSED.keys() == {field.name for field in dataclasses.fields(LoraConfig)}
    assert not TAKEN & REFUSED.keys()


def test_a_field_that_cannot_act_is_refused_with_its_reason():
    for name, reason in REFUSED.items():
        with pytest.raises(UserError, match=f"^{name} is 'x'") as caught:
            lora_config({"r": 2, name: "x"}, encoder_decoder=False)
        assert reason in str(caught.value)
        lora_config({"r": 2, name: getattr(LoraConfig(), name)}, encoder_decoder=False)


def test_a_start_that_is_not_the_base_is_refused():
    others = ("pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq", "orthogonal", "lora_ga", "Gaussian")
    for start in (False, *others, 1, None):
        with pytest.raises(UserError, match="init_lora_weights"):
            lora_config({"r": 2, "init_lora_weights": start}, encoder_decoder=False)


def test_the_law_itself_finds_such_a_start(monkeypatch, folders):
    """On the model, where the list of values would let one through."""
    starts = ("pissa", "olora", "orthogonal", False)
    monkeypatch.setattr(adapters, "STARTS", (True, *starts))
    for start in starts:
        with pytest.raises(UserError, match=r"with the new adapter .* is not the base model"):
            load_model(str(folders[True]), device="cpu").with_adapter({**ALL, "init_lora_weights": start})


def test_the_law_finds_biases_that_stay(monkeypatch):
    monkeypatch.delitem(REFUSED, "bias")
    with (
        pytest.raises(UserError, match=r"without the trained adapter .* is not the base model"),
        pytest.warns(UserWarning, match="does not produce the same output as the base model"),
    ):
        language_model(tiny_gpt2()).with_adapter({"r": 2, "bias": "all", "fan_in_fan_out": True})


def test_to_hold_embeddings_together_that_are_not_is_refused(folders):
    with pytest.raises(UserError, match="requested `ensure_weight_tying`, but no tied modules were found"):
        adapted(folders[False], "both as one")


def test_every_start_that_is_taken_is_tried_above():
    assert set(STARTS) == {
        True,
        *(case["init_lora_weights"] for case in KINDS.values() if "init_lora_weights" in case),
    }


def test_a_task_of_another_kind_is_refused():
    assert lora_config({"task_type": "CAUSAL_LM"}, encoder_decoder=False).task_type == "CAUSAL_LM"
    with pytest.raises(UserError, match="task_type is SEQ_CLS"):
        lora_config({"task_type": "SEQ_CLS"}, encoder_decoder=False)


def test_an_encoder_decoder_has_one_too(tmp_path):
    folder = save_tiny(tmp_path / "t5", tiny_t5())
    model = load_model(str(folder), device="cpu").with_adapter({"r": 2, "target_modules": ["q", "v"]})
    assert isinstance(model.model, PeftModel)
    assert model.model.peft_config["default"].base_model_name_or_path == str(folder.resolve())


def test_an_adapter_is_tried_on_a_model_without_weights(folders):
    for kind in KINDS:
        model = adapted(folders[True], kind).model
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        assert model_sizes(str(folders[True]), adapter=KINDS[kind]).trained == trained, kind
