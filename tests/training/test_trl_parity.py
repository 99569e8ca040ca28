"""Law 8: losses and gradients equal TRL 1.16's on the same token ids."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.models.plain import token_logprobs
from tests.tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.training.tools import language_model, random_rows, with_reference
from tokenward import losses
from tokenward.models import logprobs
from tokenward.objectives import DPO, KTO, SePO, SimPO
from tokenward.objectives.base import Losses
from tokenward.tokens.batches import collate
from tokenward.tokens.rows import TokenRow
from tokenward.training.metrics import MetricSums

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("default")  # TRL's own warnings are not ours to turn into errors

MODELS = {"llama": lambda: tiny_llama(dtype=torch.float64), "gpt2": lambda: tiny_gpt2(dtype=torch.float64)}
# Law 8 asks for 1e-6, which is what float32 leaves: TRL's DPO rounds log-probabilities to it, Llama its
# norms and rotations, whatever the model computes in. GPT-2 in TRL's CPO is float64 throughout.
EXACT = {"llama": 1e-6, "gpt2": 1e-10}
ROWS = random_rows(6, longest=8)


class Outcome:
    """A mean loss, its gradient for every weight, and TRL's metrics."""

    def __init__(self, model, loss: Tensor, metrics: dict[str, float]) -> None:
        model.zero_grad()
        loss.backward()
        self.loss = float(loss.detach())
        self.gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
        self.metrics = metrics


def ours(make: Callable, objective, rows: list[TokenRow], layout: str) -> Outcome:
    model = language_model(make(), layout=layout)
    batch = collate(rows, layout=layout, pad_id=model.pad_id)
    losses: Losses = objective(token_logprobs(model.model, model.head, batch), batch.tokens)
    sums = MetricSums()
    sums.add(losses, torch.ones(batch.tokens.comparisons, dtype=torch.bool))
    return Outcome(model.model, losses.loss.mean(), sums.take(lambda total: total))


def assert_gradients_equal(mine: Outcome, theirs: Outcome, *, within: float) -> None:
    assert mine.loss == pytest.approx(theirs.loss, rel=0, abs=within)
    assert mine.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert float((mine.gradients[name] - gradient).abs().max()) < within, name


def assert_equal(mine: Outcome, theirs: Outcome, *, within: float, sums: bool = True) -> None:
    """Loss and every gradient, and the metrics that both log."""
    assert_gradients_equal(mine, theirs, within=within)
    assert max(float(value.abs().max()) for value in theirs.gradients.values()) > 1e-2
    # TRL logs means per token as logps in SimPO; ours are sums everywhere, so only DPO shares them.
    shared = [name for name in mine.metrics if name in theirs.metrics and (sums or "logps" not in name)]
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= {*shared}
    for name in shared:
        assert mine.metrics[name] == pytest.approx(theirs.metrics[name], rel=1e-5, abs=1e-5), name


@pytest.fixture(autouse=True)
def no_open_loader():
    """Accelerate keeps what the last loader of the process left; TRL's metrics would drop rows by its remainder."""
    from accelerate.state import GradientState

    GradientState._reset_state()
    yield
    GradientState._reset_state()


def trl_dataset():
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)


def trl_settings(folder) -> dict:
    return {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
            "disable_dropout": True, "activation_checkpointing": False}  # fmt: skip


def pairs_of(rows: list[TokenRow]) -> list[dict[str, list[int]]]:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [dict(zip(names, (row.prompt, *row.responses), strict=True)) for row in rows]


def trl_dpo(folder, make: Callable, reference, rows: list[TokenRow], **settings) -> Outcome:
    """TRL's DPO trainer on a batch that its own collator makes of the ids."""
    from trl import DPOConfig, DPOTrainer

    model = make()
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(**trl_settings(folder), **settings),
        train_dataset=trl_dataset(),
        processing_class=tiny_tokenizer(),
    )
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(pairs_of(rows)))
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return Outcome(model, loss, metrics)


