"""Tokenizers that the tests train on the spot, and a tiny model for each: GPT-2's kind, LLaMA's kind, and one that lowers case."""

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny import planted_rows, tiny_llama

TEXTS = [
    *(text for row in planted_rows(40) for text in row["responses"]),
    "There is the good tea on the table, and it was here.",
    "Wir trinken Tee im Café — 日本語 👩‍👩‍👧 und e\u0301.",
]

INST = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] | trim }} </s>"
    "{% else %}<s>[INST] {{ message['content'] }} [/INST]{% endif %}{% endfor %}"
)
"""A chat template with other marks than ChatML, which strips white space and puts a space around the reply."""


@cache
def byte_level(size: int = 420, *, lower: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's, optionally with a normalizer that loses capitals."""
    backend = Tokenizer(models.BPE())
    if lower:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return _made(backend, f"byte_level {size}{' lower' if lower else ''}")


@cache
def byte_fallback(size: int = 90) -> PreTrainedTokenizerFast:
    """BPE over characters with a space mark, a space before the first word, and bytes for what is unknown, as LLaMA's."""
    learned = Tokenizer(models.BPE())
    learned.normalizer = mark = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    plain = [text for text in TEXTS if text.isascii()]
    learned.train_from_iterator(plain * 3, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    found = json.loads(learned.to_str())["model"]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *found["vocab"]]
    merges = [tuple(pair) for pair in found["merges"]]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = mark
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _made(backend, f"byte_fallback {size}")


def _made(backend: Tokenizer, name: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("[INST]"), AddedToken("[/INST]")]})
    tokenizer.chat_template = INST
    tokenizer.name_or_path = name
    return tokenizer


def other_llama(tokenizer: PreTrainedTokenizerFast, *, seed: int = 3, **settings) -> LlamaForCausalLM:
    """The tiny model for another tokenizer."""
    return tiny_llama(seed=seed, vocab_size=len(tokenizer), **settings)


def save_other(folder: Path, tokenizer: PreTrainedTokenizerFast, **settings) -> Path:
    """An ordinary Hugging Face folder of a tiny model with another tokenizer."""
    other_llama(tokenizer, **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
