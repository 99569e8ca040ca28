"""Before the first step: policy and reference must be the same model."""

import math
from dataclasses import replace

import pytest
import torch

from tests.tiny import tiny_gpt2, tiny_llama
from tests.training.tools import language_model, random_rows, with_reference
from tokenward.errors import UserError
from tokenward.objectives import DPO, IPO, CheckedObjective, Selected
from tokenward.selection import KeepAll
from tokenward.training.checks import check_first_batch, check_rows

CASES = {
    "llama-shared": (tiny_llama, "shared"),
    "llama-separate": (tiny_llama, "separate"),
    "gpt2": (tiny_gpt2, "shared"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_at_the_start_the_margin_is_0_and_the_loss_ln_2(case, beta):
    make, layout = CASES[case]
    # The reference was computed in other batches than those that train.
    rows = [with_reference(language_model(make()), [row])[0] for row in random_rows(4, longest=30)]
    model = language_model(make(), layout=layout)
    found = check_first_batch(model, DPO(beta=beta), rows, precision=torch.float32)
    assert found["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert found["margin"] == pytest.approx(0, abs=1e-4)
    assert found["per_token"] == pytest.approx(0, abs=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.20
def test_a_new_adapter_changes_nothing():
    rows = with_reference(language_model(), random_rows(4))
    model = language_model().with_adapter({"r": 4, "target_modules": ["q_proj", "v_proj"]})
    found = check_first_batch(model, DPO(), rows, precision=torch.float32)
    assert found["margin"] == pytest.approx(0, abs=1e-5)


def test_the_reference_of_another_model_is_refused():
    rows = with_reference(language_model(tiny_llama(seed=1)), random_rows(4, longest=30))
    with pytest.raises(UserError, match="policy and reference differ"):
        check_first_batch(language_model(), DPO(), rows, precision=torch.float32)


def test_a_small_lasting_difference_is_refused_in_float32_and_allowed_in_bfloat16():
    """0.01 nats per token is rounding in bfloat16 and another model in float32."""
    rows = [
        replace(row, reference_logp=[side + 0.01 for side in row.reference_logp])
        for row in with_reference(language_model(), random_rows(4))
    ]
    with pytest.raises(UserError, match=r"differ by 0.0100 nats"):
        check_first_batch(language_model(), DPO(), rows, precision=torch.float32)
    found = check_first_batch(language_model(), DPO(), rows, precision=torch.bfloat16)
    assert found["per_token"] == pytest.approx(0.01, abs=0.01)


def test_a_reference_that_is_not_finite_is_refused():
    rows = with_reference(language_model(), random_rows(2))
    rows[0] = replace(rows[0], reference_logp=[side * torch.nan for side in rows[0].reference_logp])
    with pytest.raises(UserError, match="differ by nan"):
        check_first_batch(language_model(), DPO(), rows, precision=torch.float32)


def test_tokens_without_weight_are_not_compared():
    rows = with_reference(language_model(), random_rows(3, longest=10))
    wrong = []
    for row in rows:
        weights = [torch.ones(len(ids)) for ids in row.responses]
        values = [side.clone() for side in row.reference_logp]
        for side, weight in zip(values, weights, strict=True):
            weight[0], side[0] = 0.0, -1e4
        wrong.append(replace(row, weights=weights, reference_logp=values))
    found = check_first_batch(language_model(), DPO(), wrong, precision=torch.float32)
    assert found["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert found["margin"] == pytest.approx(0, abs=1e-4)


def test_what_the_loss_begins_at_is_the_objectives_own():
    """DPO's is ln 2, IPO's the square of its target; the message says which it should be."""
    rows = with_reference(language_model(), random_rows(4))
    for objective, begins in ((DPO(), math.log(2)), (IPO(beta=0.5), 1.0)):
        found = check_first_batch(language_model(), objective, rows, precision=torch.float32)
        assert found["begins"] == pytest.approx(begins, abs=1e-6)
    others = with_reference(language_model(tiny_llama(seed=1)), random_rows(4, longest=30))
    with pytest.raises(UserError, match="not the same model"):
        check_first_batch(language_model(), IPO(beta=0.5), others, precision=torch.float32)


@pytest.mark.parametrize(
    ("wrapped", "name"),
    [
        (CheckedObjective(DPO(), "mylab:Mine"), "mylab:Mine"),
        (Selected(DPO(), KeepAll()), "DPO"),
        (Selected(CheckedObjective(DPO(), "mylab:Mine"), KeepAll()), "mylab:Mine"),
    ],
)
def test_an_objective_inside_another_is_called_by_its_own_name(wrapped, name):
    with pytest.raises(UserError, match=f"^{name} compares with a reference"):
        check_rows(wrapped, random_rows(1))
