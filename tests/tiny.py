"""A tiny model with a tokenizer and a chat template, made by the tests themselves."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tokenward.models.attention import install_tree_attention

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the 256 bytes and a few merges, with ChatML marks; pad equals EOS, as in SmolLM2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("Ġ", "a"),
        ("Ġ", "the"),
        ("i", "n"),
        ("o", "o"),
        ("g", "oo"),
        ("goo", "d"),
    ]
    vocabulary = {
        token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _takes_trees(model):
    """The model with the attention that loading gives one whose packed rows are exact."""
    install_tree_attention(model)
    return model


def tiny_llama(*, dtype: torch.dtype = torch.float32, seed: int = 0, **settings) -> LlamaForCausalLM:
    """Two layers of 32 with grouped heads and tied embeddings, about 30,000 parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(tiny_tokenizer()),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            # Large enough that a wrong mask or position shows in the log-probabilities.
            "initializer_range": 0.2,
            **settings,
        }
    )
    return _takes_trees(LlamaForCausalLM(config).to(dtype))


def tiny_gpt2(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> GPT2LMHeadModel:
    """Two layers of 32, absolute positions."""
    torch.manual_seed(seed)
    size = len(tiny_tokenizer())
    config = GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2
    )
    return _takes_trees(GPT2LMHeadModel(config).to(dtype))


def tiny_t5(*, dtype: torch.dtype = torch.float32, seed: int = 0) -> T5ForConditionalGeneration:
    """An encoder and a decoder of two layers of 32 with tied embeddings; the decoder starts with the pad, as T5 does."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        # The weights are this factor times T5's own start, whose embeddings are of size 1.
        initializer_factor=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config).to(dtype)


def move_trained(model, *, by: float = 0.2, seed: int = 1) -> None:
    """Put every weight that trains elsewhere, as a training would: an adapter then says something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator).to(weight), alpha=by)


def save_tiny(folder: Path, model=None) -> Path:
    """An ordinary Hugging Face folder of a tiny model."""
    (model if model is not None else tiny_llama()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


WORDS = ["the", "a", "tea", "cup", "on", "table", "was", "here", "and", "there"]


def planted_rows(count: int, seed: int = 0) -> list[dict]:
    """Comparisons of three replies in which the words good and bad decide, with their spans."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        replies, spans = [], []
        for word, value in (("good", 2.0), ("so", 0.0), ("bad", -2.0)):
            words = rng.choices(WORDS, k=rng.randint(3, 7))
            words.insert(rng.randint(0, len(words)), word)
            text = " ".join(words)
            start = text.split().index(word)
            begin = len(" ".join(text.split()[:start])) + (start > 0)
            replies.append(text)
            spans.append([[begin, begin + len(word), value]] if value else [])
        rows.append(
            {"prompt": f"Say {number}.", "responses": replies, "scores": [1.0, 0.0, -1.0], "spans": spans}
        )
    return rows


TINY_RECIPE = """
model: {{name: {model}}}
data: {{source: pairs.jsonl, eval: 0.3}}
tokens: {{max_prompt_tokens: 128, max_response_tokens: 64}}
oracle:
  training: {{learning_rate: 1.0e-3, per_device_train_batch_size: 4, max_steps: 6}}
policy:
  objective: {{name: sepo, gamma: 2.0}}
  training: {{learning_rate: 1.0e-3, per_device_train_batch_size: 4, max_steps: 4}}
evaluation: {{prompts: 4, max_new_tokens: 6, bootstrap: 50, metrics: [vader]}}
"""


def make_workplace(folder: Path, model: Path, rows: int = 24) -> Path:
    """A folder with data and ``recipes/quickstart.yaml`` for the tiny model; returns the recipe."""
    (folder / "recipes").mkdir(parents=True)
    lines = [json.dumps(row) for row in planted_rows(rows)]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    recipe = folder / "recipes" / "quickstart.yaml"
    recipe.write_text(TINY_RECIPE.format(model=model))
    return recipe
