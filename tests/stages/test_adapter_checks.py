"""An adapter that cannot work is refused before the first stage; one that can begins at the reference, to the bit."""

import math
from pathlib import Path

import pytest

import tokenward
from tests.stages.runs import lines, refused
from tokenward.errors import UserError
from tokenward.tools.export import export
from tokenward.tools.run import open_run

LORA = "r: 2, target_modules: [q_proj, v_proj]"


REFUSED = [
    (f"{{{LORA}, init_lora_weights: pissa}}", "init_lora_weights 'pissa', .* Use true, gaussian or mica"),
    (f"{{{LORA}, init_lora_weights: pissa_niter_4}}", "init_lora_weights 'pissa_niter_4'"),
    (f"{{{LORA}, init_lora_weights: loftq}}", "init_lora_weights 'loftq'"),
    (f"{{{LORA}, bias: all}}", "bias cannot be 'all': trained biases stay"),
    (f"{{{LORA}, layer_replication: [[0, 2], [1, 2]]}}", "layer_replication cannot be .* it changes the base"),
    (f"{{{LORA}, task_type: SEQ_CLS}}", "task_type is SEQ_CLS"),
    ("{r: 2, target_modules: [nowhere]}", "peft refuses the adapter .*nowhere"),
    ("{r: 0}", "peft refuses the adapter .*`r` should be a positive integer"),
    ("{rank: 4}", "peft refuses the adapter .*rank"),
    (f"{{{LORA}, trainable_token_indices: {{nowhere: [1]}}}}", "peft refuses the adapter"),
    (f"{{{LORA}, lora_dropout: 0.1}}", r"lora_dropout is 0\.1, and [a-z_.]+\.training\.disable_dropout"),
]  # fmt: skip


@pytest.mark.parametrize("key", ["model.adapter", "oracle.adapter", "auxiliary_models.other.adapter"])
def test_it_is_refused_with_its_line(tiny_workplace, key):
    other = ["scores.scorer={name: log_ratio, numerator: other}"]
    other = ["auxiliary_models.other.training={max_steps: 1}", *other] if "other" in key else []
    for adapter, message in REFUSED:
        with pytest.raises(UserError, match=f"^--set {key}: .*{message}"):
            open_run(tiny_workplace, [f"{key}={adapter}", *other], quiet=True)
    assert not Path("runs").exists()


def test_so_is_that_of_an_online_run(recipe):
    changes = [f"model.adapter={{{LORA}, init_lora_weights: olora}}"]
    assert "init_lora_weights 'olora'" in refused(recipe, changes)
    changes = [f"model.adapter={{{LORA}, lora_dropout: 0.1}}", "online.training.disable_dropout=false"]
    open_run(recipe, changes, quiet=True)


@pytest.mark.parametrize(
    "more",
    ["use_dora: true", "init_lora_weights: mica", "modules_to_save: [embed_tokens, lm_head]", "trainable_token_indices: [5, 7]"],
)  # fmt: skip
def test_it_begins_at_the_reference_and_leaves_as_it_trained(tiny_workplace, more):
    """KTO's divergence is 0 and TDPO's loss ln 2 at the first update; nothing is rounded in between."""
    changes = [f"model.adapter={{{LORA}, {more}}}", "scores.scorer={name: random}"]
    changes += ["policy.training={learning_rate: 0.01, max_steps: 2}"]
    first = []
    for name in ("kto", "tdpo"):
        run = tokenward.run(
            tiny_workplace, [*changes, f"policy.objective={{name: {name}}}"], last="policy", quiet=True
        )
        first.append(lines(run.path("policy") / "history.jsonl")[0])
    assert first[0]["kl"] == 0.0
    assert first[1]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    found = export(str(run.folder), "out")
    assert found.from_training
    assert found.difference < 1e-5
