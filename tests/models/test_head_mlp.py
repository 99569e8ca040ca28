"""The network before a frozen head: what it computes, what trains, its folder."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import save_tiny, tiny_gpt2, tiny_llama, tiny_t5
from tests.tokens.rows import encoded
from tests.training.tools import arguments
from tokenward.errors import UserError
from tokenward.models.forward import token_statistics
from tokenward.models.head_mlp import HeadMLPSettings, install_head_mlp
from tokenward.models.loading import load_model
from tokenward.objectives import SFT
from tokenward.sampling import SamplingSettings, sample_replies
from tokenward.tokens.batches import Needs
from tokenward.training.trainer import TokenTrainer

IDS = torch.tensor([[1, 2, 3, 4]])
LIVELY = {"hidden": 16, "gain": 1.0, "bias": 0.1}
BUILDS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def states_of(model):
    body = model.model if hasattr(model, "model") else model.transformer
    return body(input_ids=IDS).last_hidden_state


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", BUILDS)
def test_logits_are_those_of_the_head_on_the_networks_output(name, residual):
    plain, model = BUILDS[name]().eval(), BUILDS[name]().eval()
    adapted = install_head_mlp(model, HeadMLPSettings(**LIVELY, residual=residual))
    first, _, second = adapted.mlp
    hidden = states_of(plain)
    new = torch.relu(hidden @ first.weight.T + first.bias) @ second.weight.T + second.bias
    weight = plain.get_output_embeddings().weight
    expected = (new + hidden if residual else new) @ weight.T
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)


def test_the_published_start_explores_and_a_residual_starts_at_the_model():
    plain = tiny_llama().eval()
    explores, starts = tiny_llama().eval(), tiny_llama().eval()
    install_head_mlp(explores, HeadMLPSettings())
    install_head_mlp(starts, HeadMLPSettings(residual=True))
    logits = explores(input_ids=IDS).logits
    uniform = torch.tensor(1 / logits.shape[-1])
    torch.testing.assert_close(logits.softmax(-1), uniform.expand_as(logits), rtol=0.02, atol=0)
    torch.testing.assert_close(starts(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=0, atol=2e-3)


def loaded(folder: Path, build=tiny_llama, **settings):
    model = load_model(str(save_tiny(folder, build())), device="cpu", **settings)
    return model.with_head_mlp(HeadMLPSettings(**LIVELY), seed=3)


def test_only_the_network_trains_and_only_it_is_saved(tmp_path):
    model = loaded(tmp_path / "base")
    assert {name for name, value in model.model.named_parameters() if value.requires_grad} == {
        f"lm_head.mlp.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")
    }
    assert not model.whole
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    rows = [encoded([1, 2], [3, 4, 5], ranks=(0,))]
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.5}
    TokenTrainer(model, SFT(), arguments(tmp_path / "t", **settings), rows).train()
    changed = {k for k, value in model.model.state_dict().items() if not torch.equal(value, before[k])}
    assert changed == {f"lm_head.mlp.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}
    assert set(load_file(tmp_path / "t" / "checkpoint-2" / "model.safetensors")) == changed
    model.save(tmp_path / "mlp")
    assert not (tmp_path / "mlp" / "model.safetensors").exists()
    assert set(load_file(tmp_path / "mlp" / "head_mlp.safetensors")) == {
        name.removeprefix("lm_head.mlp.") for name in changed
    }


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_t5])
def test_what_is_saved_is_loaded_by_its_folders_name(tmp_path, monkeypatch, build):
    model = loaded(tmp_path / "base", build)
    model.save(tmp_path / "mlp")
    monkeypatch.chdir(tmp_path)  # the base is named so that it is found from any folder
    again = load_model("mlp", device="cpu")
    assert again.head_mlp_settings == model.head_mlp_settings
    inputs = {"input_ids": IDS, **({} if model.start_id is None else {"decoder_input_ids": IDS})}
    assert torch.equal(again.model(**inputs).logits, model.model(**inputs).logits)
    again.save(tmp_path / "twice")
    twice = load_model("twice", device="cpu")
    assert torch.equal(twice.model(**inputs).logits, model.model(**inputs).logits)


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_the_selective_head_answers_through_the_network(tmp_path, layout):
    model = loaded(tmp_path / "base", packing={"shared": "shared_prompts", "separate": "none"}[layout])
    assert model.layout == layout
    batch = model.collate([encoded([1, 2], [3, 4, 5], [6])])
    found = token_statistics(model.model, model.head, batch, Needs(entropy=True))
    plain = token_statistics(model.model, None, batch, Needs(entropy=True))
    torch.testing.assert_close(found["logp"], plain["logp"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["entropy"], plain["entropy"], rtol=0, atol=1e-5)
    assert plain["logp"].std() > 0.1
    found["logp"].sum().backward()
    assert all(value.grad.abs().sum() > 0 for value in model.head_mlp.mlp.parameters())


def test_it_samples_from_the_network(tmp_path):
    model = loaded(tmp_path / "base")
    with torch.no_grad():
        for value in model.head_mlp.mlp.parameters():
            value.zero_()
        # The head's product is then the same at every place: one token is always the likeliest.
        model.head_mlp.mlp[2].bias.copy_(10 * model.head_mlp.head.weight[77])
    wanted = int((model.head_mlp.head.weight @ model.head_mlp.mlp[2].bias).argmax())
    settings = SamplingSettings(max_new_tokens=3, temperature=0.0)
    (reply,) = sample_replies(model, model.template("chat"), [[1, 2]], settings, seed=0)
    assert reply.ids == [wanted] * 3


def test_the_network_of_a_half_precision_model_is_in_float32(tmp_path):
    model = loaded(tmp_path / "base", dtype="bfloat16")
    assert {value.dtype for value in model.head_mlp.mlp.parameters()} == {torch.float32}
    assert model.model(input_ids=IDS).logits.dtype == torch.bfloat16
    model.save(tmp_path / "mlp")
    again = load_model(str(tmp_path / "mlp"), dtype="bfloat16", device="cpu")
    assert torch.equal(again.model(input_ids=IDS).logits, model.model(input_ids=IDS).logits)


def test_the_start_is_that_of_its_seed(tmp_path):
    base = load_model(str(save_tiny(tmp_path / "base")), device="cpu")

    def weight(seed):
        made = load_model(base.name, device="cpu").with_head_mlp(HeadMLPSettings(hidden=4), seed=seed)
        return made.head_mlp.mlp[0].weight

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = base.with_head_mlp(HeadMLPSettings(hidden=4), seed=0).head_mlp.mlp[0].weight
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one, weight(0))
    assert not torch.equal(one, weight(1))


def test_a_base_that_moved_is_named(tmp_path):
    model = loaded(tmp_path / "base")
    model.save(tmp_path / "mlp")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"there is no model folder .*base"):
        load_model(str(tmp_path / "mlp"), device="cpu")


@pytest.mark.parametrize(
    ("record", "message"),
    [("{", "head_mlp.json"), (json.dumps({"settings": {}}), "head_mlp.json"), (None, "head_mlp.safetensors")],
)
def test_a_broken_folder_is_a_users_error(tmp_path, record, message):
    loaded(tmp_path / "base").save(tmp_path / "mlp")
    if record is None:
        (tmp_path / "mlp" / "head_mlp.safetensors").unlink()
    else:
        (tmp_path / "mlp" / "head_mlp.json").write_text(record)
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path / "mlp"), device="cpu")


def test_a_network_that_cannot_be_is_refused():
    for settings in ({"hidden": 0}, {"gain": 0.0}, {"gain": float("nan")}):
        with pytest.raises(UserError, match="hidden >= 1 and gain > 0"):
            HeadMLPSettings(**settings)
