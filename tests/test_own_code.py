"""Code of the user's that ends the program, or gives a number that is none, is an error with its name."""

import sys
from types import SimpleNamespace

import pytest
import torch

from tests.training.tools import arguments, language_model, random_rows
from tokenward.errors import UserError
from tokenward.objectives import CheckedObjective
from tokenward.sampling.sources import call_source
from tokenward.scoring.reads import scores_of
from tokenward.selection.base import ScoredTokens
from tokenward.selection.weights import weights_of
from tokenward.training.trainer import TokenTrainer

RECORD = SimpleNamespace(key="abc", ids=[5, 6, 7])
TOKENS = ScoredTokens(
    scores=torch.zeros(2),
    response=torch.zeros(2, dtype=torch.long),
    comparison=torch.zeros(1, dtype=torch.long),
    rank=torch.zeros(1, dtype=torch.long),
    eos=torch.zeros(2, dtype=torch.bool),
    seeds=torch.zeros(1, dtype=torch.long),
)


class Ends:
    """A scorer, selector, objective, metric or reward that ends the program."""

    reads = ()

    def __call__(self, *args, **kwargs):
        sys.exit("no data")


def a_source(prompts, completions):
    sys.exit(3)


def call(kind: str, folder) -> None:
    if kind == "scorer":
        scores_of(Ends(), RECORD)
    elif kind == "selector":
        weights_of(Ends(), TOKENS)
    elif kind == "objective":
        args = arguments(folder, max_steps=1)
        TokenTrainer(language_model(), Ends(), args, random_rows(4)).train()
    elif kind == "checked objective":
        CheckedObjective(Ends(), "mylab:Ends")(torch.zeros(1), SimpleNamespace(comparisons=1))
    else:
        call_source("mylab:a_source", a_source, ["p"], ["c"], [[1]], {}, ["rows:1"], kind=kind)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("scorer", "Ends called sys.exit('no data')"),
        ("selector", "Ends called sys.exit('no data')"),
        ("objective", "Ends called sys.exit('no data')"),
        ("checked objective", "mylab:Ends called sys.exit('no data')"),
        ("metric", "mylab:a_source called sys.exit(3)"),
        ("preference source", "mylab:a_source called sys.exit(3)"),
    ],
)
def test_code_that_ends_the_program_is_an_error(kind, name, tmp_path):
    with pytest.raises(UserError) as caught:
        call(kind, tmp_path)
    assert caught.value.code == "plugin-exits"
    assert kind.removeprefix("checked ") in str(caught.value)
    assert name in str(caught.value)


class Gives:
    """A scorer with these scores."""

    reads = ()

    def __init__(self, *scores: float) -> None:
        self._scores = scores

    def __call__(self, record):
        return list(self._scores)


def test_infinite_scores_are_refused_and_nan_is_no_score():
    assert scores_of(Gives(1.0, float("nan"), 2.0), RECORD).isnan().tolist() == [False, True, False]
    for value in ("inf", "-inf"):
        with pytest.raises(
            UserError, match=rf"Gives returned {value} for token 2 of 3 of the response abc"
        ) as caught:
            scores_of(Gives(1.0, float(value), 2.0), RECORD)
        assert caught.value.code == "non-finite-scores"