def trl_cpo(folder, make: Callable, rows: list[TokenRow], **settings) -> Outcome:
    """TRL's CPO trainer on a batch that its own collator makes of the ids."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    model = make()
    trainer = CPOTrainer(
        model=model,
        args=CPOConfig(**trl_settings(folder), **settings),
        train_dataset=trl_dataset(),
        processing_class=tiny_tokenizer(),
    )

    def side(name: str, prompt: list[int], response: list[int]) -> dict[str, list[int]]:
        parts = {
            "input_ids": prompt + response,
            "attention_mask": [1] * len(prompt + response),
            "labels": [-100] * len(prompt) + response,
        }
        return {f"{name}_{part}": ids for part, ids in parts.items()}

    features = [
        {
            **side("chosen", row.prompt, row.responses[0]),
            **side("rejected", row.prompt, row.responses[1]),
            "prompt_input_ids": row.prompt,
            "prompt_attention_mask": [1] * len(row.prompt),
        }
        for row in rows
    ]
    trainer.model.train()
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, trainer.data_collator(features))
    return Outcome(model, loss, metrics)


def trl_kto(folder, make: Callable, reference, rows: list[TokenRow], **settings) -> Outcome:
    """TRL's KTO trainer on a batch that its own collator makes of the ids."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    model = make()
    trainer = KTOTrainer(
        model=model,
        ref_model=reference,
        args=KTOConfig(**trl_settings(folder), **settings),
        train_dataset=Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}] * 2),
        processing_class=tiny_tokenizer(),
    )
    features = [
        {
            "prompt_ids": row.prompt,
            "completion_ids": row.responses[0],
            "label": row.comparison.ranks[0] == 0,
        }
        for row in rows
    ]
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(features))
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return Outcome(model, loss, metrics)


def alone(row: TokenRow, place: int) -> TokenRow:
    """One response of a pair as a row of its own."""
    only = {"responses": row.comparison.responses[place : place + 1], "ranks": (place,)}
    return TokenRow(replace(row.comparison, **only), row.prompt, [row.responses[place]], [row.eos[place]])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("places", [(0, 1, 1, 0, 1, 1), (0, 0, 0, 0, 0, 0), (1, 1, 1, 1, 1, 1)])
def test_unpaired_kto_without_a_reference_point_equals_trl(tmp_path, name, places):
    start = MODELS[name]
    rows = with_reference(
        language_model(start()), [alone(row, p) for row, p in zip(ROWS, places, strict=True)]
    )
    settings = {"desirable_weight": 1.5, "undesirable_weight": 0.5, "beta": 0.3, "max_length": None}
    frozen = start().eval()
    theirs = trl_kto(tmp_path, moved(start), frozen, rows, loss_type="apo_zero_unpaired", **settings)
    objective = KTO(beta=0.3, anchor="zero", desirable=1.5, undesirable=0.5)
    mine = ours(moved(start), objective, rows, "shared")
    assert_gradients_equal(mine, theirs, within=1e-6)
    shared = {metric for metric in mine.metrics if metric in theirs.metrics and metric.startswith("rewards")}
    assert shared == {f"rewards/{side}" for side, rank in (("chosen", 0), ("rejected", 1)) if rank in places}
    for metric in shared:
        assert mine.metrics[metric] == pytest.approx(theirs.metrics[metric], abs=1e-5), metric


