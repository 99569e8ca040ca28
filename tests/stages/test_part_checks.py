"""Mistakes that used to show in a late stage are refused before anything is computed, with the recipe's line."""

import json
from pathlib import Path

import pytest
import yaml

import tokenward
from tests.stages.runs import plugin, refused
from tests.tiny import save_tiny, tiny_t5
from tokenward.methods import method_of
from tokenward.models.default import HUB_NAME
from tokenward.models.identity import layer_count

RUN = Path("runs/quickstart")
LAB = """
number = 3

def right(prompts, completions, **columns):
    return [1.0] * len(completions)

def needs_answers(prompts, completions, answers):
    return [1.0] * len(completions)

class Judge:
    def __call__(self, prompts, completions):
        return [1.0] * len(completions)
"""
OF_POLICY = "scores.scorer={name: probability, of: policy}"
TERM = "{name: treg, selection: {name: threshold, above: 0.0, below: 0.0}}"


def refused_at_once(recipe: Path, changes: list[str]) -> str:
    """The message; nothing was computed for it."""
    message = refused(recipe, changes, last="data")
    assert not RUN.exists()
    return message


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        ("nolab:f", "the module 'nolab' cannot be imported"),
        ("LAB:nothing", "has no 'nothing'"),
        ("LAB:number", "is an int, which cannot be called. Name a function."),
        ("right", "a verifier must be a function given as"),
        ("LAB:Judge", "is a class, and is called as f(prompts, completions, **columns)"),
        (
            "LAB:needs_answers",
            "takes 'answers', and is given prompts, completions, completion_ids, references",
        ),
    ],
)
def test_a_verifier_that_cannot_be_called(tiny_workplace, verifier, message):
    name = verifier.replace("LAB", plugin(LAB))
    changes = [f'scores.scorer={{name: counterfactual, verifier: "{name}"}}']
    found = refused_at_once(tiny_workplace, changes)
    assert found.startswith("--set scores.scorer: ")
    assert message in found


def test_a_verifier_that_can_be_called_passes(tiny_workplace):
    changes = [f'scores.scorer={{name: counterfactual, verifier: "{plugin(LAB)}:right"}}']
    run = tokenward.run(tiny_workplace, changes, last="data", quiet=True)
    assert run.done("data").complete


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "spans.jsonl: no such file"),
        ([], "spans.jsonl has no rows"),
        (["{"], "spans.jsonl:1: not JSON"),
        ([{"prompt": "Say 0.", "response": "x"}], "spans.jsonl:1: spans: missing; found only prompt, response"),
        ([{"prompt": "Say 0.", "response": "x", "spans": [[0, "a"]]}], "its spans are not lists of three numbers"),
        ([{"prompt": "Say 0.", "response": 3, "spans": []}], "spans.jsonl:1: response: found the number 3"),
        (
            [{"prompt": "a", "response": "b", "spans": []}, {"prompt": "Say 0.", "response": "so", "spans": [[0, 3, 1]]}],
            "spans.jsonl:2: the span [0, 3, 1.0] lies outside its response of 2 characters",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_file_of_spans_that_cannot_be_read(tiny_workplace, lines, message):
    if lines is not None:
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        Path("spans.jsonl").write_text("".join(f"{line}\n" for line in text))
    recipe = yaml.safe_load(tiny_workplace.read_text())
    recipe["scores"] = {"scorer": {"name": "external", "file": "spans.jsonl"}}
    tiny_workplace.write_text(yaml.safe_dump(recipe))
    found = refused_at_once(tiny_workplace, [])
    line = 1 + tiny_workplace.read_text().splitlines().index("  scorer:")
    assert found.startswith(f"{tiny_workplace}:{line}: ")
    assert message in found


@pytest.mark.parametrize("layer", [2, 99, -3])
def test_a_layer_that_the_model_does_not_have(tiny_workplace, layer):
    attention = f"{{name: attention, of: MODEL, layer: {layer}}}"
    for model, changes in (
        ("reference", []),
        ("oracle", []),
        ("x", ["auxiliary_models={x: {training: {max_steps: 1}}}"]),
    ):
        scorer = f"scores.scorer={attention.replace('MODEL', model)}"
        found = refused_at_once(tiny_workplace, [scorer, *changes])
        assert f"reads layer {layer} of the {model}, and " in found
        assert "has 2 layers. Write a number from 0 to 1, or from -1, the last, to -2." in found


@pytest.mark.parametrize("layer", [1, -2])
def test_a_layer_that_it_has_passes(tiny_workplace, layer):
    changes = [f"scores.scorer={{name: attention, layer: {layer}}}"]
    assert tokenward.run(tiny_workplace, changes, last="data", quiet=True).done("data").complete


def test_the_default_model_is_not_fetched_for_the_number_of_its_layers():
    assert layer_count("default") == layer_count(HUB_NAME) == 30


def test_a_look_into_a_model_with_an_encoder(tiny_workplace, tmp_path):
    folder = save_tiny(tmp_path / "t5", tiny_t5())
    changes = [f"model.name={folder}", "scores.scorer={name: entropy}"]
    assert "has an encoder, of which only log-probabilities are read" in refused_at_once(
        tiny_workplace, changes
    )
    tokenward.run(tiny_workplace, [changes[0]], last="data", quiet=True)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("{min_max: {scope: dataset}}", "this one has scope: dataset"),
        ("{standardise: {scope: dataset}}", "this one has scope: dataset"),
        ("{cluster: {scope: dataset}}", "this one has scope: dataset"),
        ("{segment_pool: {segment: word}}", "does not know which word a token is in"),
        ("{segment_pool: {segment: spans}}", "does not know which span a token is in"),
    ],
)
def test_a_step_that_a_scorer_of_the_policy_cannot_have(tiny_workplace, step, message):
    selection = f"policy.selection={{name: transform, steps: [{step}]}}"
    changes = [OF_POLICY, selection, "policy.objective={name: sft}"]
    found = refused_at_once(tiny_workplace, changes)
    assert found.startswith("--set policy.selection: ")
    assert message in found
    tokenward.run(tiny_workplace, [*changes, "scores.scorer={name: random}"], last="data", quiet=True)


