"""Plans: estimates worked by hand, measurements, and what a plan leaves alone."""

from pathlib import Path

import pytest
import torch

from tests.stages.runs import PROMPTS, online_recipe
from tests.tiny import tiny_llama
from tokenward.models.identity import model_sizes
from tokenward.models.loading import load_model
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
def test_sizes_match_the_loaded_model(tiny_folder: Path, adapter: dict | None) -> None:
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
    folders = {path.name for path in Path("runs/quickstart").iterdir() if path.is_dir()}
    assert folders == {"data", "encoded", "pairs"}
    assert f"lower the memory of {plan.largest}" in capsys.readouterr().out


def test_estimates_follow_the_recipe(tiny_workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller settings are smaller, more tokens with weight need more, and twice the steps take twice the time."""
    monkeypatch.setattr("tokenward.tools.plan_stages.machine_rate", lambda *_: 1e9)

    def planned(*overrides: str):
        plan = plan_recipe(tiny_workplace, ["fixed_prompts=0", *overrides], measure=False, quiet=True)
        assert all(stage.measured is None and stage.peak is None for stage in plan.stages)
        return plan, {stage.stage: stage for stage in plan.stages}

    plan, stages = planned("oracle.training.max_steps=3")
    assert plan.largest == "oracle"
    assert all(held < stages["oracle"].memory for _, held in plan.smaller)
    keys = {name.partition("=")[0] for name, _ in plan.smaller}
    assert {"oracle.training.activation_checkpointing", "model.adapter", "model.dtype"} <= keys
    _, other = planned("policy.selection={name: all}", "oracle.training.max_steps=6")
    assert stages["policy"].memory < other["policy"].memory
    assert other["oracle"].seconds == pytest.approx(2 * stages["oracle"].seconds)


def test_online_plans_say_what_is_not_planned(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = online_recipe(tmp_path, tiny_folder)
    stages = {stage.stage: stage for stage in plan_recipe(recipe, quiet=True).stages}
    assert list(stages) == ["examples", "online", "evaluation"]
    assert stages["online"].measured > 0
    assert "without sampling" in stages["online"].note
    drawn = plan_recipe(recipe, ["online.objective={name: reinforce}"], measure=False, quiet=True)
    assert {stage.stage: stage.memory for stage in drawn.stages}["online"] > 0
    (only,) = plan_recipe(online_recipe(tmp_path, tiny_folder, PROMPTS), quiet=True).stages
    assert only.memory > 0
    assert (only.seconds, only.measured) == (None, None)
    assert "not planned" in only.note


def test_a_plan_of_own_replies_says_what_is_not_planned(tiny_workplace: Path) -> None:
    changes = [
        "scores.scorer={name: reward}",
        "policy.selection={name: all}",
        "policy.objective={name: reinforce}",
    ]
    small, large = (
        {
            stage.stage: stage
            for stage in plan_recipe(
                tiny_workplace, [*changes, f"policy.rollouts={count}"], measure=False, quiet=True
            ).stages
        }
        for count in (2, 16)
    )
    assert "without sampling" in small["policy"].note
    assert large["policy"].memory > small["policy"].memory


def test_readable_numbers() -> None:
    assert [size(count) for count in (None, 12_000, 3_400_000, 1.26e9)] == ["-", "12 kB", "3.4 MB", "1.3 GB"]
    times = [clock(seconds) for seconds in (None, 0.2, 61, 600, 7200)]
    assert times == ["-", "under 1 s", "61 s", "10 min", "2.0 h"]
