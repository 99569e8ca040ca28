"""Law 7, planted truth: the oracle finds the tokens that carry the preference, and SePO learns from them."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.tiny import tiny_llama
from tests.training.tools import arguments, language_model, token_row, with_reference
from tokenward.evaluation.measures import PairLogprobs, preference_figures
from tokenward.evaluation.statistics import auroc
from tokenward.models.loading import LanguageModel
from tokenward.objectives import DPO, Objective, SePO
from tokenward.scoring.reads import token_values
from tokenward.selection import TopFraction
from tokenward.selection.weights import weigh_rows
from tokenward.tokens.rows import TokenRow
from tokenward.training.trainer import TokenTrainer

FILLER, GOOD, BAD = range(30), range(100, 103), range(110, 113)


class Study(NamedTuple):
    """What the module's tests look at: held-out pairs, oracle scores of all pairs, margins of two policies."""

    eval_rows: list[TokenRow]
    train: list[TokenRow]
    untrained: list[TokenRow]
    margins: dict[str, object]


def planted_row(rng: random.Random, number: int) -> TokenRow:
    """Filler words, with 1 to 3 good words in the better response and as many bad ones in the other."""

    def response(planted: Sequence[int]) -> list[int]:
        words = [rng.choice(FILLER) for _ in range(rng.randint(7, 12))]
        for place in rng.sample(range(len(words)), rng.randint(1, 3)):
            words[place] = rng.choice(planted)
        return words

    prompt = [rng.choice(FILLER) for _ in range(4)]
    return token_row(prompt, (response(GOOD), response(BAD)), f"planted:{number}")


def start() -> LanguageModel:
    return language_model(tiny_llama(initializer_range=0.05))


def train(folder, objective: Objective, rows: Sequence[TokenRow]) -> LanguageModel:
    # One epoch: a tiny model that is trained longer learns to recognise the whole response by its first
    # planted word, and then every later token carries the preference.
    model = start()
    settings = {"optim": "adamw_torch", "learning_rate": 3e-3, "per_device_train_batch_size": 16}
    table = {**settings, "max_grad_norm": 1.0, "logging_steps": 1000}
    TokenTrainer(model, objective, arguments(folder, **table), rows).train()
    return model


def scored(oracle: LanguageModel, rows: Sequence[TokenRow]) -> list[TokenRow]:
    values = token_values(oracle, rows, precision="float32", tokens_per_batch=4096)
    return [
        replace(row, scores=[now - before for now, before in zip(value, row.reference_logp, strict=True)])
        for row, value in zip(rows, values, strict=True)
    ]


def margin(policy: LanguageModel, rows: Sequence[TokenRow]):
    values = token_values(policy, rows, precision="float32", tokens_per_batch=4096)
    pairs = [
        PairLogprobs(tuple(row.reference_logp), tuple(value)) for row, value in zip(rows, values, strict=True)
    ]
    return preference_figures(pairs)["preference/margin"]


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    folder, rng = tmp_path_factory.mktemp("planted"), random.Random(0)
    rows = with_reference(start(), [planted_row(rng, number) for number in range(300)])
    training, eval_rows = rows[:240], rows[240:]
    oracle = train(folder, DPO(beta=1.0), training)
    kept = weigh_rows(TopFraction(), scored(oracle, training))
    policy = train(folder, SePO(), kept)
    margins = {"start": margin(start(), eval_rows), "policy": margin(policy, eval_rows)}
    return Study(scored(oracle, eval_rows), kept, scored(start(), eval_rows), margins)


def planted_auroc(rows: Sequence[TokenRow], side: int) -> float:
    """How well the scores of one side find its planted words; on the rejected side a low score finds.

    Scores that differ by rounding alone are ties: a log-probability's last bits depend on the batch around it.
    """
    scores = np.concatenate([row.scores[side].numpy() for row in rows]).round(4)
    planted = np.concatenate([np.isin(row.responses[side], (*GOOD, *BAD)) for row in rows])
    assert 0.1 < planted.mean() < 0.3
    return auroc(scores if side == 0 else -scores, planted)


@pytest.mark.parametrize("side", [0, 1], ids=["good", "bad"])
def test_the_oracle_ranks_planted_words_first_on_pairs_it_has_not_seen(study, side):
    assert planted_auroc(study.eval_rows, side) > 0.9


@pytest.mark.parametrize("side", [0, 1], ids=["good", "bad"])
def test_an_untrained_oracle_ranks_nothing(study, side):
    """The same measure at chance: the scores above come from training."""
    assert planted_auroc(study.untrained, side) == pytest.approx(0.5, abs=1e-12)


def test_the_selected_30_percent_hold_most_planted_words(study):
    for side, words in enumerate((GOOD, BAD)):
        ids = torch.cat([torch.tensor(row.responses[side]) for row in study.train])
        weights = torch.cat([row.weights[side] for row in study.train])
        planted = torch.isin(ids, torch.tensor(words))
        assert weights.unique().tolist() == [0.0, 1.0]
        assert 0.2 < float(weights.mean()) <= 0.3
        assert float(weights[planted].mean()) > 0.7
        assert float(weights[~planted].mean()) < 0.2


def test_training_on_the_selected_tokens_raises_the_held_out_margin(study):
    assert study.margins["policy"].n == 60
    assert study.margins["policy"].low > 0
    assert study.margins["start"].value == pytest.approx(0, abs=1e-5)
