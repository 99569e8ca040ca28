"""Every objective of the registry, and batches with whatever any of them needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.tokens.rows import encoded
from tokenward.objectives import OBJECTIVES, Objective, Selected
from tokenward.objectives.base import modules_of
from tokenward.plugins import build
from tokenward.selection import KeepAll
from tokenward.tokens.batches import TokenBatch, collate

WIDTH, LAYERS = 6, 2

NEEDED: dict[str, dict[str, Any]] = {
    "sum": {
        "terms": [
            {"name": "dpo"},
            {"name": "token_kl", "factor": 0.2},
            {"name": "tbpo", "factor": 0.3, "baseline": "head"},
            {"name": "treg", "factor": 0.5, "selection": {"name": "threshold", "above": 0.0, "below": 0.0}},
        ]
    }
}
"""Settings that an objective cannot be built without."""

MORE: list[tuple[str, dict[str, Any]]] = [
    ("dpo", {"loss": "ipo"}),
    ("pairwise", {"link": "hinge", "reference": False, "aggregate": "mean"}),
    ("pairwise", {"link": "robust", "label_smoothing": 0.2, "margin": 0.3}),
    ("pairwise", {"link": "odds", "reference": False, "aggregate": "mean"}),
    ("pairwise", {"link": "ipo", "aggregate": "mean"}),
    ("pairwise", {"link": "sba", "power": 0.5}),
    ("sepo", {"gamma": 1.5, "margin": 0.3}),
    ("tdpo", {"version": 1}),
    ("tdpo", {"alpha": -0.5, "direction": "reverse", "stop_gradient": "none"}),
    ("tbpo", {"baseline": "sample", "link": "logistic"}),
    ("tbpo", {"baseline": "head", "hidden": 5, "centre": True, "clamp": 10.0}),
    ("tbpo", {"baseline": "head", "profile": "official"}),
    ("tbpo", {"baseline": "none", "link": "lsif"}),
    ("sparsepo", {"masks": "independent", "l1_ratio": 0.1, "l1_kl": 0.2}),
    ("sparsepo", {"masks": "weights"}),
    ("kto", {"anchor": "zero", "undesirable": 0.5}),
    ("weighted_likelihood", {"sides": "both"}),
    ("weighted_likelihood", {"normaliser": "none"}),
    ("weighted_likelihood", {"normaliser": "step_weights", "sides": "both"}),
    ("token_kl", {"direction": "reverse", "sides": "difference", "stop_gradient": "chosen"}),
    ("treg", {"stop_gradient": "none"}),
    ("plackett_luce", {"aggregate": "sum"}),
    ("plackett_luce", {"aggregate": "softmax"}),
    ("plackett_luce", {"aggregate": "softmin"}),
    ("plackett_luce", {"aggregate": "softmax", "length_neutral": True, "temperature": 0.5}),
    ("plackett_luce", {"scale_by_length": False, "list_temperature": 3.0}),
    ("reinforce", {"kl": 0.3, "baseline": "mean"}),
    (
        "reinforce",
        {"return_to_go": True, "discount": 0.9, "baseline": "leave_one_out", "normaliser": "sequence"},
    ),
]
"""Further settings to try."""

CASES = [(name, NEEDED.get(name, {})) for name in OBJECTIVES] + MORE
NAMES = [f"{name}-{settings}" if settings and name != "sum" else name for name, settings in CASES]


def made(name: str, settings: dict[str, Any], width: int = WIDTH, layers: int = LAYERS) -> Objective:
    """An objective whose modules are float64 and come from one seed."""
    objective = build("objective", name, settings, OBJECTIVES)
    return with_modules(objective, width, layers)


def with_modules(objective: Objective, width: int = WIDTH, layers: int = LAYERS) -> Objective:
    torch.manual_seed(11)
    for part in modules_of(objective, width, layers):
        part.module.double()
    return objective


@contextmanager
def naming(name: object) -> Iterator[None]:
    """Add the name to a failure."""
    try:
        yield
    except Exception as error:
        error.add_note(f"for {name}")
        raise


def every_objective(width: int = WIDTH, layers: int = LAYERS) -> Iterator[tuple[str, Objective]]:
    """All of them with their names, and one whose weights are computed in the step."""
    for name, case in zip(NAMES, CASES, strict=True):
        yield name, made(*case, width=width, layers=layers)
    yield "selected", Selected(made("dpo", {}), KeepAll())


class Values(NamedTuple):
    """Values of some tokens besides their weights, in float64."""

    logp: Tensor
    reference: Tensor
    scores: Tensor
    entropy: Tensor
    kl: Tensor
    states: Tensor
    layers: Tensor

    def take(self, index) -> "Values":
        """Some of the tokens, as new leaves."""
        return Values(*(item.detach()[index].clone().requires_grad_() for item in self))

    def broken(self, index, value: float) -> "Values":
        """All values of some tokens replaced by one."""
        return Values(
            *(item.detach().index_fill(0, torch.tensor(index), value).requires_grad_() for item in self)
        )


def values(count: int, seed: int = 0) -> Values:
    """Random values of each kind."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(count, *shape, generator=generator, dtype=torch.float64)

    logp, reference = -draw().abs() - 0.1, -draw().abs() - 0.1
    kinds = (logp, reference, draw(), draw().abs(), draw().abs(), draw(WIDTH), draw(LAYERS, WIDTH))
    return Values(*(item.requires_grad_() for item in kinds))


def batch_of(known: Values, lengths: list[tuple[int, ...]], weights: list[float]) -> TokenBatch:
    """Comparisons given as the lengths of their responses."""
    flat = iter(torch.tensor(weights).split([size for pair in lengths for size in pair]))
    rows = [
        replace(encoded([1], *([2] * size for size in pair)), weights=[next(flat) for _ in pair])
        for pair in lengths
    ]
    return replace(
        collate(rows, layout="shared", pad_id=0).tokens,
        reference_logp=known.reference.detach(),
        scores=known.scores.detach(),
        statistics={
            "entropy": known.entropy,
            "kl": known.kl,
            "states": known.states,
            "reference_layers": known.layers,
        },
    )


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def flat_batch(
    *lengths: tuple[int, ...],
    ranks=None,
    segments=None,
    weights=None,
    reference=None,
    scores=None,
    **statistics,
) -> TokenBatch:
    """Comparisons given as the lengths of their responses, with flat values in float64 and statistics by name."""
    rows = [
        encoded([1], *([2] * size for size in sizes), ranks=rank)
        for sizes, rank in zip(lengths, ranks or [None] * len(lengths), strict=True)
    ]
    if segments is not None:
        flat = iter(torch.tensor(segments).split([size for sizes in lengths for size in sizes]))
        rows = [replace(row, segments=[next(flat) for _ in row.responses]) for row in rows]

    def tensor(value):
        given = isinstance(value, Tensor)
        return value if given or value is None else torch.tensor(value, dtype=torch.float64)

    batch = collate(rows, layout="shared", pad_id=0).tokens
    batch = batch if weights is None else batch.weighted(tensor(weights))
    return replace(
        batch,
        reference_logp=tensor(reference),
        scores=tensor(scores),
        statistics={name: tensor(value) for name, value in statistics.items() if value is not None},
    )
