"""Weights computed in the step: by hand for ConfPO, empty pairs, and what a scorer receives."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from tests.objectives.test_pairs import LOGP
from tests.objectives.tools import double, flat_batch
from tests.training.tools import arguments, language_model, random_rows
from tokenward.errors import UserError
from tokenward.objectives import SFT, Selected, SePO, SimPO
from tokenward.scoring.scorers import Combine
from tokenward.selection import KeepAll, ScoredTokens, TopFraction, Transform
from tokenward.tokens.batches import Needs
from tokenward.training.trainer import TokenTrainer


@dataclass(frozen=True)
class Doubt:
    """High where the policy gave the token a low probability."""

    reads: ClassVar[tuple[str, ...]] = ("policy_logp",)

    def __call__(self, record):
        return -record.value("policy_logp").exp()


@dataclass(frozen=True)
class BelowTheMean:
    """ConfPO's critical tokens: less probable than the mean of the response."""

    def __call__(self, tokens: ScoredTokens):
        count = len(tokens.rank)
        total = torch.zeros(count, dtype=tokens.scores.dtype).index_add(0, tokens.response, tokens.scores)
        mean = total / torch.bincount(tokens.response, minlength=count)
        return (tokens.scores > mean[tokens.response]).float()


def test_confpo_by_hand():
    # Probabilities 0.37, 0.14 and 0.37, 0.02, 0.08: below their means 0.25 and 0.16 are the second and the last
    # two. Means of log-probabilities -2 and -3.25;  1.5 x 1.25 - 1.6 = 0.275
    objective = Selected(SimPO(beta=1.5, gamma=1.6), BelowTheMean(), Doubt())
    logp = double(*LOGP)
    losses = objective(logp, flat_batch((2, 3)))
    assert losses.loss.item() == pytest.approx(math.log1p(math.exp(-0.275)), abs=1e-9)
    assert losses.metrics["kept/chosen"].tolist() == [0.5]
    losses.loss.backward()
    slope = -1.5 / (1 + math.exp(0.275))
    assert logp.grad.tolist() == pytest.approx([0.0, slope, 0.0, -slope / 2, -slope / 2], abs=1e-9)


def test_a_pair_with_an_empty_side_costs_nothing_and_still_counts():
    """Tokens of equal probability: none is below the mean."""
    objective = Selected(SimPO(beta=1.5, gamma=1.6), BelowTheMean(), Doubt())
    logp = double(-1.0, -1.0, -1.0, -4.0, -2.5, *LOGP)
    losses = objective(logp, flat_batch((2, 3), (2, 3)))
    alone = objective(double(*LOGP), flat_batch((2, 3)))
    assert losses.loss.tolist() == [0.0, pytest.approx(alone.loss.item(), abs=1e-12)]
    assert losses.metrics["selection/empty"].tolist() == [1.0, 0.0]
    losses.loss.sum().backward()
    assert logp.grad.tolist()[:5] == [0.0] * 5
    assert logp.grad[6] != 0


@pytest.mark.parametrize(("normaliser", "sizes"), [("step_weights", [0.0, 1.0]), ("step_length", [2.0, 2.0])])
def test_the_denominator_of_a_step_is_made_of_the_weights_of_the_step(normaliser, sizes):
    """A comparison without weight adds nothing to the first, and its whole response to the second."""
    objective = Selected(SFT(normaliser=normaliser), BelowTheMean(), Doubt())
    assert objective.needs.own_denominator
    losses = objective(double(*[-1.0] * 4, -1.0, -2.0, -1.0, -1.0, -1.0), flat_batch((2, 2), (2, 3)))
    assert losses.loss.tolist() == [0.0, 2.0]
    assert losses.metrics["selection/empty"].tolist() == [1.0, 0.0]
    assert losses.denominator.tolist() == sizes
    assert Selected(SFT(), BelowTheMean(), Doubt())(double(*LOGP), flat_batch((2, 3))).denominator is None


def test_no_gradient_goes_through_the_weights():
    class Soft:
        def __call__(self, tokens):
            return torch.sigmoid(tokens.scores)

    logp = double(*LOGP)
    batch = flat_batch((2, 3))
    loss = Selected(SimPO(), Soft(), Doubt())(logp, batch).loss
    weights = torch.sigmoid(-logp.detach().exp().float())
    fixed = SimPO()(double(*LOGP), replace(batch, weights=weights)).loss
    assert loss.item() == pytest.approx(fixed.item(), abs=1e-12)
    (slope,) = torch.autograd.grad(loss, logp)
    leaf = double(*LOGP)
    (expected,) = torch.autograd.grad(SimPO()(leaf, replace(batch, weights=weights)).loss, leaf)
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-12)


class InPlace:
    """Changes what it is handed."""

    reads = ("policy_logp",)

    def __call__(self, given):
        values = given.scores if isinstance(given, ScoredTokens) else given.value("policy_logp")
        return values.neg_().exp_()


