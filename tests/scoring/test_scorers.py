"""Scorers by hand, and the log-probabilities that they read."""

import pytest
import torch

from tests.models.plain import plain_logprobs
from tests.tiny import save_tiny, tiny_gpt2
from tests.tokens.rows import encoded
from tokenward.errors import UserError
from tokenward.models.loading import load_model
from tokenward.plugins import build
from tokenward.scoring.reads import is_online, reads_of, scope_of_scores, scores_of, token_values
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
HOWS = {
    "sum": [0.25, 1.5, 2.0],
    "product": [0.0, 0.5, 1.0],
    "max": [0.25, 1.0, 1.0],
    "min": [0.0, 0.5, 1.0],
    "and": [0.0, 1.0, 1.0],
    "or": [1.0, 1.0, 1.0],
}


def record(key="k", size=3, **values) -> TokenRecord:
    return TokenRecord(key, list(range(size)), [0] * size, [0] * size, values)


def part(steps=(), **scorer):
    return {"scorer": scorer, "steps": list(steps)}


def compared(scope, name="rank", of="policy"):
    return Combine((part([{"rank_scale": {"scope": scope}}], name=name, of=of),))


def test_random_scores_depend_only_on_the_seed_and_the_response():
    scores = Random(seed=1)(record("a", 50, reward=[9.0] * 50)).tolist()
    assert Random(seed=1)(record("a", 20)).tolist() == scores[:20]
    assert Random(seed=2)(record("a", 50)).tolist() != scores
    assert Random(seed=1)(record("b", 50)).tolist() != scores
    assert 0 <= min(scores) < max(scores) < 1
    assert len(set(scores)) == 50


def test_every_scorer_reads_what_it_declares():
    needed = {
        "external": {"file": "f.jsonl"},
        "similarity": {"domain": ("tea",)},
        "counterfactual": {"verifier": "lab:right"},
        "combine": {"parts": ({"scorer": {"name": "probability"}}, {"scorer": {"name": "rank"}})},
    }
    for name, make in SCORERS.items():
        scorer = make(**needed.get(name, {}))
        values = {str(value): [-0.5, 0.5, 1.0] for value in scorer.reads}
        assert len(scorer(record(**values, other=[0.0] * 3)).tolist()) == 3
        for value in scorer.reads:
            with pytest.raises(UserError, match=value) as caught:
                scorer(record(**{other: values[other] for other in values if other != value}))
            assert caught.value.code == "missing-value"


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"name": "log_ratio"}, [0.5, -1.0, 0.0]),
        ({"name": "surprisal"}, [1.5, 1.0, 0.5]),
        ({"name": "reward"}, [3.0, -1.0, 0.25]),
        # TOSS: log-probability under the degraded model minus that under the useful one.
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
    values = record(
        oracle_logp=[-1.0, -2.0, -0.5],
        reference_logp=[-1.5, -1.0, -0.5],
        reward=[3.0, -1.0, 0.25],
        bad_logp=[-2.0, -1.0, -0.5],
        good_logp=[-1.5, -2.5, -0.5],
        bad_entropy=[0.5, 0.25, 0.0],
        bad_rank=[4.0, 0.0, 1.0],
    )
    scorer = build("scorer", table.pop("name"), table, SCORERS)
    assert scorer(values).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("how", HOWS)
def test_scores_are_combined_token_by_token(how):
    parts = (part(name="rank", of="a"), part([{"clamp": {"low": 0.0}}], name="rank", of="b"))
    combined = Combine(parts, how=how)
    assert combined(record(a_rank=[0.25, 0.5, 1.0], b_rank=[-3.0, 1.0, 1.0])).tolist() == HOWS[how]
    found = combined(record(a_rank=[float("nan"), 1.0, 1.0], b_rank=[1.0, float("nan"), 1.0]))
    assert found.isnan().tolist() == [True, True, False]


def test_a_custom_part_may_return_a_list(monkeypatch):
    monkeypatch.setitem(SCORERS, "listed", lambda record: [1.0, 0.0, 3.0])
    assert Combine((part([{"affine": {"scale": 2.0}}], name="listed"),))(record()).tolist() == [2.0, 0.0, 6.0]


def test_xtf_drops_tokens_that_lack_any_of_its_attributes():
    """arXiv 2602.14536, with two of the attributes: attention below Q1 - IQR, probability above 0.95."""
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
    ("parts", "code"),
    [
        ((), "missing-setting"),
        (({"scorer": "rank"},), "invalid-value"),
        (({"scorer": {"name": "rank"}, "step": []},), "invalid-value"),
        ((part(name="rnak"),), "unknown-name"),
        ((part([{"top": {"scope": "batch"}}], name="rank"),), "unsupported-scope"),
        ((part(name="combine", parts=compared("dataset").parts),), "unsupported-scope"),
    ],
)
def test_impossible_parts_are_refused(parts, code):
    with pytest.raises(UserError) as caught:
        Combine(parts)
    assert caught.value.code == code


