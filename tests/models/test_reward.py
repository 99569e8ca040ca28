"""The token reward model: where rewards are read, their range, the initial head, training, and its folder."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tests.models.tools import LIVELY, plain_rewards, reward_model
from tests.tiny import save_tiny, tiny_gpt2, tiny_llama, tiny_t5
from tests.tokens.rows import encoded
from tests.training.tools import arguments
from tokenward.errors import UserError
from tokenward.models.head_mlp import HeadMLPSettings, live_units, mlp
from tokenward.models.loading import load_model
from tokenward.models.reward import (
    HEAD_FILE,
    RewardSettings,
    is_reward_folder,
    load_reward_model,
    new_reward_model,
)
from tokenward.objectives import PlackettLuce
from tokenward.scoring.reads import token_values
from tokenward.training.trainer import TokenTrainer

ids = torch.randint(0, 250, (60,), generator=torch.Generator().manual_seed(5)).tolist()
ROWS = [
    encoded(ids[:9], ids[9:13], ids[13:20]),
    encoded(ids[20:23], ids[23:24], ids[24:29], ids[29:31]),
    encoded(ids[31:45], ids[45:50], ids[50:60], ranks=(1, 0)),
]
KINDS = [("gpt2", "shared"), ("gpt2", "separate"), ("llama", "shared"), ("llama", "separate"), ("t5", "encoder_decoder")]  # fmt: skip
# GPT-2 computes in float64 throughout; the norms of Llama and T5 are always in float32.
EXACT = {"gpt2": 1e-10, "llama": 1e-6, "t5": 1e-5}


def rewards_of(model, rows):
    batch = model.collate(list(rows))
    return model.read(model.model, batch)[0]


def values_of(model, rows=ROWS, **settings):
    settings = {"precision": "float32", "tokens_per_batch": 4096, **settings}
    found = token_values(model, list(rows), **settings)
    return torch.cat([part for row in found for part in row])


@pytest.mark.parametrize(("name", "layout"), KINDS)
def test_reward_is_read_after_its_token_in_every_layout(name, layout):
    model = reward_model(name, layout, dtype=torch.float64)
    expected = plain_rewards(model, ROWS)
    factors = torch.linspace(-1, 2, len(expected), dtype=torch.float64)
    slopes = torch.autograd.grad((expected * factors).sum(), list(model.model.parameters()))
    found = rewards_of(model, ROWS)
    found_slopes = torch.autograd.grad((found * factors).sum(), list(model.model.parameters()))
    assert expected.std() > 0.05, "equal rewards would agree in any layout"
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT[name])
    largest = max(float(slope.abs().max()) for slope in slopes)
    torch.testing.assert_close(found_slopes, slopes, rtol=0, atol=EXACT[name] * largest)


@pytest.mark.parametrize(("name", "layout"), KINDS)
def test_reward_depends_on_its_token_and_earlier_ones_only(name, layout):
    model = reward_model(name, layout, dtype=torch.float64)

    def found(prompt, response):
        return rewards_of(model, [encoded(prompt, response, [20, 21])]).detach()

    before = found([1, 2, 3], [10, 11, 12, 13, 14])
    later = found([1, 2, 3], [10, 11, 12, 99, 98])
    longer = found([1, 2, 3], [10, 11, 12, 99, 98, 97])
    assert torch.allclose(before[:3], later[:3], rtol=0, atol=EXACT[name])
    assert abs(float(before[3] - later[3])) > 1e-3, "the reward depends on its token"
    assert torch.allclose(later[:5], longer[:5], rtol=0, atol=EXACT[name])
    assert torch.allclose(before[5:], later[5:], rtol=0, atol=EXACT[name]), "but not on other responses"
    prompt = found([1, 9, 3], [10, 11, 12, 13, 14])
    assert float((prompt - before).abs().min()) > 1e-5, "and on the prompt"


class Watched:
    """An objective that records the rewards of each response."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, ...], torch.Tensor] = {}

    def __call__(self, logp, batch):
        for number in range(batch.responses):
            mine = batch.response == number
            self.seen[tuple(batch.ids[mine].tolist())] = logp[mine].detach().clone()
        return PlackettLuce()(logp, batch)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_rewards_are_the_same_in_training_and_inference_and_after_saving(tmp_path, name):
    """The published code uses different positions in inference than in training (tlm.md, B2)."""
    folder = save_tiny(tmp_path / "start", {"gpt2": tiny_gpt2, "llama": tiny_llama, "t5": tiny_t5}[name]())
    model = new_reward_model(str(folder), RewardSettings(**LIVELY), seed=1, device="cpu")
    watched = Watched()
    settings = {"learning_rate": 0.0, "per_device_train_batch_size": 2, "num_train_epochs": 1}
    rows = list(ROWS)
    TokenTrainer(model, watched, arguments(tmp_path / "t", **settings), rows).train()
    texts = [tuple(response) for row in ROWS for response in row.responses]
    trained = torch.cat([watched.seen[text] for text in texts])
    assert trained.std() > 0.01
    torch.testing.assert_close(values_of(model), trained, rtol=0, atol=2e-6)
    torch.testing.assert_close(values_of(model, tokens_per_batch=1), trained, rtol=0, atol=2e-6)
    model.save(tmp_path / "reward")
    again = load_reward_model(tmp_path / "reward", device="cpu")
    assert again.settings == model.settings
    assert (again.layout, again.start_id) == (model.layout, model.start_id)
    assert torch.equal(values_of(again), values_of(model))


