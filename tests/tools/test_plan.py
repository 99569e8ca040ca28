"""Memory and time before a run starts: what is counted, what is measured, and what is left alone."""

from pathlib import Path

import pytest
import torch

from tests.stages.runs import PROMPTS, guided_recipe
from tests.tiny import tiny_llama
from tokenward.models.identity import model_sizes
from tokenward.ops.costs import (
    FLOAT,
    HALF,
    MOMENTS,
    ModelSizes,
    NumberTypes,
    Work,
    forward_operations,
    training_memory,
    training_operations,
)
from tokenward.tools import plan as plan_module
from tokenward.tools.plan import clock, plan_recipe, size

SIZES = ModelSizes(
    weights=100, trained=100, products=70, head=30, layers=2, width=4, attention=4, inner=8, vocabulary=10
)


def test_operations_worked_by_hand() -> None:
    # 3 tokens x 70 weights and 2 tokens x 30 of the head, two operations each; attention 4 x 2 layers x 4 wide x 5 seen.
    assert forward_operations(SIZES, Work(3, 2, 5)) == 2 * (3 * 70 + 2 * 30) + 4 * 2 * 4 * 5
    # Forward, both gradients, the logits again, ten operations of AdamW a weight.
    assert training_operations(SIZES, Work(3, 2, 5)) == 3 * 700 + 2 * 2 * 30 + 10 * 100


def test_memory_worked_by_hand() -> None:
    memory = training_memory(SIZES, Work(3, 2, 5), NumberTypes())
    a_token = 2 * (6 * 4 + 4 * 4 + 4 * 8) * FLOAT
    assert memory == (100 * FLOAT, 100 * FLOAT, MOMENTS * 100 * FLOAT, 3 * a_token, 3 * FLOAT * 2 * 10)
    assert training_memory(SIZES, Work(3, 2, 5), NumberTypes(), checkpointing=True).activations == 3 * (
        2 * 4 * FLOAT + a_token / 2
    )
    adapter = training_memory(SIZES._replace(trained=1), Work(3, 2, 5), NumberTypes())
    assert (adapter.gradients, adapter.optimizer) == (FLOAT, MOMENTS * FLOAT)
    coarse = training_memory(SIZES, Work(3, 2, 5), NumberTypes(FLOAT, HALF))
    assert coarse.weights == 100 * FLOAT + 70 * HALF, "autocast keeps a copy of the weights"


@pytest.mark.parametrize("adapter", [None, {"r": 2, "target_modules": ["q_proj", "v_proj"]}])
def test_sizes_are_those_of_the_loaded_model(tiny_folder: Path, adapter: dict | None) -> None:
    from tokenward.models.loading import load_model

    loaded = load_model(str(tiny_folder))
    model = loaded.model if adapter is None else loaded.with_adapter(adapter).model
    sizes = model_sizes(str(tiny_folder), adapter=adapter)
    assert sizes.weights == sum(weight.numel() for weight in model.parameters())
    assert sizes.trained == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert sizes.products + sizes.head == sum(weight.numel() for weight in tiny_llama().parameters())


def test_a_plan_measures_each_training_and_leaves_the_run_alone(
    tiny_workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    plan = plan_recipe(tiny_workplace, ["eval_reward={fraction: 0.3, training: {max_steps: 2}}"])
    stages = {stage.stage: stage for stage in plan.stages}
    assert list(stages) == ["data", "reference", "oracle", "scores", "policy", "eval_reward", "evaluation"]
    assert stages["oracle"].work == "6 steps of 4"
    for name in ("oracle", "policy", "eval_reward", "reference"):
        found = stages[name]
        assert 0 < found.memory < found.peak, name  # the process holds Python and libraries too
        assert found.seconds > 0, name
        assert found.measured > 0, name
    assert {path.name for path in Path("runs/quickstart").iterdir() if path.is_dir()} == {
        "data",
        "encoded",
        "pairs",
    }
    shown = capsys.readouterr().out
    assert "what would make" in shown
    assert "adapter={r: 16" in shown


def test_smaller_settings_are_smaller_and_longer_rows_are_larger(tiny_workplace: Path) -> None:
    plan = plan_recipe(tiny_workplace, measure=False, quiet=True)
    largest = max(stage.memory for stage in plan.stages if stage.stage in ("oracle", "policy"))
    assert plan.smaller
    assert all(held < largest for _, held in plan.smaller)
    wide = plan_recipe(tiny_workplace, ["policy.selection={name: all}"], measure=False, quiet=True)
    kept = [next(s for s in found.stages if s.stage == "policy") for found in (plan, wide)]
    assert kept[0].memory < kept[1].memory, "logits of fewer tokens"
    assert all(stage.measured is None and stage.peak is None for stage in plan.stages)


def test_a_guided_recipe_says_what_is_not_planned(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = plan_recipe(guided_recipe(tmp_path, tiny_folder))
    stages = {stage.stage: stage for stage in plan.stages}
    assert list(stages) == ["examples", "online", "evaluation"]
    assert stages["online"].measured > 0
    assert "learning the reward come on top" in " ".join(capsys.readouterr().out.split())
    drawn = plan_recipe(
        tmp_path / "guided.yaml", ["online.objective={name: reinforce}"], measure=False, quiet=True
    )
    memory = {stage.stage: stage.memory for stage in drawn.stages}
    assert memory["online"] > 0


def test_a_prompt_task_is_planned_as_far_as_its_weights(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = plan_recipe(guided_recipe(tmp_path, tiny_folder, PROMPTS), quiet=True)
    (only,) = plan.stages
    assert only.memory > 0
    assert (only.seconds, only.measured) == (None, None)
    assert "not planned" in only.note


def test_numbers_for_people() -> None:
    assert [size(count) for count in (None, 12_000, 3_400_000, 1.26e9)] == ["-", "12 kB", "3.4 MB", "1.3 GB"]
    assert [clock(seconds) for seconds in (None, 0.2, 61, 600, 7200)] == [
        "-",
        "under 1 s",
        "61 s",
        "10 min",
        "2.0 h",
    ]


def test_twice_the_steps_take_twice_the_time(tiny_workplace, monkeypatch):
    monkeypatch.setattr("tokenward.tools.plan_stages.machine_rate", lambda *_: 1e9)
    times = []
    for steps in (3, 6):
        settings = [f"oracle.training.max_steps={steps}", "fixed_prompts=0"]
        plan = plan_recipe(tiny_workplace, settings, measure=False, quiet=True)
        times.append(next(stage.seconds for stage in plan.stages if stage.stage == "oracle"))
    assert times[1] == pytest.approx(2 * times[0])


def test_advice_on_an_expert_names_its_table():
    assert plan_module._table_of("auxiliary-good") == "auxiliary_models.good"
    assert plan_module._table_of("oracle") == "oracle"
