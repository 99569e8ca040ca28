"""Preference figures of eval pairs, worked by hand."""

import math

import pytest
import torch

from tokenward.evaluation.measures import PairLogprobs, preference_figures
from tokenward.evaluation.statistics import before_after_figures

PAIRS = [
    # chosen -3 over 2 tokens, rejected -6 over 3; after: -2 and -9.
    PairLogprobs(
        (torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -2.0, -2.0])),
        (torch.tensor([-1.0, -1.0]), torch.tensor([-3.0, -3.0, -3.0])),
    ),
    # chosen -8 over 2, rejected -1 over 1; after: -9 and -1.5.
    PairLogprobs(
        (torch.tensor([-4.0, -4.0]), torch.tensor([-1.0])),
        (torch.tensor([-4.0, -5.0]), torch.tensor([-1.5])),
    ),
]


def test_preference_figures_by_hand():
    figures = preference_figures(PAIRS)
    values = {name: figure.value for name, figure in figures.items()}
    # Changes: +1 and -3, -1 and -0.5, so the margins are 4 and -0.5.
    # Per token: -1.5 and -2 become -1 and -3; -4 and -1 become -4.5 and -1.5.
    assert values == pytest.approx(
        {
            "preference/accuracy": 1 / 2,
            "preference/margin": (4 - 0.5) / 2,
            "likelihood/accuracy_before": 1 / 2,
            "likelihood/accuracy_after": 1 / 2,
            "likelihood/margin_before": (0.5 - 3) / 2,
            "likelihood/margin_after": (2 - 3) / 2,
            "logps/chosen_change": (1 - 1) / 2,
            "logps/rejected_change": (-3 - 0.5) / 2,
            "logps/chosen_change_per_token": (0.5 - 0.5) / 2,
            "logps/rejected_change_per_token": (-1 - 0.5) / 2,
        }
    )
    # Of two pairs a draw holds both, or one of them twice.
    assert figures["preference/margin"][1:] == (-0.5, 4.0, 2)


def test_before_training_nothing_is_preferred():
    same = [PairLogprobs(pair.start, pair.start) for pair in PAIRS]
    figures = preference_figures(same)
    assert figures["preference/accuracy"][:3] == (0.5, 0.5, 0.5)
    assert figures["preference/margin"][:3] == (0.0, 0.0, 0.0)
    assert figures["logps/chosen_change"][:3] == (0.0, 0.0, 0.0)


def test_without_pairs_every_figure_is_empty():
    for name, figure in preference_figures([]).items():
        assert figure.n == 0, name
        assert math.isnan(figure.value), name


def test_before_and_after_are_paired():
    figures = before_after_figures("length", [1.0, 5.0, 9.0], [2.0, 6.0, 10.0])
    assert figures["length/before"].value == 5.0
    assert figures["length/after"].value == 6.0
    assert figures["length/before"].high > 6.0
    assert figures["length/change"] == (1.0, 1.0, 1.0, 3)  # the same prompts: no width is left
