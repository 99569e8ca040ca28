"""Settings and arguments of TRL that tokenward does not have under that name, and what to write instead.

The one table of them: errors of recipes and of the library's functions read it, and ``docs/trl.md`` shows it
(``python -m scripts.trl_page``).
"""

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, NamedTuple, TypeVar, cast

from tokenward.errors import UserError


class Ours(NamedTuple):
    """What to write for some settings of TRL.

    Attributes:
        names: Settings of TRL's configurations, or arguments of its trainers, present and former.
        recipe: What to write in a recipe; empty if there is nothing to write.
        script: What to pass in a script; empty if there is nothing to pass.
        note: A remark on that.
        without: Why there is nothing, where there is nothing. Like the note, it begins in lower case and has no full stop.
    """

    names: tuple[str, ...]
    recipe: str = ""
    script: str = ""
    note: str = ""
    without: str = ""

    def advice(self, *, recipe: bool) -> str:
        """One sentence for a recipe or for a script."""
        wanted = self.recipe if recipe else self.script
        if not wanted:
            elsewhere = f" In a recipe: {self.recipe}." if self.recipe else ""
            return f"Leave it out: {self.without}.{elsewhere}"
        remark = f" ({self.note})" if self.note else ""
        return f"{'Write' if recipe else 'Pass'} {wanted}{remark}."


_RATIOS = "reinforce makes one update from each sample, so there is no ratio to an older policy"
_SAMPLER = 'online: {sampler: {name: "module:Name"}}'
_SAMPLING = "a script samples only in tokenward.evaluate(..., sampling=SamplingSettings(...))"
_LOADED = "a model that you loaded with it"

