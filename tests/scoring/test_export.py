"""RTO's token rewards: scaled before they are clipped, from the left, the whole response's at its last token."""

import pytest
import torch

from tests.tiny import save_tiny, tiny_llama
from tokenward.errors import UserError
from tokenward.scoring.export import TokenRewards, padded
from tokenward.scoring.texts import TokenScorer


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> TokenScorer:
    folder = tmp_path_factory.mktemp("rewards")
    oracle, reference = (str(save_tiny(folder / str(seed), tiny_llama(seed=seed))) for seed in (1, 2))
    return TokenScorer.load(oracle, reference=reference)


def test_padded_by_hand():
    rewards = [torch.tensor([0.05, -0.02]), torch.tensor([0.01])]
    found = padded(rewards, torch.tensor([1.0, 0.0]), width=3)
    torch.testing.assert_close(found, torch.tensor([[0.05, 0.98, 0.0], [0.01, 0.0, 0.0]]))
    assert padded(rewards, torch.zeros(2)).shape == (2, 2)
    with pytest.raises(UserError, match="the array 1 columns"):
        padded(rewards, torch.zeros(2), width=1)


def test_rewards_are_scaled_then_clipped(scorer):
    """0.05 and 0.05 clip a log-ratio at one nat; clipped before, all would be at most 0.0025."""
    prompts, responses = [[1, 2, 3], [9]], [[4, 5, 6, 7], [8, 10]]
    raw = scorer.score_ids(prompts, responses)
    assert max(float(part.abs().max()) for part in raw) > 1
    found = TokenRewards(scorer).of_ids(prompts, responses, terminal=[30.0, -0.5])
    expected = torch.zeros(2, 4)
    for row, part in enumerate(raw):
        expected[row, : len(part)] = (0.05 * part).clamp(-0.05, 0.05)
    expected[0, 3] += 10.0  # bounded
    expected[1, 1] += -0.5
    torch.testing.assert_close(found, expected)
    free = TokenRewards(scorer, scale=1.0, clip=None, terminal_clip=None)
    torch.testing.assert_close(free.of_ids(prompts, responses)[0], raw[0])


def test_the_scores_of_ids_are_those_of_their_text(scorer):
    text = scorer("Say it.", "the good tea")
    row = scorer.template.prompt_ids([{"role": "user", "content": "Say it."}])
    (again,) = scorer.score_ids([row], [[token.id for token in text.tokens]])
    assert again.tolist() == pytest.approx([token.score for token in text.tokens], abs=1e-5)


def test_trl_gets_a_number_per_completion(scorer):
    rewards = TokenRewards(scorer)
    found = rewards(
        ["Say it.", "Say it."], ["the good tea", [{"role": "assistant", "content": "a cup"}]], level=[1, 2]
    )
    row = scorer.template.prompt_ids([{"role": "user", "content": "Say it."}])
    texts = scorer.template.texts_ids(["the good tea", "a cup"])
    ids = [[*text, *scorer.template.eos_ids] for text in texts]
    assert found == pytest.approx(rewards.of_ids([row, row], ids).sum(1).tolist(), abs=1e-5)
    assert rewards.__name__ == "tokenward_rewards"


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"clip": -1.0}, {"terminal_clip": 0.0}])
def test_numbers_that_make_no_sense_are_refused(scorer, settings):
    with pytest.raises(UserError, match="must be greater than 0"):
        TokenRewards(scorer, **settings)


def test_wrong_inputs_are_refused(scorer):
    with pytest.raises(UserError, match="a response of 0 cannot be scored"):
        TokenRewards(scorer).of_ids([[1]], [[]])
    with pytest.raises(UserError, match=r"terminal has the shape \[2\] for 1 responses"):
        TokenRewards(scorer).of_ids([[1]], [[2]], terminal=[1.0, 2.0])
