"""Loading a model for a training that cuts its weights among the processes: one of them reads it.

FSDP2 (by accelerate's ``cpu_ram_efficient_loading``) and ZeRO-3 (always) take the values of the first process, so a copy in the
memory of every other one, and on every device, would only be thrown away. For a model of 70B parameters that copy is 141 GB.
"""

from typing import Any, NamedTuple, cast

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from tokenward.distributed import alone, first_alone
from tokenward.models.attention import install_tree_attention
from tokenward.models.head import install_head
from tokenward.models.identity import ModelParts, base_config, parts_of, resolve
from tokenward.models.loading import LanguageModel, load_model, load_tokenizer
from tokenward.models.sharding import leave_unread, loading_whole
from tokenward.ops.logprob import LogitChange
from tokenward.tokens.rows import Layout


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
    own: list[LanguageModel] = []

    def load() -> _Read:
        found = load_model(name, **{**settings, "device": "cpu"})
        own.append(found)
        inner = cast(PreTrainedModel, found.model)
        change = None if found.head is None else found.head.change
        attention = str(inner.config._attn_implementation)
        return _Read(found.layout, change, inner.dtype, attention, inner.generation_config, found.fingerprint)

    known = first_alone(load)
    return own[0] if own else _reserved(name, known, trust_remote_code)


def _reserved(name: str, known: _Read, trust_remote_code: bool) -> LanguageModel:
    """The model as another process has read it, with memory for its weights and no values."""
    config = base_config(name, trust_remote_code=trust_remote_code)
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with loading_whole(), no_init_weights():
        model = kind.from_config(
            config,
            dtype=known.dtype,
            attn_implementation=known.attention,
            trust_remote_code=trust_remote_code,
        ).eval()
    model.tie_weights()
    model.generation_config = known.generation
    if known.layout == "shared":
        install_tree_attention(model)
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
