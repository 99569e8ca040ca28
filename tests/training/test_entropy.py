"""The entropy that a training logs when asked: that of a plain softmax, and no part of the update."""

from dataclasses import replace

import pytest
import torch

import tokenward
from tests.tiny import tiny_llama
from tests.training.tools import arguments, language_model, largest_difference, random_rows, weights_of
from tokenward.errors import UserError
from tokenward.objectives import DPO, SFT, SimPO
from tokenward.objectives.selected import Selected, with_entropy
from tokenward.scoring.basic import Probability
from tokenward.selection import TopFraction
from tokenward.training.trainer import TokenTrainer


def trained(folder, objective, rows):
    settings = {"per_device_train_batch_size": len(rows), "max_steps": 1, "learning_rate": 1e-2}
    trainer = TokenTrainer(language_model(), objective, arguments(folder, **settings), rows)
    trainer.train()
    return trainer


def plain_entropy(row, response: int) -> torch.Tensor:
    """Of each token of a response, by the whole softmax over the model's own logits."""
    ids = [*row.prompt, *row.responses[response]]
    with torch.no_grad():
        logits = tiny_llama().eval()(torch.tensor([ids])).logits[0, len(row.prompt) - 1 : -1].double()
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def test_it_is_that_of_a_plain_softmax_over_tokens_with_weight(tmp_path):
    draw = torch.Generator().manual_seed(0)
    rows = []
    for row in random_rows(3, longest=20):
        weights = [torch.randint(0, 3, (len(ids),), generator=draw).float() for ids in row.responses]
        rows.append(replace(row, weights=weights))
    assert any((weight == 0).any() for row in rows for weight in row.weights)
    trainer = trained(tmp_path, with_entropy(SimPO()), rows)
    means = []
    for row in rows:
        present = torch.cat([weight != 0 for weight in row.weights])
        means.append(torch.cat([plain_entropy(row, side) for side in (0, 1)])[present].mean())
    assert trainer.state.log_history[0]["entropy"] == pytest.approx(float(sum(means)) / 3, rel=1e-5)


def test_the_update_is_the_same(tmp_path):
    rows = random_rows(4)
    for objective in (SimPO(), SFT()):
        plain, logged = (
            trained(tmp_path / str(n), o, rows) for n, o in enumerate((objective, with_entropy(objective)))
        )
        assert largest_difference(weights_of(plain.model), weights_of(logged.model)) == 0.0
        assert largest_difference(weights_of(plain.model), weights_of(tiny_llama())) > 1e-3
        assert "entropy" not in plain.state.log_history[0]


def test_a_selection_in_the_step_counts_the_tokens_that_it_chose(tmp_path):
    rows = random_rows(3)
    objective = with_entropy(Selected(SimPO(), TopFraction(), Probability(of="policy")))
    assert isinstance(objective, Selected)
    chosen = trained(tmp_path / "chosen", objective, rows).state.log_history[0]["entropy"]
    every = trained(tmp_path / "every", with_entropy(SimPO()), rows).state.log_history[0]["entropy"]
    assert abs(chosen - every) > 1e-3


def test_a_recipe_asks_for_it_where_there_is_a_distribution(tiny_workplace):
    run = tokenward.run(tiny_workplace, ["oracle.training.log_entropy=true"], last="oracle", quiet=True)
    assert '"entropy": ' in (run.path("oracle") / "history.jsonl").read_text()
    with pytest.raises(UserError) as refused:
        tokenward.run(tiny_workplace, ["reward.training.log_entropy=true"], last="data", quiet=True)
    assert refused.value.key == "reward.training.log_entropy"


def test_messages_call_the_objective_by_its_own_name(tmp_path):
    with pytest.raises(UserError, match=r"^DPO "):
        trained(tmp_path, with_entropy(DPO()), random_rows(2))
