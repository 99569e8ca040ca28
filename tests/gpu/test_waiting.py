"""A step that does not log never makes the host wait for the device."""

import pytest
import torch

from tests.gpu.meta import META, Stop, StopAfter, on_meta
from tests.tiny import tiny_llama
from tests.training import every_objective as every
from tests.training.tools import arguments, language_model, random_rows, token_row, with_reference
from tokenward.objectives import SFT
from tokenward.tokens.layouts import tree_of
from tokenward.training.passes import StepBatch
from tokenward.training.trainer import TokenTrainer

WAITING = {
    "tbpo": "matches the tokens of both responses, whose number depends on the weights",
    "selected": "scorers and selectors are called with numbers on the host, and their results are checked",
}
"""Objectives that read numbers in the step, by the first word of their label, and why."""


def test_no_objective_makes_the_host_wait_but_those_that_are_known_to(tmp_path, monkeypatch):
    rows, found = every.rows(), {}
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "tokens_per_forward": 60,
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "logging_steps": 1000,
        "logging_first_step": False,
    }
    for label, objective in every.every_objective():
        table = arguments(tmp_path, **settings)
        with on_meta(monkeypatch, table):
            trainer = TokenTrainer(
                language_model(tiny_llama(seed=3)),
                objective,
                table,
                rows,
                reference=language_model(),
                callbacks=[StopAfter(2)],
            )
            try:
                trainer.train()
            except Stop:
                assert {weight.device for weight in trainer.model.parameters()} == {META}
                found[label] = ""
            except (RuntimeError, NotImplementedError) as error:
                found[label] = str(error)
    read = ("cannot be called on meta", "Cannot copy out of meta", "torch.nonzero()", "aten::bincount")
    waiting = {label for label, error in found.items() if any(part in error for part in read)}
    assert {label for label, error in found.items() if error} == waiting, found
    # The sum of the registry's test has a selection in it.
    assert {label.split()[0].strip(":") for label in waiting} == {*WAITING, "sum"}, found
    assert len(found) - len(waiting) > 30
