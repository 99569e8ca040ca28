"""Fields of a training table that cannot work or would be ignored are refused before the first stage, with their line."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tokenward
from tests.stages.runs import lines, refused
from tokenward.config.training import BESIDE, CANNOT_ACT
from tokenward.errors import UserError
from tokenward.tools.run import open_run
from tokenward.training import arguments as workable
from tokenward.training.arguments import training_arguments

WRITTEN = {
    "label_smoothing_factor": "0.5",
    "hub_strategy": "end",
    "include_num_input_tokens_seen": "all",
    "include_for_metrics": "[loss]",
    "ddp_timeout": "3",
    "ddp_backend": "gloo",
    "log_level_replica": "info",
    "neftune_noise_alpha": "5.0",
    "torch_empty_cache_steps": "2",
    "eval_accumulation_steps": "2",
    "length_column_name": "size",
    "deepspeed": "{zero_optimization: {stage: 2}}",
    "fsdp": "full_shard",
    "fsdp_config": "{version: 2}",
    "accelerator_config": "{split_batches: true}",
    "liger_kernel_config": "{rope: true}",
    "hub_token": "abc",
    "hub_model_id": "me/it",
    "hub_revision": "main",
    "ddp_bucket_cap_mb": "25",
    "average_tokens_across_devices": "false",
    "log_on_each_node": "false",
    "eval_do_concat_batches": "false",
    "skip_memory_metrics": "false",
    "eval_steps": "2",
    "eval_delay": "1",
    "per_device_eval_batch_size": "2",
    "metric_for_best_model": "loss",
    "save_steps": "2",
    "run_name": "mine",
    "project": "mine",
    "trackio_space_id": "me/it",
    "trackio_bucket_id": "me/it",
    "trackio_static_space_id": "me/it",
    "gradient_checkpointing_kwargs": "{use_reentrant: false}",
    "activation_checkpointing_kwargs": "{use_reentrant: false}",
    "dataloader_prefetch_factor": "2",
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_in_order": "false",
    "logging_steps": "5, logging_strategy: epoch",
    "warmup_steps": "5, lr_scheduler_type: constant",
}
"""What is written of each field; true where nothing is said."""

NO_TEXT = ("parallelism_config",)
"""Its type has no words in YAML."""


def message_of(recipe: Path, text: str, written: str) -> str:
    """The refusal of a recipe with a training table of its own on a line of its own."""
    text = text.replace("tokens:", f"sft:\n  training: {{{written}}}\ntokens:", 1)
    recipe.write_text(text)
    with pytest.raises(UserError) as caught:
        open_run(recipe, quiet=True)
    start = f"{recipe}:{1 + text.splitlines().index(f'  training: {{{written}}}')}: "
    assert str(caught.value).startswith(start), written
    assert not Path("runs").exists()
    return str(caught.value).removeprefix(start)


def test_a_field_that_nothing_reads_is_refused(tiny_workplace):
    text = tiny_workplace.read_text()
    for field in sorted({*CANNOT_ACT, *BESIDE} - {*NO_TEXT}):
        message = message_of(tiny_workplace, text, f"{field}: {WRITTEN.get(field, 'true')}")
        if field in CANNOT_ACT:
            assert message == f"{field} cannot act in a recipe: {CANNOT_ACT[field]}. Leave it out here."
        else:
            assert message.startswith(f"{field} acts only beside {BESIDE[field][1]}, which is not in")


CANNOT_WORK = [
    ("report_to: wandb", r"the tracker wandb does not work here: WandbCallback requires wandb .* Or use none"),
    ("report_to: wandbb", "transformers has no tracker wandbb. Known are none, azure_ml, "),
    ("optim: adamw_bnb_8bit", "the optimizer adamw_bnb_8bit does not work here: You need to install `bitsandbytes`"),
    ("optim: adamw_torch_4bit", "the optimizer adamw_torch_4bit does not work here: You need to have `torchao"),
    ("optim: adamw_torch_xla", "the optimizer adamw_torch_xla does not work here"),
    ("optim: schedule_free_adamw", "the optimizer schedule_free_adamw does not work here: You need to install `schedulefree`"),
    ("optim: galore_adamw", "galore_adamw needs the package galore_torch, which is not installed"),
    ("optim: apollo_adamw", "apollo_adamw needs the package apollo_torch, which is not installed"),
    ("optim: lomo", "lomo updates weights inside the backward pass"),
    ("optim: galore_adamw_layerwise", "galore_adamw_layerwise updates weights inside the backward pass"),
    ("optim: adamw_torch, optim_args: 'a=1'", "the optimizer adamw_torch does not use optim_args"),
    ("optim_target_modules: all-linear", "the optimizer adamw_torch_fused does not use optim_target_modules"),
    ("optim: sgd, adam_beta1: 0.8", "the optimizer sgd does not use adam_beta1"),
    ("lr_scheduler_type: cosine_with_min_lr", "the schedule cosine_with_min_lr cannot be created: One of min_lr or min_lr_rate"),
    ("lr_scheduler_type: warmup_stable_decay", "the schedule warmup_stable_decay cannot be created: .*num_decay_steps"),
    ("lr_scheduler_kwargs: {zz: 1}", "the schedule linear cannot be created: .*zz"),
    ("lr_scheduler_type: greedy", "lr_scheduler_type greedy requires an eval strategy"),
    ("train_sampling_strategy: group_by_length", "train_sampling_strategy is group_by_length, which is not supported"),
    ("train_sampling_strategy: foo", "train_sampling_strategy is foo, which"),
    ("fp16: true", "fp16 needs a CUDA device, but training runs on cpu. Use bf16"),
    ("tf32: true", "tf32 needs a CUDA device, and model.device is auto here"),
    ("save_strategy: best, eval_strategy: epoch", "save_strategy best needs a metric"),
    ("save_strategy: best, metric_for_best_model: loss", "save_strategy best needs an evaluation"),
    ("use_cpu: true", "tokenward sets 'use_cpu' itself, .* Write model.device: cpu"),
    ("torch_compile: true", "torch_compile needs a C"),
]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these work there")
def test_a_value_that_cannot_work_here_is_refused(tiny_workplace, monkeypatch):
    monkeypatch.setattr(workable.shutil, "which", lambda name: None)  # as if there were no compiler
    text = tiny_workplace.read_text()
    for written, message in CANNOT_WORK:
        found = message_of(tiny_workplace, text, written)
        assert re.match(message, found), (written, found)


def test_what_can_work_passes(tiny_workplace):
    for written in (
        "optim: adafactor",
        "optim: adamw_torch, adam_beta1: 0.8, adam_epsilon: 1.0e-6, weight_decay: 0.1",
        "lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1.0e-7}, warmup_steps: 3",
        "eval_strategy: steps, eval_steps: 2, per_device_eval_batch_size: 2, eval_on_start: true",
        "eval_strategy: steps, save_strategy: steps, eval_steps: 2, save_steps: 2, load_best_model_at_end: true, "
        "metric_for_best_model: loss",
        "dataloader_num_workers: 1, dataloader_prefetch_factor: 2, dataloader_persistent_workers: true",
        "push_to_hub: false, label_smoothing_factor: 0.0, fsdp: null, report_to: none, neftune_noise_alpha: null",
        "train_sampling_strategy: sequential, activation_checkpointing: true, full_determinism: true, bf16: true",
    ):
        open_run(tiny_workplace, [f"sft.training={{{written}}}"], quiet=True)


def test_a_gpu_without_bfloat16_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    table = {"bf16": True}
    arguments = training_arguments(table, folder=tmp_path, seed=0, where="policy.training")
    assert dict(workable.unworkable(arguments, table, "cuda")) == {
        "bf16": "this GPU has no bfloat16 instructions. Use fp16, or leave bf16 out."
    }


def test_evaluation_needs_something_to_look_at(tiny_workplace):
    for stage in ("oracle", "policy"):
        key = f"{stage}.training.eval_strategy"
        message = refused(tiny_workplace, ["data.eval=0", f"{key}=epoch"], last="data")
        assert message.startswith(f"--set {key}: eval_strategy is epoch, and data.eval is 0")


@pytest.mark.parametrize("stage", ["oracle", "policy"])
def test_a_batch_that_is_never_full_is_refused_before_anything_trains(tiny_workplace, stage):
    table = f"{stage}.training={{dataloader_drop_last: true, per_device_train_batch_size: 64}}"
    message = refused(tiny_workplace, [table], last="policy")
    assert re.match(
        r"dataloader_drop_last drops .* \d+ rows do not fill one of 64: nothing would be",
        message,
    )
    assert not Path("runs/quickstart/reference/manifest.json").exists()


def test_of_an_online_run(recipe):
    full = "online.training={dataloader_drop_last: true, per_device_train_batch_size: 64}"
    beside = "warmup_steps acts only beside lr_scheduler_type: constant_with_warmup"
    for change, message in (
        (full, "rows do not fill one of 64"),
        ("online.training.eval_strategy=epoch", "Write online.evaluate_every"),
        ("online.training.warmup_steps=3", beside),
        ("reward.training.warmup_steps=3", beside),
    ):
        assert message in refused(recipe, [change])
    open_run(recipe, ["reward.training.per_device_eval_batch_size=2"], quiet=True)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # peft, of a checkpoint
def test_the_best_of_a_training_with_an_adapter_is_restored(tiny_workplace):
    """By the largest loss, so that it is not the last."""
    best = "eval_strategy: steps, eval_steps: 1, save_strategy: steps, save_steps: 1, load_best_model_at_end: true"
    table = f"{{max_steps: 3, learning_rate: 0.1, warmup_steps: 0, metric_for_best_model: loss, greater_is_better: true, {best}}}"
    changes = ["model.adapter={r: 2, target_modules: [q_proj, embed_tokens]}", f"oracle.training={table}"]
    changes += ["oracle.training.save_total_limit=3"]
    run = tokenward.run(tiny_workplace, changes, last="oracle", quiet=True)
    history = lines(run.path("oracle") / "history.jsonl")
    losses = {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line}
    first = max(losses, key=losses.get)
    saved = load_file(run.path("oracle") / "model" / "adapter_model.safetensors")
    kept = load_file(run.path("oracle") / "checkpoints" / f"checkpoint-{first}" / "adapter_model.safetensors")
    assert saved.keys() <= kept.keys()
    assert all(torch.equal(value, kept[name]) for name, value in saved.items())
    assert len(losses) == 3
