"""Folders of the measured models: the default model, and small ones that the scripts make."""

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from tokenward.models.identity import resolve
from tokenward.models.loading import load_tokenizer


def folder_of(name: str) -> str:
    """Folder of a model, by its name in a recipe."""
    return str(resolve(name))


def cut_down(source: str, target: Path, *, layers: int, vocabulary: int | None = None, seed: int = 0) -> Path:
    """Make a random model with the width of another, fewer layers and, optionally, another vocabulary.

    With another vocabulary it gets a byte tokenizer; larger ids then have no text.
    """
    config = AutoConfig.from_pretrained(folder_of(source))
    config.num_hidden_layers = layers
    if vocabulary is None:
        return _made(config, load_tokenizer(source), target, seed)
    config.vocab_size = vocabulary
    return _made(config, byte_tokenizer(), target, seed)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer with one token per byte and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def tiny(source: str, target: Path, *, width: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """Make a tiny Llama with random weights and another model's tokenizer."""
    tokenizer: Any = load_tokenizer(
        source
    )  # typed Any: its ids are ints here, but not by their declared type
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _made(config, tokenizer, target, seed)


def _made(config: Any, tokenizer: PreTrainedTokenizerBase, target: Path, seed: int) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target