def moved(make: Callable):
    """The model a little away from where it began, so that it is not its own reference."""

    def build():
        model, generator = make(), torch.Generator().manual_seed(3)
        with torch.no_grad():
            for value in model.parameters():
                value += 0.02 * torch.randn(value.shape, generator=generator).to(value.dtype)
        return model

    return build


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        (DPO(beta=0.1), {"loss_type": ["sigmoid"], "beta": 0.1}),
        (DPO(beta=0.5), {"loss_type": ["sigmoid"], "beta": 0.5}),
        (DPO(beta=0.3, loss="ipo"), {"loss_type": ["ipo"], "beta": 0.3}),
    ],
    ids=["sigmoid-0.1", "sigmoid-0.5", "ipo"],
)
def test_dpo_equals_trl(tmp_path, name, objective, settings, layout):
    start = MODELS[name]
    rows = with_reference(language_model(start()), ROWS)
    theirs = trl_dpo(tmp_path, moved(start), start().eval(), rows, max_length=None, **settings)
    assert_equal(ours(moved(start), objective, rows, layout), theirs, within=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_smoothed_dpo_equals_trl(tmp_path, name, smoothing):
    """TRL 1.16 keeps cDPO's smoothing in CPO's sigmoid loss only: that is DPO with a reference of 0 nats."""
    rows = [replace(row, reference_logp=[torch.zeros(len(ids)) for ids in row.responses]) for row in ROWS]
    settings = {"loss_type": "sigmoid", "beta": 0.2, "label_smoothing": smoothing, "cpo_alpha": 0.0}
    theirs = trl_cpo(tmp_path, MODELS[name], rows, **settings)
    mine = ours(MODELS[name], DPO(beta=0.2, label_smoothing=smoothing), rows, "shared")
    assert_equal(mine, theirs, within=EXACT[name])


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 1.0), (2.5, 0.0), (1.0, 0.5)])
def test_simpo_equals_trl(tmp_path, name, layout, beta, gamma):
    settings = {"loss_type": "simpo", "beta": beta, "simpo_gamma": gamma, "cpo_alpha": 0.0}
    theirs = trl_cpo(tmp_path, MODELS[name], ROWS, **settings)
    for objective in (SimPO(beta=beta, gamma=gamma), SePO(gamma=beta, margin=gamma)):
        assert_equal(ours(MODELS[name], objective, ROWS, layout), theirs, within=EXACT[name], sums=False)


def test_the_comparison_sees_a_token_that_is_left_out(tmp_path):
    """The comparison itself can fail: one weight of 0 is enough."""
    weights = [[torch.ones(len(ids)) for ids in row.responses] for row in ROWS]
    weights[2][0][-1] = 0.0
    rows = [replace(row, weights=sides) for row, sides in zip(ROWS, weights, strict=True)]
    settings = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}
    theirs = trl_cpo(tmp_path, MODELS["llama"], ROWS, **settings)
    with pytest.raises(AssertionError):
        assert_equal(ours(MODELS["llama"], SimPO(), rows, "shared"), theirs, within=1e-6, sums=False)


def padded(rows: list[TokenRow]) -> tuple[dict[str, Tensor], Tensor]:
    """Chosen rows, then rejected ones, as TRL's collator lays them out, and which tokens are of responses."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    batch = DataCollatorForPreference(pad_token_id=0)(pairs_of(rows))
    return batch, batch.pop("completion_mask").bool()


@pytest.mark.parametrize("name", MODELS)
def test_a_loop_with_losses_on_padded_rows_equals_trl(tmp_path, name):
    start, (batch, mask) = MODELS[name], padded(ROWS)
    model, frozen, sides = moved(start)().eval(), start().eval(), mask.chunk(2)
    with torch.no_grad():
        reference = logprobs.token_logprobs(frozen, batch, mask)
    logp = logprobs.token_logprobs(model, batch, mask)
    loss = losses.dpo(logp.chunk(2), sides, reference.chunk(2), beta=0.3)
    mine = Outcome(model, loss.mean(), {})
    theirs = trl_dpo(tmp_path, moved(start), frozen, ROWS, beta=0.3)
    assert_gradients_equal(mine, theirs, within=1e-6)
    simpo = losses.simpo(logprobs.token_logprobs(model, batch, mask).chunk(2), sides, beta=0.5, gamma=0.3)
    mine = Outcome(model, simpo.mean(), {})
    settings = {"loss_type": "simpo", "simpo_gamma": 0.3, "cpo_alpha": 0.0, "beta": 0.5, "max_length": 512}
    assert_gradients_equal(mine, trl_cpo(tmp_path, moved(start), ROWS, **settings), within=EXACT[name])
