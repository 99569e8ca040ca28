"""What a recipe says and a run does not read, because of another setting, is told when it begins."""

import pytest

from tests.stages.runs import EXAMPLES, PROMPTS, guided_recipe, refused
from tokenward.stages.checks import idle_settings
from tokenward.tools.run import open_run


@pytest.mark.parametrize(
    ("changes", "last", "told"),
    [
        ([], "evaluation", []),
        (["scores.scorer={name: random}"], "evaluation", ["the table oracle is not read: the scorer random looks at no number of it"]),
        (["scores.scorer={name: random}"], "oracle", []),
        (["reward.fraction=0.5"], "policy", ["the table reward is not read: the scorer log_ratio looks at no number of it"]),
        (["auxiliary_models.a.training={max_steps: 1}"], "policy", ["the table auxiliary_models.a is not read: the scorer log_ratio looks at no number of it"]),
    ],
)  # fmt: skip
def test_of_a_run_on_comparisons(tiny_workplace, changes, last, told):
    assert idle_settings(open_run(tiny_workplace, changes, quiet=True), last) == told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ([], ["rollouts"]),
        (["online.objective={name: reinforce}", "online.selection={name: all}"], ["selection"]),
        (["online.every=null", "online.until=0.3", "online.evaluation_samples=2"], ["rollouts", "until", "evaluation_samples"]),
        (["online.selection={name: all}"], ["rollouts", "samples", "reward_steps", "reward_evals", "every", "the table reward"]),
    ],
)  # fmt: skip
def test_of_a_guided_run(tmp_path, tiny_folder, monkeypatch, changes, told):
    recipe = guided_recipe(tmp_path, tiny_folder, EXAMPLES)
    monkeypatch.chdir(tmp_path)
    lines = idle_settings(open_run(recipe, changes, quiet=True), "online")
    assert [line.removeprefix("online.").partition(" is not read: ")[0] for line in lines] == told


def test_what_can_never_act_is_refused(tmp_path, tiny_folder, monkeypatch):
    recipe = guided_recipe(tmp_path, tiny_folder, PROMPTS)
    monkeypatch.chdir(tmp_path)
    message = refused(recipe, ["evaluation.temperature=0.5"])
    assert message.startswith(
        "--set evaluation.temperature: evaluation.temperature cannot act in a prompt_task: no replies are drawn"
    )
    message = refused(recipe, ["reward.training.bf16=true"])
    assert "reward.training.bf16 is true, and the policy's is not: the two train in one process" in message
    open_run(recipe, ["reward.training.bf16=true", "online.training.bf16=true"], quiet=True)
