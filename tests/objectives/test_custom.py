"""A custom objective that reads what it does not declare, or returns something else than losses, is refused."""

from types import SimpleNamespace

import pytest
import torch

from tests.objectives.tools import every_objective, flat_batch, naming
from tests.stages.runs import plugin
from tests.training.tools import arguments, language_model, random_rows
from tokenward.config import Named
from tokenward.errors import UserError
from tokenward.objectives import Losses, Needs, Selected, Sum, objective_of
from tokenward.objectives.base import Composite, needs_of
from tokenward.objectives.custom import CheckedObjective, check_declared
from tokenward.objectives.selected import with_entropy
from tokenward.ops.logprob import STATISTICS
from tokenward.ops.ragged import segment_sum
from tokenward.scoring.scorers import Probability
from tokenward.selection import KeepAll
from tokenward.training.trainer import TokenTrainer

FIELDS = {
    "reference": "batch.reference_logp",
    "scores": "batch.scores",
    **{name: f"batch.statistics['{name}']" for name in (*STATISTICS, "states", "reference_layers")},
}
"""What a batch has only for an objective that declares it."""


def reads(*names: str, **flags):
    """An objective that reads some fields of the batch."""

    class Reads:
        needs = Needs(**flags)

        def __call__(self, logp, batch):
            found = logp
            for name in names:
                value = eval(FIELDS[name], {"batch": batch})
                found = found + value.flatten(1).sum(1) if value.dim() > 1 else found + value
            owner = batch.comparison[batch.response]
            return Losses(segment_sum(found, owner, batch.comparisons), {})

    return Reads()


def refused(call) -> str:
    """The message of the refusal."""
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.code == "undeclared-value"
    return str(caught.value)


def test_every_objective_declares_what_it_reads():
    for name, objective in every_objective():
        with naming(name):
            check_declared(objective)
            check_declared(with_entropy(Selected(objective, KeepAll(), Probability(of="policy"))))


@pytest.mark.parametrize("field", FIELDS)
def test_an_undeclared_read_is_named_with_the_declaration(field):
    declared = {field: "forward" if field == "kl" else True}
    message = refused(lambda: check_declared(reads(field, unpaired="all")))
    assert f"Reads reads {FIELDS[field]}," in message
    assert f"Write needs = Needs({field}={declared[field]!r}, unpaired='all')" in message
    check_declared(reads(field, **declared))


def test_several_reads_are_named_at_once_and_each_term_of_a_sum_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(lambda: check_declared(reads("reference", "entropy", "scores", reference=True)))
    assert "batch.scores and batch.statistics['entropy']" in message
    name = plugin(
        "from tokenward.objectives import Losses\n"
        "class Own:\n"
        "    def __call__(self, logp, batch):\n"
        "        return Losses((logp - batch.reference_logp)[:batch.comparisons], {})\n"
    )
    for call in (
        lambda: Sum(terms=[{"name": "dpo"}, {"name": f"{name}:Own"}]),
        lambda: objective_of("objective", Named(name=f"{name}:Own", arguments={})),
    ):
        assert f"the objective {name}:Own reads batch.reference_logp" in refused(call)
    # A training refuses it before its first step, though the rows have the values.
    refused(lambda: TokenTrainer(language_model(), reads("scores"), arguments(tmp_path), random_rows(2)))


def test_optional_reads_and_other_failures_pass():
    def optional(logp, batch):
        more = batch.statistics.get("entropy", 0.0)
        return Losses(segment_sum(logp + more, batch.comparison[batch.response], batch.comparisons), {})

    def broken(logp, batch):
        raise KeyError("x")

    generator = torch.random.get_rng_state()
    check_declared(optional)
    check_declared(broken)
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_needs_must_be_needs():
    with pytest.raises(UserError) as caught:
        needs_of(type("Wrong", (), {"needs": ("reference",)})())
    assert caught.value.code == "invalid-needs"


GOOD = torch.zeros(2)


@pytest.mark.parametrize(
    ("returned", "word"),
    [
        (GOOD, "a Tensor"),
        (Losses(GOOD.mean(), {}), "as loss"),
        (Losses(torch.zeros(4), {}), "as loss"),
        (Losses(GOOD, {"figure": torch.zeros(4)}), "as figure"),
        (Losses(GOOD, {}, GOOD + 1), "own_denominator"),
    ],
)
def test_a_first_result_that_is_not_one_number_per_comparison_is_refused(returned, word):
    batch, logp = flat_batch((1, 1), (1, 1)), torch.zeros(4)
    with pytest.raises(UserError, match=word) as caught:
        CheckedObjective(lambda logp, batch: returned, "lab:Own")(logp, batch)
    assert caught.value.code == "wrong-result"
    fine = Losses(GOOD, {"figure": GOOD})
    assert CheckedObjective(lambda logp, batch: fine, "lab:Own")(logp, batch) is fine


def test_a_sum_trains_on_a_single_response_if_all_its_terms_do():
    for kinds, expected in ((("all", "good"), "all"), (("good",), "good"), (("all", None), None), ((), None)):
        parts = [SimpleNamespace(needs=Needs(unpaired=kind)) for kind in kinds]
        assert Composite(parts).needs.unpaired == expected