def test_published_start_gives_all_tokens_nearly_the_same_reward(tmp_path):
    """z = -1e-4 or so: r = softplus(1 - softplus(1 + 1e-4)) = softplus(-0.31326 - 7e-5) = 0.5487."""
    model = new_reward_model(str(save_tiny(tmp_path)), RewardSettings(), seed=0, device="cpu")
    assert values_of(model).tolist() == pytest.approx([0.5487] * 34, abs=2e-4)
    first, last = model.model.head[0], model.model.head[2]
    assert (first.out_features, last.in_features, last.out_features) == (2048, 2048, 1)
    for layer, bias in (
        (first, 0.0),
        (last, -1e-4),
    ):  # at width 32, the published bias would leave no unit active
        assert torch.equal(layer.bias, torch.full_like(layer.bias, bias))
        limit = 1e-4 * (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.98 * limit < float(layer.weight.detach().abs().max()) <= limit


@pytest.mark.parametrize("width", [8, 64, 576, 4096])
@pytest.mark.parametrize("hidden", [16, 2048])
def test_new_head_is_trainable_at_every_width(width, hidden):
    """A ReLU layer without active units has no gradient, so reward models of narrow backbones did not learn."""
    torch.manual_seed(0)
    states = torch.randn(50, width)
    head = mlp(width, hidden, 1, gain=1e-4, bias=None)
    alive = (head[0](states) > 0).float().sum(1)
    assert float(alive.mean()) >= 4
    head(states).sum().backward()
    assert float(head[0].weight.grad.abs().max()) > 0
    published = hidden == 2048 and width >= 576
    assert torch.equal(head[0].bias, torch.full((hidden,), -1e-4 if published else 0.0))
    if published:
        assert float(alive.mean()) == pytest.approx(live_units(width, hidden, gain=1e-4, bias=-1e-4), rel=0.1)


def test_narrow_reward_model_learns_from_the_default_start(tmp_path):
    """Width 32 and the default head: responses with the good token 5 end with higher rewards."""
    model = new_reward_model(str(save_tiny(tmp_path / "model")), RewardSettings(), seed=0, device="cpu")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(16):
        good, bad = torch.randint(10, 250, (2, 6), generator=generator).tolist()
        good[3] = 5
        rows.append(encoded([1, 2], good, bad))
    settings = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 12}
    TokenTrainer(model, PlackettLuce(), arguments(tmp_path / "t", **settings), rows).train()
    model.model.eval()
    values = values_of(model, list(rows)).view(16, 2, 6)
    assert float(values.std()) > 1e-2
    assert float(values[:, 0].mean(1).sub(values[:, 1].mean(1)).min()) > 0


