"""Scorers by hand, and the log-probabilities that they read."""

import pytest
import torch

from tests.models.plain import plain_logprobs
from tests.tiny import save_tiny, tiny_gpt2
from tests.tokens.rows import encoded
from tokenward.errors import UserError
from tokenward.models.loading import load_model
from tokenward.plugins import build
from tokenward.scoring.reads import flatten, is_online, reads_of, scope_of_scores, token_values
from tokenward.scoring.scorers import (
    SCORERS,
    Attention,
    Combine,
    LogRatio,
    Random,
    check_in_the_step,
    check_scope,
    scores_together,
    seeded,
)
from tokenward.scoring.steps import Owners
from tokenward.scoring.store import TokenRecord

ROWS = [
    encoded([1, 2, 3], [4, 5], [6, 7, 8]),
    encoded([9], [10], [11], [12, 13, 14, 15]),
    encoded(list(range(20, 32)), list(range(40, 47)), [60, 61]),
]


def record(key="k", size=3, **values) -> TokenRecord:
    return TokenRecord(key, list(range(size)), [0] * size, [0] * size, values)


def test_random_depends_on_the_seed_and_the_response_only():
    scores = Random(seed=1)(record("a", 50, reward=[9.0] * 50)).tolist()
    assert Random(seed=1)(record("a", 20)).tolist() == scores[:20]
    assert Random(seed=2)(record("a", 50)).tolist() != scores
    assert Random(seed=1)(record("b", 50)).tolist() != scores
    assert 0 <= min(scores) < max(scores) < 1
    assert len(set(scores)) == 50


NEEDED = {
    "external": {"file": "f.jsonl"},
    "similarity": {"domain": ("tea",)},
    "counterfactual": {"verifier": "lab:right"},
    "combine": {"parts": ({"scorer": {"name": "probability"}}, {"scorer": {"name": "rank"}})},
}


def test_scorers_read_what_they_say():
    for name, make in SCORERS.items():
        scorer = make(**NEEDED.get(name, {}))
        values = {str(value): [-0.5, 0.5, 1.0] for value in scorer.reads}
        assert len(scorer(record(**values, other=[0.0] * 3)).tolist()) == 3
        for value in scorer.reads:
            with pytest.raises(UserError, match=f"the store holds no {value}"):
                scorer(record(**{other: values[other] for other in values if other != value}))


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"name": "log_ratio"}, [0.5, -1.0, 0.0]),
        ({"name": "surprisal"}, [1.5, 1.0, 0.5]),
        ({"name": "reward"}, [3.0, -1.0, 0.25]),
        # TOSS: log-probability under the degraded model less that under the useful one.
        ({"name": "log_ratio", "numerator": "bad", "denominator": "good", "scale": 2.0}, [-1.0, 3.0, 0.0]),
        ({"name": "log_probability", "of": "bad"}, [-2.0, -1.0, -0.5]),
        ({"name": "log_probability", "of": "bad", "sign": -1}, [2.0, 1.0, 0.5]),
        ({"name": "probability", "of": "bad"}, [0.135335, 0.367879, 0.606531]),
        ({"name": "entropy", "of": "bad"}, [0.5, 0.25, 0.0]),
        ({"name": "rank", "of": "bad"}, [4.0, 0.0, 1.0]),
        ({"name": "position", "rate": 0.5, "first": 1}, [0.5, 0.25, 0.125]),
        ({"name": "position", "kind": "step", "rate": 0.5, "length": 2}, [1.0, 1.0, 0.5]),
        ({"name": "position", "kind": "linear", "rate": 0.5}, [1.0, 0.75, 0.5]),
    ],
)
def test_formulas_by_hand(table, expected):
    made = record(
        oracle_logp=[-1.0, -2.0, -0.5],
        reference_logp=[-1.5, -1.0, -0.5],
        reward=[3.0, -1.0, 0.25],
        bad_logp=[-2.0, -1.0, -0.5],
        good_logp=[-1.5, -2.5, -0.5],
        bad_entropy=[0.5, 0.25, 0.0],
        bad_rank=[4.0, 0.0, 1.0],
    )
    scorer = build("scorer", table.pop("name"), table, SCORERS)
    assert scorer(made).tolist() == pytest.approx(expected, abs=1e-6)