class OutOfPlace(InPlace):
    def __call__(self, given):
        values = given.scores if isinstance(given, ScoredTokens) else given.value("policy_logp")
        return (-values).exp()


def test_a_scorer_and_a_selector_may_change_what_they_are_handed():
    """They get copies: the loss is that of the policy's own log-probabilities and of the scores as they were."""
    found = []
    for kind in (InPlace, OutOfPlace):
        logp = double(*LOGP)
        loss = Selected(SimPO(), kind(), kind())(logp, flat_batch((2, 3))).loss
        loss.backward()
        batch = flat_batch((2, 3), scores=[0.1, 0.2, 0.3, 0.4, 0.5])
        picked = Selected(SimPO(), kind())(double(*LOGP), batch).loss
        found.append((loss.item(), logp.grad.tolist(), picked.item(), batch.scores.tolist()))
    assert found[0] == found[1]


class Network(torch.nn.Module):
    """A scorer that is a module: its result has a gradient."""

    reads = ("policy_logp",)

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(-1.0))

    def forward(self, record):
        return self.scale * record.value("policy_logp")


def test_a_module_as_scorer_gets_no_gradient():
    scorer = Network()
    loss = Selected(SimPO(), TopFraction(0.5), scorer)(double(*LOGP), flat_batch((2, 3))).loss
    loss.backward()
    assert scorer.scale.grad is None
    fixed = Selected(SimPO(), TopFraction(0.5), Surprise())(double(*LOGP), flat_batch((2, 3))).loss
    assert loss.item() == fixed.item()


class Surprise:
    reads = ("policy_logp",)

    def __call__(self, record):
        return -record.value("policy_logp")


def test_a_token_without_weight_keeps_none():
    batch = flat_batch((2, 3), weights=[0.0, 1.0, 1.0, 0.0, 1.0])
    selected = Selected(SePO(), KeepAll(), Doubt())
    assert selected(double(*LOGP), batch).loss.item() == SePO()(double(*LOGP), batch).loss.item()


@pytest.mark.parametrize("scorer", [Doubt(), None], ids=["policy", "stored"])
@pytest.mark.parametrize(
    "selector",
    [TopFraction(0.5), TopFraction(0.5, scope="batch"), Transform(steps=({"threshold": {"at": "mean"}},))],
    ids=["response", "batch", "threshold"],
)
def test_a_token_without_weight_has_no_part_in_the_selection(selector, scorer):
    """The loss is that of the responses without these tokens, whatever the pass and the store have there."""
    kept = [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    logp, scores = double(*LOGP, *LOGP[1:]), [0.1, 9.0, 0.3, 0.2, -0.3, 0.4, -9.0, 8.0, 0.6]
    whole = flat_batch((4, 5), weights=kept, scores=scores)
    places = torch.tensor(kept).nonzero().squeeze(-1)
    rest = flat_batch((3, 3), scores=torch.tensor(scores, dtype=torch.float64)[places])
    objective = Selected(SimPO(beta=1.5, gamma=1.6), selector, scorer)
    present = torch.where(torch.tensor(kept) != 0, logp, 0.0)  # as the pass gives them
    assert objective(present, whole).loss.item() == objective(logp[places], rest).loss.item() > 0


def test_what_a_scorer_sees():
    """Detached values of the response, stored ones too, and a name that depends on its ids only."""
    seen = []

    class Spy:
        reads = ("policy_logp", "policy_entropy", "policy_rank", "reference_logp", "oracle_logp")

        def __call__(self, record):
            seen.append(record)
            return record.value("oracle_logp")

    def step(*pairs, ids):
        batch = flat_batch(*pairs, reference=[-9.0] * len(ids))
        known = torch.arange(len(ids), dtype=torch.float32)
        batch = replace(
            batch,
            ids=torch.tensor(ids),
            values={"oracle_logp": known},
            statistics={"entropy": known + 1, "token_rank": known + 2},
        )
        logp = torch.linspace(-1, -2, len(ids), dtype=torch.float64).requires_grad_()
        return Selected(SimPO(), TopFraction(), Spy()), logp, batch

    objective, logp, batch = step((2, 1), ids=[5, 6, 7])
    assert objective.needs == Needs(entropy=True, token_rank=True, reference=True, pairwise=True)
    objective(logp, batch)
    first, second = seen
    assert (first.ids, second.ids) == ([5, 6], [7])
    assert first.value("policy_logp").tolist() == logp[:2].tolist()
    assert not first.value("policy_logp").requires_grad
    assert second.value("policy_entropy").tolist() == [3.0]
    assert second.value("policy_rank").tolist() == [4.0]
    assert not Selected(SimPO(), KeepAll(), Doubt()).needs.token_rank
    assert first.value("reference_logp").tolist() == [-9.0, -9.0]
    assert second.value("oracle_logp").tolist() == [2.0]
    objective, logp, batch = step((1, 1), (2, 1), ids=[1, 2, 5, 6, 7])
    objective(logp, batch)
    assert [record.key for record in seen[-2:]] == [first.key, second.key]
    assert len({record.key for record in seen}) == 4


def test_a_random_selection_depends_on_the_response_and_not_on_its_place():
    objective = Selected(SFT(), TopFraction(ties="random"), None)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3]])

    def loss(order):
        batch = flat_batch(*[(6,)] * len(order), scores=[0.0] * 6 * len(order))
        batch = replace(batch, ids=ids[order].flatten())
        return objective(double(*([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0] * len(order))), batch).loss.tolist()

    assert loss([0, 1]) == loss([1, 0])[::-1] == [loss([0])[0], loss([1])[0]]


