"""Scorers by hand, and the log-probabilities that they read."""

import pytest
import torch

from tests.models.plain import plain_logprobs
from tests.tiny import save_tiny, tiny_gpt2
from tests.tokens.rows import encoded
from tokenward.errors import UserError
from tokenward.models.loading import load_model
from tokenward.scoring.scorers import SCORERS, LogRatio, Random, Reward, Surprisal
from tokenward.scoring.store import TokenRecord
from tokenward.scoring.values import flatten, token_values
from tokenward.tokens.rows import TokenRow

ROWS = [
    encoded([1, 2, 3], [4, 5], [6, 7, 8]),
    encoded([9], [10], [11], [12, 13, 14, 15]),
    encoded(list(range(20, 32)), list(range(40, 47)), [60, 61]),
]


def record(key="k", size=3, **values) -> TokenRecord:
    return TokenRecord(key, list(range(size)), [0] * size, [0] * size, values)


def test_log_ratio_by_hand():
    made = record(oracle_logp=[-1.0, -2.0, -0.5], reference_logp=[-1.5, -1.0, -0.5])
    assert LogRatio()(made).tolist() == [0.5, -1.0, 0.0]


def test_surprisal_and_reward_by_hand():
    made = record(reference_logp=[-1.5, -1.0, -0.5], reward=[3.0, -1.0, 0.25])
    assert Surprisal()(made).tolist() == [1.5, 1.0, 0.5]
    assert Reward()(made).tolist() == [3.0, -1.0, 0.25]


def test_random_depends_on_the_seed_and_the_response_only():
    scores = Random(seed=1)(record("a", 50, reward=[9.0] * 50)).tolist()
    assert Random(seed=1)(record("a", 50)).tolist() == scores
    assert Random(seed=1)(record("a", 20)).tolist() == scores[:20]
    assert Random(seed=2)(record("a", 50)).tolist() != scores
    assert Random(seed=1)(record("b", 50)).tolist() != scores
    assert 0 <= min(scores) < max(scores) < 1
    assert len(set(scores)) == 50


@pytest.mark.parametrize(("scorer", "missing"), [(LogRatio(), "oracle_logp"), (Reward(), "reward")])
def test_a_value_that_the_store_lacks_is_named(scorer, missing):
    with pytest.raises(UserError, match=rf"the store holds no {missing} \(it holds reference_logp\)"):
        scorer(record(reference_logp=[-1.0] * 3))


@pytest.mark.parametrize("name", SCORERS)
def test_scorers_read_what_they_say(name):
    scorer = SCORERS[name]()
    values = {value: [-0.5, 0.5, 1.0] for value in scorer.reads}
    assert len(scorer(record(**values, other=[0.0] * 3)).tolist()) == 3
    for value in scorer.reads:
        with pytest.raises(UserError, match=f"the store holds no {value}"):
            scorer(record(**{other: values[other] for other in values if other != value}))


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(str(tiny_folder), device="cpu")


def stored(model, **options):
    rows = [TokenRow(encoded=row) for row in ROWS]
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
