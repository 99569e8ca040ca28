"""The network before a frozen head: what it computes, what trains, and its folder."""

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
NETWORK = {f"lm_head.mlp.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}


def loaded(folder: Path, build=tiny_llama, **settings):
    model = load_model(str(save_tiny(folder, build())), device="cpu", **settings)
    return model.with_head_mlp(HeadMLPSettings(**LIVELY), seed=3)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_logits_are_those_of_the_head_on_the_output_of_the_network(build, residual):
    plain, model = build().eval(), build().eval()
    first, _, second = install_head_mlp(model, HeadMLPSettings(**LIVELY, residual=residual)).mlp
    hidden = plain.base_model(input_ids=IDS).last_hidden_state
    new = torch.relu(hidden @ first.weight.T + first.bias) @ second.weight.T + second.bias
    expected = (new + hidden if residual else new) @ plain.get_output_embeddings().weight.T
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)


def test_published_start_is_uniform_and_residual_starts_at_the_model():
    plain, uniform, residual = (tiny_llama().eval() for _ in range(3))
    install_head_mlp(uniform, HeadMLPSettings())
    install_head_mlp(residual, HeadMLPSettings(residual=True))
    share = uniform(input_ids=IDS).logits.softmax(-1)
    torch.testing.assert_close(share, torch.full_like(share, 1 / share.shape[-1]), rtol=0.02, atol=0)
    expected = plain(input_ids=IDS).logits
    torch.testing.assert_close(residual(input_ids=IDS).logits, expected, rtol=0, atol=2e-3)


def test_only_the_network_trains_and_is_saved(tmp_path):
    model = loaded(tmp_path / "base")
    assert {name for name, value in model.model.named_parameters() if value.requires_grad} == NETWORK
    assert not model.whole
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    rows = [encoded([1, 2], [3, 4, 5], ranks=(0,))]
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.5}
    TokenTrainer(model, SFT(), arguments(tmp_path / "t", **settings), rows).train()
    changed = {k for k, value in model.model.state_dict().items() if not torch.equal(value, before[k])}
    assert changed == NETWORK == set(load_file(tmp_path / "t" / "checkpoint-2" / "model.safetensors"))
    model.save(tmp_path / "mlp")
    assert not (tmp_path / "mlp" / "model.safetensors").exists()
    saved = load_file(tmp_path / "mlp" / "head_mlp.safetensors")
    assert set(saved) == {name.removeprefix("lm_head.mlp.") for name in NETWORK}


@pytest.mark.parametrize(
    ("build", "dtype"),
    [(tiny_llama, "float32"), (tiny_llama, "bfloat16"), (tiny_gpt2, "float32"), (tiny_t5, "float32")],
)
def test_a_saved_network_is_loaded_by_its_folder(tmp_path, monkeypatch, build, dtype):
    model = loaded(tmp_path / "base", build, dtype=dtype)
    assert {value.dtype for value in model.head_mlp.mlp.parameters()} == {torch.float32}
    model.save(tmp_path / "mlp")
    monkeypatch.chdir(tmp_path)  # the base is stored with an absolute path
    again = load_model("mlp", device="cpu", dtype=dtype)
    assert again.head_mlp_settings == model.head_mlp_settings
    inputs = {"input_ids": IDS, **({} if model.start_id is None else {"decoder_input_ids": IDS})}
    again.save(tmp_path / "twice")
    for other in (again, load_model("twice", device="cpu", dtype=dtype)):
        assert torch.equal(other.model(**inputs).logits, model.model(**inputs).logits)


@pytest.mark.parametrize(("packing", "layout"), [("shared_prompts", "shared"), ("none", "separate")])
def test_the_selective_head_answers_through_the_network(tmp_path, packing, layout):
    model = loaded(tmp_path / "base", packing=packing)
    assert model.layout == layout
    batch = model.collate([encoded([1, 2], [3, 4, 5], [6])])
    found, plain = (
        token_statistics(model.model, head, batch, Needs(entropy=True)) for head in (model.head, None)
    )
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
    assert plain["logp"].std() > 0.1
    found["logp"].sum().backward()
    assert all(value.grad.abs().sum() > 0 for value in model.head_mlp.mlp.parameters())


def test_sampling_uses_the_network(tmp_path):
    model = loaded(tmp_path / "base")
    network, weight = model.head_mlp.mlp, model.head_mlp.head.weight
    with torch.no_grad():
        for value in network.parameters():
            value.zero_()
        network[2].bias.copy_(10 * weight[77])  # the same logits at every position
    wanted = int((weight @ network[2].bias).argmax())
    settings = SamplingSettings(max_new_tokens=3, temperature=0.0)
    (reply,) = sample_replies(model, model.template("chat"), [[1, 2]], settings, seed=0)
    assert reply.ids == [wanted] * 3


def test_initialization_depends_on_the_seed_only(tmp_path):
    base = load_model(str(save_tiny(tmp_path / "base")), device="cpu")

    def weight(seed):
        made = load_model(base.name, device="cpu").with_head_mlp(HeadMLPSettings(hidden=4), seed=seed)
        return made.head_mlp.mlp[0].weight

    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = base.with_head_mlp(HeadMLPSettings(hidden=4), seed=0).head_mlp.mlp[0].weight
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, weight(0))
    assert not torch.equal(one, weight(1))


@pytest.mark.parametrize(
    ("code", "breakage"),
    [
        ("missing-file", lambda folder: (folder.parent / "base").rename(folder.parent / "elsewhere")),
        ("damaged-file", lambda folder: (folder / "head_mlp.json").write_text("{")),
        ("damaged-file", lambda folder: (folder / "head_mlp.json").write_text(json.dumps({"settings": {}}))),
        ("damaged-file", lambda folder: (folder / "head_mlp.safetensors").unlink()),
    ],
)
def test_damaged_folder(tmp_path, code, breakage):
    loaded(tmp_path / "base").save(tmp_path / "mlp")
    breakage(tmp_path / "mlp")
    with pytest.raises(UserError) as error:
        load_model(str(tmp_path / "mlp"), device="cpu")
    assert error.value.code == code


@pytest.mark.parametrize("settings", [{"hidden": 0}, {"gain": 0.0}, {"gain": float("nan")}])
def test_settings_out_of_range(settings):
    with pytest.raises(UserError) as error:
        HeadMLPSettings(**settings)
    assert (error.value.code, error.value.key) == ("out-of-range", "model.head_mlp")