def test_initialization_depends_on_the_seed_only(tmp_path):
    folder, settings = str(save_tiny(tmp_path)), RewardSettings(hidden=4)
    state = torch.get_rng_state()
    one, same, other = (
        new_reward_model(folder, settings, seed=seed, device="cpu").model.head[0].weight for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("settings", "low", "high", "middle"),
    [
        ({}, 1e-8, 1.3132617, 0.5487),
        ({"exact_range": True}, 1e-8, 1.0, 0.5487 / 1.3132617),
        ({"bound": "sigmoid"}, 1e-8, 1.0, 0.5),
        ({"bound": "sigmoid", "low": -2.0, "high": 3.0}, -2.0, 3.0, 0.5),
        ({"low": 2.0, "high": 5.0}, 2.0, 2 + 3.0485874, None),
    ],
)
def test_range_of_a_bound_is_reached_by_large_outputs(settings, low, high, middle):
    made = RewardSettings(**settings)
    assert made.range == pytest.approx((low, high), rel=1e-6)
    far = torch.tensor([-1e3, -80.0, 0.0, 80.0, 1e3], dtype=torch.float64)
    found = made.bounded(far)
    assert found[[0, 4]].tolist() == pytest.approx([low, high], rel=1e-6, abs=1e-12)
    if middle is not None:
        assert float(found[2]) == pytest.approx(middle, abs=1e-4)
    assert (found >= made.range[0]).all()
    assert (found <= made.range[1] + 1e-9).all()
    # Likelihood weights divide by sums of rewards, which must not be 0 in float32 either.
    assert float(RewardSettings().bounded(torch.tensor(-50.0))) > 9.99e-9


def test_reward_without_a_bound_is_the_output_of_the_head():
    settings, raw = RewardSettings(bound="none"), torch.tensor([-7.5, 0.0, 123.0])
    assert settings.range == (-float("inf"), float("inf"))
    assert torch.equal(settings.bounded(raw), raw)


def test_head_can_be_one_linear_layer(tmp_path):
    model = reward_model("gpt2", "shared", hidden=None, bound="none", gain=1.0)
    weight, bias = model.model.head.weight, model.model.head.bias
    assert (weight.shape, bias.tolist()) == ((1, 32), [pytest.approx(0.1)])
    states = model.model.backbone(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state[0]
    found = rewards_of(model, [encoded([5], [6, 7])])
    torch.testing.assert_close(found, (states @ weight[0] + bias)[1:], rtol=0, atol=1e-5)
    model.save(tmp_path)
    assert torch.equal(values_of(load_reward_model(tmp_path, device="cpu")), values_of(model))


@pytest.mark.parametrize("freeze", [True, False])
def test_freeze_trains_only_the_head(tmp_path, freeze):
    folder = str(save_tiny(tmp_path / "start"))
    model = new_reward_model(folder, RewardSettings(**LIVELY, freeze=freeze), seed=0, device="cpu")
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.5}
    rows = list(ROWS)
    TokenTrainer(model, PlackettLuce(), arguments(tmp_path / "t", **settings), rows).train()
    changed = {
        name for name, value in model.model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert {name for name in changed if name.startswith("head.")} == {
        "head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias",
    }  # fmt: skip
    assert any(name.startswith("backbone.") for name in changed) is not freeze
    saved = load_file(tmp_path / "t" / "checkpoint-2" / "model.safetensors")
    assert any(name.startswith("backbone.") for name in saved) is not freeze


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_t5])
def test_automodel_loads_the_folder(tmp_path, build):
    model = new_reward_model(
        str(save_tiny(tmp_path / "m", build())), RewardSettings(**LIVELY), seed=0, device="cpu"
    )
    with torch.no_grad():
        for value in model.model.parameters():
            value.add_(0.01)
    model.save(tmp_path / "reward")
    plain, found = AutoModel.from_pretrained(tmp_path / "reward", output_loading_info=True)
    assert not found["missing_keys"]
    mine = model.model.backbone.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in plain.state_dict().items())
    assert set(load_file(tmp_path / "reward" / HEAD_FILE)) == set(model.model.head.state_dict())
    assert is_reward_folder(tmp_path / "reward")