def test_a_scope_is_refused_where_its_responses_are_not_available():
    class Custom:
        scope = "comparison"

        def __call__(self, record):
            return torch.zeros(len(record.ids))

    whole = compared("dataset")
    assert scope_of_scores(whole) == "dataset"
    for call in (
        lambda: whole(record(policy_rank=[1.0] * 3)),
        lambda: check_in_the_step(whole),
        lambda: check_scope(Custom()),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert caught.value.code == "unsupported-scope"
    check_in_the_step(compared("comparison"))


def test_the_steps_of_nested_parts_compare_responses():
    inner = {"name": "combine", "parts": compared("comparison").parts}
    outer = Combine(({"scorer": inner},))
    assert scope_of_scores(outer) == "comparison"
    records = [record("a", 2, policy_rank=[3.0, 1.0]), record("b", 1, policy_rank=[2.0])]
    owners = Owners(torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.long))
    for scorer in (outer, compared("comparison")):
        found = scores_together(scorer, records, owners, torch.ones(3, dtype=torch.bool))
        assert found.tolist() == [1.0, 0.0, 0.5]


def test_random_scorers_get_the_seed_unless_they_have_one():
    table = {
        "name": "combine",
        "parts": [{"scorer": {"name": "random"}}, {"scorer": {"name": "random", "seed": 4}}],
    }
    assert [item["scorer"]["seed"] for item in seeded(table, 7)["parts"]] == [7, 4]
    assert seeded({"name": "reward"}, 7) == {"name": "reward"}
    assert "seed" not in table["parts"][0]["scorer"]


def test_values_are_named_by_model_kind_and_settings():
    first, last = (Attention(layer=layer).reads[0] for layer in (0, 1))
    assert first != last
    assert first.startswith("reference_attention_")
    assert (first.model, first.kind, first.details) == ("reference", "attention", {"layer": 0})
    assert reads_of(LogRatio(numerator="my-auxiliary"))[0].model == "my-auxiliary"
    assert is_online(LogRatio(numerator="reference", denominator="policy"))
    assert not is_online(LogRatio())
    assert [*map(str, reads_of(lambda record: record))] == ["oracle_logp", "reference_logp"]
    with pytest.raises(UserError) as caught:
        reads_of(type("Custom", (), {"reads": ("oracle_lopg",)})())
    assert caught.value.code == "unknown-value"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (lambda record: record.value("reward"), "undeclared-value"),
        (lambda record: record.value("rewards"), "unknown-value"),
        (lambda record: [0.5], "wrong-result"),
        (lambda record: ["a"] * 3, "wrong-result"),
    ],
)
def test_custom_scorers_that_misbehave_are_refused(answer, code):
    with pytest.raises(UserError) as caught:
        scores_of(answer, record(oracle_logp=[0.0] * 3))
    assert caught.value.code == code
    assert scores_of(lambda record: [1, 2, 3], record()).tolist() == [1.0, 2.0, 3.0]


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(str(tiny_folder), device="cpu")


def values_of(model, **options) -> list[torch.Tensor]:
    rows = token_values(model, ROWS, **{"precision": "float32", "tokens_per_batch": 64, **options})
    assert [[len(values) for values in row] for row in rows] == [[2, 3], [1, 1, 4], [7, 2]]
    return [values for row in rows for values in row]


@pytest.mark.parametrize("tokens_per_batch", [1, 20, 40, 10_000])
def test_logprobs_are_the_models_own_in_the_order_of_the_rows(model, tokens_per_batch):
    counts = []
    found = values_of(model, tokens_per_batch=tokens_per_batch, progress=counts.append)
    with torch.no_grad():
        expected = plain_logprobs(model.model, ROWS)
    torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=1e-5)
    assert sum(counts) == 7


def test_bfloat16_is_close_and_stored_as_float32(model):
    exact, coarse = (torch.cat(values_of(model, precision=name)) for name in ("float32", "bfloat16"))
    assert coarse.dtype == torch.float32
    assert 0 < (exact - coarse).abs().max() < 0.5


def test_scoring_switches_dropout_off(tmp_path):
    model = load_model(str(save_tiny(tmp_path, tiny_gpt2())), device="cpu")
    with torch.no_grad():
        expected = plain_logprobs(model.model, ROWS)
    model.model.train()
    torch.testing.assert_close(torch.cat(values_of(model)), expected, rtol=0, atol=1e-5)


def test_an_oracle_equal_to_its_reference_scores_zero(model, tiny_folder):
    # Loaded and computed twice: the same numbers, so the difference is exactly 0.
    again = load_model(str(tiny_folder), device="cpu")
    for one, other in zip(values_of(model), values_of(again), strict=True):
        both = record(size=len(one), oracle_logp=one.tolist(), reference_logp=other.tolist())
        assert LogRatio()(both).tolist() == [0.0] * len(one)