def part(steps=(), **scorer):
    return {"scorer": scorer, "steps": list(steps)}


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("sum", [0.25, 1.5, 2.0]),
        ("product", [0.0, 0.5, 1.0]),
        ("max", [0.25, 1.0, 1.0]),
        ("min", [0.0, 0.5, 1.0]),
        ("and", [0.0, 1.0, 1.0]),
        ("or", [1.0, 1.0, 1.0]),
    ],
)
def test_scores_are_put_together(how, expected):
    parts = (part(name="rank", of="a"), part([{"clamp": {"low": 0.0}}], name="rank", of="b"))
    made = record(a_rank=[0.25, 0.5, 1.0], b_rank=[-3.0, 1.0, 1.0])
    assert Combine(parts, how=how)(made).tolist() == expected


@pytest.mark.parametrize("how", ["sum", "product", "max", "min", "and", "or"])
def test_a_token_that_a_part_gives_no_score_has_none(how):
    parts = (part(name="rank", of="a"), part(name="rank", of="b"))
    found = Combine(parts, how=how)(record(a_rank=[float("nan"), 1.0, 1.0], b_rank=[1.0, float("nan"), 1.0]))
    assert found.isnan().tolist() == [True, True, False]


def test_xtf_drops_what_lacks_any_of_three_attributes():
    """arXiv 2602.14536, with two attributes in a response: attention below Q1 - IQR, probability above 0.95."""
    drops = Combine(
        (
            part([{"threshold": {"at": "iqr", "factor": 1.0, "keep": "below"}}], name="attention", layer=0),
            part([{"threshold": {"value": 0.95, "keep": "above"}}], name="probability"),
        ),
        how="or",
    )
    attention, logp = drops.reads
    # Quartiles 4 and 6: the bound is 2. Only the last token is as likely as 0.96.
    values = {str(attention): [1.0, 4.0, 5.0, 6.0, 7.0], str(logp): [-1.0, -1.0, -1.0, -1.0, -0.04]}
    assert drops(record(size=5, **values)).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ((), "needs parts"),
        (({"scorer": "rank"},), "has a scorer"),
        (({"scorer": {"name": "rank"}, "step": []},), "has a scorer"),
        ((part(name="rnak"),), "no scorer 'rnak'"),
        ((part([{"top": {"scope": "batch"}}], name="rank"),), "scope"),
    ],
)
def test_parts_that_cannot_be_are_refused(parts, word):
    with pytest.raises(UserError, match=word):
        Combine(parts)


def test_a_score_that_needs_all_data_is_not_given_for_one_response():
    scorer = Combine((part([{"top": {"scope": "dataset"}}], name="rank"),))
    assert scope_of_scores(scorer) == "dataset"
    with pytest.raises(UserError, match="need a whole dataset, not one response"):
        scorer(record(reference_rank=[1.0] * 3))
    with pytest.raises(UserError, match="made in the step"):
        check_in_the_step(scorer)
    check_in_the_step(compared("comparison"))


def compared(scope, name="rank", of="policy"):
    return Combine((part([{"rank_scale": {"scope": scope}}], name=name, of=of),))


def test_a_step_of_a_part_of_a_part_counts_for_the_whole():
    inner = {"name": "combine", "parts": compared("comparison").parts}
    outer = Combine(({"scorer": inner},))
    assert scope_of_scores(outer) == "comparison"
    records = [record("a", 2, policy_rank=[3.0, 1.0]), record("b", 1, policy_rank=[2.0])]
    owners = Owners(torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.long))
    for scorer in (outer, compared("comparison")):
        found = scores_together(scorer, records, owners, torch.ones(3, dtype=torch.bool))
        assert found.tolist() == [1.0, 0.0, 0.5]


