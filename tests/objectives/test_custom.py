"""An objective that reads what it did not ask for is refused before it trains, by the name of what it reads."""

import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from tests.objectives.tools import every_objective, naming
from tests.stages.runs import plugin
from tests.tokens.rows import encoded
from tests.training.tools import arguments, language_model, random_rows
from tokenward.config import Named
from tokenward.errors import UserError
from tokenward.objectives import Losses, Selected, Sum, objective_of
from tokenward.objectives.base import Composite, needs_of
from tokenward.objectives.custom import CheckedObjective, check_declared
from tokenward.objectives.selected import with_entropy
from tokenward.ops.logprob import STATISTICS
from tokenward.ops.ragged import segment_sum
from tokenward.scoring.scorers import Probability
from tokenward.selection import KeepAll
from tokenward.tokens.batches import Needs, collate
from tokenward.training.trainer import TokenTrainer

FIELDS = {
    "reference": "batch.reference_logp",
    "scores": "batch.scores",
    **{name: f"batch.statistics['{name}']" for name in (*STATISTICS, "states", "reference_layers")},
}
"""What a batch has only for an objective that needs it."""


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


def test_every_objective_asks_for_what_it_reads():
    for name, objective in every_objective():
        with naming(name):
            check_declared(objective)
            check_declared(with_entropy(Selected(objective, KeepAll(), Probability(of="policy"))))


@pytest.mark.parametrize("field", FIELDS)
def test_what_is_read_unasked_is_named_with_how_to_ask(field):
    asked = {field: "forward" if field == "kl" else True}
    written = re.escape(f"Write needs = Needs({field}={asked[field]!r}, unpaired='all')")
    with pytest.raises(UserError, match=rf"Reads reads {re.escape(FIELDS[field])}, which .* {written}"):
        check_declared(reads(field, unpaired="all"))
    check_declared(reads(field, **asked))


@pytest.mark.parametrize(
    ("flags", "written"),
    [
        ({"needs_reference": True, "pairwise": True}, "Needs(reference=True, pairwise=True)"),
        ({"needs_kl": "reverse", "unpaired": "all"}, "Needs(kl='reverse', unpaired='all')"),
        ({"own_denominator": True, "draws": True}, "Needs(own_denominator=True, draws=True)"),
    ],
)
def test_a_class_with_the_flags_of_earlier_versions_is_told_the_new_form(flags, written):
    with pytest.raises(
        UserError, match=rf"Old says {next(iter(flags))} = .* Write needs = {re.escape(written)}"
    ):
        needs_of(type("Old", (), flags)())
    # A setting of one of these names is none of them.
    assert needs_of(type("Own", (), {"draws": 64, "needs": Needs(draws=True)})()) == Needs(draws=True)
    with pytest.raises(UserError, match=r"now called make_module"):
        needs_of(type("Old", (), {"auxiliary": lambda self, width, layers: None})())
    with pytest.raises(UserError, match=r"has needs = \('reference',\)"):
        needs_of(type("Wrong", (), {"needs": ("reference",)})())


def test_several_are_named_at_once_and_terms_of_a_sum_each_for_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"batch.scores and batch.statistics\['entropy'\]"):
        check_declared(reads("reference", "entropy", "scores", reference=True))
    name = plugin(
        "from tokenward.objectives import Losses\n"
        "class Own:\n"
        "    def __call__(self, logp, batch):\n"
        "        return Losses((logp - batch.reference_logp)[:batch.comparisons], {})\n"
    )
    with pytest.raises(UserError, match=rf"the objective {name}:Own reads batch\.reference_logp"):
        Sum(terms=[{"name": "dpo"}, {"name": f"{name}:Own"}])
    with pytest.raises(UserError, match=rf"the objective {name}:Own reads batch\.reference_logp"):
        objective_of("objective", Named(name=f"{name}:Own", arguments={}))


def test_a_training_refuses_it_before_the_first_step_though_the_rows_have_the_values(tmp_path):
    with pytest.raises(UserError, match=r"reads batch\.scores"):
        TokenTrainer(language_model(), reads("scores"), arguments(tmp_path), random_rows(2))


def test_what_is_read_only_where_it_is_there_need_not_be_asked_for():
    @dataclass
    class Optional:
        def __call__(self, logp, batch):
            more = batch.statistics.get("entropy", 0.0)
            return Losses(segment_sum(logp + more, batch.comparison[batch.response], batch.comparisons), {})

    check_declared(Optional())


def test_a_class_that_fails_for_another_reason_is_left_to_the_training():
    class Broken:
        def __call__(self, logp, batch):
            raise KeyError("x")

    generator = torch.random.get_rng_state()
    check_declared(Broken())
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_a_first_answer_that_is_not_one_number_per_comparison_is_refused():
    logp, batch = (
        torch.zeros(4),
        collate([encoded([1], [2], [3])] * 2, layout="shared", pad_id=0).tokens,
    )
    good = torch.zeros(2)
    for answer, word in (
        (good, "a Tensor"),
        (Losses(good.mean(), {}), "as loss"),
        (Losses(logp, {}), "as loss"),
        (Losses(good, {"figure": logp}), "as figure"),
        (Losses(good, {}, good + 1), "own_denominator"),
    ):
        with pytest.raises(UserError, match=word):
            CheckedObjective(lambda logp, batch, answer=answer: answer, "lab:Own")(logp, batch)
    assert (
        CheckedObjective(lambda logp, batch: Losses(good, {"figure": good}), "lab:Own")(logp, batch).loss
        is good
    )


def test_a_sum_trains_on_a_response_alone_where_all_its_terms_do():
    for kinds, expected in ((("all", "good"), "all"), (("good",), "good"), (("all", None), None), ((), None)):
        assert (
            Composite([SimpleNamespace(needs=Needs(unpaired=kind)) for kind in kinds]).needs.unpaired
            == expected
        )
