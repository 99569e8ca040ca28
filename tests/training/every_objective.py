"""Trains every objective of the registry in this process, which may be one of several, and keeps what became of it.

    python -m tests.training.every_objective FOLDER

is one process of a training; what launches it says so in the environment. All objectives train in one start: a
process takes longer to begin than they take together.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from tests.objectives.tools import MORE, NEEDED
from tests.tiny import tiny_llama
from tests.training.tools import (
    arguments,
    cheap_collection,
    language_model,
    random_rows,
    weights_of,
    with_reference,
)
from tokenward.objectives import DPO, OBJECTIVES, SFT, Objective, Selected, SimPO
from tokenward.plugins import build
from tokenward.scoring.scorers import Probability
from tokenward.selection import KeepAll, Threshold, TopFraction, Transform
from tokenward.tokens.rows import TokenRow
from tokenward.training.trainer import TokenTrainer

TOGETHER = 8
"""Comparisons of one step, over all processes."""

IN_THE_STEP = {
    "selected: all": lambda: Selected(DPO(), KeepAll()),
    "selected: stored scores": lambda: Selected(DPO(), Threshold(above=0.0, below=0.0)),
    "selected: the policy's own": lambda: Selected(
        SimPO(), Transform(steps=({"threshold": {"at": "mean", "keep": "below"}},)), Probability(of="policy")
    ),
    "selected: over the step": lambda: Selected(
        SFT(normaliser="step_weights"),
        Transform(steps=({"top": {"fraction": 0.5, "scope": "batch"}},)),
        Probability(of="policy"),
    ),
    "selected: stored scores over the step": lambda: Selected(DPO(), TopFraction(scope="batch")),
}
"""Objectives whose weights are made in the step, by what they select with."""


def every_objective() -> Iterator[tuple[str, Objective]]:
    """Each of the registry as it comes, with what it needs, with other settings, and with a selection in the step."""
    for name, settings in [(name, NEEDED.get(name, {})) for name in OBJECTIVES] + MORE:
        label = f"{name} {settings}" if settings and name != "sum" else name
        yield label, build("objective", name, settings, OBJECTIVES)
    for label, made in IN_THE_STEP.items():
        yield label, made()


def rows() -> list[TokenRow]:
    """11 pairs of 2 to 13 tokens a response: in the second step one process has 3 left and the other none."""
    generator = torch.Generator().manual_seed(0)

    def drawn(row, kind):
        return [kind(torch.rand(len(ids), generator=generator)) for ids in row.responses]

    found = [
        replace(
            row, weights=drawn(row, lambda x: (x + 0.3) * (x < 0.8)), scores=drawn(row, lambda x: x - 0.4)
        )
        for row in random_rows(11)
    ]
    return with_reference(language_model(), found)


def train_all(folder: Path, processes: int) -> dict[str, dict[str, Any]]:
    """Two steps of each objective: the weights before and after, what was logged, and the passes of each step."""
    settings = {
        "per_device_train_batch_size": TOGETHER // processes,
        "per_device_eval_batch_size": TOGETHER // processes,
        "tokens_per_forward": 60,
    }
    trained_rows, reference = rows(), language_model()
    with cheap_collection():
        return {
            label: _train(objective, trained_rows, reference, arguments(folder, **settings))
            for label, objective in every_objective()
        }


def _train(objective, trained_rows, reference, settings) -> dict[str, Any]:
    policy = language_model(tiny_llama(seed=3))  # it has left its reference, so divergences have gradients
    trainer = TokenTrainer(
        policy, objective, settings, trained_rows, reference=reference, eval_rows=trained_rows
    )
    trainer.remove_callback(PrinterCallback)
    # At rates of their own some modules would move by less than what processes may differ by.
    trainer.objective_modules._parts = [
        part._replace(learning_rate=2.0) for part in trainer.objective_modules._parts
    ]
    begun, passes = weights_of(policy.model), _noted_passes(trainer)
    trainer.train()
    ended = weights_of(policy.model)
    logged = [_figures(entry) for entry in trainer.state.log_history if "loss" in entry]
    logged.append(_figures(trainer.evaluate()))
    return {"begun": begun, "ended": ended, "logged": logged, "passes": passes}


def _noted_passes(trainer: TokenTrainer) -> list[int]:
    """How many passes of its own this process has in each step; filled while it trains."""
    passes, training_step = [], trainer.training_step

    def noted(model, inputs, count):
        passes.append(len(inputs.passes))
        return training_step(model, inputs, count)

    trainer.training_step = noted
    return passes


def _figures(entry: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if not re.search("runtime|per_second|rate", name)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    made = train_all(target, processes=2)
    rank = torch.distributed.get_rank()
    torch.save(made, target / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
