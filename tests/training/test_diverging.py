"""A training that diverges stops with its step and learning rate, and saves nothing of it."""

from dataclasses import replace

import pytest
import torch

import tokenward
from tests.stages.runs import REINFORCE, online_recipe, refusal
from tests.tiny import tiny_llama
from tests.training.tools import arguments, language_model, random_rows
from tokenward.errors import UserError
from tokenward.models.loading import load_model
from tokenward.objectives import SFT
from tokenward.sampling import SamplingSettings, sample_replies
from tokenward.scoring.basic import LogRatio
from tokenward.scoring.texts import TokenScorer
from tokenward.tokens.template import Style
from tokenward.training.checks import check_weights
from tokenward.training.trainer import TokenTrainer

RATE = "1e+38"


def refused(call) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    return caught.value


def broken(value: float):
    """A model that computes what no number type holds, though it was loaded well."""
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value):
    check_weights(broken(1e30), 3, 0.5)
    error = refused(lambda: check_weights(broken(value), 3, 0.5))
    assert error.code == "non-finite-weights"
    assert "after step 3, with learning_rate 0.5, the weights are NaN or infinite in 1 of " in str(error)
    assert "model.layers.1.mlp.down_proj.weight" in str(error)
    frozen = broken(value).requires_grad_(False)
    check_weights(frozen, 3, 0.5)


@pytest.mark.parametrize("saves", [{}, {"save_strategy": "steps", "save_steps": 1}])
def test_the_last_update_of_a_training_is_checked_too(tmp_path, saves):
    args = arguments(tmp_path, learning_rate=float(RATE), weight_decay=1e3, max_steps=1, **saves)
    trainer = TokenTrainer(language_model(), SFT(), args, random_rows(4))
    error = refused(trainer.train)
    assert f"after step 1, with learning_rate {RATE}, the weights are NaN or infinite" in str(error)
    assert not [*tmp_path.glob("checkpoint-*")]


@pytest.mark.parametrize(
    ("rate", "change", "code"),
    [
        (RATE, "seed=0", "non-finite-weights"),
        ("1e+10", REINFORCE, "non-finite-probabilities"),
        ("1e+10", "online.every=1", "non-finite-probabilities"),
    ],
    ids=["weights", "rollouts", "reward"],
)
def test_a_sampled_run_stops_with_its_step_and_learning_rate(
    tmp_path, tiny_folder, monkeypatch, rate, change, code
):
    recipe = online_recipe(tmp_path, tiny_folder)
    monkeypatch.chdir(tmp_path)
    changes = [change, f"online.training.learning_rate={rate}", "online.training.warmup_steps=0"]
    error = refusal(recipe, changes, last="online")
    assert error.code == code
    assert f"after step 1, with learning_rate {rate}" in str(error)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replies_of_a_model_without_finite_probabilities_are_refused(temperature):
    settings = SamplingSettings(max_new_tokens=3, temperature=temperature, top_p=0.9, batch=2)
    for made in (broken(float("nan")), broken(1.0)):
        model = language_model(made)
        template = model.template(Style())

        def sample(model=model, template=template):
            return sample_replies(model, template, [[1, 2], [3], [4]], settings, seed=0)

        if torch.isfinite(made.model.layers[1].mlp.down_proj.weight).all():
            assert len(sample()) == 3
        else:
            error = refused(sample)
            assert error.code == "non-finite-probabilities"
            assert "2 of 2 replies" in str(error)


def test_scores_of_a_model_without_finite_values_name_the_row(tiny_folder):
    texts = [{"prompt": "Say it.", "responses": ["good tea", "tea"], "scores": [1, 0]}]
    oracle = replace(load_model(str(tiny_folder), device="cpu", packing="none"), fingerprint="diverged")
    oracle.model.load_state_dict(broken(float("nan")).state_dict())
    models = {"oracle": oracle, "reference": load_model(str(tiny_folder), device="cpu")}
    scored = TokenScorer(models, LogRatio())
    for call in (
        lambda: tokenward.score(texts, oracle=oracle, reference=str(tiny_folder)),
        lambda: scored("Say it.", "good tea"),
    ):
        error = refused(call)
        assert error.code == "non-finite-values"
        assert "gives token 1 of " in str(error)
        assert "of response 1 (key " in str(error)
        assert "the log-probability nan" in str(error)