class Giving:
    """A selector that returns what it was made with."""

    def __init__(self, weights, signed=False):
        self.weights, self.signed = weights, signed

    def __call__(self, tokens):
        return torch.tensor(self.weights)


def test_stored_scores_are_used_without_a_scorer():
    batch = flat_batch((2, 3), scores=[0.0, 1.0, -1.0, 0.0, 0.0])
    found = Selected(SePO(), TopFraction())(double(*LOGP), batch).loss.item()
    selected = flat_batch((2, 3), weights=[0.0, 1.0, 1.0, 0.0, 0.0])
    assert found == SePO()(double(*LOGP), selected).loss.item()


def test_a_selector_may_be_signed():
    weights = [1.0, -0.5, 1.0, 1.0, 1.0]
    found = Selected(SimPO(), Giving(weights, signed=True), Doubt())(double(*LOGP), flat_batch((2, 3)))
    assert found.loss.item() == SimPO()(double(*LOGP), flat_batch((2, 3), weights=weights)).loss.item()


def scorer(answer, **attributes):
    return type("Custom", (), {"__call__": lambda self, record: answer(record), **attributes})()


def combine(scope):
    ranked = {"name": "log_probability", "of": "policy"}
    return Combine(({"scorer": ranked, "steps": [{"min_max": {"scope": scope}}]},))


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ((KeepAll(), scorer(None, reads=("policy_attention",))), "unknown-value"),
        ((KeepAll(), combine("dataset")), "unsupported-scope"),
        ((type("Whole", (), {"scope": "dataset"})(), Doubt()), "unsupported-scope"),
        ((Transform(steps=("segment_pool",)), Doubt()), "missing-segments"),
        ((KeepAll(), scorer(lambda record: torch.zeros(len(record.ids) - 1))), "wrong-result"),
        ((KeepAll(), scorer(lambda record: record.value("oracle_logp"))), "missing-value"),
        ((KeepAll(), None), "missing-scores"),
        *[
            ((Giving(weights), Doubt()), "wrong-result")
            for weights in ([1.0] * 4, [1.0, -1.0, 1.0, 1.0, 1.0], [math.nan, 1.0, 1.0, 1.0, 1.0])
        ],
    ],
)
def test_impossible_selections_are_refused(parts, code):
    with pytest.raises(UserError) as caught:
        Selected(SimPO(), *parts)(double(*LOGP), flat_batch((2, 3)))
    assert caught.value.code == code


def test_a_training_in_which_no_token_has_a_score_is_refused(tmp_path):
    blank = scorer(lambda record: torch.full((len(record.ids),), torch.nan), reads=("policy_logp",))
    objective = Selected(SimPO(), KeepAll(), blank)
    found = objective(double(*LOGP), flat_batch((2, 3)))
    assert found.metrics["selection/unscored"].tolist() == [1.0]
    with pytest.raises(UserError, match="Custom") as caught:
        TokenTrainer(language_model(), objective, arguments(tmp_path), random_rows(4)).train()
    assert caught.value.code == "no-scores"


def test_a_response_without_scores_may_be_a_pass_by_itself(tmp_path):
    long = scorer(
        lambda record: torch.full((len(record.ids),), 1.0 if len(record.ids) > 4 else torch.nan),
        reads=("policy_logp",),
    )
    objective = Selected(SFT(), TopFraction(), long)
    table = arguments(tmp_path, tokens_per_forward=1, max_steps=1)
    trainer = TokenTrainer(language_model(), objective, table, random_rows(8))
    trainer.train()
    assert 0 < trainer.state.log_history[0]["selection/unscored"] < 1


def test_a_step_of_combine_compares_the_responses_of_a_comparison():
    """As with stored scores; -1 -2 | -1 -4 -2.5 of each side by itself, from 0 to 1."""
    objective = Selected(SFT(sides="both"), Transform(), combine("comparison"))
    tokens = objective.scored(double(*LOGP), flat_batch((2, 3)))
    assert tokens.scores.tolist() == pytest.approx([1.0, 0.0, 1.0, 0.0, 0.5])
