"""Law 5 over every method: the update is the same however an optimizer step is cut into passes and micro-batches.

Each method's recipe runs up to its policy, and what the policy's stage hands to the training is trained with several
cuts: weights that were stored, that are made in the step, and statistics of the objective.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PrinterCallback

import tokenward
from studies.methods import arm_of
from tests.models.tools import reward_model
from tests.stages.runs import plugin
from tests.tiny import make_workplace
from tests.tokens.rows import encoded
from tests.training.tools import arguments, largest_difference, weights_of
from tokenward.api import training
from tokenward.methods import Method, all_methods
from tokenward.objectives import PlackettLuce
from tokenward.objectives.base import DRAW
from tokenward.stages.lists import carry_out, run_through
from tokenward.training.passes import StepDraw
from tokenward.training.trainer import TokenTrainer

METHODS = all_methods()
TOP = {"top": {"fraction": 0.5, "scope": "batch"}}
MORE: dict[str, list[str]] = {
    "stored scores over the step": ["policy.selection={name: top_fraction, scope: batch}"],
    "a sum's term over the step": [
        "policy.selection={name: all}",
        "policy.objective={name: sum, terms: [{name: dpo}, {name: treg, factor: 5.0, selection: {name: top_fraction, scope: batch, "
        "ties: random}}]}",
    ],
    "standardised over the step": [
        "scores.scorer={name: entropy, of: policy}",
        "policy.selection={name: transform, steps: [{standardise: {scope: batch}}, sigmoid]}",
        "policy.objective={name: simpo}",
    ],
    "compared within the comparison": [
        "scores.scorer={name: combine, parts: [{scorer: {name: rank, of: policy}, steps: [{rank_scale: {scope: comparison}}]}]}",
        "policy.selection={name: transform, steps: []}",
        "policy.objective={name: weighted_likelihood, normaliser: step_weights, sides: both}",
    ],
}
"""Further recipes, with what depends on more than a response."""
QUICK = ("sepo", "tis_dpo", "sparsepo", "tlm")
CASES = [
    name if name in (*QUICK, *MORE) else pytest.param(name, marks=pytest.mark.slow)
    for name in (*METHODS, *MORE)
]
CUTS = [(2, 4, 100), (8, 1, 1)]
"""Pairs of a micro-batch, micro-batches of a step, tokens of a pass."""
WITHIN = 1e-4
"""Of the update. Sums in another order differ by about 1e-6 of it; a token more or less in one pair's weights by 1e-2."""


class Handed(NamedTuple):
    """What a policy's stage hands to the training."""

    model: Any
    objective: Any
    rows: Any
    settings: dict[str, Any]


class _Stop(Exception):
    """The policy's stage has handed over what it would train."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_folder) -> Path:
    """One run folder for all methods, so that they share what they can."""
    return make_workplace(tmp_path_factory.mktemp("law5") / "work", tiny_folder)


@pytest.fixture
def handed(workplace, monkeypatch):
    """``f(changes)``: what the policy's stage of a recipe with these changes trains."""
    monkeypatch.chdir(workplace.parent.parent)

    def of(changes) -> Handed:
        taken: list[Handed] = []

        def fit(model, objective, rows, args, folder, *, prepare, reference, **others):
            taken.append(Handed(model, objective, rows, {"prepare": prepare, "reference": reference}))
            raise _Stop

        quick = [f"{stage}.training.max_steps=2" for stage in ("oracle", "reward")]
        run = tokenward.open_run(workplace, [*changes, *quick], quiet=True)
        run_through(run, "scores")
        monkeypatch.setattr(training, "fit", fit)
        with pytest.raises(_Stop):
            carry_out(run, "policy")
        return taken[0]

    return of


def changes_of(method: Method) -> list[str]:
    """A method as changes of the workplace's recipe; its rounds are as short as they can be."""
    verifier = plugin(
        "def right(prompts, completions):\n    return [len(text) % 2 for text in completions]\n"
    )
    own = {"my_module:is_correct": f"{verifier}:right", "candidates: 2": "candidates: 1, max_new_tokens: 2"}
    body = method.body
    for old, new in own.items():
        body = body.replace(old, new)
    return [item for item in arm_of(replace(method, body=body)).changes if "reward.training" not in item]


def trained(given: Handed, folder: Path, cut: tuple[int, int, int]) -> dict[str, Any]:
    """The weights after a step of eight pairs, the model left as it was."""
    batch, accumulation, tokens = cut
    begun = weights_of(given.model.model)
    table = arguments(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        tokens_per_forward=tokens,
        max_steps=1,
    )
    trainer = TokenTrainer(given.model, given.objective, table, given.rows, **given.settings)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    found = weights_of(given.model.model)
    given.model.model.load_state_dict(begun, strict=False)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_step_of_each_method_is_the_same_however_it_is_cut(name, handed, tmp_path):
    given = handed(changes_of(METHODS[name]) if name in METHODS else MORE[name])
    begun = weights_of(given.model.model)
    whole = trained(given, tmp_path, (8, 1, 4096))
    moved = largest_difference(begun, {key: whole[key] for key in begun})
    assert moved > 1e-6  # a reward of two updates hardly tells tokens apart, and moves tlm_rl little
    for cut in CUTS:
        apart = largest_difference(whole, trained(given, tmp_path, cut))
        assert apart <= WITHIN * moved, f"{cut}: {apart / moved:.1e} of the update"


def test_what_a_ranked_list_draws_is_the_same_however_the_step_is_cut(tmp_path):
    """Lists of four, two of them tied; another draw would be seen at once, and each step has its own."""
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(3, 250, (8, 4, 5), generator=generator).tolist()
    rows = [encoded([1, 2], *row, ranks=(0, 1, 1, 2)) for row in drawn]
    model = reward_model("llama", "shared")
    for settings in (
        {"group_size": 2, "groups": 4},
        {"ties": "random"},
        {"group_size": 3, "groups": 2, "ties": "random"},
    ):
        given = Handed(model, PlackettLuce(**settings), rows, {})
        whole = trained(given, tmp_path, (8, 1, 4096))
        moved = largest_difference(weights_of(model.model), whole)
        for cut in CUTS:
            assert largest_difference(whole, trained(given, tmp_path, cut)) <= WITHIN * moved, (settings, cut)
        again = StepDraw(given.objective)
        first, second = (
            again.begin() or again.add_to(model.collate(rows)).tokens.values[DRAW][0] for _ in range(2)
        )
        assert first != second
