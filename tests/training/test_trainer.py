"""Law 5 and what else a training loop must keep: one update however it is cut, resume, seeds, refusals."""

import math
import re
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM, TrainerCallback

from tests.objectives.tools import naming
from tests.tiny import tiny_gpt2, tiny_llama
from tests.training.tools import (
    arguments,
    language_model,
    largest_difference,
    random_rows,
    token_row,
    weights_of,
    with_reference,
)
from tokenward.errors import UserError
from tokenward.objectives import DPO, SFT, Selected, SePO
from tokenward.objectives.base import Losses
from tokenward.selection import TopFraction
from tokenward.training import trainer as trainers
from tokenward.training.checks import disable_dropout
from tokenward.training.passes import check_divisible
from tokenward.training.trainer import TokenTrainer


def trained(
    folder, rows, *, objective=None, model=None, eval_rows=None, callbacks=None, resume=None, **settings
):
    """A trainer that has trained a fresh tiny model."""
    model, objective = model or language_model(), objective or DPO()
    given = {"eval_rows": eval_rows, "callbacks": callbacks}
    trainer = TokenTrainer(model, objective, arguments(folder, **settings), rows, **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def cut_into(batch: int, accumulation: int, tokens: int) -> dict[str, int]:
    """Comparisons of a micro-batch, micro-batches of a step, tokens of a pass."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_forward")
    return dict(zip(names, (batch, accumulation, tokens), strict=True))


def assert_same_training(one, other, names) -> None:
    """The same weights and, at each of six steps, the same figures."""
    assert one.state.global_step == other.state.global_step == 6
    assert largest_difference(weights_of(one.model), weights_of(other.model)) < 2e-6
    for first, second in zip(logged(one)[:6], logged(other)[:6], strict=True):
        expected = {name: second[name] for name in names}
        assert {name: first[name] for name in names} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def logged(trainer) -> list[dict]:
    """The log of a trainer without what depends on the clock."""
    timed = ("runtime", "per_second")
    return [
        {key: value for key, value in entry.items() if not key.endswith(timed)}
        for entry in trainer.state.log_history
    ]


@pytest.fixture(scope="module")
def uneven_rows():
    """20 pairs whose responses have 1 to 40 tokens: two full groups of 8 and one of 4."""
    return with_reference(language_model(), random_rows(20, longest=40))


def test_a_step_is_the_same_however_it_is_cut(tmp_path, uneven_rows):
    whole = trained(tmp_path, uneven_rows, per_device_train_batch_size=8, num_train_epochs=2)
    # The six steps moved weights by 2e-2: a group counted wrongly would show ten thousand times over.
    assert largest_difference(weights_of(whole.model), weights_of(tiny_llama())) > 1e-2
    names = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected")
    for cut in ((2, 4, 4096), (8, 1, 150), (4, 2, 100), (1, 8, 1)):
        other = trained(tmp_path, uneven_rows, **cut_into(*cut), num_train_epochs=2)
        with naming(cut):
            assert_same_training(whole, other, names)


@dataclass(frozen=True)
class Doubt:
    """High where the policy gave the token a low probability."""

    reads: ClassVar[tuple[str, ...]] = ("policy_logp",)

    def __call__(self, record):
        return -record.value("policy_logp")


def some_weights(rows):
    """Rows with the weights 0.5, 0, 2 over and over."""
    cycle = torch.tensor([0.5, 0.0, 2.0])
    return [
        replace(row, weights=[cycle[torch.arange(len(ids)) % 3] for ids in row.responses]) for row in rows
    ]


STEP_WIDE = {
    "weights": SFT(normaliser="step_weights"),
    "length": SFT(normaliser="step_length"),
    "in the step": Selected(SFT(normaliser="step_weights", sides="both"), TopFraction(), Doubt()),
}


@pytest.mark.parametrize("name", STEP_WIDE)
def test_a_denominator_over_the_step_is_the_same_however_it_is_cut(tmp_path, name):
    """Also where clipping follows and what is counted depends on the policy; 20 pairs, so the last step is short."""
    rows, common = some_weights(random_rows(20, longest=40)), {"num_train_epochs": 2, "max_grad_norm": 1.0}
    objective = STEP_WIDE[name]
    whole = trained(tmp_path, rows, objective=objective, per_device_train_batch_size=8, **common)
    assert largest_difference(weights_of(whole.model), weights_of(tiny_llama())) > 5e-3
    for cut in ((1, 8, 4096), (4, 2, 100)):
        other = trained(tmp_path, rows, objective=objective, **cut_into(*cut), **common)
        with naming(cut):
            assert_same_training(whole, other, ("loss", "grad_norm", "nll"))


@pytest.mark.parametrize("normaliser", ["step_weights", "step_length"])
def test_a_step_descends_the_sum_over_the_steps_tokens(tmp_path, normaliser):
    """Against the formula on one batch: ``sum w nll / sum w``, or over all tokens of the best responses."""
    rows = some_weights(random_rows(6, longest=20))
    model = language_model()
    batch = model.collate(rows)
    logp, batch = model.read(model.model, batch)
    best = (batch.rank == 0)[batch.response]
    total = (batch.weights * best).sum() if normaliser == "step_weights" else best.sum()
    loss = -(batch.weights * logp)[best].sum() / total
    loss.backward()
    before = {name: (value.detach().clone(), value.grad) for name, value in model.model.named_parameters()}
    evaluates = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    settings = {**cut_into(3, 2, 4096), **evaluates, "max_steps": 1}
    trainer = trained(tmp_path, rows, objective=SFT(normaliser=normaliser), eval_rows=rows, **settings)
    for name, value in trainer.model.named_parameters():
        start, slope = before[name]
        torch.testing.assert_close(value.detach(), start - 0.05 * slope, rtol=0, atol=1e-6)
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    # After the step the eval rows, the same ones, cost a little less, by the same denominator.
    (figures,) = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    with torch.no_grad():
        logp, batch = trainer.token_model.read(trainer.model, trainer.token_model.collate(rows))
    after = -(batch.weights * logp)[best].sum() / total
    assert figures["eval_loss"] == pytest.approx(after.item(), rel=1e-5)
    assert after < loss.detach()


def test_a_step_in_which_nothing_counts_changes_nothing(tmp_path):
    rows = [replace(row, weights=[torch.zeros(len(ids)) for ids in row.responses]) for row in random_rows(4)]
    trainer = trained(tmp_path, rows, objective=SFT(normaliser="step_weights"), per_device_train_batch_size=4)
    assert largest_difference(weights_of(trainer.model), weights_of(tiny_llama())) == 0
    assert logged(trainer)[0]["loss"] == 0.0


def test_an_optimizer_that_steps_in_the_backward_pass_cannot_have_such_a_denominator():
    check_divisible(SFT(), optimizer="galore_adamw_layerwise")
    check_divisible(SFT(normaliser="step_length"), optimizer="adamw_torch")
    with pytest.raises(UserError) as caught:
        check_divisible(SFT(normaliser="step_length"), optimizer="galore_adamw_layerwise")
    assert caught.value.code == "step-denominator"


class ScheduleFree(torch.optim.SGD):
    """Steps in training mode only, as the optimizers of schedulefree do."""

    training = False

    def train(self):
        self.training = True

    def eval(self):
        self.training = False

    def step(self, closure=None):
        assert self.training
        super().step()


def test_a_schedule_free_optimizer_trains_after_each_evaluation(tmp_path):
    rows = random_rows(4)
    settings = {"per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = TokenTrainer(language_model(), SFT(), arguments(tmp_path, **settings), rows, eval_rows=rows)
    trainer.optimizer = ScheduleFree(trainer.model.parameters(), lr=0.05)
    trainer.train()
    assert largest_difference(weights_of(trainer.model), weights_of(tiny_llama())) > 1e-3


def test_only_the_last_pass_of_a_step_closes_it(tmp_path, uneven_rows, monkeypatch):
    model = language_model()
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = TokenTrainer(model, DPO(), arguments(tmp_path, tokens_per_forward=1, **settings), uneven_rows)
    closing, backward = [], trainers.backward

    def noted(accelerator, model, loss, *, last):
        closing.append(last)
        backward(accelerator, model, loss, last=last)

    monkeypatch.setattr(trainers, "backward", noted)
    trainer.train()
    assert closing == [False] * 7 + [True]


def test_a_policy_is_in_training_mode_again_after_it_was_sampled_from(tmp_path):
    model, learning = language_model(), []

    def prepare(rows, step):
        model.model.eval()
        return rows

    class Noted:
        def __call__(self, logp, batch) -> Losses:
            learning.append(model.model.training)
            return SFT()(logp, batch)

    settings = {"per_device_train_batch_size": 2, "max_steps": 2}
    trainer = TokenTrainer(model, Noted(), arguments(tmp_path, **settings), random_rows(4), prepare=prepare)
    learning.clear()
    trainer.train()
    assert learning == [True, True]


class StopAfter(TrainerCallback):
    """Saves and stops at a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize(("optimizer", "accumulation"), [("adamw_torch", 2), ("sgd", 1)])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, optimizer, accumulation):
    rows = with_reference(language_model(), random_rows(20))
    settings = {
        "optim": optimizer, "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "warmup_steps": 2,
        "num_train_epochs": 2, "max_grad_norm": 1.0, **cut_into(4, accumulation, 4096),
    }  # fmt: skip
    whole = trained(tmp_path / "whole", rows, **settings)
    stopped = trained(tmp_path / "parts", rows, callbacks=[StopAfter(2)], **settings)
    assert stopped.state.global_step == 2
    resumed = trained(tmp_path / "parts", rows, resume=str(tmp_path / "parts" / "checkpoint-2"), **settings)
    first, second = weights_of(whole.model), weights_of(resumed.model)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], stopped.model.state_dict()["lm_head.weight"])
    # The last entry sums up one call of train, of which a resumed run has two.
    assert logged(resumed)[:-1] == logged(whole)[:-1]
    assert len(logged(whole)) == math.ceil(20 / 4 / accumulation) * 2 + 1


