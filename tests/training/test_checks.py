"""Checks around training: policy and reference are the same model at the start, and losses are finite."""

import math
from dataclasses import replace

import pytest
import torch

from tests.tiny import tiny_gpt2, tiny_llama
from tests.training.tools import language_model, random_rows, with_reference
from tokenward.errors import UserError
from tokenward.objectives import DPO, IPO, KTO, TDPO, CheckedObjective, Selected
from tokenward.selection import KeepAll
from tokenward.training.checks import FiniteLosses, check_first_batch, check_rows
from tokenward.training.passes import frozen_reference

CASES = {
    "llama-shared": (tiny_llama, "shared"),
    "llama-separate": (tiny_llama, "separate"),
    "gpt2": (tiny_gpt2, "shared"),
}


def first_batch(rows, objective=None, *, model=None, precision=torch.float32):
    return check_first_batch(model or language_model(), objective or DPO(), rows, precision=precision)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_at_the_start_the_margin_is_0_and_the_loss_ln_2(case, beta):
    make, layout = CASES[case]
    # The reference was computed in other batches than those that train.
    rows = [with_reference(language_model(make()), [row])[0] for row in random_rows(4, longest=30)]
    found = first_batch(rows, DPO(beta=beta), model=language_model(make(), layout=layout))
    expected = {"loss": math.log(2), "begins": math.log(2), "margin": 0, "per_token": 0}
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.20
def test_a_new_adapter_changes_nothing():
    rows = with_reference(language_model(), random_rows(4))
    model = language_model().with_adapter({"r": 4, "target_modules": ["q_proj", "v_proj"]})
    assert first_batch(rows, model=model)["margin"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("objective", [DPO(), IPO(beta=0.5)])
def test_the_reference_of_another_model_is_an_error(objective):
    rows = with_reference(language_model(tiny_llama(seed=1)), random_rows(4, longest=30))
    with pytest.raises(UserError) as caught:
        first_batch(rows, objective)
    assert caught.value.code == "reference-mismatch"


@pytest.mark.parametrize("objective", [TDPO(), KTO()])
def test_the_frozen_model_must_be_that_of_the_stored_values(objective):
    rows, policy = with_reference(language_model(), random_rows(4)), language_model()

    def check(reference):
        frozen = frozen_reference(objective, policy, language_model(tiny_llama(seed=reference)))
        return check_first_batch(policy, objective, rows, precision=torch.float32, reference=frozen)

    assert check(0)["per_token"] == pytest.approx(0, abs=1e-5)
    with pytest.raises(UserError, match="KL divergence") as caught:
        check(1)
    assert caught.value.code == "reference-mismatch"


def test_a_frozen_reference_is_another_model_than_the_policy():
    policy = language_model()
    with pytest.raises(UserError) as caught:
        frozen_reference(TDPO(), policy, policy)
    assert caught.value.code == "same-model"
    assert all(weight.requires_grad for weight in policy.model.parameters())


def shifted(rows, by):
    return [replace(row, reference_logp=[side + by for side in row.reference_logp]) for row in rows]


def test_a_small_constant_difference_is_an_error_in_float32_and_allowed_in_bfloat16():
    """0.01 nats per token is rounding in bfloat16 and another model in float32; NaN is always an error."""
    rows = with_reference(language_model(), random_rows(4))
    for by, words in ((0.01, "differ by 0.0100 nats"), (math.nan, "differ by nan")):
        with pytest.raises(UserError, match=words):
            first_batch(shifted(rows, by))
    found = first_batch(shifted(rows, 0.01), precision=torch.bfloat16)
    assert found["per_token"] == pytest.approx(0.01, abs=0.01)


def test_tokens_without_weight_are_not_compared():
    wrong = []
    for row in with_reference(language_model(), random_rows(3, longest=10)):
        weights = [torch.ones(len(ids)) for ids in row.responses]
        values = [side.clone() for side in row.reference_logp]
        for side, weight in zip(values, weights, strict=True):
            weight[0], side[0] = 0.0, -1e4
        wrong.append(replace(row, weights=weights, reference_logp=values))
    found = first_batch(wrong)
    assert found["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert found["margin"] == pytest.approx(0, abs=1e-4)


def test_the_expected_loss_is_the_objectives_own():
    found = first_batch(with_reference(language_model(), random_rows(4)), IPO(beta=0.5))
    assert found["begins"] == pytest.approx(1.0, abs=1e-6), "the square of the target"


@pytest.mark.parametrize(
    ("wrapped", "name"),
    [
        (CheckedObjective(DPO(), "mylab:Mine"), "mylab:Mine"),
        (Selected(DPO(), KeepAll()), "DPO"),
        (Selected(CheckedObjective(DPO(), "mylab:Mine"), KeepAll()), "mylab:Mine"),
    ],
)
def test_an_objective_inside_another_is_called_by_its_own_name(wrapped, name):
    with pytest.raises(UserError, match=f"^{name} ") as caught:
        check_rows(wrapped, random_rows(1))
    assert caught.value.code == "missing-reference"


class OnAnotherDevice:
    """Losses that count how often they are read."""

    def __init__(self, values):
        self.values, self.device, self.reads = torch.tensor(values), torch.device("cuda"), 0

    def detach(self):
        return self

    def __len__(self):
        return len(self.values)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function is torch.cat
        for item in args[0]:
            item.reads += 1
        return torch.cat([item.values for item in args[0]])


def test_losses_on_an_accelerator_are_read_only_when_checked():
    good, bad = OnAnotherDevice([1.0, 2.0]), OnAnotherDevice([1.0, float("nan")])
    losses = FiniteLosses(0.5)
    losses.note(good, ["a:1", "a:2"], 1)
    losses.note(bad, ["a:3", "a:4"], 2)
    assert good.reads == bad.reads == 0
    with pytest.raises(UserError, match=r"step 2, with learning_rate 0\.5, for: a:4\."):
        losses.check()
    losses.check()  # nothing is checked twice
    assert good.reads == 1


def test_on_the_cpu_a_loss_is_checked_at_once():
    with pytest.raises(UserError, match=r"step 7, with learning_rate 0\.5, for: b:1\.") as caught:
        FiniteLosses(0.5).note(torch.tensor([float("inf"), 0.0]), ["b:1", "b:2"], 7)
    assert caught.value.code == "non-finite-loss"
