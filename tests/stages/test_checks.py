"""Mistakes in a recipe are refused before anything is computed, with the recipe's line, the key and a code."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import tokenward
from tests.stages.runs import REINFORCE, plugin, refusal
from tests.tiny import save_tiny, tiny_t5
from tokenward.config import parse_recipe
from tokenward.config.training import BESIDE, CANNOT_ACT
from tokenward.errors import UserError
from tokenward.methods import method_of
from tokenward.models.default import HUB_NAME
from tokenward.models.identity import layer_count
from tokenward.stages.checks import idle_settings
from tokenward.stages.run import Run
from tokenward.stages.subset import check_subset
from tokenward.tools.run import open_run
from tokenward.training import arguments as workable
from tokenward.training.arguments import training_arguments

LORA = "r: 2, target_modules: [q_proj, v_proj]"
TASK = "prompt_task={train: train.tsv, development: dev.tsv, test: test.tsv, verbalizers: [' a', ' the']}"
UNBOUND = "reward.head={hidden: 4, bound: none}"
TRAINED = "training: {max_steps: 1}"
TREG = "{name: treg, selection: {name: threshold, above: 0.0, below: 0.0}}"
REPLIES = "policy.objective={name: reinforce};policy.selection={name: all}"
AT = "{name: server, address: 'http://127.0.0.1:9/v1'}"
OF_POLICY = "scores.scorer={name: probability, of: policy}"

# Changes of a recipe -> key and code of the error (empty: the code is another package's), and a word of the message.
ONLINE = [
    ("examples=null", "online", "missing-table", "neither"),
    (TASK, "online", "conflicting-tables", "both"),
    (f"examples=null;{TASK}", "online.objective", "wrong-objective", "reinforce"),
    ("examples.references=null", "examples.references", "missing-key", "weighted_likelihood"),
    ("examples.references=null;sft={training: {}}", "sft", "missing-key", "examples.references"),
    ("online.source=null", "online.source", "missing-key", "rouge"),
    ("online.source={name: rogue}", "online.source", "", "rouge"),
    ("online.source={name: length, word: 3}", "online.source", "", "words"),
    ("online.source={name: 'nolab:score'}", "online.source", "", "nolab"),
    ("online.reward=here", "online.reward", "not-a-reward-model", "reward stage"),
    ("online.objective={name: reinforced}", "online.objective", "", "reinforce"),
    ("online.objective={name: sepo}", "online.objective", "wrong-objective", "weighted_likelihood"),
    ("online.objective={name: plackett_luce}", "online.objective", "wrong-objective", "reinforce"),
    ("online.selection={name: sfot}", "online.selection", "", "soft"),
    ("online.sampler={name: vllm}", "online.sampler", "", "vllm"),
    ("reward.head.hiden=3", "reward.head", "", "hidden"),
    ("reward.head.unit=spans", "reward.head.unit", "no-spans", "sentence"),
    ("reward.objective={name: plackett_luce, aggregate: mean}", "reward.objective", "", "mean"),
    ("reward.objective={name: weighted_likelihood}", "reward.objective", "wrong-objective", "plackett_luce"),
    ("reward.objective={name: dpo}", "reward.objective", "wrong-objective", "plackett_luce"),
    ("model.head_mlp={hiden: 3}", "model.head_mlp", "", "hidden"),
    ("model.head_mlp={};model.adapter={r: 2}", "model.head_mlp", "conflicting-keys", "adapter"),
    (f"model.adapter={{{LORA}, init_lora_weights: olora}}", "model.adapter", "", "olora"),
    ("examples.prompt='Say {question'", "examples.prompt", "bad-template", "Say {question"),
    ("examples.prompt='Say {}'", "examples.prompt", "bad-template", "Say {}"),
    ("examples.prompt='Say {question:d}'", "examples.prompt", "bad-template", ":d"),
    ("examples.prompt='Say something.'", "examples.prompt", "missing-placeholder", "something"),
    ("online=null", "examples", "unused-key", "online"),
    ("data.source=builtin", "data", "unused-key", "online"),
    ("evaluation.metrics=[rouge11]", "evaluation.metrics", "", "rouge1"),
    ("reward.head={hidden: 4, low: -1.0}", "online.selection", "negative-rewards", "from -1"),
    (UNBOUND, "online.selection", "negative-rewards", "from -inf"),
    (f"{UNBOUND};online.selection={{name: soft, transform: power, power: 2.0}}", "online.selection", "negative-rewards", "power"),
    ("online.selection={name: top_fraction, scope: dataset}", "online.selection", "unsupported-scope", "batch"),
    ("online.selection={name: transform, steps: [segment_pool]}", "online.selection", "unsupported-unit", "reward.head.unit"),
    ("online.training.max_steps=0", "online.training.max_steps", "", "max_steps is 0"),
    ("online.training={num_train_epochs: -1.5}", "online.training.num_train_epochs", "", "-1.5"),
    ("online.training.eval_strategy=epoch", "online.training.eval_strategy", "unused-key", "online.evaluate_every"),
    ("online.training.warmup_steps=3", "online.training.warmup_steps", "unused-key", "constant_with_warmup"),
    ("reward.training.warmup_steps=3", "reward.training.warmup_steps", "unused-key", "constant_with_warmup"),
    ("reward.training.log_entropy=true", "reward.training.log_entropy", "unused-key", "log_entropy"),
    ("online.patience=2", "online.patience", "unused-key", "online.evaluate_every"),
    ("online.reward_patience=2;online.reward_evals=0", "online.reward_patience", "unused-key", "online.reward_evals"),
    *((f"reward.training.{key}={value}", f"reward.training.{key}", "unused-key", word) for key, value, word in (
        ("max_steps", 5, "online.reward_steps"), ("num_train_epochs", 2, "online.reward_steps"), ("seed", 5, "seed"),
        ("eval_strategy", "epoch", "online.reward_evals"), ("eval_steps", 5, "online.reward_evals"))),
    ("reward.training.bf16=true", "reward.training.bf16", "conflicting-keys", "online.training"),
    ("online.sampling.stop=['']", "online.sampling.stop", "empty-text", "stop"),
    ("online.sampling.temperature=1e-45", "online.sampling.temperature", "", "1e-45"),
    ("evaluation.temperature=1e-40", "evaluation.temperature", "", "1e-40"),
    ("model.device=cuda:0", "model.device", "no-cuda", "cuda:0"),
]  # fmt: skip
PROMPT_TASK = [
    ("prompt_task.verbalizers=[' a']", "prompt_task.verbalizers", "too-few", "2 or more"),
    ("prompt_task.template='{sentence}'", "prompt_task.template", "", "prompt"),
    ("online.objective={name: weighted_likelihood}", "online.objective", "wrong-objective", "reinforce"),
    ("online.source={name: length, words: 3}", "online.source", "unused-key", "prompt_task"),
    ("evaluation.metrics=[vader]", "evaluation.metrics", "unused-key", "accuracy"),
    ("evaluation.temperature=0.5", "evaluation.temperature", "unused-key", "no replies"),
]  # fmt: skip
SOFT = "scores.scorer={name: reward};policy.selection={name: soft}"
COMPARISONS = [
    (f"{SOFT};reward.head={{bound: none}}", "policy.selection", "negative-rewards", "from -inf"),
    (f"{SOFT};reward.head={{low: -0.5}}", "policy.selection", "negative-rewards", "from -0.5"),
    (f"{SOFT};reward.training.max_steps=0", "reward.training.max_steps", "", "max_steps is 0"),
    ("model.head_mlp={hidden: 4}", "model.head_mlp", "unused-key", "online"),
    ("data={source: pairs.jsonl, eval: {limit: 3}}", "data.eval", "unused-key", "split"),
    *((f"data.eval=0;{stage}.training.eval_strategy=epoch", f"{stage}.training.eval_strategy", "no-eval-rows", "data.eval")
      for stage in ("oracle", "policy")),
    # Selections and objectives that do not fit the scorer.
    *((f"{OF_POLICY};policy.objective={{name: sft}};policy.selection={{name: transform, steps: [{step}]}}", "policy.selection", "", word)
      for step, word in (("{min_max: {scope: dataset}}", "dataset"), ("{segment_pool: {segment: word}}", "word"))),
    ("policy.selection={name: transform, steps: [{segment_pool: {segment: word}}, {top: {fraction: 0.5, scope: batch}}]}",
     "policy.selection", "", "word"),
    (f"{OF_POLICY};{REPLIES}", "policy.objective", "wrong-scorer", "policy_logp"),
    (f"scores.scorer={{name: random}};{REPLIES}", "policy.objective", "wrong-scorer", "reads no model"),
    ("policy.objective={name: reinforce}", "policy.selection", "conflicting-settings", "{name: all}"),
    (f"{REPLIES};policy.training.eval_strategy=epoch", "policy.training.eval_strategy", "unused-key", "own replies"),
    (f"{REPLIES};policy.sampling.stop=['']", "policy.sampling.stop", "empty-text", "stop"),
    (f"{REPLIES};policy.sampler={AT}", "policy.sampler", "weights-changed", "reinforce"),
    *((change.replace("OBJECTIVE", objective), key, "needs-scores", who)
      for objective, who in ((f"{{name: sum, terms: [{{name: dpo}}, {TREG}]}}", "treg with its selection"), ("{name: reinforce}", "reinforce"))
      for change, key in (*[(f"{OF_POLICY};policy.objective=OBJECTIVE", "policy.objective")] * (who != "reinforce"), ("oracle.objective=OBJECTIVE", "oracle.objective"),
                          (f"eval_reward={{objective: OBJECTIVE, {TRAINED}}}", "eval_reward.objective"),
                          (f"auxiliary_models={{x: {{{TRAINED}, objective: OBJECTIVE}}}}", "auxiliary_models.x.objective"))),
    # Values that a model does not have.
    *((f"scores.scorer={{name: attention, of: {model}, layer: {layer}}};auxiliary_models={{x: {{{TRAINED}}}}}", "scores.scorer", "no-layer", f"layer {layer} of the {model}")
      for model, layer in (("reference", 2), ("oracle", -3), ("x", 99))),
    # Auxiliary models.
    ("auxiliary_models={oracle: {}}", "auxiliary_models.oracle", "", "oracle"),
    ("auxiliary_models={a_b: {}}", "auxiliary_models.a_b", "", "a_b"),
    ('auxiliary_models={x: {prompt: "better"}}', "auxiliary_models.x.prompt", "", "{prompt}"),
    ("auxiliary_models={x: {training: {learning_rat: 1}}}", "auxiliary_models.x.training.learning_rat", "unknown-key", "learning_rate"),
    ("auxiliary_models={x: {objective: {name: dop}, training: {}}}", "auxiliary_models.x.objective", "", "dpo"),
    ("scores.scorer={name: rank, of: expret}", "scores.scorer", "", "expret"),
    ("scores.scorer={name: attention, of: policy}", "scores.scorer", "", "entropy"),
    ("scores.scorer={name: combine, parts: [{scorer: {name: entropy, of: policy}, steps: [{top: {scope: dataset}}]}]}", "scores.scorer", "", "combine"),
    ("auxiliary_models={a: {swap_labels: true}}", "auxiliary_models.a.training", "", "swap_labels"),
    ('auxiliary_models={a: {prompt: "{prompt}", subset: {count: 1}}}', "auxiliary_models.a.training", "", "subset"),
    ("auxiliary_models={a: {}}", "auxiliary_models.a.training", "", "reference"),
    ("auxiliary_models={a: {model: a}}", "auxiliary_models.a.model", "", "'a'"),
    # Their subsets.
    *((f"auxiliary_models={{x: {{training: {{}}, {keys}}}}};scores.scorer={{name: random}}", f"auxiliary_models.x.subset{key}", code, word)
      for keys, key, code, word in (
        ("subset: {alone: true}", "", "conflicting-keys", "neither"),
        ("subset: {alone: true, count: 2, fraction: 0.1}", "", "conflicting-keys", "both"),
        ("subset: {count: 2, scorer: {name: rank, of: x}, alone: true}", "", "circular-subset", "x itself"),
        ("subset: {count: 2, scorer: {name: rank, of: policy}}", ".scorer", "reads-policy", "policy"),
        ("subset: {count: 2, scorer: {name: rank, of: y}}", ".scorer", "", "'y'"),
        ("subset: {count: 2}", "", "empty-subset", "side chosen"),
        ("fraction: 0.5, subset: {count: 2, side: rejected}", "", "contradicting-subset", "prefer the chosen"),
        ("swap_labels: true, subset: {count: 2}", "", "contradicting-subset", "prefer the rejected"),
        ("fraction: 0.5, subset: {count: 2, alone: true}", "", "unused-key", "fraction"),
        ("swap_labels: true, subset: {count: 2, alone: true}", "", "unused-key", "swap_labels"))),
]  # fmt: skip


def check_each(recipe: Path, cases: list[tuple[str, str, str, str]]) -> None:
    for changes, key, code, word in cases:
        with pytest.raises(UserError) as caught:
            open_run(recipe, changes.split(";"), quiet=True)
        error = caught.value
        assert error.key == key, (changes, error)
        assert code in ("", error.code), (changes, error.code)
        assert word in str(error), (changes, error)
        # The first words are the place: the change, or the line of the key in the file.
        assert str(error).startswith((f"--set {key.split('.')[0]}", f"{recipe}:")), (changes, error)
    assert not Path("runs").exists()


def test_recipe_of_an_online_run(recipe, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_each(recipe, ONLINE)
    for last in ("scores", "oracle"):
        assert refusal(recipe, last=last).code == "unknown-stage"


def test_recipe_of_a_prompt_task(prompts):
    check_each(prompts, PROMPT_TASK)
    open_run(prompts, ["reward.training.bf16=true", "online.training.bf16=true"], quiet=True)


def test_recipe_of_a_run_on_comparisons(tiny_workplace):
    check_each(tiny_workplace, COMPARISONS)
    assert refusal(tiny_workplace, last="online").code == "unknown-stage"


def test_similar_settings_that_work_pass(recipe, tiny_workplace):
    low = "reward.head={hidden: 4, low: -1.0}"
    for changes in (
        [low, "online.selection={name: soft, transform: exp}"],
        [low, REINFORCE],
        [low, "online.selection={name: all}"],
        ["online.training.max_steps=-1", "online.training.num_train_epochs=0.5"],
        ["reward.objective={name: 'tokenward.objectives:PlackettLuce'}"],
        ["online.sampling.temperature=1e-6"],
        ["reward.training.per_device_eval_batch_size=2"],
        [f"model.adapter={{{LORA}, lora_dropout: 0.1}}", "online.training.disable_dropout=false"],
    ):
        open_run(recipe, changes, quiet=True)
    verifier = f'{{name: counterfactual, verifier: "{plugin(LAB)}:right"}}'
    for changes in (
        ["scores.scorer={name: attention, layer: -2}"],
        [f"scores.scorer={verifier}"],
        [f"policy.objective={{name: sum, terms: [{{name: dpo}}, {TREG}]}}"],
        ["scores.scorer={name: random}", "policy.selection={name: transform, steps: [{min_max: {scope: dataset}}]}"],
    ):  # fmt: skip
        open_run(tiny_workplace, changes, quiet=True)


@pytest.mark.parametrize(
    ("written", "wrong"),
    [
        ('prompt: "{question}"', 'prompt: "{question"'),
        ("words: 3}", "words: 3}\n  objective: {name: sepo}"),
        ("name: length", "name: lenght"),
    ],
)
def test_mistake_in_the_file_is_reported_with_its_line(recipe, written, wrong):
    text = recipe.read_text().replace(", prompt:", ",\n  prompt:").replace(written, wrong)
    recipe.write_text(text)
    line = next(n for n, row in enumerate(text.splitlines(), start=1) if wrong.splitlines()[-1] in row)
    assert str(refusal(recipe)).startswith(f"{recipe}:{line}: ")


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


def test_verifier_and_file_of_spans_are_read(tiny_workplace):
    for name in ("nolab:f", "LAB:nothing", "LAB:number", "right", "LAB:Judge", "LAB:needs_answers"):
        verifier = name.replace("LAB", plugin(LAB))
        error = refusal(tiny_workplace, [f'scores.scorer={{name: counterfactual, verifier: "{verifier}"}}'])
        assert error.key == "scores.scorer"
        assert verifier.rpartition(":")[2] in str(error)
    row = {"prompt": "Say 0.", "response": "so", "spans": [[0, 3, 1]]}
    for lines, word in ((None, "spans.jsonl"), (["{"], "spans.jsonl:1"), ([json.dumps(row)], "2 characters")):
        if lines is not None:
            Path("spans.jsonl").write_text("\n".join(lines))
        error = refusal(tiny_workplace, ["scores.scorer={name: external, file: spans.jsonl}"])
        assert error.key == "scores.scorer"
        assert word in str(error)


def test_model_with_an_encoder_gives_log_probabilities_only(tiny_workplace, tmp_path):
    model = f"model.name={save_tiny(tmp_path / 't5', tiny_t5())}"
    assert refusal(tiny_workplace, [model, "scores.scorer={name: entropy}"]).code == "unsupported-model"
    open_run(tiny_workplace, [model], quiet=True)


def test_layers_of_the_default_model_are_known_without_a_download():
    assert layer_count("default") == layer_count(HUB_NAME) == 30


def test_numbers_that_a_method_leaves_open_are_asked_for(tiny_workplace):
    Path("tis.yaml").write_text(method_of("tis_dpo").recipe)
    line = 1 + Path("tis.yaml").read_text().splitlines().index("  selection:")
    message = str(refusal(Path("tis.yaml")))
    assert message.startswith(f"tis.yaml:{line}: ")
    assert "LOW" in message


def test_circular_subsets_are_refused():
    reads = "{{training: {{}}, subset: {{count: 1, alone: true, scorer: {{name: rank, of: {}}}}}}}"
    way = ", ".join(f"{name}: {reads.format(other)}" for name, other in (("a", "b"), ("b", "c"), ("c", "b")))
    checks = check_subset(Run(recipe=parse_recipe("seed: 0", "x", [f"auxiliary_models={{{way}}}"]).recipe))
    checks["auxiliary_models.a.subset"]()  # it reads the circle, but is not part of it
    with pytest.raises(UserError, match="b reads c reads b") as caught:
        checks["auxiliary_models.b.subset"]()
    assert caught.value.code == "circular-subset"


ADAPTERS = [
    (f"{{{LORA}, init_lora_weights: pissa}}", "pissa"),
    (f"{{{LORA}, bias: all}}", "bias"),
    (f"{{{LORA}, layer_replication: [[0, 2], [1, 2]]}}", "layer_replication"),
    (f"{{{LORA}, task_type: SEQ_CLS}}", "task_type"),
    ("{r: 2, target_modules: [nowhere]}", "nowhere"),
    ("{rank: 4}", "rank"),
    (f"{{{LORA}, lora_dropout: 0.1}}", "disable_dropout"),
]


@pytest.mark.parametrize("key", ["model.adapter", "oracle.adapter", "auxiliary_models.other.adapter"])
def test_adapter_that_cannot_work(tiny_workplace, key):
    other = f";auxiliary_models.other.training={{max_steps: 1}}{';scores.scorer={name: rank, of: other}' if 'other' in key else ''}"
    check_each(tiny_workplace, [(f"{key}={adapter}{other}", key, "", word) for adapter, word in ADAPTERS])


WRITTEN = """
label_smoothing_factor: 0.5; hub_strategy: end; include_num_input_tokens_seen: all; include_for_metrics: [loss]
log_level_replica: info; neftune_noise_alpha: 5.0; torch_empty_cache_steps: 2; eval_accumulation_steps: 2
length_column_name: size; fsdp_config: {version: 2}
accelerator_config: {split_batches: true}; liger_kernel_config: {rope: true}; hub_token: abc; hub_model_id: me/it; hub_revision: main
average_tokens_across_devices: false; log_on_each_node: false; eval_do_concat_batches: false
skip_memory_metrics: false; eval_steps: 2; eval_delay: 1; per_device_eval_batch_size: 2; metric_for_best_model: loss; save_steps: 2
run_name: mine; logging_dir: logs; project: mine; trackio_space_id: me/it; trackio_bucket_id: me/it; trackio_static_space_id: me/it
gradient_checkpointing_kwargs: {use_reentrant: false}; activation_checkpointing_kwargs: {use_reentrant: false}
dataloader_prefetch_factor: 2; dataloader_multiprocessing_context: spawn; dataloader_in_order: false
logging_steps: 5, logging_strategy: epoch; warmup_steps: 5, lr_scheduler_type: constant
"""
"""Values of fields for which true is not a valid or not another value than the default."""
VALUES = dict(item.split(": ", 1) for line in WRITTEN.split("\n") for item in line.split("; ") if item)
NOT_IN_YAML = {"parallelism_config"}

UNWORKABLE = [
    ("report_to: wandb", "report_to", "wandb"),
    ("report_to: wandbb", "report_to", "azure_ml"),
    ("optim: adamw_bnb_8bit", "optim", "bitsandbytes"),
    ("optim: adamw_torch_4bit", "optim", "torchao"),
    ("optim: galore_adamw", "optim", "galore_torch"),
    ("optim: lomo", "optim", "lomo"),
    ("optim: adamw_torch, optim_args: 'a=1'", "optim_args", "adamw_torch"),
    ("optim: sgd, adam_beta1: 0.8", "adam_beta1", "sgd"),
    ("lr_scheduler_type: cosine_with_min_lr", "lr_scheduler_type", "min_lr"),
    ("lr_scheduler_kwargs: {zz: 1}", "lr_scheduler_kwargs", "zz"),
    ("lr_scheduler_type: greedy", "", "greedy"),
    ("train_sampling_strategy: group_by_length", "train_sampling_strategy", "sequential"),
    ("fp16: true", "fp16", "CUDA"),
    ("tf32: true", "tf32", "CUDA"),
    ("save_strategy: best, eval_strategy: epoch", "save_strategy", "metric_for_best_model"),
    ("save_strategy: best, metric_for_best_model: loss", "save_strategy", "eval_strategy"),
    ("use_cpu: true", "use_cpu", "model.device"),
    ("torch_compile: true", "torch_compile", "C"),
]


def test_training_fields_without_effect(tiny_workplace):
    fields = sorted({*CANNOT_ACT, *BESIDE} - NOT_IN_YAML)
    reasons = [CANNOT_ACT.get(field) or BESIDE[field][1] for field in fields]
    check_each(
        tiny_workplace,
        [
            (
                f"sft.training={{{field}: {VALUES.get(field, 'true')}}}",
                f"sft.training.{field}",
                "unused-key",
                reason,
            )
            for field, reason in zip(fields, reasons, strict=True)
        ],
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these work there")
def test_training_values_that_cannot_work_here(tiny_workplace, monkeypatch):
    monkeypatch.setattr(workable.shutil, "which", lambda name: None)  # as if there were no compiler
    cases = [
        (f"sft.training={{{text}}}", f"sft.training.{key}".strip("."), "", word)
        for text, key, word in UNWORKABLE
    ]
    check_each(tiny_workplace, cases)


def test_training_values_that_work_pass(tiny_workplace):
    for written in (
        "optim: adafactor",
        "optim: adamw_torch, adam_beta1: 0.8, adam_epsilon: 1.0e-6, weight_decay: 0.1",
        "lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1.0e-7}, warmup_steps: 3",
        "eval_strategy: steps, eval_steps: 2, per_device_eval_batch_size: 2, eval_on_start: true",
        "eval_strategy: steps, save_strategy: steps, eval_steps: 2, save_steps: 2, load_best_model_at_end: true, metric_for_best_model: loss",
        "dataloader_num_workers: 1, dataloader_prefetch_factor: 2, dataloader_persistent_workers: true",
        "push_to_hub: false, label_smoothing_factor: 0.0, fsdp: null, report_to: none, neftune_noise_alpha: null",
        "train_sampling_strategy: sequential, activation_checkpointing: true, full_determinism: true, bf16: true",
    ):  # fmt: skip
        open_run(tiny_workplace, [f"sft.training={{{written}}}"], quiet=True)


def test_gpu_without_bfloat16_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    arguments = training_arguments({"bf16": True}, folder=tmp_path, seed=0, where="policy.training")
    assert [*dict(workable.unworkable(arguments, {"bf16": True}, "cuda"))] == ["bf16"]


@pytest.mark.parametrize("stage", ["oracle", "policy", "online"])
def test_training_that_drops_its_only_batch(request, stage):
    recipe = request.getfixturevalue("recipe" if stage == "online" else "tiny_workplace")
    table = f"{stage}.training={{dataloader_drop_last: true, per_device_train_batch_size: 64}}"
    message = str(refusal(recipe, [table], last="policy"))
    assert "dataloader_drop_last" in message or stage == "online"
    assert "64" in message
    assert not list(Path("runs").glob("*/reference/manifest.json"))


@pytest.mark.parametrize(
    ("changes", "last", "unused"),
    [
        ([], "evaluation", []),
        (["scores.scorer={name: random}"], "evaluation", ["oracle"]),
        (["scores.scorer={name: random}"], "oracle", []),
        (["reward.fraction=0.5"], "policy", ["reward"]),
        (["auxiliary_models.a.training={max_steps: 1}"], "policy", ["auxiliary_models.a"]),
    ],
)
def test_unused_tables_of_a_run_on_comparisons_are_noted(tiny_workplace, changes, last, unused):
    lines = idle_settings(open_run(tiny_workplace, changes, quiet=True), last)
    assert [line.partition(" is not used: ")[0] for line in lines] == unused


@pytest.mark.parametrize(
    ("changes", "unused"),
    [
        ([], ["rollouts"]),
        (["online.objective={name: reinforce}", "online.selection={name: all}"], ["selection"]),
        (["online.every=null", "online.until=0.3", "online.evaluation_samples=2"], ["rollouts", "until", "evaluation_samples"]),
        (["online.selection={name: all}"], ["rollouts", "samples", "reward_steps", "reward_evals", "every", "reward"]),
    ],
)  # fmt: skip
def test_unused_keys_of_an_online_run_are_noted(recipe, changes, unused):
    lines = idle_settings(open_run(recipe, changes, quiet=True), "online")
    assert [line.removeprefix("online.").partition(" is not used: ")[0] for line in lines] == unused


def test_recipe_of_a_later_stage_is_checked_before_the_first(tiny_workplace):
    recipe = yaml.safe_load(tiny_workplace.read_text())
    recipe["policy"]["objective"] = {"name": "speo"}
    tiny_workplace.write_text(yaml.safe_dump(recipe))
    line = 1 + tiny_workplace.read_text().splitlines().index("  objective:")
    with pytest.raises(UserError, match=f"^{tiny_workplace}:{line}: .*'sepo'"):
        tokenward.run(tiny_workplace, quiet=True)
    assert not Path("runs").exists()
