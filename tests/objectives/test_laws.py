"""Laws 1, 2 and 3 for every objective of the registry; a new objective is held to them automatically."""

import math
from dataclasses import fields, replace

import pytest
import torch

from tests.models.test_forward import gradients
from tests.objectives.tools import CASES, Values, batch_of, every_objective, made, naming, values
from tests.tiny import move_trained, tiny_gpt2
from tests.training.tools import language_model, random_rows
from tokenward.errors import UserError
from tokenward.models.forward import FrozenReference
from tokenward.objectives import DPO, OBJECTIVES, Composite, Losses, PlackettLuce, Selected, TokenKL
from tokenward.objectives.base import ObjectiveModule, has_module, modules_of, needs_of
from tokenward.objectives.custom import CheckedObjective
from tokenward.ops.ragged import segment_sum
from tokenward.scoring.scorers import Probability
from tokenward.selection import KeepAll
from tokenward.tokens.batches import Needs
from tokenward.training.passes import frozen_reference

# Pairs of 3 and 4, and of 2 and 3 tokens.
LENGTHS, COUNT = [(3, 4), (2, 3)], 12
WEIGHTS = [1.0, 0.0, 0.5, 0.0, 2.0, 1.0, 1.0, 1.0, 0.5, 1.5, 0.0, 1.0]
KEPT = [place for place, weight in enumerate(WEIGHTS) if weight]
GONE = [place for place, weight in enumerate(WEIGHTS) if not weight]
SHORT = [(2, 3), (2, 2)]


def slopes(objective, known: Values, batch) -> tuple[Losses, list[torch.Tensor]]:
    """Losses, and the gradient of their sum by every value; 0 if there is none."""
    losses = objective(known.logp, batch)
    leaves = [item for item in known if item.requires_grad]
    found = torch.autograd.grad(losses.loss.sum(), leaves, allow_unused=True)
    return losses, [
        torch.zeros_like(leaf) if slope is None else slope for leaf, slope in zip(leaves, found, strict=True)
    ]


def assert_same_denominators(losses: Losses, expected: Losses, take: slice = slice(None)) -> None:
    assert (losses.denominator is None) == (expected.denominator is None)
    if losses.denominator is not None and expected.denominator is not None:
        torch.testing.assert_close(losses.denominator, expected.denominator[take], rtol=0, atol=1e-14)


@pytest.mark.parametrize("broken", [-3.0, -math.inf, math.nan])
def test_law_1_a_weight_of_zero_deletes_the_token(broken):
    """Whatever its values, finite or not; the gradient there is exactly 0."""
    plain = values(COUNT)
    for name, objective in every_objective():
        long, short = plain.broken(GONE, broken), plain.take(KEPT)
        losses, found = slopes(objective, long, batch_of(long, LENGTHS, WEIGHTS))
        expected, wanted = slopes(objective, short, batch_of(short, SHORT, [WEIGHTS[i] for i in KEPT]))
        with naming(name):
            assert losses.loss.isfinite().all()
            torch.testing.assert_close(losses.loss, expected.loss, rtol=0, atol=1e-14)
            assert_same_denominators(losses, expected)
            for slope, brief in zip(found, wanted, strict=True):
                torch.testing.assert_close(slope[KEPT], brief, rtol=0, atol=1e-14)
                assert not slope[GONE].any()
            for metric in set(losses.metrics) - {"kept/chosen", "kept/rejected"}:
                torch.testing.assert_close(
                    losses.metrics[metric], expected.metrics[metric], rtol=0, atol=1e-6
                )


def test_law_2_weights_of_one_are_no_weights():
    known = values(COUNT)
    with_ones = batch_of(known, LENGTHS, [1.0] * COUNT)
    rows = replace(with_ones, weights=torch.ones(COUNT), kept=torch.arange(COUNT))
    for name, objective in every_objective():
        losses, expected = objective(known.logp, with_ones), objective(known.logp, rows)
        with naming(name):
            assert torch.equal(losses.loss, expected.loss)
            assert_same_denominators(losses, expected)


def test_law_3_the_order_of_a_batch_changes_nothing():
    """And what comes back is one number per comparison, a loss with gradient, metrics without."""
    known = values(COUNT)
    turned, first = known.take([*range(7, 12), *range(7)]), known.take(range(7))
    for name, objective in every_objective():
        with naming(name):
            together = CheckedObjective(objective, name)(known.logp, batch_of(known, LENGTHS, WEIGHTS))
            assert together.loss.requires_grad
            assert not any(value.requires_grad for value in together.metrics.values())
            swapped = objective(turned.logp, batch_of(turned, LENGTHS[::-1], WEIGHTS[7:] + WEIGHTS[:7]))
            torch.testing.assert_close(swapped.loss, together.loss.flip(0), rtol=0, atol=1e-14)
            alone = objective(first.logp, batch_of(first, LENGTHS[:1], WEIGHTS[:7]))
            torch.testing.assert_close(alone.loss, together.loss[:1], rtol=0, atol=1e-14)
            assert_same_denominators(alone, together, slice(1))
            for metric, value in alone.metrics.items():
                torch.testing.assert_close(value, together.metrics[metric][:1], rtol=0, atol=1e-6)


