"""Law 5 over every objective of the registry, and what happens to modules that train with the policy."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.objectives.tools import MORE, NEEDED, naming
from tests.tiny import move_trained, tiny_llama
from tests.training.tools import (
    arguments,
    language_model,
    largest_difference,
    random_rows,
    weights_of,
    with_reference,
)
from tokenward.errors import UserError
from tokenward.models.loading import load_model
from tokenward.objectives import DPO, OBJECTIVES, TBPO, TDPO, SparsePO
from tokenward.plugins import build
from tokenward.training.passes import frozen_reference
from tokenward.training.trainer import TokenTrainer

HEAD = {"baseline": "head", "hidden": 8, "learning_rate": 0.5}
LEARNS = [(name, NEEDED.get(name, {})) for name in OBJECTIVES] + [
    (name, settings) for name, settings in MORE if name in ("tbpo", "sparsepo", "kto", "tdpo")
]
AUXILIARY = "auxiliary.safetensors"


@pytest.fixture(scope="module")
def rows():
    """8 pairs with weights of their own, reference values of the model before its training, and scores."""
    generator = torch.Generator().manual_seed(0)

    def drawn(row, kind):
        return [kind(torch.rand(len(ids), generator=generator)) for ids in row.responses]

    found = [
        replace(row, weights=drawn(row, lambda x: 0.5 + x), scores=drawn(row, lambda x: x - 0.5))
        for row in random_rows(8, longest=8)
    ]
    return with_reference(language_model(), found)


def moved():
    """A policy that has left its reference, so that divergences have gradients."""
    return language_model(tiny_llama(seed=3))


def trainer_of(folder, objective, rows, *, model=None, reference=None, **settings):
    if reference is None and model is None:
        reference = language_model()
    common = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 0.01,
        "save_total_limit": None,
    }
    made = arguments(folder, **{**common, **settings})
    return TokenTrainer(model or moved(), objective, made, rows, reference=reference)


def trained(folder, objective, rows, *, resume=None, **settings):
    trainer = trainer_of(folder, objective, rows, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def made(case):
    return build("objective", *case, OBJECTIVES)


def test_a_step_is_the_same_however_it_is_cut(tmp_path, rows):
    begun = weights_of(tiny_llama(seed=3))
    for case in LEARNS:
        whole, cut = (
            weights_of(trained(tmp_path, made(case), rows, max_steps=1, **how).model)
            for how in (
                {"per_device_train_batch_size": 8},
                {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "tokens_per_forward": 1},
            )
        )
        with naming(case):
            assert largest_difference({key: whole[key] for key in begun}, begun) > 1e-6
            assert largest_difference(whole, cut) < 2e-6


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, rows):
    saves = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    for number, case in enumerate(LEARNS):
        folder = tmp_path / str(number)
        resume = {"resume": str(folder / "a" / "checkpoint-1")}
        whole, again = (
            weights_of(trained(folder / part, made(case), rows, **saves, **more).model)
            for part, more in (("a", {}), ("b", resume))
        )
        with naming(case):
            assert whole.keys() == again.keys()
            assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize("objective", [TBPO(**HEAD), SparsePO(masks="independent")], ids=["tbpo", "sparsepo"])
def test_modules_of_an_objective_learn_and_lie_beside_the_model(tmp_path, rows, objective):
    trainer = trainer_of(tmp_path, objective, rows, save_strategy="steps", save_steps=1)
    before = {name: value.clone() for name, value in trainer.objective_modules._modules.state_dict().items()}
    trainer.train()
    after = trainer.objective_modules._modules.state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    checkpoint = tmp_path / "checkpoint-2"
    saved = load_file(checkpoint / AUXILIARY)
    assert saved.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in saved.items())
    trainer.token_model.save(tmp_path / "model")
    for folder in (checkpoint, tmp_path / "model"):
        names = load_file(folder / "model.safetensors").keys()
        assert not [name for name in names if "auxiliary" in name]
        plain = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert all(torch.equal(value, trainer.model.state_dict()[name]) for name, value in plain.items())


def test_a_head_has_a_learning_rate_and_a_weight_decay_of_its_own(tmp_path, rows):
    """A step of plain gradient descent, by the schedule's share of its own rate."""
    objective = TBPO(**HEAD, weight_decay=0.1, clamp=None)
    trainer = trainer_of(tmp_path, objective, rows, max_steps=1, per_device_train_batch_size=8)
    head = objective._head
    before = head[2].bias.detach().clone(), head[0].weight.detach().clone()
    losses = trainer.losses(trainer.model, trainer.token_model.collate(rows))
    slopes = torch.autograd.grad(losses.loss.mean(), [head[2].bias, head[0].weight])
    trainer.train()
    torch.testing.assert_close(
        head[0].weight, before[1] - 0.5 * (slopes[1] + 0.1 * before[1]), rtol=0, atol=1e-6
    )
    groups = trainer.optimizer.param_groups
    assert [group["initial_lr"] for group in groups] == [0.01, 0.01, 0.5]
    policy = sum(len(group["params"]) for group in groups[:2])
    assert policy == len([*tiny_llama().parameters()])