def test_a_scorer_that_draws_has_the_seed_of_the_recipe_unless_it_has_one():
    table = {
        "name": "combine",
        "parts": [{"scorer": {"name": "random"}}, {"scorer": {"name": "random", "seed": 4}}],
    }
    found = seeded(table, 7)
    assert [item["scorer"]["seed"] for item in found["parts"]] == [7, 4]
    assert seeded({"name": "random"}, 7) == {"name": "random", "seed": 7}
    assert seeded({"name": "reward"}, 7) == {"name": "reward"}
    assert "seed" not in table["parts"][0]["scorer"]


def test_a_scorer_of_ones_own_cannot_ask_for_several_responses():
    class Own:
        scope = "comparison"

        def __call__(self, record):
            return torch.zeros(len(record.ids))

    with pytest.raises(UserError, match="Own has scope comparison"):
        check_scope(Own())


def test_values_are_told_apart_by_their_settings_and_the_policys_are_online():
    first, last = (Attention(layer=layer).reads[0] for layer in (0, 1))
    assert first != last
    assert (first.model, first.kind, first.details) == ("reference", "attention", {"layer": 0})
    assert reads_of(LogRatio(numerator="my-auxiliary"))[0].model == "my-auxiliary"
    assert is_online(LogRatio(numerator="reference", denominator="policy"))
    assert not is_online(LogRatio())
    assert [*map(str, reads_of(lambda record: record))] == ["oracle_logp", "reference_logp"]
    with pytest.raises(UserError, match="reads 'oracle_lopg'"):
        reads_of(type("Own", (), {"reads": ("oracle_lopg",)})())


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(str(tiny_folder), device="cpu")


def stored(model, **options):
    rows = list(ROWS)
    return token_values(model, rows, **{"precision": "float32", "tokens_per_batch": 64, **options})


@pytest.mark.parametrize("tokens_per_batch", [1, 20, 40, 10_000])
def test_logprobs_are_the_models_own_in_the_order_of_the_rows(model, tokens_per_batch):
    results = stored(model, tokens_per_batch=tokens_per_batch)
    assert [[len(values) for values in row] for row in results] == [[2, 3], [1, 1, 4], [7, 2]]
    with torch.no_grad():
        expected = plain_logprobs(model.model, ROWS)
    torch.testing.assert_close(torch.cat(list(flatten(results))), expected, rtol=0, atol=1e-5)


def test_progress_counts_responses(model):
    steps = []
    stored(model, progress=steps.append)
    assert sum(steps) == 7


def test_half_precision_is_near_and_stored_as_float32(model):
    exact, coarse = (torch.cat(list(flatten(stored(model, precision=p)))) for p in ("float32", "bfloat16"))
    assert coarse.dtype == torch.float32
    assert 0 < (exact - coarse).abs().max() < 0.5


def test_scoring_switches_dropout_off(tmp_path):
    model = load_model(str(save_tiny(tmp_path, tiny_gpt2())), device="cpu")
    with torch.no_grad():
        expected = plain_logprobs(model.model, ROWS)
    model.model.train()
    torch.testing.assert_close(torch.cat(list(flatten(stored(model)))), expected, rtol=0, atol=1e-5)


def test_an_oracle_that_is_its_reference_scores_zero(model, tiny_folder):
    # Loaded and computed twice: the same numbers, so the difference is exactly 0.
    again = load_model(str(tiny_folder), device="cpu")
    oracle, reference = flatten(stored(model)), flatten(stored(again))
    for one, other in zip(oracle, reference, strict=True):
        made = record(size=len(one), oracle_logp=one.tolist(), reference_logp=other.tolist())
        assert LogRatio()(made).tolist() == [0.0] * len(one)
