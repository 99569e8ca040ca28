"""Law 5 over every objective with two processes: they make the update of one."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.objectives.tools import naming
from tests.training.every_objective import every_objective, train_all
from tests.training.tools import in_two_processes, largest_difference
from tokenward.objectives import OBJECTIVES

pytestmark = pytest.mark.slow

LABELS = [label for label, _ in every_objective()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What one process makes of every objective."""
    return train_all(tmp_path_factory.mktemp("alone"), processes=1)


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict[str, dict[str, Any]]]:
    """The same from each of two processes, which train all objectives in one start."""
    folder: Path = tmp_path_factory.mktemp("together")
    in_two_processes([sys.executable, "-m", "tests.training.every_objective", str(folder)], folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_make_the_update_of_one(alone, together):
    """And the same figures of 11 rows of evaluation, of which the last batch is not full."""
    for label in LABELS:
        one, (first, second) = alone[label], (found[label] for found in together)
        with naming(label):
            assert moved(one, auxiliary=False) > 1e-3
            assert moved(one, auxiliary=True) > 1e-3 or label not in with_modules(alone)
            for two in (first, second):
                assert largest_difference(one["begun"], two["begun"]) == 0
                assert largest_difference(one["ended"], two["ended"]) < 2e-6
            assert len(one["logged"]) == len(first["logged"]) == 3
            for mine, theirs in zip(one["logged"], first["logged"], strict=True):
                assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def moved(found: dict[str, Any], *, auxiliary: bool) -> float:
    """How far the training moved the policy's weights, or those of the objective's modules."""
    ours = [name for name in found["begun"] if name.startswith("tokenward_auxiliary") == auxiliary]
    begun, ended = ({name: found[key][name] for name in ours} for key in ("begun", "ended"))
    return largest_difference(begun, ended) if ours else 0.0


def with_modules(found: dict[str, dict[str, Any]]) -> list[str]:
    """Objectives that have modules of their own."""
    return [
        label
        for label, item in found.items()
        if any(name.startswith("tokenward_auxiliary") for name in item["begun"])
    ]


def test_the_cases_are_what_they_should_be(alone, together):
    """Every name of the registry, modules of an objective, and steps in which one process has more passes."""
    assert {label.split()[0] for label in LABELS} == {*OBJECTIVES, "selected:"}
    assert {"sum", "sparsepo"} <= {*with_modules(alone)}
    passes = [found["dpo"]["passes"] for found in together]
    assert any(first != second for first, second in zip(*passes, strict=True))
