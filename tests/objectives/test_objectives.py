"""Laws 1 and 2: objectives against numbers worked by hand, and what a weight of zero means."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.tokens.rows import encoded
from tokenward.errors import UserError
from tokenward.objectives import DPO, SFT, Pairwise, SePO, SimPO
from tokenward.tokens.batches import TokenBatch, collate

LOGISTIC = [SePO(), SimPO(), SePO(gamma=1.5, margin=0.3), DPO(), DPO(loss="ipo"), DPO(label_smoothing=0.1)]


def batch_of(*pairs, weights=None, reference=None) -> TokenBatch:
    """Comparisons given as the lengths of their responses, with flat values."""
    rows, count = [], [n for lengths in pairs for n in lengths]

    def split(values):
        return None if values is None else iter(torch.as_tensor(values).split(count))

    parts = split(weights), split(reference)
    for lengths in pairs:
        weight, logp = ([next(part) for _ in lengths] if part is not None else None for part in parts)
        item = encoded([1], *([2] * n for n in lengths))
        rows.append(replace(item, weights=weight, reference_logp=logp))
    return collate(rows, layout="shared", pad_id=0).tokens


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


# One pair: two chosen tokens, three rejected ones.
LOGP = (-1.0, -2.0, -1.0, -4.0, -2.5)
REFERENCE = [-1.5, -2.5, -2.0, -3.0, -2.0]


def test_dpo_by_hand():
    # Log-ratios: 0.5 + 0.5 = 1 and 1 - 1 - 0.5 = -0.5;  0.2 x 1.5 = 0.3;  -log sigma(0.3) = 0.5543552
    losses = DPO(beta=0.2)(double(*LOGP), batch_of((2, 3), reference=REFERENCE))
    assert losses.loss.tolist() == pytest.approx([0.5543552], abs=1e-7)
    assert {name: value.tolist() for name, value in losses.metrics.items()} == {
        "rewards/chosen": pytest.approx([0.2]),
        "rewards/rejected": pytest.approx([-0.1]),
        "rewards/margins": pytest.approx([0.3]),
        "rewards/accuracies": [1.0],
        "logps/chosen": [-3.0],
        "logps/chosen_per_token": [-1.5],
        "logps/chosen_change_per_token": [0.5],
        "logps/rejected": [-7.5],
        "kept/chosen": [1.0],
        "kept/rejected": [1.0],
    }


def test_dpo_over_some_tokens_by_hand():
    # Weights 1, 0 | 0, 2, 0: 0.5 and 2 x -1 = -2;  0.2 x 2.5 = 0.5;  -log sigma(0.5) = 0.4740770
    batch = batch_of((2, 3), weights=[1.0, 0.0, 0.0, 2.0, 0.0], reference=REFERENCE)
    losses = DPO(beta=0.2)(double(*LOGP), batch)
    assert losses.loss.tolist() == pytest.approx([0.4740770], abs=1e-7)
    assert losses.metrics["logps/rejected"].tolist() == [-8.0]
    assert losses.metrics["kept/chosen"].tolist() == [0.5]
    assert losses.metrics["kept/rejected"].tolist() == pytest.approx([1 / 3])


def test_changes_per_token_are_over_the_weight_of_the_chosen_response():
    # Two pairs: weights 1, 3 on changes 0.5, -0.5; then no weight at all on the chosen side.
    logp = double(-1.0, -2.5, -1.0, -7.0, -1.0)
    batch = batch_of(
        (2, 1), (1, 1), weights=[1.0, 3.0, 1.0, 0.0, 1.0], reference=[-1.5, -2.0, -1.0, -1.0, -1.0]
    )
    metrics = DPO()(logp, batch).metrics
    assert metrics["logps/chosen_change_per_token"].tolist() == [(0.5 - 3 * 0.5) / 4, 0.0]
    assert metrics["logps/chosen_per_token"].tolist() == [(-1.0 - 3 * 2.5) / 4, 0.0]


def test_sepo_by_hand():
    # Selected: -2 | -1, -4, means -2 and -2.5;  2 x 0.5 - 0.5 = 0.5;  -log sigma(0.5) = 0.4740770
    batch = batch_of((2, 3), weights=[0.0, 1.0, 1.0, 1.0, 0.0])
    losses = SePO(gamma=2.0, margin=0.5)(double(*LOGP), batch)
    assert losses.loss.tolist() == pytest.approx([0.4740770], abs=1e-7)
    assert {name: value.tolist() for name, value in losses.metrics.items()} == {
        "rewards/chosen": [-4.0],
        "rewards/rejected": [-5.0],
        "rewards/margins": [1.0],
        "rewards/accuracies": [1.0],
        "logps/chosen": [-2.0],
        "logps/chosen_per_token": [-2.0],
        "logps/rejected": [-5.0],
        "kept/chosen": [0.5],
        "kept/rejected": pytest.approx([2 / 3]),
    }


@pytest.mark.parametrize(
    ("normaliser", "rates", "logit"),
    [
        ("selected", (None, None), -2 / 1 + 5 / 2),
        ("none", (None, None), -2 + 5),
        ("length", (None, None), -2 / 2 + 5 / 3),
        ("rate", (0.4, 0.5), -2 / 0.8 + 5 / 1.5),
    ],
)
def test_normalisers_by_hand(normaliser, rates, logit):
    batch = batch_of((2, 3), weights=[0.0, 1.0, 1.0, 1.0, 0.0])
    objective = SePO(gamma=1.5, normaliser=normaliser, chosen_rate=rates[0], rejected_rate=rates[1])
    expected = math.log1p(math.exp(-1.5 * logit))
    assert objective(double(*LOGP), batch).loss.tolist() == pytest.approx([expected], abs=1e-6)


def test_sft_by_hand():
    # Only the best response counts, wherever it stands: (1 + 4 + 2.5) / 3 and, of ranks 1 and 0, the second.
    item = encoded([1], [2, 2], [2, 2, 2], ranks=(1, 0))
    batch = collate([item], layout="shared", pad_id=0).tokens
    losses = SFT()(double(*LOGP), batch)
    assert losses.loss.tolist() == [2.5]
    assert losses.metrics["nll"].tolist() == [2.5]
    weights = [torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0, 3.0])]
    batch = collate([replace(item, weights=weights)], layout="shared", pad_id=0).tokens
    # (1 x 1 + 3 x 2.5) / 4
    assert SFT()(double(*LOGP), batch).loss.tolist() == [2.125]


def test_sft_takes_any_number_of_responses():
    items = encoded([1], [2], [2], [2], ranks=(2, 0, 1)), encoded([1], [2], [2], ranks=(0, 0))
    batch = collate(list(items), layout="shared", pad_id=0).tokens
    # The tie is the mean of both.
    assert SFT()(double(-1.0, -2.0, -4.0, -3.0, -6.0), batch).loss.tolist() == [2.0, 4.5]


def test_sepo_of_every_token_is_simpo():
    batch = batch_of((2, 3), (4, 1), (1, 1))
    logp = [-0.5 * (index % 5) - 0.1 * index for index in range(12)]
    ours, theirs = double(*logp), double(*logp)
    sepo = SePO(gamma=2.5, margin=0.7)(ours, batch).loss
    lengths = torch.tensor([2, 3, 4, 1, 1, 1])
    means = torch.stack([part.mean() for part in theirs.split(lengths.tolist())])
    written_out = -F.logsigmoid(2.5 * (means[0::2] - means[1::2]) - 0.7)
    assert torch.equal(sepo, SimPO(beta=2.5, gamma=0.7)(ours, batch).loss)
    torch.testing.assert_close(sepo, written_out, rtol=0, atol=1e-14)
    sepo.sum().backward()
    written_out.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("objective", LOGISTIC, ids=repr)
def test_a_pair_of_equals_costs_the_loss_at_zero(objective):
    batch = batch_of((2, 2), reference=[-1.0, -2.0, -1.0, -2.0])
    loss = objective(double(-1.5, -3.0, -1.5, -3.0), batch).loss.item()
    margin = {SimPO(): 1.0, SePO(gamma=1.5, margin=0.3): 0.3}.get(objective, 0.0)
    expected = (1 / (2 * 0.1)) ** 2 if objective == DPO(loss="ipo") else math.log1p(math.exp(margin))
    assert loss == pytest.approx(expected, abs=1e-6)


def test_the_gradient_by_the_logits_is_the_formula():
    """sepo.md 3.3: -(gamma / K_w) sigma(-D) (onehot - softmax) at selected chosen tokens, 0 where unselected."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([0, 3, 1, 4, 2, 2, 0])
    selected = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    gamma, margin = 2.3, 0.4
    logp = logits.log_softmax(-1)[torch.arange(7), ids]
    loss = SePO(gamma=gamma, margin=margin)(logp, batch_of((3, 4), weights=selected)).loss
    loss.backward()
    with torch.no_grad():
        d = gamma * (logp[[0, 2]].mean() - logp[[4, 5, 6]].mean()) - margin
        direction = F.one_hot(ids, 5) - logits.softmax(-1)
        # K_w = 2, K_l = 3
        factor = gamma * torch.sigmoid(-d) * torch.tensor([-1 / 2] * 3 + [1 / 3] * 4, dtype=torch.float64)
        expected = factor[:, None] * direction * selected[:, None]
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-15)
    assert logits.grad[[1, 3]].tolist() == [[0.0] * 5] * 2


