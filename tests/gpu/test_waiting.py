"""A step that does not log never makes the host wait for the device."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from tests.gpu.meta import META, Stop, Stopping, on_meta
from tests.tiny import tiny_llama
from tests.training import every_objective as every
from tests.training.tools import arguments, cheap_collection, language_model, random_rows
from tokenward.scoring.reads import over_batches
from tokenward.training.passes import Collator
from tokenward.training.trainer import TokenTrainer

WAITING = {
    "tbpo": "matches the tokens of both responses, whose number depends on the weights",
    "selected": "scorers and selectors are called with numbers on the host, and their results are checked",
}
"""Objectives that read numbers in the step, by the first word of their label, and why."""


def error_in_training(objective, rows, table, monkeypatch) -> str:
    """What torch says of the first number that a training on the meta device reads; empty if it reads none."""
    policy, reference = language_model(tiny_llama(seed=3)), language_model()
    with on_meta(monkeypatch, table):
        trainer = TokenTrainer(policy, objective, table, rows, reference=reference, callbacks=[Stopping()])
        # The trainer takes a policy on the meta device for one whose weights are still to come, and leaves the reference.
        reference.model.to(META)
        try:
            trainer.train()
        except Stop:
            assert {weight.device for weight in trainer.model.parameters()} == {META}
            return ""
        except (RuntimeError, NotImplementedError) as error:
            return str(error)
    raise AssertionError("the training was not stopped")


def test_no_objective_makes_the_host_wait_but_those_that_are_known_to(tmp_path, monkeypatch):
    rows, found = every.rows(), {}
    long = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "tokens_per_forward": 40}
    long |= {"optim": "adamw_torch", "max_grad_norm": 1.0}
    with cheap_collection():
        for label, objective in every.every_objective():
            if "{" in label:  # other settings of one that is tried
                continue
            more = long if label in ("dpo", "plackett_luce") else {"per_device_train_batch_size": 2}
            table = arguments(tmp_path, logging_steps=1000, logging_first_step=False, **more)
            found[label] = error_in_training(objective, rows, table, monkeypatch)
    read = ("cannot be called on meta", "Cannot copy out of meta", "torch.nonzero()", "aten::bincount")
    read += ("a blocking copy",)
    waiting = {label for label, error in found.items() if any(part in error for part in read)}
    assert {label for label, error in found.items() if error} == waiting, found
    # The sum of the registry's test has a selection in it.
    assert {label.split()[0].strip(":") for label in waiting} == {*WAITING, "sum"}, found
    assert len(found) - len(waiting) > 12


def tensors_of(item: Any) -> list[torch.Tensor]:
    """Every tensor of a batch, however deep."""
    if isinstance(item, torch.Tensor):
        return [item]
    if isinstance(item, dict):
        return [part for value in item.values() for part in tensors_of(value)]
    if isinstance(item, tuple | list):
        return [part for value in item for part in tensors_of(value)]
    if is_dataclass(item):
        return [part for field in fields(item) for part in tensors_of(getattr(item, field.name))]
    return []


@pytest.mark.parametrize("layout", ["shared", "separate", "encoder_decoder"])
def test_a_loader_pins_every_tensor_of_a_batch_and_none_is_awaited(layout, monkeypatch):
    row = every.rows()[0]
    row = replace(row, values={"oracle_logp": row.scores}, segments=[*map(torch.zeros_like, row.scores)])
    batch = Collator(layout=layout, pad_id=0, start_id=0, tokens_per_forward=60)([row, row, row])
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    found = pin_memory(batch)
    assert len(pinned) == len(tensors_of(batch)) > 10
    assert {id(item) for item in pinned} == {id(item) for item in tensors_of(found)}
    for mine, plain in zip(tensors_of(found), tensors_of(batch), strict=True):
        assert torch.equal(mine, plain)
    moves: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *place, **how: moves.append(how) or tensor)
    found.to("cuda:0")  # as accelerate calls it
    assert len(moves) == len(pinned)
    assert all(how == {"non_blocking": True} for how in moves)


def test_scoring_reads_a_batch_when_the_next_one_is_on_its_way():
    order: list[str] = []

    def compute(batch):
        order.append("computed")
        return torch.arange(len(batch.tokens.ids))[None].float()

    rows, model = random_rows(6), language_model()
    settings = {"precision": "float32", "tokens_per_batch": 20}
    found = over_batches(model, rows, compute, progress=lambda count: order.append("read"), **settings)
    batches = order.count("computed")
    assert batches > 2
    assert order[:3] == ["computed", "computed", "read"]
    assert order[-1] == "read"
    assert [len(values) for values in found] == [2] * 6
    for row, values in zip(rows, found, strict=True):
        assert [value.shape[1] for value in values] == [len(ids) for ids in row.responses]
        joined = torch.cat([value[0] for value in values])
        assert torch.equal(joined, torch.arange(len(joined)) + joined[0])