# They stop gradients of log-probabilities; other tests check these by hand.
STOPS = ("reinforce", "sum", "treg")


def test_the_gradient_is_that_of_finite_differences():
    known = values(COUNT, seed=2)
    batch = batch_of(known, LENGTHS, [weight or 0.7 for weight in WEIGHTS])
    for name, objective in every_objective():
        if not name.startswith(STOPS):
            with naming(name):
                assert torch.autograd.gradcheck(lambda logp, it=objective: it(logp, batch).loss, known.logp)


def pair_rows(seed: int = 0):
    """Pairs of random ids with weights, reference values and scores."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(row, kind):
        sizes = [len(ids) for ids in row.responses]
        return [kind(torch.rand(size, generator=generator)) for size in sizes]

    return [
        replace(
            row,
            weights=drawn(row, lambda x: (x + 0.2) * (x < 0.8)) if seed == 0 else None,
            reference_logp=drawn(row, lambda x: -3 - x),
            scores=drawn(row, lambda x: x - 0.5),
        )
        for row in random_rows(4, longest=9, seed=seed)
    ]


def read(model, objective, rows, reference):
    """Mean loss, and the gradient of every trained weight, of the policy and of the objective."""
    batch = model.collate(rows)
    logp, batch = model.read(
        model.model, batch, needs_of(objective), frozen_reference(objective, model, reference)
    )
    loss = objective(logp, batch).loss.mean()
    return loss, logp


def test_law_3_shared_rows_equal_separate_rows():
    rows = pair_rows()
    held = tiny_gpt2(dtype=torch.float64, seed=1)
    policies = [language_model(tiny_gpt2(dtype=torch.float64), layout=it) for it in ("shared", "separate")]
    for name, objective in every_objective(width=32, layers=2):
        found = []
        for model in policies:
            loss, _ = read(model, objective, rows, language_model(held, layout=model.layout))
            found.append((loss.detach(), gradients(model.model, loss[None], torch.ones(1))))
        (one, slope), (other, expected) = found
        with naming(name):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
            largest = max(float(item.abs().max()) for item in expected.values())
            assert largest > 1e-6
            torch.testing.assert_close(slope, expected, rtol=0, atol=1e-10 * largest)


def test_an_adapter_is_its_own_reference():
    """The same loss as with a second copy of the base."""
    model = language_model(tiny_gpt2(dtype=torch.float64))
    model = model.with_adapter({"r": 4, "target_modules": "all-linear", "fan_in_fan_out": True})
    move_trained(model.model.to(torch.float64))
    copy, rows = language_model(tiny_gpt2(dtype=torch.float64)), pair_rows()
    for name, objective in every_objective(width=32, layers=2):
        if needs_of(objective).kl:
            itself, _ = read(model, objective, rows, None)
            beside, _ = read(model, objective, rows, copy)
            reference = frozen_reference(objective, model)
            with naming(name):
                assert isinstance(reference, FrozenReference)
                assert reference.without_adapter
                torch.testing.assert_close(itself, beside, rtol=0, atol=1e-10)


def test_every_objective_of_the_registry_is_here():
    assert {name for name, _ in CASES} == set(OBJECTIVES)


def test_a_composite_needs_what_its_parts_need():
    class States:
        needs = Needs(states=True, reference_layers=True, entropy=True, scores=True, token_rank=True)

        def make_module(self, width, layers):
            return ObjectiveModule(torch.nn.Linear(width, layers), None, 0.0)

        def __call__(self, logp, batch):
            return Losses(segment_sum(logp, batch.comparison[batch.response], batch.comparisons), {})

    counts = made("sft", {"normaliser": "step_weights"})
    draws = PlackettLuce(ties="random")
    parts = [DPO(), TokenKL(direction="reverse"), CheckedObjective(States(), "States"), counts, draws]
    whole = Composite(parts)
    everything = {item.name: True for item in fields(Needs)} | {"kl": "reverse", "unpaired": None}
    assert whole.needs == Needs(**everything)
    assert has_module(whole)
    assert [part.module.weight.shape for part in modules_of(whole, 5, 3)] == [(3, 5)]
    none = Composite([made("sepo", {})])
    assert (none.needs, has_module(none)) == (Needs(pairwise=True), False)
    assert Composite([]).needs == Needs()
    assert Selected(DPO(), KeepAll()).needs.scores
    assert not Selected(DPO(), KeepAll(), Probability(of="policy")).needs.scores
    assert Selected(counts, KeepAll()).needs.unpaired == "good"
    assert Selected(DPO(), KeepAll()).needs.pairwise
    assert not Selected(made("sft", {}), KeepAll()).needs.pairwise


def test_impossible_needs_are_refused():
    with pytest.raises(UserError):
        made("sum", {"terms": [{"name": "tdpo"}, {"name": "token_kl", "direction": "reverse"}]})
    for needs in ({"kl": "sideways"}, {"unpaired": "some"}):
        with pytest.raises(UserError):
            Needs(**needs)
