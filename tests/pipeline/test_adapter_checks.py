"""An adapter that cannot work is refused before the first stage; one that can begins at the reference, to the bit."""

import json
import math
from pathlib import Path

import pytest

import tokenward
from tests.pipeline.tools import EXAMPLES, guided_recipe, refused
from tokenward.errors import UserError
from tokenward.tools.export import export
from tokenward.tools.run import open_run

LORA = "r: 2, target_modules: [q_proj, v_proj]"


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (f"{{{LORA}, init_lora_weights: pissa}}", "init_lora_weights is 'pissa', .* Write init_lora_weights: true, gaussian or mica"),
        (f"{{{LORA}, init_lora_weights: pissa_niter_4}}", "init_lora_weights is 'pissa_niter_4'"),
        (f"{{{LORA}, init_lora_weights: loftq}}", "init_lora_weights is 'loftq'"),
        (f"{{{LORA}, bias: all}}", "bias is 'all', which cannot be in a recipe: trained biases stay"),
        (f"{{{LORA}, layer_replication: [[0, 2], [1, 2]]}}", "layer_replication is .* it adds layers to the base"),
        (f"{{{LORA}, task_type: SEQ_CLS}}", "task_type is SEQ_CLS"),
        ("{r: 2, target_modules: [nowhere]}", "peft refuses the adapter .*nowhere"),
        ("{r: 0}", "peft refuses the adapter .*`r` should be a positive integer"),
        ("{rank: 4}", "peft refuses the adapter .*rank"),
        (f"{{{LORA}, trainable_token_indices: {{nowhere: [1]}}}}", "peft refuses the adapter"),
        (f"{{{LORA}, lora_dropout: 0.1}}", r"lora_dropout is 0\.1, and [a-z_.]+\.training\.disable_dropout"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["model.adapter", "oracle.adapter", "auxiliary_models.other.adapter"])
def test_it_is_refused_with_its_line(tiny_workplace, key, adapter, message):
    changes = [f"{key}={adapter}"]
    if key.startswith("auxiliary_models"):
        changes += [
            "auxiliary_models.other.training={max_steps: 1}",
            "scores.scorer={name: log_ratio, numerator: other}",
        ]
    with pytest.raises(UserError, match=f"^--set {key}: .*{message}"):
        open_run(tiny_workplace, changes, quiet=True)
    assert not Path("runs").exists()


def test_so_is_that_of_a_guided_run(tmp_path, tiny_folder, monkeypatch):
    recipe = guided_recipe(tmp_path, tiny_folder, EXAMPLES)
    monkeypatch.chdir(tmp_path)
    assert "init_lora_weights is 'olora'" in refused(
        recipe, [f"model.adapter={{{LORA}, init_lora_weights: olora}}"]
    )
    changes = [f"model.adapter={{{LORA}, lora_dropout: 0.1}}", "online.training.disable_dropout=false"]
    open_run(recipe, changes, quiet=True)


@pytest.mark.parametrize(
    "more",
    ["use_dora: true", "init_lora_weights: mica", "modules_to_save: [embed_tokens, lm_head]", "trainable_token_indices: [5, 7]"],
)  # fmt: skip
def test_it_begins_at_the_reference_and_leaves_as_it_trained(tiny_workplace, more):
    """KTO's divergence is 0 and TDPO's loss ln 2 at the first update; nothing is rounded in between."""
    changes = [f"model.adapter={{{LORA}, {more}}}", "policy.training.learning_rate=0.01"]
    run = tokenward.run(tiny_workplace, [*changes, "policy.objective={name: kto}"], last="policy", quiet=True)
    assert history(run)[0]["kl"] == 0.0
    run = tokenward.run(
        tiny_workplace, [*changes, "policy.objective={name: tdpo}"], last="policy", quiet=True
    )
    assert history(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    found = export(str(run.folder), "out")
    assert found.from_training
    assert found.difference < 1e-5


def history(run) -> list[dict]:
    return [json.loads(line) for line in (run.path("policy") / "history.jsonl").read_text().splitlines()]
