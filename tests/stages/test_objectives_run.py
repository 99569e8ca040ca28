"""Recipes whose objective needs more than log-probabilities: a reference beside the policy, or its own module."""

import pytest
import torch
from safetensors.torch import load_file

import tokenward
from tests.stages.runs import lines, plugin
from tokenward.errors import UserError
from tokenward.evaluation.replies import divergence, reply_rows
from tokenward.models.loading import load_model
from tokenward.stages import policy as policy_stage
from tokenward.stages import training as training_stage
from tokenward.stages.evaluation import measures_of, prompts_to_answer
from tokenward.stages.run import Run

RANDOM = "scores.scorer={name: random}"
LORA = "model.adapter={r: 2, target_modules: [q_proj, v_proj]}"
TDPO = "policy.objective={name: tdpo}"
HEAD = "policy.objective={name: tbpo, baseline: head, hidden: 8}"


def policy(recipe, *changes, run="quickstart"):
    return tokenward.run(recipe, [f"run=runs/{run}", RANDOM, *changes], last="policy", quiet=True).path(
        "policy"
    )


def losses(folder) -> list[dict]:
    return lines(folder / "history.jsonl")


@pytest.mark.parametrize("adapter", [None, LORA])
def test_objective_with_a_divergence_starts_at_the_reference(copied_run, adapter):
    folder = policy(copied_run, TDPO, *([adapter] if adapter else []))
    history = losses(folder)
    # The first step begins at the reference.
    assert history[0]["kl/chosen"] == pytest.approx(0.0, abs=1e-4)
    assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert not (folder / "auxiliary.safetensors").exists()


def test_module_of_an_objective_is_saved_beside_the_model(copied_run):
    folder = policy(copied_run, HEAD)
    assert load_file(folder / "auxiliary.safetensors")["0.0.weight"].shape == (8, 32)
    assert not [name for name in load_file(folder / "model" / "model.safetensors") if "auxiliary" in name]


def test_every_stage_that_trains_on_pairs_has_a_reference(copied_run):
    changes = [
        "oracle.objective={name: tdpo}",
        "eval_reward={objective: {name: tdpo}, training: {max_steps: 2}}",
    ]
    run = tokenward.run(copied_run, changes, last="eval_reward", quiet=True)
    for stage in ("oracle", "eval_reward"):
        assert losses(run.path(stage))[0]["kl/rejected"] == pytest.approx(0.0, abs=1e-4)


def test_sum_logs_each_term_and_terms_with_a_selection_are_evaluated(copied_run):
    treg = "{name: treg, selection: {name: transform, signed: true, steps: [{sigmoid: {shift: -0.5}}]}}"
    terms = f"[{{name: dpo}}, {{name: token_kl, factor: 0.1}}, {treg}]"
    training = "policy.training={max_steps: 1, eval_strategy: steps, eval_steps: 1}"
    changes = [f"policy.objective={{name: sum, terms: {terms}}}", "policy.selection={name: all}", training]
    found = losses(policy(copied_run, *changes))
    first = found[0]
    assert first["loss/dpo"] == pytest.approx(0.6931, abs=1e-3)
    assert first["loss/token_kl"] == pytest.approx(0.0, abs=1e-4)
    assert torch.isfinite(torch.tensor(first["loss"]))
    # Eval pairs have the scores that the term reads.
    (evaluated,) = (entry for entry in found if "eval_loss" in entry)
    assert evaluated["eval_loss/treg"] != 0


def test_reference_without_packing_gets_no_packed_rows(copied_run, monkeypatch):
    """The probe decides for each model by itself, and rounding can decide otherwise for two of one kind."""
    plain = losses(policy(copied_run, TDPO, "model.packing=none", run="plain"))
    original = training_stage.fit_model

    def unpacked(*given, freeze, **settings):
        return original(*given, freeze=lambda model: load_model(model.name, packing="none"), **settings)

    monkeypatch.setattr(training_stage, "fit_model", unpacked)
    mixed_rows = losses(policy(copied_run, TDPO, "model.packing=shared_prompts", run="mixed"))
    for one, other in zip(plain, mixed_rows, strict=True):
        for key in ("loss", "kl/chosen", "kl/rejected"):
            assert one.get(key) == pytest.approx(other.get(key), abs=1e-4)


def test_divergence_does_not_depend_on_the_layout_of_rows(copied_run):
    run = tokenward.open_run(copied_run, quiet=True)
    apart = Run(
        recipe=run.recipe.model_copy(
            update={"model": run.recipe.model.model_copy(update={"packing": "none"})}
        )
    )
    name = str(run.path("policy") / "model")
    policy_model, start = run.load(name), run.load(run.policy_start)
    template = start.template("chat")
    prompts = prompts_to_answer(run, template)
    rows = reply_rows(prompts, measures_of(run).replies(policy_model, template, prompts, ""))
    assert (policy_model.layout, apart.load(name).layout) == ("shared", "separate")
    plain = divergence(apart.load(name), apart.load(run.policy_start), rows)
    for mixed in (
        divergence(policy_model, apart.load(run.policy_start), rows),
        divergence(apart.load(name), start, rows),
    ):
        torch.testing.assert_close(torch.cat(mixed), torch.cat(plain), rtol=0, atol=1e-5)
    assert float(torch.cat(plain).sum()) > 0


def test_custom_objective_may_need_a_divergence_and_must_have_a_gradient(copied_run):
    name = plugin(
        "import torch\nfrom tokenward.objectives import Losses\n"
        "class Still:\n"
        "    def __call__(self, logp, batch):\n"
        "        return Losses(torch.zeros(batch.comparisons), {})\n"
    )
    with pytest.raises(UserError, match="gradient"):
        policy(copied_run, f"policy.objective={{name: '{name}:Still'}}")
    name = plugin(
        "from tokenward.objectives import Losses, Needs\n"
        "from tokenward.ops.ragged import segment_sum\n"
        "class Stay:\n"
        "    needs = Needs(kl='reverse')\n"
        "    def __call__(self, logp, batch):\n"
        "        owner = batch.comparison[batch.response]\n"
        "        return Losses(segment_sum(batch.statistics['kl'], owner, batch.comparisons), {})\n"
    )
    folder = policy(copied_run, f'policy.objective={{name: "{name}:Stay"}}', "policy.selection={name: all}")
    assert [entry["loss"] for entry in losses(folder) if "loss" in entry] == pytest.approx([0.0], abs=1e-3)


def test_selection_of_a_term_draws_with_the_seed_of_the_recipe(copied_run, monkeypatch):
    """As the policy's own selection; a seed of the sum or of the selection takes precedence."""
    handed = []

    def fit(run, stage, model, objective, *others, **more):
        handed.append(objective.parts[0].selector.seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(policy_stage, "fit_stage", fit)
    random = "{name: top_fraction, ties: random}"
    for seed, own in ((3, ""), (4, ""), (3, ", seed: 9")):
        objective = f"policy.objective={{name: sum, terms: [{{name: sepo, selection: {random}}}]{own}}}"
        with pytest.raises(KeyboardInterrupt):
            policy(copied_run, objective, f"seed={seed}", run=f"seed{seed}")
    assert handed == [3, 4, 9]