def test_a_tie_of_rewards_is_not_counted_as_right():
    metrics = SePO()(double(-1.0, -1.0), batch_of((1, 1))).metrics
    assert metrics["rewards/accuracies"].tolist() == [0.0]


def test_the_official_profile_is_gamma_one():
    batch = batch_of((2, 3), weights=[0.0, 1.0, 1.0, 1.0, 0.0])
    # -log sigma(-2 - -2.5) = 0.4740770
    official = SePO(profile="official")(double(*LOGP), batch)
    assert official.loss.tolist() == pytest.approx([0.4740770], abs=1e-7)
    assert official.loss.tolist() == SePO(gamma=1.0)(double(*LOGP), batch).loss.tolist()
    assert official.metrics["rewards/margins"].tolist() == [0.5]


@pytest.mark.parametrize(
    ("kind", "settings", "word"),
    [
        (DPO, {"beta": 0.0}, "beta"),
        (DPO, {"beta": math.nan}, "beta"),
        (DPO, {"label_smoothing": 0.5}, "label_smoothing"),
        (DPO, {"label_smoothing": -0.1}, "label_smoothing"),
        (DPO, {"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        (SePO, {"gamma": -1.0}, "gamma"),
        (SePO, {"normaliser": "rate"}, "None and None"),
        (SePO, {"normaliser": "rate", "chosen_rate": 0.3, "rejected_rate": 1.2}, r"0\.3 and 1\.2"),
        (SimPO, {"beta": 0.0}, "beta"),
        (SePO, {"profile": "official", "gamma": 2.5}, "profile: official"),
        (SePO, {"profile": "official", "margin": 0.1}, "profile: official"),
        (SePO, {"profile": "official", "normaliser": "length"}, "profile: official"),
    ],
)
def test_values_that_cannot_work_are_refused(kind, settings, word):
    with pytest.raises(UserError, match=word):
        kind(**settings)


def test_negative_weights_push_the_other_way_whatever_the_normaliser():
    """A sum of negative weights as the denominator would turn each of them round again."""
    mean = Pairwise(beta=2.0, reference=False, aggregate="mean")
    for objective in (SePO(), SimPO(), mean):
        up, down = (
            objective(double(*LOGP), batch_of((2, 3), weights=[weight] * 5)).loss.item()
            for weight in (0.5, -0.5)
        )
        margin = math.log(math.expm1(down)) - math.log(math.expm1(up))
        assert down > up
        # The means of log-probabilities are -1.5 and -2.5: the scaled margins are 2 and -2, less SimPO's gamma.
        assert margin == pytest.approx(4.0, abs=1e-6)