def test_head_and_rewards_stay_in_float32(tmp_path):
    reward_model("llama", "shared").save(tmp_path)
    model = load_reward_model(tmp_path, dtype="bfloat16", device="cpu")
    assert {value.dtype for value in model.model.backbone.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in model.model.head.parameters()} == {torch.float32}
    found = rewards_of(model, ROWS)
    assert found.dtype == torch.float32
    exact = values_of(load_reward_model(tmp_path, device="cpu"))
    torch.testing.assert_close(found.detach(), exact, rtol=0, atol=0.05)


def test_segments_get_the_mean_of_their_tokens():
    model = reward_model("gpt2", "shared")
    (single,) = token_values(model, [ROWS[0]], precision="float32", tokens_per_batch=4096)
    row = replace(ROWS[0], segments=[torch.tensor([0, 0, 3, 3]), torch.tensor([0, 1, 1, 1, 2, 2, 2])])
    (found,) = token_values(model, [row], precision="float32", tokens_per_batch=4096)
    one, two = single
    expected = [one[:2].mean()] * 2 + [one[2:].mean()] * 2
    torch.testing.assert_close(found[0], torch.stack(expected))
    expected = [two[0], *[two[1:4].mean()] * 3, *[two[4:].mean()] * 3]
    torch.testing.assert_close(found[1], torch.stack(expected))


@pytest.mark.parametrize("kind", ["adapter", "head_mlp"])
def test_reward_model_needs_whole_weights(tmp_path, kind):
    base = load_model(str(save_tiny(tmp_path / "base")), device="cpu")
    if kind == "adapter":
        part = base.with_adapter({"r": 2, "target_modules": ["q_proj"]})
    else:
        part = base.with_head_mlp(HeadMLPSettings(hidden=4), seed=0)
    part.save(tmp_path / "part")
    with pytest.raises(UserError) as error:
        new_reward_model(str(tmp_path / "part"), RewardSettings(), seed=0, device="cpu")
    assert error.value.code == "not-whole-weights"


def code_of_loading(folder) -> str:
    with pytest.raises(UserError) as error:
        load_reward_model(folder, device="cpu")
    return error.value.code


def test_folder_without_a_whole_reward_model(tmp_path):
    folder = save_tiny(tmp_path / "model")
    assert code_of_loading(folder) == code_of_loading(tmp_path / "nowhere") == "not-a-reward-model"
    assert not is_reward_folder(folder)
    reward_model("gpt2", "shared").save(tmp_path)
    path = tmp_path / "token_reward.json"
    settings = path.read_text()
    for text in (json.dumps({**json.loads(settings), "novel": 1}), "{"):
        path.write_text(text)
        assert code_of_loading(tmp_path) == "damaged-file"
    path.write_text(settings)
    (tmp_path / HEAD_FILE).unlink()
    assert code_of_loading(tmp_path) == "damaged-file"


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"low": 1.0, "high": 1.0}, "high"),
        ({"low": math.nan}, "high"),
        ({"gain": 0.0}, "hidden"),
        ({"hidden": 0}, "hidden"),
    ],
)
def test_settings_out_of_range(settings, key):
    with pytest.raises(UserError) as error:
        RewardSettings(**settings)
    assert (error.value.code, error.value.key) == ("out-of-range", f"reward.head.{key}")