def test_same_seed_same_bytes(tmp_path):
    rows = with_reference(language_model(), random_rows(16))

    def saved(name: str, **settings) -> bytes:
        table = {"optim": "adamw_torch", "learning_rate": 1e-3, "per_device_train_batch_size": 4, **settings}
        trained(tmp_path / name, rows, **table).save_model(str(tmp_path / name))
        return (tmp_path / name / "model.safetensors").read_bytes()

    first = saved("first")
    assert saved("second") == first
    assert saved("other", seed=8) != first


def test_evaluation_during_training_averages_comparisons_not_batches(tmp_path):
    """Five pairs in batches of 2, 2 and 1: the last one must not count twice."""
    rows = with_reference(language_model(tiny_llama(seed=1)), random_rows(5, longest=20, seed=4))
    model = language_model()
    beta, margins, sums = 0.1, [], []
    for row, policy in zip(rows, with_reference(model, rows), strict=True):
        chosen, rejected = (
            float(now.double().sum() - before.double().sum())
            for now, before in zip(policy.reference_logp, row.reference_logp, strict=True)
        )
        margins.append(beta * (chosen - rejected))
        sums.append([float(side.sum()) for side in policy.reference_logp])
    trainer = TokenTrainer(
        model,
        DPO(beta=beta),
        # A step of length 0: the model that is evaluated is the one above.
        arguments(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=1, learning_rate=0.0,
                  per_device_train_batch_size=1, per_device_eval_batch_size=2),
        rows,
        eval_rows=rows,
    )  # fmt: skip
    trainer.train()
    (figures,) = (entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert 0 < sum(margin > 0 for margin in margins) < 5
    expected = {
        "eval_loss": sum(math.log1p(math.exp(-margin)) for margin in margins) / 5,
        "eval_rewards/accuracies": sum(margin > 0 for margin in margins) / 5,
        "eval_rewards/margins": sum(margins) / 5,
        "eval_logps/chosen": sum(chosen for chosen, _ in sums) / 5,
        "eval_logps/rejected": sum(rejected for _, rejected in sums) / 5,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_training_metrics_average_the_comparisons_since_the_last_log(tmp_path, uneven_rows):
    each = trained(tmp_path, uneven_rows, per_device_train_batch_size=8, learning_rate=0.0)
    slow = {"logging_steps": 3, "logging_first_step": False}
    once = trained(tmp_path, uneven_rows, per_device_train_batch_size=8, learning_rate=0.0, **slow)
    steps, (entry, _) = logged(each)[:3], logged(once)
    for name in ("logps/chosen", "logps/rejected", "kept/chosen"):
        expected = (8 * steps[0][name] + 8 * steps[1][name] + 4 * steps[2][name]) / 20
        assert entry[name] == pytest.approx(expected, rel=1e-5)


def test_best_model_can_be_chosen_by_a_metric_of_ours(tmp_path):
    rows = with_reference(language_model(), random_rows(8))
    trainer = trained(
        tmp_path, rows, eval_rows=rows, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_rewards/margins", greater_is_better=True,
        per_device_train_batch_size=4, save_total_limit=2,
    )  # fmt: skip
    margins = [entry["eval_rewards/margins"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_metric == max(margins)


class BreaksAt:
    """SFT whose loss is NaN for one row, from a given call on."""

    def __init__(self, first_token: int, call: int) -> None:
        self._token, self._call, self.calls = first_token, call, 0

    def __call__(self, logp, batch) -> Losses:
        self.calls += 1
        losses = SFT()(logp, batch)
        starts = torch.searchsorted(batch.response, torch.arange(batch.responses))
        bad = (batch.ids[starts] == self._token)[0::2]
        broken = bad if self.calls >= self._call else torch.zeros_like(bad)
        return losses._replace(loss=torch.where(broken, torch.nan, losses.loss))


def test_a_loss_that_is_not_finite_names_row_and_step_and_spares_the_saved_weights(tmp_path):
    rows = [token_row([5, 6], ([20 + i, 7], [60 + i, 8, 9]), f"pairs.jsonl:{i + 1}") for i in range(6)]
    settings = {"per_device_train_batch_size": 6, "save_strategy": "steps", "save_steps": 1}
    good = trained(tmp_path / "good", rows, objective=SFT(), num_train_epochs=2, **settings)
    with pytest.raises(UserError, match="at step 3,") as caught:
        trained(tmp_path / "bad", rows, objective=BreaksAt(23, call=3), num_train_epochs=4, **settings)
    assert re.findall(r"pairs\.jsonl:\d+", str(caught.value)) == ["pairs.jsonl:4"]
    assert [path.name for path in (tmp_path / "bad").iterdir()] == ["checkpoint-2"]
    saved = load_file(tmp_path / "bad" / "checkpoint-2" / "model.safetensors")
    expected = weights_of(good.model)
    assert all(torch.equal(value, expected[name]) for name, value in saved.items())


@pytest.mark.parametrize("objective", [DPO(), SePO()])
def test_rows_that_the_objective_cannot_train_on_are_errors(tmp_path, objective):
    for ranks in ((1, 0), (0, 0), (0, 1, 2)):
        bad = token_row([1], ([2], [3], [4])[: len(ranks)], "pairs.jsonl:9", ranks=ranks)
        rows = with_reference(language_model(), [*random_rows(2), bad])
        with pytest.raises(UserError, match=r"pairs\.jsonl:9") as caught:
            TokenTrainer(language_model(), objective, arguments(tmp_path), rows)
        assert caught.value.code == "not-a-pair"
    if objective == DPO():
        with pytest.raises(UserError, match="rows:1 ") as caught:
            TokenTrainer(language_model(), objective, arguments(tmp_path), random_rows(2))
        assert caught.value.code == "missing-reference"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.20
def test_lora_trains_its_adapter_and_leaves_the_base_untouched(tmp_path):
    rows = with_reference(language_model(), random_rows(8))
    adapted = language_model().with_adapter(
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5}
    )
    trainer = trained(tmp_path, rows, model=adapted, per_device_train_batch_size=4, num_train_epochs=2)
    state, plain = adapted.model.state_dict(), tiny_llama().state_dict()
    base = [name for name in state if "lora_" not in name]
    base_names = {name: name.removeprefix("base_model.model.").replace(".base_layer", "") for name in base}
    assert sorted(base_names.values()) == sorted(plain)
    assert all(torch.equal(state[name], plain[short]) for name, short in base_names.items())
    trained_parts = [value for name, value in state.items() if "lora_B" in name]
    assert min(float(value.abs().max()) for value in trained_parts) > 1e-5  # they begin at 0
    first, *_, last = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert first == pytest.approx(math.log(2), abs=1e-5)
    assert last < first
    trainer.save_model(str(tmp_path / "adapter"))
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in kept)


def tiny_opt() -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=266, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.3, layerdrop=0.3,
    )  # fmt: skip
    return OPTForCausalLM(config)


def tiny_bloom() -> BloomForCausalLM:
    torch.manual_seed(0)
    size = {"vocab_size": 266, "hidden_size": 32, "n_layer": 1, "n_head": 4}
    return BloomForCausalLM(BloomConfig(**size, hidden_dropout=0.3, attention_dropout=0.3))


@pytest.mark.parametrize(
    "make",
    [lambda: tiny_llama(attention_dropout=0.3), tiny_gpt2, tiny_opt, tiny_bloom],
    ids=["llama", "gpt2", "opt", "bloom"],
)
def test_dropout_is_switched_off_wherever_a_model_keeps_it(make):
    model, ids = make(), torch.arange(40)[None]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    with torch.no_grad():
        plain = model.eval()(input_ids=ids).logits
        torch.manual_seed(1)
        noisy = model.train()(input_ids=ids).logits
        assert float((noisy - plain).abs().max()) > 1e-3
        disable_dropout(model)
        assert torch.equal(model.train()(input_ids=ids).logits, plain)


def test_the_trainer_switches_dropout_off_unless_told_otherwise(tmp_path):
    rows = with_reference(language_model(), random_rows(8, longest=30))

    def losses(**settings) -> list[float]:
        model = language_model(tiny_llama(attention_dropout=0.5))
        trainer = trained(tmp_path, rows, model=model, per_device_train_batch_size=4, **settings)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses()[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses(disable_dropout=False)[0] - math.log(2)) > 1e-3
