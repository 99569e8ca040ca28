"""Model folders of strangers, each wrong in one way."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Change = Callable[[Path], Any]


class Trap:
    """Leaves a trace when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("unpickled"),)


def settings(file: str, **new: Any) -> Change:
    """Change keys of a JSON file of the folder."""
    return lambda folder: write(folder / file, json.loads((folder / file).read_bytes()) | new)


def write(path: Path, value: Any) -> None:
    """Write a value as JSON."""
    path.write_text(json.dumps(value))


def text(file: str, content: str | bytes) -> Change:
    """Replace a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / file).write_bytes(data)


def safetensors(header: Any, size: int | None = None, data: bytes = b"") -> Change:
    """Weights with a header that says something else than there is."""
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return text("model.safetensors", struct.pack("<Q", len(body) if size is None else size) + body + data)


def index(names: dict[str, str] | Any) -> Change:
    """Weights in shards that an index names."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "kept.safetensors")
        write(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": names})

    return change


def pickled(value: Any) -> Change:
    """Weights as a pickle."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        if isinstance(value, bytes):
            (folder / "pytorch_model.bin").write_bytes(value)
        else:
            torch.save(value, folder / "pytorch_model.bin")

    return change


def nested(depth: int) -> str:
    """JSON in JSON."""
    return '{"a":' * depth + "1" + "}" * depth


CONFIG, TOKENIZER, OF_TOKENIZER, GENERATION = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)

FOLDERS: dict[str, Change] = {
    "config: no JSON": text(CONFIG, "{"),
    "config: empty": text(CONFIG, ""),
    "config: a list": text(CONFIG, "[]"),
    "config: no UTF-8": text(CONFIG, b"\xff\xfe{}"),
    "config: deep": text(CONFIG, nested(100_000)),
    "config: no type": text(CONFIG, "{}"),
    "config: type of another kind": settings(CONFIG, model_type=7),
    "config: unknown type": settings(CONFIG, model_type="nobody"),
    "config: sizes are text": settings(CONFIG, hidden_size="many"),
    "config: no size": settings(CONFIG, hidden_size=None),
    "config: negative layers": settings(CONFIG, num_hidden_layers=-1),
    "config: layers of a list": settings(CONFIG, num_hidden_layers=[2]),
    "config: a million layers": settings(CONFIG, num_hidden_layers=10**6),
    "config: huge vocabulary": settings(CONFIG, vocab_size=10**12),
    "config: huge width": settings(CONFIG, hidden_size=10**9),
    "config: endless number": text(CONFIG, '{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}"),
    "config: heads of zero": settings(CONFIG, num_attention_heads=0),
    "config: width that is not": settings(CONFIG, intermediate_size=63),
    "config: unknown activation": settings(CONFIG, hidden_act="os.system"),
    "config: unknown data type": settings(CONFIG, dtype="float7"),
    "config: data type of another kind": settings(CONFIG, dtype=["float32"]),
    "config: rope of another kind": settings(CONFIG, rope_parameters="yes"),
    "config: code of its own": settings(CONFIG, model_type="mine", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}),
    "config: quantized by nobody": settings(CONFIG, quantization_config={"quant_method": "nobody"}),
    "config: no positions": settings(CONFIG, max_position_embeddings="long"),
    "tokenizer: no JSON": text(TOKENIZER, "{"),
    "tokenizer: a list": text(TOKENIZER, "[]"),
    "tokenizer: deep": text(TOKENIZER, nested(100_000)),
    "tokenizer: no model": text(TOKENIZER, '{"version": "1.0"}'),
    "tokenizer: unknown class": settings(OF_TOKENIZER, tokenizer_class="Nobody"),
    "tokenizer: class of another kind": settings(OF_TOKENIZER, tokenizer_class=["x"]),
    "tokenizer: settings of a list": text(OF_TOKENIZER, "[]"),
    "tokenizer: tokens of a number": settings(OF_TOKENIZER, eos_token=7),
    "tokenizer: deep settings": text(OF_TOKENIZER, nested(100_000)),
    "template: syntax": text("chat_template.jinja", "{% for"),
    "template: endless": text("chat_template.jinja", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
    "template: other": text("chat_template.jinja", b"\xff\xff"),
    "generation: no JSON": text(GENERATION, "{"),
    "generation: a list": text(GENERATION, "[]"),
    "generation: wrong values": text(GENERATION, '{"temperature": "hot", "top_k": -3, "do_sample": true, "max_new_tokens": "many"}'),
    "weights: empty": text("model.safetensors", b""),
    "weights: header too long": safetensors({}, size=2**60),
    "weights: header is no JSON": safetensors(b"{" * 40),
    "weights: outside of the file": safetensors({"lm_head.weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}),
    "weights: other": safetensors({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, data=bytes(4)),
    "weights: other type": safetensors({"model.norm.weight": {"dtype": "F99", "shape": [32], "data_offsets": [0, 128]}}, data=bytes(128)),
    "index: missing shard": index({"model.norm.weight": "gone.safetensors"}),
    "index: shard elsewhere": index({"model.norm.weight": "../elsewhere.safetensors"}),
    "index: absolute shard": index({"model.norm.weight": "/etc/passwd"}),
    "index: of numbers": index({"model.norm.weight": 7}),
    "index: a list": index([1]),
    "pickle: a trap": pickled(pickle.dumps(Trap())),
    "pickle: a trap in a zip": pickled({"model.norm.weight": Trap()}),
    "pickle: no weights": pickled([1, 2, 3]),
    "pickle: not one": pickled(b"not a pickle"),
}  # fmt: skip

OF_ADAPTER = "adapter_config.json"
ADAPTERS: dict[str, Change] = {
    "no JSON": text(OF_ADAPTER, "{"),
    "a list": text(OF_ADAPTER, "[]"),
    "deep": text(OF_ADAPTER, nested(100_000)),
    "unknown type": settings(OF_ADAPTER, peft_type="NOBODY"),
    "huge rank": settings(OF_ADAPTER, r=10**9),
    "negative rank": settings(OF_ADAPTER, r=-1),
    "rank of text": settings(OF_ADAPTER, r="2"),
    "no base": settings(OF_ADAPTER, base_model_name_or_path=None),
    "base of a number": settings(OF_ADAPTER, base_model_name_or_path=7),
    "base is itself": lambda folder: settings(OF_ADAPTER, base_model_name_or_path=str(folder))(folder),
    "no such layers": settings(OF_ADAPTER, target_modules=["nothing"]),
    "layers by an endless pattern": settings(OF_ADAPTER, target_modules="(a|a|model|layers|.)*" * 3 + "(.*.*)*x$"),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "empty weights": text("adapter_model.safetensors", b""),
    "weights with a long header": text("adapter_model.safetensors", struct.pack("<Q", 2**60)),
    "a trap": lambda folder: ((folder / "adapter_model.safetensors").unlink(), (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))),
    "another rank than its weights": settings(OF_ADAPTER, r=3),
}  # fmt: skip