TABLE: tuple[Ours, ...] = (
    # models
    Ours(("ref_model", "force_use_ref_model", "ref_model_init_kwargs"), "", "reference=...", without="the reference is the model before training"),
    Ours(("precompute_ref_log_probs",), without="log-probabilities of the reference are always computed before training and stored"),
    Ours(("precompute_ref_batch_size",), "scores: {tokens_per_batch: ...}", "tokens_per_batch=...", "in tokens, not in rows"),
    Ours(("reference_free",), "policy: {objective: {name: simpo}}", "objective=SimPO()", "objectives without a reference: simpo, sepo, orpo"),
    Ours(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
         without="log-probabilities of the reference are computed once, so it cannot change during training"),
    Ours(("model_init_kwargs",), "model: {dtype: ..., attention: ..., trust_remote_code: ...}", _LOADED),
    Ours(("trust_remote_code",), "model: {trust_remote_code: true}", _LOADED),
    Ours(("quantization_config",), "", _LOADED, without="a recipe loads models in float32 or bfloat16"),
    Ours(("model_init",), "model: {name: ...}", "model=..."),
    Ours(("peft_config", "lora_config"), "model: {adapter: {r: 16, lora_alpha: 32, target_modules: all-linear}}", "peft_config=..."),
    Ours(("model_adapter_name", "ref_adapter_name"), without="the reference of a new adapter is the model without it"),
    Ours(("processing_class", "tokenizer"), "", "processing_class=...",
         without="the tokenizer that was saved with model.name is used; save another one in that folder"),
    Ours(("is_encoder_decoder",), without="it is read from the model's config"),
    Ours(("router_aux_loss_coef",), without="the loss has no term for the router of a mixture of experts"),
    Ours(("cast_lm_head_to_fp32",), without="log-probabilities are always computed in float32"),
    Ours(("use_liger_kernel", "use_liger_loss"), without="tokenward's own head already avoids storing logits"),
    # rows
    Ours(("max_length",), "tokens: {max_prompt_tokens: ..., max_response_tokens: ...}",
         "tokens=TokenSettings(max_prompt_tokens=..., max_response_tokens=...)", "longer rows are dropped, unless too_long is truncate"),
    Ours(("max_prompt_length",), "tokens: {max_prompt_tokens: ...}", "tokens=TokenSettings(max_prompt_tokens=...)"),
    Ours(("max_completion_length", "max_target_length"), "tokens: {max_response_tokens: ...}, and online: {sampling: {max_new_tokens: ...}} for samples",
         "tokens=TokenSettings(max_response_tokens=...)"),
    Ours(("truncation_mode",), "tokens: {too_long: drop}, truncate or error", "tokens=TokenSettings(too_long=...)",
         "truncate cuts the oldest turns of a prompt and the end of a reply"),
    Ours(("dataset_num_proc",), "tokens: {processes: ...}", without="a script encodes in its own process"),
    Ours(("dataset_text_field", "dataset_kwargs", "formatting_func"), "data: {columns: {...}}", without="the format is found by the columns; rename yours to prompt, chosen and rejected"),
    Ours(("chat_template_path",), without="the template that was saved with the tokenizer is used; save another one in that folder"),
    Ours(("chat_template_kwargs",), "tokens: {chat_template_kwargs: {...}}", "tokens=TokenSettings(chat_template_kwargs={...})"),
    Ours(("eos_token", "pad_token", "padding_value", "label_pad_token_id"),
         without="the tokenizer's EOS is used, and the end of a row is known from its length, whatever the pad token"),
    Ours(("padding_free",), "model: {packing: auto}", "packing=\"auto\"", "the default; rows without padding wherever the model supports them"),
    Ours(("packing", "packing_strategy", "eval_packing"), "model: {packing: auto}", "packing=\"auto\"",
         "the prompt is computed once for its responses, if the model supports it"),
    Ours(("pad_to_multiple_of",), "training: {tokens_per_forward: ...}", "args=TokenTrainingArguments(tokens_per_forward=...)",
         "the most tokens of a pass; rows of similar lengths are together"),
    Ours(("completion_only_loss", "assistant_only_loss"), without="only tokens of the assistant's replies train"),
    Ours(("shuffle_dataset",), "training: {train_sampling_strategy: random}, or sequential", "args=TrainingArguments(train_sampling_strategy=...)"),
    Ours(("data_collator",), without="rows are laid out by tokenward, because their layout depends on the model"),
    # losses
    Ours(("beta",), "objective: {name: dpo, beta: ...} in oracle or policy", "objective=DPO(beta=...)",
         "the factor of reinforce's KL term is kl"),
    Ours(("loss_type",), "objective: {name: dpo, loss: sigmoid} or ipo; {name: pairwise, link: hinge} or robust; {name: simpo}, {name: kto} and others",
         "objective=DPO(loss=...), Pairwise(link=...), SimPO(), KTO() or another"),
    Ours(("loss_weights", "rpo_alpha", "cpo_alpha"), "objective: {name: sum, terms: [{name: dpo}, {name: sft, factor: ...}]}", "objective=Sum(...)"),
    Ours(("label_smoothing",), "objective: {name: dpo, label_smoothing: ...}", "objective=DPO(label_smoothing=...)"),
    Ours(("simpo_gamma",), "objective: {name: simpo, gamma: ...}", "objective=SimPO(gamma=...)", "the margin itself"),
    Ours(("desirable_weight",), "objective: {name: kto, desirable: ...}", "objective=KTO(desirable=...)"),
    Ours(("undesirable_weight",), "objective: {name: kto, undesirable: ...}", "objective=KTO(undesirable=...)"),
    Ours(("ld_alpha",), "policy: {selection: {name: transform, steps: [{beyond_shorter: {rate: ...}}]}}", note="tokenward init ld_dpo writes the whole recipe",
         without="only a recipe has it"),
    Ours(("f_divergence_type", "f_alpha_divergence_coef", "reference_free_divergence", "use_weighting", "discopop_tau", "alpha", "use_logits_to_keep"),
         "objective: {name: \"module:Name\"}", "objective=...", "there is no such loss; an objective of your own has fewer than 15 lines"),
    Ours(("center_rewards_coefficient",), "reward: {head: {...}}", "head=RewardSettings(...)", "the head bounds the rewards, so they need no term that centers them"),
    # training
    Ours(("activation_offloading",), "training: {activation_checkpointing: true}", "args=TrainingArguments(activation_checkpointing=True)"),
    Ours(("generate_during_eval", "log_completions", "num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo", "log_multimodal"),
         "fixed_prompts: 8", without="a script calls tokenward.evaluate(..., prompts=8)"),
    Ours(("compute_metrics", "preprocess_logits_for_metrics"), "evaluation: {metrics: [\"module:function\"]}", without="evaluation during training keeps losses, not predictions; tokenward.evaluate takes metrics"),
    Ours(("compute_loss_func",), "objective: {name: \"module:Name\"}", "objective=..."),
    Ours(("optimizers", "optimizer_cls_and_kwargs"), "training: {optim: ..., lr_scheduler_type: ...}", "args=TrainingArguments(optim=..., lr_scheduler_type=...)"),
    # sampled replies
    Ours(("reward_funcs",), "online: {source: {name: \"module:function\"}}", without="only a recipe makes an online run"),
    Ours(("reward_weights", "multi_objective_aggregation"), "online: {source: {name: \"module:function\"}}", without="one function ranks the samples; combine yours in it"),
    Ours(("reward_processing_classes", "reward_model_path", "missing_eos_penalty"), "online: {source: {name: classifier, model: ...}}", without="only a recipe makes an online run"),
    Ours(("num_generations",), "online: {rollouts: ...} for each step, samples: ... to learn the reward", without="only a recipe makes an online run"),
    Ours(("num_generations_eval",), "online: {evaluation_samples: ...}", without="only a recipe makes an online run"),
    Ours(("max_new_tokens",), "online: {sampling: {max_new_tokens: ...}}, or evaluation: {max_new_tokens: ...}", without=_SAMPLING),
    Ours(("temperature", "top_p", "top_k"), "online: {sampling: {temperature: ..., top_p: ..., top_k: ...}}, or the same in evaluation", without=_SAMPLING),
    Ours(("min_p", "repetition_penalty", "generation_kwargs", "cache_implementation"), _SAMPLER, note="a sampler of your own; tokenward's has temperature, top_p and top_k",
         without="only a recipe samples during training"),
    Ours(("rollout_func", "environment_factory", "use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged",
          "max_tool_calling_iterations"), _SAMPLER, note="a sampler of your own", without="only a recipe makes an online run"),
    Ours(("use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex", "vllm_server_base_url", "vllm_server_host",
          "vllm_server_port", "vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size",
          "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max",
          "vllm_importance_sampling_clip_min"), "online: {sampler: {name: vllm, llm: {...}}}, or {name: server, address: ...}; the same in evaluation",
         note="its log-probabilities are never used, so they need no correction", without="only a recipe samples during training; evaluate takes sampler=VllmSampler() or ServerSampler(address=...)"),
    Ours(("tools",), "a column tools in the data", "a column tools in the rows"),
    Ours(("generation_batch_size", "steps_per_generation", "ds3_gather_for_generation"), "online: {sampling: {batch: ...}}", without="each step samples its own replies"),
    Ours(("num_iterations", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos",
          "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg", "off_policy_mask_threshold", "use_bias_correction_kl"), without=_RATIOS),
    Ours(("scale_rewards",), "online: {objective: {name: reinforce, baseline: ...}}", without="only a recipe makes an online run"),
    Ours(("entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
         "online: {objective: {name: reinforce, entropy: ...}}", note="a fixed factor", without="only a recipe makes an online run"),
    Ours(("top_entropy_quantile",), "policy: {selection: {name: top_fraction}} with a scorer of entropy", "selector=TopFraction(...)", "for rows that were written before"),
    Ours(("mask_truncated_completions",), without="a sampled reply trains with the tokens that it has"),
)  # fmt: skip
"""Every setting of TRL's DPO, CPO, ORPO, KTO, GRPO, reward and SFT configurations that tokenward does not have by that name."""

_BY_NAME = {name: ours for ours in TABLE for name in ours.names}


def trl_advice(name: str, *, recipe: bool) -> str:
    """What to write instead of a setting of TRL, as a sentence; empty if it is none of TRL's."""
    ours = _BY_NAME.get(name)
    return "" if ours is None else f"{name} is a setting of TRL. {ours.advice(recipe=recipe)}"


Called = TypeVar("Called", bound=Callable[..., Any])


def answers_trl(target: Called) -> Called:
    """Let a function, or the constructor of a class, answer a keyword of TRL that it does not take."""
    function = cast(Any, target.__init__ if inspect.isclass(target) else target)
    known = inspect.signature(function).parameters

    @wraps(function)
    def answering(*args: Any, **kwargs: Any) -> Any:
        refuse_trl_names(target.__name__, (name for name in kwargs if name not in known))
        return function(*args, **kwargs)

    if not inspect.isclass(target):
        return cast(Called, answering)
    cast(Any, target).__init__ = answering
    return cast(Called, target)


def refuse_trl_names(whose: str, names: Iterable[str]) -> None:
    """Refuse keywords of TRL.

    Raises:
        UserError: names each of them, with what to pass instead.
    """
    found = [advice for name in names if (advice := trl_advice(name, recipe=False))]
    if found:
        raise UserError(f"{whose} was called with TRL's names. {' '.join(found)}", code="trl-name")