def test_without_a_rate_of_its_own_a_module_learns_at_the_policys(tmp_path, rows):
    trainer = trained(tmp_path, SparsePO(weight_decay=0.2), rows, max_steps=1)
    last = trainer.optimizer.param_groups[-1]
    assert (last["initial_lr"], last["weight_decay"]) == (0.01, 0.2)


def test_the_first_weights_of_a_module_come_from_the_seed(tmp_path, rows):
    def first(seed):
        torch.manual_seed(torch.randint(100, ()).item())
        return trainer_of(tmp_path, TBPO(**HEAD), rows, seed=seed).objective_modules._modules.state_dict()

    one, same, other = first(1), first(1), first(2)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_best_modules_are_put_back_with_the_best_model(tmp_path, rows):
    settings = arguments(
        tmp_path, learning_rate=0.3, max_steps=3, per_device_train_batch_size=8, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=True, save_total_limit=None,
    )  # fmt: skip
    given = {"eval_rows": rows, "reference": language_model()}
    trainer = TokenTrainer(moved(), TBPO(**HEAD), settings, rows, **given)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")  # by the largest loss, so that it is not the last
    kept = load_file(f"{best}/{AUXILIARY}")
    mine = trainer.objective_modules._modules.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in kept.items())
    last = load_file(f"{tmp_path}/checkpoint-3/{AUXILIARY}")
    assert not all(torch.equal(value, mine[name]) for name, value in last.items())


def with_adapter():
    torch.manual_seed(1)
    adapted = moved().with_adapter({"r": 4, "target_modules": ["q_proj", "v_proj"]})
    move_trained(adapted.model)
    return adapted


def test_an_adapter_trains_beside_a_module_and_both_resume(tmp_path, rows):
    def run(folder, resume=None):
        objective = made(("sum", NEEDED["sum"]))
        saves = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
        trainer = trainer_of(tmp_path / folder, objective, rows, model=with_adapter(), **saves)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("a")
    again = run("b", resume=str(tmp_path / "a" / "checkpoint-1"))
    first, second = weights_of(whole.model), weights_of(again.model)
    assert all(torch.equal(first[key], second[key]) for key in first)
    saved = load_file(tmp_path / "a" / "checkpoint-2" / "adapter_model.safetensors")
    assert not [name for name in saved if "auxiliary" in name]
    base = weights_of(tiny_llama(seed=3))
    frozen = {
        key.removeprefix("base_model.model."): value for key, value in first.items() if "lora" not in key
    }
    shared = [key for key in base if key in frozen]
    assert shared
    assert all(torch.equal(base[key], frozen[key]) for key in shared)


def test_the_reference_stays_as_it_is(tmp_path, rows):
    reference = language_model()
    reference.model.train()
    trained(tmp_path, TDPO(), rows, reference=reference)
    begun = tiny_llama().state_dict()
    assert all(torch.equal(value, begun[name]) for name, value in reference.model.state_dict().items())
    assert not reference.model.training
    assert not any(weight.requires_grad for weight in reference.model.parameters())


def test_an_objective_that_needs_the_reference_model_says_so(tmp_path, rows):
    with pytest.raises(UserError, match=r"^TDPO ") as caught:
        TokenTrainer(language_model(), TDPO(), arguments(tmp_path), rows)
    assert caught.value.code == "missing-reference-model"
    TokenTrainer(language_model(), DPO(), arguments(tmp_path), rows)


def test_a_second_training_of_a_model_begins_with_modules_of_its_own(tmp_path, rows):
    """What the first left is gone; without a module nothing is saved."""
    model = moved()
    trainer_of(tmp_path, TBPO(**HEAD), rows, model=model, reference=language_model())
    trainer = trainer_of(tmp_path, DPO(), rows, model=model, save_strategy="steps", save_steps=1)
    trainer.train()
    assert not (tmp_path / "checkpoint-1" / AUXILIARY).exists()
    assert not [name for name, _ in model.model.named_parameters() if "auxiliary" in name]


def test_a_folder_with_a_module_loads_as_any_other(tmp_path, rows):
    trainer = trained(tmp_path / "c", SparsePO(), rows, max_steps=1)
    trainer.token_model.save(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), device="cpu")
    mine = {name: value for name, value in weights_of(trainer.model).items() if "auxiliary" not in name}
    assert largest_difference(mine, weights_of(loaded.model)) == 0.0


def test_the_reference_of_a_policy_with_an_adapter_is_the_policy_without_it():
    adapted = with_adapter()
    found = frozen_reference(TDPO(), adapted)
    assert found is not None
    assert (found.model, found.without_adapter) == (adapted.model, True)
    assert frozen_reference(DPO(), adapted) is None
    with pytest.raises(UserError) as error:
        frozen_reference(TDPO(), moved())
    assert error.value.code == "missing-reference-model"