@pytest.mark.parametrize(
    ("objective", "who"),
    [
        (f"{{name: sum, terms: [{{name: dpo}}, {TERM}]}}", "the sum's term treg with its selection"),
        ("{name: sum, terms: [{name: dpo}, {name: reinforce}]}", "the sum's term reinforce"),
        ("{name: reinforce}", "the objective reinforce"),
    ],
)
def test_an_objective_that_reads_scores_where_there_are_none(tiny_workplace, objective, who):
    found = refused_at_once(tiny_workplace, [OF_POLICY, f"policy.objective={objective}"])
    assert found.startswith(
        f"--set policy.objective: {who} reads stored scores, and the scorer reads the policy"
    )
    auxiliary = f"auxiliary_models={{x: {{training: {{max_steps: 1}}, objective: {objective}}}}}"
    for stage, change in (
        ("the oracle", f"oracle.objective={objective}"),
        ("the eval reward model", f"eval_reward={{objective: {objective}, training: {{max_steps: 1}}}}"),
        ("the auxiliary model x", auxiliary),
    ):
        found = refused_at_once(tiny_workplace, [change])
        assert f"{who} reads scores of tokens, and {stage} is trained without any" in found
    tokenward.run(tiny_workplace, [f"policy.objective={objective}"], last="data", quiet=True)


def test_a_term_that_pools_over_words_is_refused(tiny_workplace):
    term = "{name: treg, selection: {name: transform, steps: [{segment_pool: {segment: word}}]}}"
    found = refused_at_once(
        tiny_workplace, [f"policy.objective={{name: sum, terms: [{{name: dpo}}, {term}]}}"]
    )
    assert "does not know which word a token is in" in found


def test_a_term_with_its_selection_is_evaluated_while_it_trains(tiny_workplace):
    """Held-out pairs have the scores that the term reads; it ended the training at its first evaluation."""
    selection = "{name: transform, signed: true, steps: [{sigmoid: {shift: -0.5}}]}"
    changes = [
        f"policy.objective={{name: sum, terms: [{{name: dpo}}, {{name: treg, selection: {selection}}}]}}",
        "scores.scorer={name: random}",
        "policy.training={max_steps: 1, eval_strategy: steps, eval_steps: 1}",
    ]
    run = tokenward.run(tiny_workplace, changes, last="policy", quiet=True)
    history = [json.loads(line) for line in (run.path("policy") / "history.jsonl").read_text().splitlines()]
    (looked,) = (entry for entry in history if "eval_loss" in entry)
    assert looked["eval_loss/treg"] != 0


def test_numbers_that_a_recipe_leaves_open_are_asked_for(tiny_workplace):
    Path("tis.yaml").write_text(method_of("tis_dpo").recipe)
    line = 1 + Path("tis.yaml").read_text().splitlines().index("  selection:")
    assert refused(Path("tis.yaml"), last="data") == (
        f"tis.yaml:{line}: step clamp: low is LOW and high is HIGH, a placeholder. Write a number instead, such "
        "as low: -0.5, high: 1.5."
    )
    one = "policy.selection={name: transform, steps: [{clamp: {low: 0.0, high: HIGH}}]}"
    assert "high is HIGH, a placeholder" in refused(tiny_workplace, [one], last="data")
