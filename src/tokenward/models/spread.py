"""Loading a model for a training that cuts its weights among the processes: one of them reads it.

FSDP2 (by accelerate's ``cpu_ram_efficient_loading``) and ZeRO-3 (always) take the values of the first process, so a copy in the
memory of every other one, and on every device, would only be thrown away. For a model of 70B parameters that copy is 141 GB.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from tokenward.distributed import alone, first_alone
from tokenward.models.attention import PLAIN_NAMES, install_tree_attention
from tokenward.models.head import install_head
from tokenward.models.identity import ModelParts, base_config, parts_of, resolve
from tokenward.models.loading import LanguageModel, load_model, load_tokenizer
from tokenward.models.reward import RewardModel, RewardSettings, new_reward_model, reward_head
from tokenward.models.sharding import leave_unread, loading_whole
from tokenward.ops.logprob import LogitChange
from tokenward.tokens.rows import Layout

M = TypeVar("M", LanguageModel, RewardModel)


class _Read(NamedTuple):
    """What a process must know of a model that another one has read."""

    layout: Layout
    change: LogitChange | None
    dtype: torch.dtype
    attention: str
    generation: GenerationConfig | None
    fingerprint: str


def load_in_first(name: str, *, trust_remote_code: bool = False, **settings: Any) -> LanguageModel:
    """Load a causal language model on the CPU in the first process only; its weights are spread when the training begins.

    Arguments and errors are those of :func:`tokenward.models.loading.load_model`; ``device`` counts only where every process loads
    the model. The other processes reserve memory that they do not touch, and a forward pass there is an error until the weights
    have come. A model with an adapter or a head network is loaded whole in each process. All processes must call this.
    """
    settings["trust_remote_code"] = trust_remote_code
    parts = parts_of(resolve(name))
    if alone() or parts != ModelParts(parts.base):
        return load_model(name, **settings)
    own, known = _first_reads(lambda: load_model(name, **{**settings, "device": "cpu"}))
    return own or _reserved(name, known, trust_remote_code)


def _first_reads(load: Callable[[], M]) -> tuple[M | None, _Read]:
    """What the first process has read, and what the others must know of it; the others get no model."""
    own: list[M] = []

    def read() -> _Read:
        found = load()
        own.append(found)
        inner: Any = found.model.backbone if isinstance(found, RewardModel) else found.model
        head = found.head if isinstance(found, LanguageModel) else None
        return _Read(
            found.layout,
            None if head is None else head.change,
            inner.dtype,
            # Ours is known to transformers only where a model has been loaded.
            PLAIN_NAMES.get(attention := str(inner.config._attn_implementation), attention),
            getattr(inner, "generation_config", None),  # a body has none
            found.fingerprint,
        )

    known = first_alone(read)
    return (own[0] if own else None), known


def _empty(kind: Any, config: PretrainedConfig, known: _Read, trust_remote_code: bool) -> PreTrainedModel:
    """A model with memory for its weights and no values."""
    with loading_whole(), no_init_weights():
        model = kind.from_config(
            config,
            dtype=known.dtype,
            attn_implementation=known.attention,
            trust_remote_code=trust_remote_code,
        ).eval()
    model.tie_weights()
    if known.generation is not None:
        model.generation_config = known.generation
    if known.layout == "shared":
        install_tree_attention(model)
    return model


def _reserved(name: str, known: _Read, trust_remote_code: bool) -> LanguageModel:
    """The model as another process has read it, with memory for its weights and no values."""
    config = base_config(name, trust_remote_code=trust_remote_code)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = _empty(kind, config, known, trust_remote_code)
    head = None if known.change is None else install_head(model, known.change)
    leave_unread(model)
    return LanguageModel(
        model=model,
        tokenizer=load_tokenizer(name, trust_remote_code=trust_remote_code),
        head=head,
        layout=known.layout,
        fingerprint=known.fingerprint,
        name=name,
        start_id=config.decoder_start_token_id if config.is_encoder_decoder else None,
    )


def new_reward_in_first(
    name: str, settings: RewardSettings, *, trust_remote_code: bool = False, **more: Any
) -> RewardModel:
    """A reward model whose body is read on the CPU in the first process only, as :func:`load_in_first` does.

    Arguments and errors are those of :func:`tokenward.models.reward.new_reward_model`. All processes must call this.
    """
    more["trust_remote_code"] = trust_remote_code
    if alone():
        return new_reward_model(name, settings, **more)
    own, known = _first_reads(lambda: new_reward_model(name, settings, **{**more, "device": "cpu"}))
    if own is not None:
        return own
    config = base_config(name, trust_remote_code=trust_remote_code)
    body = _empty(AutoModel, config, known, trust_remote_code)
    module = reward_head(body, settings, seed=more["seed"]).eval()
    leave_unread(module)
    return RewardModel(
        model=module,
        tokenizer=load_tokenizer(name, trust_remote_code=trust_remote_code),
        layout=known.layout,
        fingerprint=known.fingerprint,
        name=name,
        start_id=config.decoder_start_token_id if config.is_encoder_decoder else None,
    )
